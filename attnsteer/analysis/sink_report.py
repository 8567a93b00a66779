"""`sinks`: which tokens heads rest on, massive activations, and the frame that they make, for any model, without a map.

Sink metric: Gu et al., "When Attention Sink Emerges in Language Models" (ICLR 2025, arXiv 2410.10781; sail-sg/Attention-Sink,
eval_sink_open_source.py): alpha_k = mean over the rows i >= k of A_ik, a sink where above 0.3. Massive activations: Sun et al.
(2024, arXiv 2402.17762): |x| above 100 and above 1,000 times the median. Frames: Ruscio, Nanni, Silvestri, "What are you
sinking?" (NeurIPS 2025, arXiv 2508.02546) name them; the measures here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..call import AttnCall
from ..errors import SelectionError
from ..heads import HeadSet
from ..intervention import Intervention
from ..search.screen import sites_of
from ..search.state import model_digest
from ..steering import steer
from ..versions import library_versions
from ..where import Where
from .map_readings import SINK, SINK_ROWS, column_means
from .projections import evaluating

Pair = tuple[int, int]
# Massive: above both (Sun et al., section 2).
MASSIVE, TIMES = 100.0, 1000.0
# Shares of a frame: this much of the column mass, in one token, or at both ends.
SHARE, ENDS = 0.8, 2


@dataclass(frozen=True)
class Massive:
    """One massive activation: `value` in dimension `dim` of what enters layer `layer`, at token `index` (id `token`) of
    input `sample`."""

    layer: int
    sample: int
    index: int
    dim: int
    value: float
    times_median: float
    token: int | None = None


@dataclass
class Sinks:
    """What `sinks` found.

    Attributes:
        heads, shape: as of a `HeadSet`. alpha: [heads, K], mean over inputs of each token's column mean, by index from the
            first token
            (K the longest input); NaN where no input has enough rows. share: of inputs in which it is above the threshold,
            [heads, K].
        excess: alpha times the mean number of keys that its rows see: 1 is what a uniform map gives. value_norm: [heads,
            K], |v_k| over the mean of the input's tokens.
        frame: [heads, 4]: entropy of the column masses over its maximum (0: one token, 1: all alike), share of the
            largest, share of both ends, and number of tokens that hold 80 %.
        activations: layer -> (largest |x|, over the median of |x|), of what enters it, mean over inputs; {} where the host
            has no residual.
        massive: single activations above 100 and 1,000 times the median, strongest first. tokens: index -> id, where all
            inputs agree.
    """

    heads: tuple[Pair, ...]
    shape: tuple[int, int]
    threshold: float
    alpha: Tensor
    share: Tensor
    excess: Tensor
    value_norm: Tensor
    frame: Tensor
    activations: dict[int, tuple[float, float]]
    massive: list[Massive]
    facts: dict[str, Any]

    def rate(self, index: int = 0) -> float:
        """Share of (input, head) pairs whose token `index` is a sink: Sink_k of Gu et al., 0 to 1."""
        return float(self.share[:, index].nanmean())

    def tokens(self, head: Pair) -> list[int]:
        """Indices of the sink tokens of one head: alpha above the threshold, strongest first."""
        if head not in self.heads:
            raise SelectionError(
                f"sinks: head {head} was not looked at; there are {len(self.heads)} heads of shape {self.shape}."
            )
        alpha = self.alpha[self.heads.index(head)].nan_to_num(0.0)
        order = alpha.argsort(descending=True).tolist()
        return [k for k in order if float(alpha[k]) > self.threshold]

    def kind(self, head: Pair) -> str:
        """The frame of one head (our rule): "centralised" (one token holds 80 % of all columns' mass), "bidirectional"
        (both ends do
        together), else "distributed"."""
        _, most, ends, _ = self.frame[self.heads.index(head)].tolist()
        return "centralised" if most >= SHARE else "bidirectional" if ends >= SHARE else "distributed"

    def to_heads(self, index: int = 0, top: int | None = None) -> HeadSet:
        """Heads scored by how much token `index` gets."""
        scores = {p: float(v) for p, v in zip(self.heads, self.alpha[:, index], strict=True) if not math.isnan(v)}
        found = HeadSet(list(scores), scores=scores, shape=self.shape, provenance={**self.facts, "index": index})
        return found if top is None else found.top(top)

    def layers(self) -> dict[int, Tensor]:
        """alpha by layer, the mean over its heads, [K]."""
        return {
            layer: torch.stack([a for p, a in zip(self.heads, self.alpha, strict=True) if p[0] == layer]).nanmean(dim=0)
            for layer in sorted({p[0] for p in self.heads})
        }

    def plot(self, path: str | Path | None = None, tokens: int = 24) -> Any:
        """Layers by tokens (mean over heads), heads by layers (the first token), and the largest activation by layer
        (extra `viz`)."""
        from ..viz.head_figures import new_figure, saved

        rows = self.layers()
        figure = new_figure(11.0, max(3.4, 0.22 * len(rows) + 2.0))
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.6, 1.0, 0.9))
        shown = torch.stack(list(rows.values()))[:, :tokens]
        most = max(self.threshold, float(self.alpha.nan_to_num(0.0).max()))
        drawn = left.imshow(shown.tolist(), aspect="auto", cmap="viridis", vmin=0.0, vmax=most)
        left.set(xlabel="token (from the first)", ylabel="layer", title="column mean, mean of heads")
        left.set_yticks(
            range(0, len(rows), max(1, len(rows) // 16)),
            [str(layer) for layer in list(rows)[:: max(1, len(rows) // 16)]],
        )
        figure.colorbar(drawn, ax=[left, middle], fraction=0.03, pad=0.02)
        grid = [[math.nan] * self.shape[1] for _ in range(self.shape[0])]
        for (layer, head), value in zip(self.heads, self.alpha[:, 0].tolist(), strict=True):
            grid[layer][head] = value
        middle.set_facecolor("#dddddd")
        middle.imshow(grid, aspect="auto", cmap="viridis", vmin=0.0, vmax=most)
        middle.set(xlabel="head", ylabel="layer", title="column mean of token 0")
        if self.activations:
            at = sorted(self.activations)
            right.plot([self.activations[i][0] for i in at], at, marker="o", color="#444444")
            right.set_xscale("log")
            right.set_ylim(max(at) + 0.5, min(at) - 0.5)
            right.set(xlabel="largest |x|", ylabel="layer", title="activations entering a layer")
            right.axvline(MASSIVE, color="#ff1744", linewidth=1)
        else:
            right.axis("off")
        return saved(figure, path)

    def __str__(self) -> str:
        kinds = [self.kind(p) for p in self.heads]
        counted = ", ".join(f"{kinds.count(k)} {k}" for k in ("centralised", "bidirectional", "distributed"))
        lines = [
            f"{len(self.heads)} heads, {self.facts['samples']} inputs; token 0 is a sink in {self.rate(0):.0%} of heads and inputs",
            f"  frames: {counted}",
        ]
        if self.activations:
            layer = max(self.activations, key=lambda n: self.activations[n][0])
            big, times = self.activations[layer]
            lines.append(
                f"  largest activation {big:.1f} ({times:.0f} times the median) enters layer {layer}; {len(self.massive)} massive"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Columns(Intervention):
    """Keeps the column means of each site, norms of values, and what stands out in the residual; edits nothing."""

    residual: bool = True
    tokens: bool = True
    found: dict[int, list[tuple[Tensor, ...]]] = field(default_factory=dict, compare=False, repr=False)
    large: dict[int, list[tuple[Tensor, ...]]] = field(default_factory=dict, compare=False, repr=False)

    observes = True
    needs = property(lambda self: (("tokens",) if self.tokens else ()) + (("residual",) if self.residual else ()))

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Column means by index in the request."""
        B, H, n, m = call.map.shape
        weight = call.row_valid.expand(B, n).float()
        alpha, seen = column_means(call, weight)
        seen = seen.expand(B, -1, m)[:, 0]
        index, valid = call.keys.index.expand(B, m), call.key_valid.expand(B, m)
        # What a uniform map would give each key: the mean of 1 / keys seen over the rows that see it.
        keys = call.map.keys_seen().expand(B, -1, n)[:, 0].float().clamp_min(1)
        uniform = (call.map.seen_by(weight / keys).expand(B, -1, m)[:, 0] / seen.clamp_min(1e-9)).clamp_min(1e-9)
        norms = call.values.float().norm(dim=-1)
        norms = norms / (
            (norms * valid[:, None]).sum(-1, keepdim=True) / valid.sum(-1)[:, None, None].clamp_min(1)
        ).clamp_min(1e-30)
        tokens = call.tokens.ids if self.tokens else None
        ids = None if tokens is None or tokens.shape[1] < m else tokens.to(index.device)[:, call.keys.slot].expand(B, m)
        kept = (alpha, alpha / uniform[:, None], norms, seen, index, valid)
        self.found.setdefault(call.site.layer, []).append(tuple(t.cpu() for t in kept))
        if self.residual:
            x = call.residual.detach().float().abs() * call.row_valid.expand(B, n)[..., None]
            some = [x[b][call.row_valid.expand(B, n)[b]] for b in range(B)]
            median = torch.stack([s.median() for s in some])
            top, where = x.flatten(1).topk(8, dim=1)
            row = where // x.shape[2]
            rows = call.rows.index.expand(B, n).gather(1, row)
            named = torch.full_like(row, -1) if ids is None else ids.gather(1, row.clamp_max(m - 1))
            self.large.setdefault(call.site.layer, []).append(
                tuple(t.cpu() for t in (top, rows, where % x.shape[2], median, named))
            )


def sinks(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    *,
    threshold: float = SINK,
    where: Where | None = None,
    residual: bool = True,
) -> Sinks:
    """Sink tokens of every head, massive activations of every layer, and frames, from column sums of the model's own kernel.

    Args:
        model: a model whose attention is steered. inputs: keyword arguments of the model, a batch each.
        threshold: a token is a sink of a head where the mean share that the rows which see it give it is above this, 0 to 1.
        where: the sites; None: the main stack's self-attention.
        residual: also look at what enters each layer; False where the host gives none.

    Raises:
        SelectionError: no inputs, or a threshold outside of 0 to 1.
    """
    if not 0 < threshold < 1:
        raise SelectionError(f"sinks(threshold={threshold}): give a share between 0 and 1.")
    text = getattr(model, "main_input_name", "") == "input_ids"
    probe = _Columns(residual, text, where=Where(kinds="self") if where is None else where)
    pairs, shape = sites_of(model, probe)
    with torch.no_grad(), evaluating(model), steer(model, probe, control=True):
        for batch in inputs:
            model(**batch)
    if not probe.found:
        raise SelectionError("sinks got no inputs; give one batch of keyword arguments of the model or more.")
    heads = tuple(pairs)
    width = max(int(t[4].max()) for parts in probe.found.values() for t in parts) + 1
    by_layer = {layer: [_by_index(t, width) for t in parts] for layer, parts in probe.found.items()}
    alpha, share, excess, norms, frame = [], [], [], [], []
    samples = 0
    for layer, head in heads:
        a, e, v = (torch.cat([part[k][:, head] for part in by_layer[layer]]) for k in range(3))
        samples = len(a)
        alpha.append(a.nanmean(dim=0))
        share.append(torch.where(a.isnan(), math.nan, (a > threshold).double()).nanmean(dim=0))
        excess.append(e.nanmean(dim=0))
        norms.append(v.nanmean(dim=0))
        frame.append(torch.tensor([_frame(row) for row in a], dtype=torch.float64).mean(dim=0))
    activations, massive = _activations(probe)
    facts = {
        "search": "sinks",
        "model": model_digest(model),
        "samples": samples,
        "threshold": threshold,
        "versions": library_versions(),
    }
    stacked = [torch.stack(t) for t in (alpha, share, excess, norms, frame)]
    return Sinks(heads, shape, threshold, *stacked, activations, massive, facts)


def _by_index(kept: tuple[Tensor, ...], width: int) -> list[Tensor]:
    """Slots to indices in the request: [B, H, width] each, NaN where a token has too few rows to say, or does not exist."""
    alpha, excess, norms, seen, index, valid = kept
    out = []
    for t in (alpha, excess, norms):
        full = torch.full((*t.shape[:2], width), math.nan, dtype=torch.float64)
        for b in range(len(t)):
            known = valid[b] & (index[b] >= 0) & (seen[b] >= min(SINK_ROWS, float(seen[b].max())))
            full[b][:, index[b][known]] = t[b][:, known].double()
        out.append(full)
    return out


def _frame(alpha: Tensor) -> list[float]:
    """(entropy over its maximum, share of the largest, share of the ends, number that holds 80 %) of column means [K]."""
    p = alpha[~alpha.isnan()]
    total = float(p.sum())
    if total <= 0 or len(p) < 2:
        return [0.0, 1.0, 1.0, 1.0]
    p = p / total
    entropy = float(torch.special.entr(p).sum()) / math.log(len(p))
    ordered = p.sort(descending=True).values.cumsum(dim=0)
    holding = int((ordered < SHARE).sum()) + 1
    return [entropy, float(p.max()), float(p[0] + p[-1]), float(holding)]


def _activations(probe: _Columns) -> tuple[dict[int, tuple[float, float]], list[Massive]]:
    found, massive = {}, []
    for layer, parts in probe.large.items():
        top, rows, dims, median, ids = (torch.cat([p[k] for p in parts]) for k in range(5))
        times = top / median[:, None].clamp_min(1e-30)
        found[layer] = float(top[:, 0].mean()), float(times[:, 0].mean())
        for b, k in ((top > MASSIVE) & (times > TIMES)).nonzero().tolist():
            token = int(ids[b, k])
            massive.append(
                Massive(
                    layer,
                    b,
                    int(rows[b, k]),
                    int(dims[b, k]),
                    float(top[b, k]),
                    float(times[b, k]),
                    None if token < 0 else token,
                )
            )
    return found, sorted(massive, key=lambda m: -m.value)
