"""Runs a case three ways: steered, steered by the explicit map, and by the oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import AttnSteerError
from ...methods.act import ACT
from ...methods.headgate import HeadGate
from ...methods.pasta import PASTA
from ...methods.spotlight import SpotLight
from ...methods.zerotuning import ZeroTuning
from ...steering import steer
from ...where import Where
from .calls import Generated, Inputs, both, expected, generate, run, steps, valid
from .case import Case
from .hosts import GENERATE, model_of
from .oracle import ALPHA, SOME, SPANS, THRESHOLD

EXACT = 1e-5


@dataclass(frozen=True)
class Outcome:
    """What came of a case: "exact", "refused", "impossible" (the model itself does not run it) or "wrong".

    `difference` is relative to the largest logit.
    """

    kind: str
    difference: float = 0.0
    message: str = ""


@torch.no_grad()
def check(case: Case) -> Outcome:
    """Run a case. What the library refuses is a result; any other exception is a wrong one, unless the model raises it itself."""
    every, results = list(both(case)), {}
    for name, options in (("steered", {}), ("by the explicit map", {"reference": True})):
        try:
            with steered(case, options) as attached:
                results[name] = _at_once(every, lambda inputs, run=attached: _found(inputs, run))
        except AttnSteerError as error:
            return Outcome("refused", message=f"{type(error).__name__}: {error}")
        except Exception as error:
            return _raised(every[0], name, error)
    if any(inputs.roles is None for inputs in every):
        text = "not refused was a mask that leaves open whose token a row is, or what the method means"
        return Outcome("wrong", float("inf"), text)
    worst = Outcome("exact")
    for name, outs in results.items():
        for inputs, found in zip(every, outs, strict=True):
            try:
                far = _far(inputs, found)
            except Exception as error:
                return Outcome("wrong", float("inf"), f"oracle: {type(error).__name__}: {error}")
            if not far <= EXACT:
                return Outcome("wrong", far, name)
            worst = Outcome("exact", max(worst.difference, far))
    return worst


def _raised(inputs: Inputs, name: str, error: Exception) -> Outcome:
    said = f"{type(error).__name__}: {error}"
    try:
        _found(inputs, None)
    except Exception as own:
        if type(own) is type(error):
            return Outcome("impossible", message=said)
    return Outcome("wrong", float("inf"), f"{name}: {said}")


def _found(inputs: Inputs, attached: Any) -> Any:
    """The logits of a case, or what `generate` gave."""
    if inputs.case.way in GENERATE:
        return generate(inputs)
    return run(inputs, steps(inputs), steered=attached)


def _at_once(every: list[Inputs], work: Callable[[Inputs], Any]) -> list[Any]:
    """`work` on each, in a thread of its own where there are several."""
    if len(every) == 1:
        return [work(every[0])]

    def alone(inputs: Inputs) -> Any:
        # Gradients are switched off by thread.
        with torch.no_grad():
            return work(inputs)

    with ThreadPoolExecutor(len(every)) as pool:
        return list(pool.map(alone, every))


def _far(inputs: Inputs, found: Any) -> float:
    """The largest difference from the oracle, relative to its largest logit."""
    if isinstance(found, Generated):
        wanted, found = expected(inputs, found), found.scores
    else:
        rows = valid(inputs, steps(inputs))
        only = lambda outs: [out[at] for out, at in zip(outs, rows, strict=True)]  # noqa: E731
        wanted, found = only(expected(inputs, None)), only(found)
    far = [(_gap(a, b), float(b.abs().max())) for a, b in zip(found, wanted, strict=True) if b.numel()]
    # After a cut there may be padding only.
    return max(gap for gap, _ in far) / max(size for _, size in far) if far else 0.0


def _gap(a: Tensor, b: Tensor) -> float:
    return float("inf") if a.shape != b.shape or bool(a.isnan().any()) else float((a - b).abs().max())


@contextlib.contextmanager
def steered(case: Case, options: dict[str, Any]) -> Iterator[Any]:
    """The model of a case, steered in this block."""
    attached = steer(model_of(case.host), method(case), control=True, **options)
    try:
        yield attached
    finally:
        attached.remove()


def method(case: Case) -> Any:
    """The method of a case."""
    heads, spans = {case.layer: list(case.heads)}, [list(SPANS[b % 2]) for b in range(len(case.rows))]
    where = Where(
        phases=None if case.phases == "all" else case.phases,
        rows={"all": None, "some": SOME, "last": "last"}[case.region],
    )
    here = where & Where(heads=heads)
    if case.variant == "words":
        spans = words(case)
    tokenizer = Letters() if case.variant == "words" else None
    strength: Any = case.strength[0] if len(case.strength) == 1 else list(case.strength)
    other = {
        "alpha": {"alpha": ALPHA},
        "running": {"threshold": THRESHOLD, "decode": "running"},
        "prefill_only": {"threshold": THRESHOLD, "decode": "prefill_only"},
        "first_hit": {"threshold": THRESHOLD, "exclude": "first_hit"},
        "plain": {"threshold": THRESHOLD},
    }
    made: dict[str, Callable[[], Any]] = {
        "ZeroTuning": lambda: ZeroTuning(heads, strength, where=where),
        "ACT": lambda: ACT(heads, strength, where=where, **other[case.variant]),
        "SpotLight": lambda: SpotLight(
            spans, strength, pooled=case.variant == "pooled", where=here, tokenizer=tokenizer
        ),
        "PASTA": lambda: PASTA(
            spans,
            heads,
            strength,
            "include" if case.variant == "include" else "exclude",
            where=where,
            tokenizer=tokenizer,
        ),
        "HeadGate": lambda: HeadGate({(case.layer, h): strength for h in case.heads}, where=where),
    }
    return made[case.method]()


class Letters:
    """A tokenizer: one letter for each id."""

    is_fast = False

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(200 + i) for i in ids)


def words(case: Case) -> list[list[str]]:
    """The spans of each sample as strings."""
    inputs = Inputs.of(case)
    roles, out = inputs.layout.roles, []
    for b in range(len(case.rows)):
        at = [
            roles.valid[b] & (roles.request[b] == 0) & (roles.index[b] >= i) & (roles.index[b] < j)
            for i, j in SPANS[b % 2]
        ]
        out.append([Letters().decode(inputs.ids[0, b, m].tolist()) for m in at])
    return out
