"""`head_profile`: what each head looks at and writes, in one table with intervals over inputs.

Maps come in blocks of rows from the kernel's log-sum-exp, and are reduced at once (`map_readings.py`): memory is that of a
block. Means are over the valid rows that see two keys or more, then over inputs. Agreement with a property: Vig et al.,
"BERTology meets biology" (ICLR 2021, arXiv 2006.15222; salesforce/provis at b23402d, compute_edge_features.py, whose weight
of a pair is its attention if above `min_attn`). Previous, duplicate and induction: TransformerLens' head_detector.py.
Sensitivity and separability: our definitions after Mudarisov et al. (2025, arXiv 2508.17821), whose text could not be read.
Ring profiles: ours, after Li et al. (2023, arXiv 2303.13731).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SelectionError, UnsupportedHost, brief
from ..hosts.base import imported
from ..search.screen import sites_of
from ..search.state import model_digest
from ..steering import find_host, steer
from ..versions import library_versions
from ..where import Where
from .map_readings import COUNT, PATTERNS, THETA, TOP, Block, Pattern, Profiled, column_means
from .projections import HeadWeights, Norm, Readout, evaluating, head_weights
from .table import Column, HeadTable
from .weight_readings import weight_readings

Pair = tuple[int, int]

__all__ = ["PATTERNS", "Block", "column_means", "head_profile", "separability", "weight_readings"]


def head_profile(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    *,
    where: Where | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    theta: float | None = THETA,
    rows: str = "applicable",
    spans: Mapping[str, Sequence[Sequence[tuple[int, int]]]] | None = None,
    images: bool = False,
    grid: tuple[int, int] | None = None,
    ahead: int = 1,
    words: int = 0,
    norm: str = "own",
    tokenizer: Any = None,
    target: Sequence[tuple[int, int]] | None = None,
    weights: bool = True,
) -> HeadTable:
    """Profile every head: one row a head, one column a reading, intervals over inputs.

    Readings (range):

    - first, self, previous, duplicate, induction ([0, 1]): mass on the pattern, in the rows that have one; chance is the uniform
      map's. agreement_NAME: share of the entries of theta or more that have the property; none below 100 such entries.
    - entropy (nats), eff (effective number of keys), dispersion (eff over the visible), top_mass_5, distance (tokens, or patches),
      sensitivity (Frobenius norm of the softmax's Jacobian in the scores, [0, 1/2]).
    - sink_first, sink_largest, sinks: column means by the causal divisor, and how many are above 0.3.
    - separable_5 ([0, 1]) and gap_5, at the last row; direct_logit of a target (logits).
    - mass_SPAN, concentration_SPAN ([0, 1]), score_image (mass times concentration); ring_K, ring_density_K, to_first of a grid.
    - from weights: copying ([-1, 1]), ov_rank and qk_rank (participation ratio of singular values; qk at offset 0), ov_largest.

    Args:
        model: a model whose attention is steered.
        inputs: keyword arguments of the model, each a batch. where: the sites; None: the main stack's self-attention. Of several
            towers heads are called (tower, layer, head), and there are no readings from weights.
        patterns: further properties f(block) -> bool [B, r, m] of `Block`, by name; they get the columns NAME and agreement_NAME.
        theta: what counts as high attention; None: no agreement columns. rows: "applicable" (with a key of the pattern) or
            "all" (as TransformerLens' detector, which dilutes).
        spans: name -> token ranges for each sample, the same in each batch. images: add the span "image".
        grid: (height, width) of a vision transformer's patches, behind `ahead` other tokens.
        words: so many top tokens of what each head writes at the last row, in `table.words`; norm: "own" (the lens: the
            model's final norm of that vector alone) or "none". tokenizer: to have them as text.
        target: (token, foil) of each sample, over all batches: direct_logit is their difference through the frozen final norm.
        weights: the readings from weights; left out where they are not to be had (False is faster for large models).

    Raises:
        SelectionError: no inputs, an unknown option, a grid that is not the map's, tokens that a pattern needs and that
        are not there.
        UnsupportedHost: words or a target of a model without an unembedding.
    """
    if rows not in ("applicable", "all") or norm not in ("own", "none"):
        raise SelectionError(f'rows={rows!r} is "applicable" or "all", norm={norm!r} "own" or "none".')
    if not isinstance(inputs, Iterable) or isinstance(inputs, (str, Mapping)):
        raise SelectionError(
            f"head_profile(inputs={brief(inputs)}): give a list of batches, each keyword arguments of the model."
        )
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 <= theta <= 1):
        raise SelectionError(f"theta={brief(theta)} is a share of a row's attention, 0 to 1, or None.")
    where = Where(kinds="self") if where is None else where
    # What a tower of images or sound attends to are no tokens.
    host = find_host(model)
    every = host.sites()
    modalities = {s.modality for s, _ in where.resolve(every, host.main)}
    text = grid is None and _has_tokens(model) and modalities <= {"text"}
    chosen = {n: p for n, p in PATTERNS.items() if text} | dict(patterns or {})
    probe = Profiled(chosen, theta, dict(spans or {}), text, images, grid, ahead if grid else 0, rows, where=where)
    pairs, shape = sites_of(model, probe, towers=True)
    # A call has the selected heads only, and what is read is called by its place among all.
    where = replace(where, heads=None)
    probe = replace(probe, where=where)
    found = _weights(model, where, weights, bool(words) or target is not None, isinstance(shape, dict))
    scales: list[Tensor] = []
    with torch.no_grad(), evaluating(model), steer(model, probe, control=True):
        for batch in inputs:
            final = None if target is None or found[1].norm is None else model.get_submodule(found[1].norm.name)
            with _scales(final, found[1].norm if final is not None else None, batch, scales):
                model(**batch)
    if not probe.found:
        raise SelectionError("head_profile got no inputs; give one batch of keyword arguments of the model or more.")
    heads = tuple(pairs)
    columns = _table(probe, pairs)
    samples = len(next(iter(columns.values())).top)
    table = HeadTable(
        heads,
        shape,
        columns,
        {"search": "head_profile", "model": model_digest(model), "samples": samples, "theta": theta, "rows": rows,
         "versions": library_versions()},
    )  # fmt: skip
    if found is not None:
        by_layer, readout = found
        columns |= _at_the_last_row(probe, by_layer, heads)
        if weights:
            columns |= weight_readings(by_layer, readout, heads)
        if words:
            table.words = _words(probe, by_layer, readout, words, norm, tokenizer)
        if target is not None:
            columns["direct_logit"] = _direct(probe, by_layer, readout, heads, target, scales)
    return table


def _has_tokens(model: nn.Module) -> bool:
    kind = imported("transformers", "modeling_utils.PreTrainedModel")
    return bool(kind) and isinstance(model, kind) and getattr(model, "main_input_name", "") == "input_ids"


def _weights(
    model: nn.Module, where: Where, wanted: bool, needed: bool, towers: bool
) -> tuple[dict[int, HeadWeights], Readout | None] | None:
    """The weights of the heads where they are wanted and to be had; `towers`: they are of several."""
    if towers and needed:
        raise SelectionError("words and targets are of one stack of layers; give a where= that selects one.")
    if towers or not (wanted or needed):
        return None
    try:
        found = head_weights(model, where=where)
    except UnsupportedHost:
        if needed:
            raise
        return None
    if needed and found[1] is None:
        raise UnsupportedHost(
            f"{type(model).__name__} has no unembedding, so its heads have no words and no logits. Give the model with its "
            "language head."
        )
    return found


@contextlib.contextmanager
def _scales(
    module: nn.Module | None, norm: Norm | None, inputs: Mapping[str, Any], found: list[Tensor]
) -> Iterator[None]:
    """Keep the scale of the final norm at the last valid row of each input, [B, 1]."""

    def took(_: nn.Module, args: tuple[Any, ...]) -> None:
        scale = norm.scale(args[0].float())[..., 0]
        mask = inputs.get("attention_mask")
        last = scale.shape[1] - 1 if mask is None else mask.float().cumsum(dim=1).argmax(dim=1)
        found.append(scale[torch.arange(len(scale)), last][:, None].cpu())

    if module is None:
        yield
        return
    hook = module.register_forward_pre_hook(took)
    try:
        yield
    finally:
        hook.remove()


def _table(probe: Profiled, heads: Mapping[tuple[Any, ...], tuple[str, int]]) -> dict[str, Column]:
    names = list(dict.fromkeys(n for parts in probe.found.values() for part in parts for n in part))
    raw = {}
    for name in names:
        columns = []
        if len({sum(len(part[name][0]) for part in probe.found[path]) for path, _ in heads.values()}) > 1:
            raise SelectionError(
                "head_profile: the towers that are selected see other numbers of inputs; profile one at a time."
            )
        for path, head in heads.values():
            parts = [part[name] for part in probe.found[path]]
            pick = lambda t, h=head: t[:, h] if t.shape[1] > 1 else t[:, 0]  # noqa: E731
            columns.append([torch.cat([pick(p[k]) for p in parts]) for k in (0, 1)])
        raw[name] = [torch.stack([c[k] for c in columns], dim=1).double() for k in (0, 1)]
    out = {}
    for name, (top, bottom) in raw.items():
        if name.startswith("chance_"):
            continue
        counted = name.startswith("agreement_")
        # Means over rows are then means over inputs; pairs are pooled.
        if not counted:
            some = bottom > 0
            top, bottom = torch.where(some, top / bottom.masked_fill(~some, 1.0), 0.0), some.double()
        chance = raw.get(f"chance_{name}")
        level = None if chance is None else chance[0].sum(dim=0) / chance[1].sum(dim=0).clamp_min(1e-30)
        out[name] = Column(top, bottom, ABOUT.get(name, _about(name)), level, COUNT if counted else 0.0)
    if "mass_image" in out:
        share, focus = out["mass_image"], out["concentration_image"]
        out["score_image"] = Column(share.top * focus.top, share.bottom, "image mass times concentration")
    return out


ABOUT = {
    "entropy": "row entropy, nats",
    "eff": "effective number of keys",
    "dispersion": "effective share of the visible keys",
    "sensitivity": "Frobenius norm of the softmax's Jacobian",
    "distance": "mean distance, tokens or patches",
    "sink_first": "column mean of the first token",
    "sink_largest": "largest column mean",
    "sinks": "keys with a column mean above 0.3",
    "first": "mass on the first token",
    "self": "mass on the token itself",
    "previous": "mass on the token before",
    "duplicate": "mass on earlier same tokens",
    "induction": "mass behind earlier same tokens",
}


def _about(name: str) -> str:
    kind, _, rest = name.partition("_")
    return {
        "agreement": f"share of high attention that is {rest}",
        "mass": f"mass on {rest}",
        "concentration": f"concentration within {rest}",
        "ring": f"mass by ring, {rest}",
    }.get(kind, f"mass on {name}")


def _at_the_last_row(probe: Profiled, weights: Mapping[int, HeadWeights], heads: tuple[Pair, ...]) -> dict[str, Column]:
    """How far the strongest keys of the last row can be told apart by what they bring, |A_j x_j - s| with x_j = v_j W_O."""
    separable, gap = [], []
    for layer, head in heads:
        path = weights[layer].site.path
        G = weights[layer].output[head].double().cpu()
        G = G @ G.T
        s_values, g_values = [], []
        for part in probe.last[path]:
            if part["values"] is None:
                return {}
            for A, v in zip(part["map"][:, head].double(), part["values"][:, head].double(), strict=True):
                s, g = separability(A, v, G, TOP)
                s_values.append(s)
                g_values.append(g)
        separable.append(s_values)
        gap.append(g_values)
    out = {}
    for name, values, about in (
        (f"separable_{TOP}", separable, "share of the top keys that are told apart"),
        (f"gap_{TOP}", gap, "distance of other keys less that of the top keys"),
    ):
        t = torch.tensor(values, dtype=torch.float64).T
        out[name] = Column(t.nan_to_num(0.0), (~t.isnan()).double(), about)
    return out


def separability(A: Tensor, v: Tensor, G: Tensor, top: int) -> tuple[float, float]:
    """(separable_N, gap_N) of one row A [m] with values v [m, dv] in the metric G [dv, dv] (our definition after 2508.17821).

    s = sum of the top keys' A_j x_j; separable: the share of the top keys nearer to s than every other key; gap: mean distance of
    the others less that of the top keys. With `top` visible keys or fewer: 1 and NaN.
    """
    seen = (A > 0).nonzero()[:, 0]
    A, v = A[seen], v[seen]
    if len(A) <= top:
        return 1.0, math.nan
    chosen = torch.zeros(len(A), dtype=torch.bool)
    chosen[A.topk(top).indices] = True
    y = A[:, None] * v
    y = y - y[chosen].sum(dim=0)
    distance = ((y @ G) * y).sum(dim=-1).clamp_min(0).sqrt()
    near = (distance[chosen] < distance[~chosen].min()).double().mean()
    return float(near), float(distance[~chosen].mean() - distance[chosen].mean())


def _written(probe: Profiled, weights: Mapping[int, HeadWeights], layer: int, head: int) -> Tensor:
    """What a head writes at the last row of each input, [N, D]."""
    rows = torch.cat([part["out"][:, head] for part in probe.last[weights[layer].site.path]])
    w = weights[layer]
    written = rows @ w.output[head].cpu()
    return written if w.post is None else written * w.post.gain.cpu()


def _words(
    probe: Profiled, weights: Mapping[int, HeadWeights], readout: Readout, count: int, norm: str, tokenizer: Any
) -> dict[Pair, list[Any]]:
    """Top tokens of the mean of the lens over inputs; ranks only, since a lens is not calibrated."""
    U = readout.unembedding.cpu()
    # Softmax does not see what all words have in common.
    U = U - U.mean(dim=1, keepdim=True)
    found = {}
    for layer, w in weights.items():
        for head in range(w.site.heads):
            x = _written(probe, weights, layer, head)
            if norm == "own" and readout.norm is not None:
                n = readout.norm
                x = x - x.mean(dim=-1, keepdim=True) if n.centred else x
                x = x / (x.pow(2).mean(dim=-1, keepdim=True) + n.eps).sqrt() * n.gain.cpu()
            top = (x @ U).mean(dim=0).topk(count).indices.tolist()
            found[layer, head] = [tokenizer.decode([t]) for t in top] if tokenizer is not None else top
    return found


def _direct(
    probe: Profiled,
    weights: Mapping[int, HeadWeights],
    readout: Readout,
    heads: tuple[Pair, ...],
    target: Sequence[tuple[int, int]],
    scales: list[Tensor],
) -> Column:
    """(o W_O * gain / scale) . (W_U[t] - W_U[f]): the scale is the whole residual's, frozen, so that heads add up."""
    count = len(torch.cat([part["out"] for part in next(iter(probe.last.values()))]))
    if len(target) != count:
        raise SelectionError(f"target has {len(target)} pairs (token, foil) for {count} inputs; give one for each.")
    U = readout.unembedding.cpu()
    t, f = torch.tensor(target).T
    if bool(((t < 0) | (t >= U.shape[1]) | (f < 0) | (f >= U.shape[1])).any()):
        raise SelectionError(f"target={brief(target)}: token ids of this model run from 0 to {U.shape[1] - 1}.")
    direction = (U[:, t] - U[:, f]).T
    n = readout.norm
    if n is not None:
        direction = direction * n.gain.cpu() / torch.cat(scales)
    values = []
    for layer, head in heads:
        x = _written(probe, weights, layer, head)
        x = x - x.mean(dim=-1, keepdim=True) if n is not None and n.centred else x
        values.append((x * direction).sum(dim=-1))
    top = torch.stack(values, dim=1).double()
    return Column(top, torch.ones_like(top), "direct effect on the logit difference of the target")
