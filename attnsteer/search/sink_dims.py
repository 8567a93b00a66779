"""Sink dimensions: the hidden dimensions in which a language model's sink tokens have massive activations.

They belong to the text backbone and survive multimodal tuning. Kang et al. (ICLR 2025, arXiv 2503.03321) inherit them from
Sun et al., "Massive Activations in Large Language Models" (2024, arXiv 2402.17762); how `find_sink_dims` finds them for a new
backbone, and its thresholds, are this library's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError
from ..intervention import Intervention
from ..methods._sink_dims import scaled_tau
from ..methods.var import normalised
from ..steering import sites, steer
from ..where import Where

# A dimension must reach tau in this share of (prompt, layer) pairs; the list ends at the first drop by a factor.
SHARE, DROP = 0.8, 3.0


@dataclass(frozen=True)
class SinkDims(Sequence[int]):
    """The sink dimensions of a model, strongest first: a sequence of ints, so `VAR(sink_dims=found)` takes it.

    Attributes:
        dims: empty where no dimension stands out. strength: mean over prompts and layers of max_j |x_d| / rms(x), by
            dimension, for the strongest ten. share: of the (prompt, layer) pairs in which a dimension reaches tau.
        tau: the threshold for `VAR`: the one that was asked for; else the scaled one, or a larger one where ordinary tokens come
            near it (`between`). prompts: number of prompts. layers: looked at. reason: why dims is empty.
    """

    dims: tuple[int, ...]
    strength: Mapping[int, float]
    share: Mapping[int, float]
    tau: float
    prompts: int
    layers: tuple[int, ...]
    reason: str = ""

    def __getitem__(self, index: Any) -> Any:
        return self.dims[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.dims)

    def __len__(self) -> int:
        return len(self.dims)


@dataclass(frozen=True)
class _Strength(Intervention):
    """Keeps max_j and median_j of |x_d| / rms(x) over the valid tokens of each prompt, at each layer; edits nothing."""

    found: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False, repr=False)

    kinds = ("self",)
    needs = ("tokens", "residual")

    observes = True

    def output(self, call: AttnCall, out: Tensor) -> None:
        x = normalised(call.residual.detach())
        valid = call.row_valid[..., None]
        ordinary = x.masked_fill(~valid, float("nan")).nanmedian(dim=1).values
        self.found.append(((x * valid).amax(dim=1).cpu(), ordinary.cpu()))


@torch.no_grad()
def find_sink_dims(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    tau: float | None = None,
    layers: Iterable[int] | None = None,
    drop: float = DROP,
) -> SinkDims:
    """Find the sink dimensions of a model's language backbone.

    A dimension is a candidate where M_d = max_j |x_d| / rms(x) reaches tau in 80 % of all (prompt, layer) pairs, x the hidden
    states that enter a layer; candidates are ranked by the mean of M_d and kept up to the first drop by a factor of three of
    |x_d| over the rest of the state, M_d / sqrt(D - M_d^2): over the whole it is at most sqrt(D), which hides gaps in narrow
    models. The first token alone is a sink in most models, so that prompts without images do as well.

    Args:
        model: a language or vision-language model of transformers.
        batches: processor or tokenizer outputs, passed to the model as they are; eight varied prompts or more.
        tau: threshold; None: `scaled_tau` of the model's width, and a larger one in the result where that does not tell sinks
            from ordinary tokens. layers: to look at; None: the third to the last but one.
        drop: how far the last dimension must stand above the next one.

    Raises:
        SelectionError: no batches, or a tau that no hidden state can reach.
    """
    text = sorted({s.layer for s in sites(model) if s.modality == "text" and s.kind == "self"})
    if not text:
        raise SelectionError("find_sink_dims: the model has no self-attention over text.")
    chosen = tuple(layers) if layers is not None else tuple(text[2:-1] or text[1:] or text)
    probe = _Strength(where=Where(layers=chosen, kinds="self"))
    prompts = 0
    run = steer(model, probe, control=True)
    try:
        for batch in batches:
            before = len(probe.found)
            model(**batch)
            prompts += 0 if len(probe.found) == before else len(probe.found[-1][1])
    finally:
        run.remove()
    if not prompts:
        raise SelectionError("find_sink_dims got no batches; give the processor's outputs for eight prompts or more.")
    every, ordinary = (torch.cat(of) for of in zip(*probe.found, strict=True))
    asked, tau = tau, scaled_tau(every.shape[1]) if tau is None else tau
    if tau >= math.sqrt(every.shape[1]):
        raise SelectionError(
            f"find_sink_dims(tau={tau}): |x_d| / rms(x) is at most {math.sqrt(every.shape[1]):.1f} with {every.shape[1]} "
            "dimensions; leave tau out for the scaled one."
        )
    mean, share = every.mean(dim=0), (every >= tau).float().mean(dim=0)
    order = mean.argsort(descending=True)
    dims, reason = _leading(order.tolist(), mean, share, drop)
    top = order[:10].tolist()
    if asked is None and dims:
        level = float(ordinary.nanmean(dim=0)[list(dims)].max())
        tau = max(tau, between(level, float(mean[list(dims)].min()), every.shape[1]))
    return SinkDims(
        dims,
        {d: float(mean[d]) for d in top},
        {d: float(share[d]) for d in top},
        float(tau),
        prompts,
        chosen,
        reason,
    )


def _rest(strength: float, width: int) -> float:
    """|x_d| over the root of the mean square of the *other* dimensions, up to a factor, from |x_d| / rms(x)."""
    return strength / math.sqrt(max(width - strength**2, 1e-3))


def between(ordinary: float, sink: float, width: int) -> float:
    """The |x_d| / rms(x) that lies between two others: at the geometric mean of |x_d| over the rest of the state."""
    ratio = _rest(ordinary, width) * _rest(sink, width)
    return math.sqrt(width * ratio / (1 + ratio))


def _leading(order: list[int], mean: Tensor, share: Tensor, drop: float) -> tuple[tuple[int, ...], str]:
    """The dimensions before the first large drop, all of them candidates; else none, and why."""
    strongest = order[0]
    if float(share[strongest]) < SHARE:
        return (), (
            f"no sink dimensions: the strongest one, {strongest}, reaches tau in {float(share[strongest]):.0%} of the prompts "
            f"and layers only; {SHARE:.0%} are asked for"
        )
    for count, (here, after) in enumerate(itertools.pairwise(order), start=1):
        if _rest(float(mean[here]), len(mean)) >= drop * _rest(float(mean[after]), len(mean)):
            return tuple(order[:count]), ""
        if float(share[after]) < SHARE:
            return (), (
                f"no sink dimensions: {count} dimensions reach tau, but none stands out (the next one has "
                f"{float(mean[after] / mean[here]):.0%} of the last one's strength)"
            )
    return (), "no sink dimensions: all dimensions reach tau"
