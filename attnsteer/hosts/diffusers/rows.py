"""Which rows of a denoiser call are conditional: those whose values the pipeline does not hold as negative ones.

No table of pipelines decides this. What a pipeline was given or has encoded stands in its running frames, under names by which
all of diffusers tells negative from positive; whatever of it reaches the denoiser is recognised by its values, whole or token by
token, so that a concatenation, a trimmed or padded prompt, or a list with an entry for each row is seen for what it is.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# How the pipelines name what is negative, and what can be the prompt at all.
NEGATIVE = re.compile(r"^(negative_|neg_|uncond|null_|empty_|safety_|edit_concepts)|_negative|_(neg|null)$")
PROMPTS = re.compile(r"embed|prompt|text|cap|encod")
OTHERS = re.compile(r"latent|noise|ids|timestep|sigma|input|kwargs|rotary")
# What the denoisers call their input.
INPUTS = ("sample", "hidden_states", "x", "input_ids", "decoder_input_tokens")
# Names of methods whose inner values are looked at: some pipelines join both sides before they return.
ENCODES = re.compile(r"_?encode_\w*(prompt|image)\w*")

Pool = list[tuple[str, Tensor]]


class Conditions:
    """What one pipeline holds as positive and negative conditions, and what a denoiser's rows are in its terms."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self._encoded: list[dict[str, Any]] = []
        self._used = False
        # Whether the rows that were labelled last are conditional because nothing is negative.
        self.unguided = False

    def encoding(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around a method that encodes prompts or images: its local values at its end are remembered."""
        if self._used:
            # A new call of the pipeline: what an earlier one encoded is nothing now.
            self._encoded, self._used = [], False
        code, found = _code(inner), self._encoded

        def look(frame: Any, event: str, arg: Any) -> None:
            if event == "return" and frame.f_code is code:
                found.append({n: v for n, v in frame.f_locals.items() if n != "self" and _tensors(v)})

        before = sys.getprofile()
        if code is None or before is not None:
            # Somebody profiles: then only what the pipeline's own frame holds is known.
            return inner(*args, **kwargs)
        sys.setprofile(look)
        try:
            return inner(*args, **kwargs)
        finally:
            sys.setprofile(before)

    def labels(self, values: dict[str, Any], batch: int, latent: str) -> list[str] | None:
        """ "cond" or "uncond" for each row; None where some row is neither, or both sides are the same.

        Args:
            values: arguments of the denoiser by name. batch: its rows. latent: the argument that holds the latent.
        """
        self._used, self.unguided = True, False
        groups = [*self._encoded, *_frames()]
        numbered = _numbered(values.get("class_labels"), groups, batch)
        if numbered is not None:
            return numbered
        positive, negative = self._pools(groups)
        if not positive:
            return None
        given = [(name, *leaf) for name, v in values.items() if name != latent for leaf in _leaves(v, name)]
        if not negative:
            self.unguided = self._all_positive(given, values, batch, positive, groups)
            return ["cond"] * batch if self.unguided else None
        found = self._told(given, values, batch, positive, negative)
        if None in found:
            return None
        if set(found) == {"uncond"} and _same_sides(groups):
            return None
        return found

    @classmethod
    def _told(
        cls, given: list[tuple[str, str, Tensor]], values: dict[str, Any], batch: int, positive: Pool, negative: Pool
    ) -> list[str | None]:
        """The label of each row; None where it is neither."""
        best = [cls._best(given, values, row, batch, positive, negative) for row in range(batch)]
        # Arguments some row of which is negative.
        sided = {
            name for scores in best for (side, name), (score, _) in scores.items() if side == "uncond" and score >= 0.5
        }
        return [cls._label(scores, sided, negative) for scores in best]

    @staticmethod
    def _all_positive(
        given: list[tuple[str, str, Tensor]],
        values: dict[str, Any],
        batch: int,
        positive: Pool,
        groups: list[dict[str, Any]],
    ) -> bool:
        """Whether a call has a row for each latent of the loop, and each row's prompt is one of those that the pipeline holds."""
        held = next((g["latents"] for g in groups if isinstance(g.get("latents"), Tensor)), None)
        if held is None or len(held) != batch:
            return False
        for row in range(batch):
            own = [_row_of(values[name], path, t, row, batch, []) for name, path, t in given]
            if not any(o is not None and o.numel() > 1 and _share(o, t) >= 0.5 for o in own for _, t in positive):
                return False
        return True

    @staticmethod
    def _pools(groups: list[dict[str, Any]]) -> tuple[Pool, Pool]:
        positive: Pool = []
        negative: Pool = []
        for group in groups:
            for name, value in group.items():
                if PROMPTS.search(name) and not OTHERS.search(name):
                    side = negative if NEGATIVE.search(name) else positive
                    side += [(name, t) for _, t in _leaves(value, name)]
        return positive, negative

    @staticmethod
    def _best(
        given: list[tuple[str, str, Tensor]],
        values: dict[str, Any],
        row: int,
        batch: int,
        positive: Pool,
        negative: Pool,
    ) -> dict[tuple[str, str], tuple[float, set[str]]]:
        """Side and argument -> (the best score of one row, the names that have it)."""
        best: dict[tuple[str, str], tuple[float, set[str]]] = {}
        for name, path, tensor in given:
            own = _row_of(values[name], path, tensor, row, batch, negative)
            if own is None or own.numel() < 2:
                continue
            # Each part of an argument for itself: the prompt beside an image that all branches share.
            name = name if _each_row(values[name], path, tensor, batch) else path
            for side, pool in (("cond", positive), ("uncond", negative)):
                for known, held in pool:
                    score, before = _share(own, held), best.get((side, name), (0.0, set()))
                    if score > before[0]:
                        best[side, name] = score, {known}
                    elif score and score == before[0]:
                        before[1].add(known)
        return best

    @staticmethod
    def _label(best: dict[tuple[str, str], tuple[float, set[str]]], sided: set[str], negative: Pool) -> str | None:
        twins, votes = {n for n, _ in negative}, set()
        for name in {n for _, n in best}:
            a, known = best.get(("cond", name), (0.0, set()))
            b = best.get(("uncond", name), (0.0, set()))[0]
            # Values that all branches share, as those of a reference image, have no negative twin and no vote.
            shared = (
                name not in sided
                and ("uncond", name) not in best
                and not twins & {f"{side}_{n}" for n in known for side in ("negative", "neg", "uncond")}
            )
            if not shared and max(a, b) >= 0.5:
                # Names without "negative" often hold both sides: only the absence from the negative ones tells.
                votes.add("uncond" if b >= a else "cond")
        if not votes:
            return None
        # Being among the negatives may be chance (masks of ones, padding); not being there is none.
        return "cond" if "cond" in votes else "uncond"


def _numbered(given: Any, groups: list[dict[str, Any]], batch: int) -> list[str] | None:
    """The labels of rows whose condition is the number of a class: those of the class that stands for none are unconditional."""
    if not isinstance(given, Tensor) or given.is_floating_point() or given.shape != (batch,):
        return None
    none = [t for group in groups for n, t in group.items() if n.startswith("class") and NEGATIVE.search(n)]
    none = [t for t in none if isinstance(t, Tensor) and t.numel()]
    return ["uncond" if any(bool((t == n).any()) for t in none) else "cond" for n in given] if none else None


def latent_name(values: Mapping[str, Any]) -> str | None:
    """The argument of a denoiser call that is its latent; numbers of tokens are one where they lie on a grid [B, h, w]."""

    def fits(name: str) -> bool:
        value = values.get(name)
        return value is not None and (name != "input_ids" or (isinstance(value, Tensor) and value.ndim == 3))

    return next(filter(fits, INPUTS), None)


def layout_of(labels: list[str], latent_rows: int | None) -> tuple[str, ...] | None:
    """The names of the equal parts of the rows; None where the labels do not tile them."""
    runs: list[int] = []
    for before, now in zip([None, *labels], labels, strict=False):
        if now == before:
            runs[-1] += 1
        else:
            runs.append(1)
    size = latent_rows if latent_rows else math.gcd(*runs)
    if len(labels) % size or any(run % size for run in runs):
        return None
    return tuple(labels[::size])


def fingerprint(values: dict[str, Any], latent: str) -> tuple[Any, list[Tensor]]:
    """What tells whether the prompt arguments are those of an earlier call, and the tensors that must live for that."""
    kept = [t for name, v in values.items() if name != latent for _, t in _leaves(v, name)]
    return tuple((id(t), -1 if t.is_inference() else t._version) for t in kept), kept


def _code(method: Any) -> Any:
    while hasattr(method, "__wrapped__") or hasattr(method, "__func__"):
        method = getattr(method, "__wrapped__", None) or method.__func__
    return getattr(method, "__code__", None)


def _frames() -> Iterator[dict[str, Any]]:
    """The local values of the running pipelines, innermost first, and of the states that their blocks hand on."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        module = frame.f_code.co_filename
        if owner is not None and ("pipeline_utils" in _bases(owner) or "modular_pipelines" in module):
            found = dict(frame.f_locals)
            state = found.get("block_state")
            if hasattr(state, "as_dict"):
                found |= state.as_dict()
            yield found
        frame = frame.f_back


def _bases(owner: Any) -> str:
    return " ".join(c.__module__ for c in type(owner).__mro__ if c.__module__.startswith("diffusers"))


def _tensors(value: Any) -> bool:
    return any(True for _ in _leaves(value, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Float tensors with a row axis and something in a row, with their paths."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim >= 2 and value.numel():
            yield path, value
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from _leaves(v, f"{path}.{key}")
    elif isinstance(value, (list, tuple)) and len(value) < 100:
        for i, v in enumerate(value):
            yield from _leaves(v, f"{path}[{i}]")


def _row_of(value: Any, path: str, tensor: Tensor, row: int, batch: int, negative: Pool) -> Tensor | None:
    """What a leaf of an argument holds for one row."""
    if _each_row(value, path, tensor, batch):
        return tensor if int(re.search(r"\[(\d+)\]", path)[1]) == row else None
    if tensor.shape[0] % batch:
        return None
    for _, twin in negative:
        if twin.ndim != tensor.ndim or twin.shape[-1] != tensor.shape[-1]:
            continue
        axes = [i for i in range(tensor.ndim) if twin.shape[i] != tensor.shape[i]]
        # The batch is the axis in which the argument is longer than what it was made of.
        if len(axes) == 1 and 0 < axes[0] < tensor.ndim - 2 and tensor.shape[axes[0]] == batch:
            return tensor.select(axes[0], row)
        if not axes:
            break
    return tensor[row * (tensor.shape[0] // batch)]


def _each_row(value: Any, path: str, tensor: Tensor, batch: int) -> bool:
    """Whether an argument is a list with an entry for each row; not one of layers, whose entries have all rows."""
    layers = tensor.ndim > 2 and tensor.shape[0] == batch
    listed = isinstance(value, (list, tuple)) and len(value) == batch
    return listed and not layers and "[" in path


def _share(row: Tensor, held: Tensor) -> float:
    """The share of a row's token vectors that stand in one row of what is held, at best."""
    if row.shape[-1] != held.shape[-1]:
        return 0.0
    rows = held if held.ndim > row.ndim else held[None]
    best = 0.0
    for other in rows.detach():
        other = other.to(row.device, row.dtype)
        if other.shape == row.shape and torch.equal(other, row):
            return 1.0
        best = max(best, float(torch.isin(_hashes(row), _hashes(other)).double().mean()))
    return best


def _hashes(tensor: Tensor) -> Tensor:
    """A number for each token vector; a vector without a token axis is one."""
    flat = tensor.detach().reshape(1, -1) if tensor.ndim < 2 else tensor.detach().reshape(-1, tensor.shape[-1])
    weights = torch.cos(torch.arange(flat.shape[-1], dtype=torch.float64, device=flat.device) * 12.9898) + 0.1
    return flat.double() @ weights


def _same_sides(groups: list[dict[str, Any]]) -> bool:
    """Whether a negative value and its positive twin are equal: then which rows are which cannot be seen, nor matters."""
    for group in groups:
        for name, value in group.items():
            twin = group.get(name.removeprefix("negative_")) if name.startswith("negative_") else None
            if isinstance(value, Tensor) and isinstance(twin, Tensor) and value.ndim >= 3 and torch.equal(value, twin):
                return True
    return False
