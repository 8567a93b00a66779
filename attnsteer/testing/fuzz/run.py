"""Runs a case three ways: steered, steered by the explicit map, and by the oracle."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AttnSteerError
from ...methods.act import ACT
from ...methods.headgate import HeadGate
from ...methods.pasta import PASTA
from ...methods.spotlight import SpotLight
from ...methods.zerotuning import ZeroTuning
from ...steering import steer
from ...where import Where
from ..transformers_models import tiny_transformers
from .case import MIXED, WINDOW, WINDOWED, Case
from .layout import Layout
from .oracle import SPANS, THRESHOLD, Oracle, instead

EXACT = 1e-5


@dataclass(frozen=True)
class Outcome:
    """What came of a case: "exact", "refused" or "wrong"; `difference` is relative to the largest logit."""

    kind: str
    difference: float = 0.0
    message: str = ""


@functools.cache
def model_of(host: str) -> nn.Module:
    """The tiny model, built once."""
    return tiny_transformers(host)


@torch.no_grad()
def check(case: Case) -> Outcome:
    """Run a case. What the library refuses is a result; any other exception is a wrong one."""
    model, batch = model_of(case.host), len(case.rows)
    results = {}
    for name, options in (("steered", {}), ("by the explicit map", {"reference": True})):
        try:
            with contextlib.ExitStack() as stack:
                run = steer(model, _method(case, batch), control=True, **options)
                stack.callback(run.remove)
                results[name] = _Calls(case, model, lambda total, run=run: run.chunked_prefill(tokens=total)).run()
        except AttnSteerError as error:
            return Outcome("refused", message=f"{type(error).__name__}: {error}")
        except Exception as error:
            return Outcome("wrong", float("inf"), f"{name}: {type(error).__name__}: {error}")
    oracle = Oracle(case.method, case.strength, case.layer, case.heads, case.phases)
    with instead(model, oracle):
        expected = _Calls(case, model, None, oracle).run()
    worst = Outcome("exact")
    for name, found in results.items():
        size = max(float(e.abs().max()) for e in expected if e.numel())
        far = max((float((a - b).abs().max()) for a, b in zip(found, expected, strict=True) if a.numel()), default=0.0)
        if not far <= EXACT * size:
            return Outcome("wrong", far / size, name)
        worst = Outcome("exact", max(worst.difference, far / size))
    return worst


def _method(case: Case, batch: int) -> Any:
    heads, spans = {case.layer: list(case.heads)}, [list(SPANS)] * batch
    where = Where(phases=None if case.phases == "all" else case.phases)
    here = where & Where(heads=heads)
    made: dict[str, Callable[[], Any]] = {
        "ZeroTuning": lambda: ZeroTuning(heads, case.strength, where=where),
        "ACT": lambda: ACT(heads, case.strength, THRESHOLD, where=where),
        "SpotLight": lambda: SpotLight(spans, case.strength, where=here),
        "PASTA": lambda: PASTA(spans, heads, case.strength, where=where),
        "HeadGate": lambda: HeadGate({(case.layer, h): case.strength for h in case.heads}, where=where),
    }
    return made[case.method]()


class _Calls:
    """The calls of a case on a model; each gives the logits [rows, V] of its valid rows."""

    def __init__(self, case: Case, model: nn.Module, chunked: Any, oracle: Oracle | None = None):
        self.case, self.model, self.chunked, self.oracle = case, model, chunked, oracle
        steps = case.cuts[0] if case.way in ("decode", "reorder") else 0
        # Generated tokens go on with the last sequence of each row.
        self.prompt = Layout(case.rows, case.form in ("positions", "bool", "float"))
        rows = tuple(
            (*row[:-1], row[-1] + steps) if row[-1] > 0 else (*row, *(steps,) * bool(steps)) for row in case.rows
        )
        self.all = Layout(rows, self.prompt.packed)
        g = torch.Generator().manual_seed(case.seed)
        self.ids = torch.randint(8, 99, (len(rows), self.all.length), generator=g).masked_fill(~self.all.valid, 0)
        self.cache: Any = None
        self.order = torch.arange(len(rows))

    def run(self) -> list[Tensor]:
        case, n, end = self.case, self.prompt.length, self.all.length
        if case.way == "whole":
            return [self.call(0, n, cached=False)]
        if case.way == "chunks":
            edges = [0, *case.cuts, n]
            with contextlib.nullcontext() if self.chunked is None else self.chunked(n):
                return [self.call(a, b) for a, b in itertools.pairwise(edges)]
        if case.way == "crop":
            return self._crop(*case.cuts)
        out = [self.call(0, n)]
        for t in range(n, end):
            if case.way == "reorder":
                self._reorder()
            out.append(self.call(t, t + 1))
        return out

    def _crop(self, cut: int, back: int) -> list[Tensor]:
        """Two calls over the prompt, cut back to the end of the first, and the second part again."""
        n = self.prompt.length
        with contextlib.nullcontext() if self.chunked is None else self.chunked(n):
            first = self.call(0, cut)
            state = {} if self.oracle is None else copy.deepcopy(self.oracle.state)
            self.call(cut, n)
            self.cache.crop(-(n - cut))
            if self.oracle is not None:
                self.oracle.state = state
            again = [self.call(a, b) for a, b in ((cut, n - back), (n - back, n)) if a < b]
        return [first, *again] if cut < n - back else [first]

    def _reorder(self) -> None:
        """Batch rows change places, as beams do."""
        order = torch.arange(len(self.order)).roll(1)
        self.cache.reorder_cache(order)
        self.order = self.order[order]
        if self.oracle is not None:
            self.oracle.state = {name: t[order] for name, t in self.oracle.state.items()}

    def call(self, start: int, stop: int, cached: bool = True) -> Tensor:
        case, order = self.case, self.order
        at = slice(start, stop)
        valid, index = self.all.valid[order, :stop], self.all.index[order, :stop]
        given: dict[str, Any] = {"input_ids": self.ids[order, at]}
        if case.form not in ("none",) or case.host == "gpt2":
            given["position_ids"] = index[:, at]
        if case.form == "2d":
            given["attention_mask"] = valid.long()
        elif case.form in ("bool", "float", "tree"):
            given["attention_mask"] = self._mask(at)
        if self.oracle is not None:
            o = self.oracle
            o.valid, o.index, o.past, o.prompt = valid, index, start, self.prompt.length
        if cached:
            given |= {"past_key_values": self.cache, "use_cache": True}
        else:
            given["use_cache"] = False
        out = self.model(**given)
        self.cache = out.past_key_values if cached else None
        return out.logits[self.all.valid[order, at]]

    def _mask(self, at: slice) -> Any:
        case = self.case
        shape = lambda seen: seen[:, :, at, : at.stop]  # noqa: E731
        # Eager attention adds its mask, whatever it is.
        eager = self.model.config._attn_implementation == "eager" and self.oracle is None
        form = lambda seen: _floats(shape(seen)) if eager or case.form == "float" else shape(seen)  # noqa: E731
        whole = lambda window: form(self.all.mask(case.blind, case.parents, window))  # noqa: E731
        if case.host in MIXED:
            return {"full_attention": whole(None), "sliding_attention": whole(WINDOW)}
        return whole(WINDOW if case.host in WINDOWED else None)


def _floats(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
