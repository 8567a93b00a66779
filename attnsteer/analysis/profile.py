"""`head_profile`: what each head looks at and writes, in one table with intervals over inputs.

Maps come in blocks of rows from the kernel's log-sum-exp, and are reduced at once: memory is that of a block. Means are over
the valid rows that see two keys or more, then over inputs. Agreement with a property: Vig et al., "BERTology meets
biology" (ICLR 2021,
arXiv 2006.15222; salesforce/provis at b23402d, compute_edge_features.py, whose weight of a pair is its attention if above
`min_attn`). Previous, duplicate and induction: TransformerLens' head_detector.py. Sensitivity and separability: our definitions
after Mudarisov et al. (2025, arXiv 2508.17821), whose text could not be read. Ring profiles: ours, after Li et al. (2023,
arXiv 2303.13731).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..call import AttnCall
from ..errors import SelectionError, UnsupportedHost
from ..hosts.base import imported
from ..intervention import Intervention
from ..search.screen import sites_of
from ..search.state import model_digest
from ..steering import steer
from ..versions import library_versions
from ..where import Where
from .projections import HeadWeights, Norm, Readout, evaluating, head_weights
from .table import Column, HeadTable, of_scores

Pair = tuple[int, int]
Pattern = Callable[["Block"], Tensor]
# Above this an entry counts as high attention, and fewer counted pairs than that say nothing (the shipped scripts of ProVis).
THETA, COUNT = 0.3, 100
# Of attention sinks (Gu et al. 2025), in column means; a column needs so many rows.
SINK, SINK_ROWS = 0.3, 4
TOP = 5
ROWS = 256


@dataclass
class Block:
    """Some rows of a map, for patterns: 0-based indices in the request, and the tokens.

    Attributes:
        i: [B, r, 1] index of each row. j: [B, 1, m] of each key. rows: token ids of the rows [B, r, 1], or None. keys: [B, 1, m].
        before: token ids of the token before each key [B, 1, m], -1 before the first. seen: bool [B, r, m], keys that rows see.
    """

    i: Tensor
    j: Tensor
    rows: Tensor | None
    keys: Tensor | None
    before: Tensor | None
    seen: Tensor


def _ids(name: str, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    if block.rows is None:
        raise SelectionError(f"the pattern {name!r} compares tokens, and this call has no input_ids.")
    return block.rows, block.keys, block.before


def _duplicate(b: Block) -> Tensor:
    rows, keys, _ = _ids("duplicate", b)
    return (rows == keys) & (b.j < b.i)


def _induction(b: Block) -> Tensor:
    rows, _, before = _ids("induction", b)
    return (before == rows) & (b.j <= b.i) & (b.j >= 1)


# f(i, j): row i should look at key j.
PATTERNS: dict[str, Pattern] = {
    "first": lambda b: (b.j == 0) & (b.i >= 0),
    "self": lambda b: b.j == b.i,
    "previous": lambda b: b.j == b.i - 1,
    "duplicate": _duplicate,
    "induction": _induction,
}


@dataclass
class _Sums:
    """Sums over the rows of one input by reading: name -> (numerators [B, H], denominators [B, H])."""

    found: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, name: str, top: Tensor, bottom: Tensor) -> None:
        a, b = self.found.get(name, (0.0, 0.0))
        self.found[name] = (a + top.double(), b + bottom.double().expand_as(top))


@dataclass(frozen=True)
class _Profiled(Intervention):
    """Reduces the rows of each site; edits nothing."""

    patterns: Mapping[str, Pattern] = field(default_factory=dict, compare=False, repr=False)
    theta: float | None = THETA
    spans: Mapping[str, Sequence[Sequence[tuple[int, int]]]] = field(default_factory=dict, compare=False, repr=False)
    tokens: bool = True
    images: bool = False
    grid: tuple[int, int] | None = None
    ahead: int = 0
    rows: str = "applicable"
    found: dict[int, list[dict[str, tuple[Tensor, Tensor]]]] = field(default_factory=dict, compare=False, repr=False)
    last: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict, compare=False, repr=False)

    observes = True
    needs = property(lambda self: (("tokens",) if self.tokens else ()) + (("images",) if self.images else ()))

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Reduce all valid rows of this call."""
        A_map, sums = call.map, _Sums()
        B, H, n, m = A_map.shape
        seen_keys = A_map.keys_seen().expand(B, -1, n)[:, 0]
        valid = call.row_valid.expand(B, n) & (seen_keys >= 2)
        key_valid = call.key_valid.expand(B, m)
        i, j = call.rows.index.expand(B, n), call.keys.index.expand(B, m)
        ids = call.tokens.ids if self.tokens else None
        slot = call.rows.slot
        keys = before = row_ids = None
        if ids is not None and ids.shape[1] >= m:
            ids = ids.to(A_map.device)
            keys = ids[:, call.keys.slot].expand(B, m)
            row_ids = ids[:, slot].expand(B, n)
            before = torch.cat([keys.new_full((B, 1), -1), keys[:, :-1]], dim=1).masked_fill(j < 1, -1)
        spans = {name: call.span_keys(given)[:, 0].expand(B, m) for name, given in self.spans.items()}
        if self.images:
            spans["image"] = call.image_keys()[:, 0].expand(B, m)
        # Causal stacks see what is at or before them; windows and packing are in `keys_seen` and in the map's zeros.
        for start in range(0, n, ROWS):
            at = torch.arange(start, min(n, start + ROWS), device=A_map.device)
            A = A_map.rows(at).float()
            w = valid[:, at].float()
            block = Block(
                i[:, at, None],
                j[:, None],
                None if row_ids is None else row_ids[:, at, None],
                None if keys is None else keys[:, None],
                None if before is None else before[:, None],
                _visible(call, A, i[:, at], j, key_valid),
            )
            self._block(sums, A, w, block, spans, seen_keys[:, at].float())
        self._columns(call, sums, valid)
        self.found.setdefault(call.site.layer, []).append({k: (a.cpu(), b.cpu()) for k, (a, b) in sums.found.items()})
        self._last_row(call, out)

    def _block(
        self, sums: _Sums, A: Tensor, w: Tensor, block: Block, spans: Mapping[str, Tensor], visible: Tensor
    ) -> None:
        """A [B, H, r, m] of rows with weight w [B, r]."""
        count = w.sum(dim=1)[:, None].expand(A.shape[:2])
        mean = lambda name, x: sums.add(name, torch.einsum("bhr,br->bh", x, w), count)  # noqa: E731
        total = A.sum(dim=-1)
        entropy = torch.special.entr(A).sum(dim=-1)
        mean("entropy", entropy)
        mean("eff", entropy.exp())
        mean("dispersion", entropy.exp() / visible[:, None].clamp_min(1))
        squares, cubes = A.pow(2).sum(dim=-1), A.pow(3).sum(dim=-1)
        mean("sensitivity", (squares - 2 * cubes + squares.pow(2)).clamp_min(0).sqrt())
        mean(f"top_mass_{TOP}", A.topk(min(TOP, A.shape[-1]), dim=-1).values.sum(dim=-1))
        if self.grid is None:
            mean("distance", (A * (block.i - block.j).abs()[:, None]).sum(dim=-1))
        else:
            self._rings(sums, A)
        for name, keys in spans.items():
            inside = A * keys[:, None, None]
            share = inside.sum(dim=-1)
            mean(f"mass_{name}", share)
            size = keys.sum(dim=-1).float()[:, None, None]
            spread = torch.special.entr(inside / share.clamp_min(1e-30)[..., None]).sum(dim=-1) / size.log().clamp_min(
                1e-6
            )
            known = (share > 1e-12).float() * w[:, None] * (size[..., 0] > 1)[..., None].float()
            sums.add(f"concentration_{name}", ((1 - spread) * known).sum(dim=-1), known.sum(dim=-1))
            sums.add(
                f"chance_mass_{name}",
                ((block.seen * keys[:, None]).sum(-1) / visible.clamp_min(1) * w).sum(1)[:, None],
                count[:, :1],
            )
        for name, pattern in self.patterns.items():
            P = (pattern(block) & block.seen).float()
            rows = w if self.rows == "all" else w * (P.sum(dim=-1) > 0)
            hit = (A * P[:, None]).sum(dim=-1)
            sums.add(name, torch.einsum("bhr,br->bh", hit, rows), torch.einsum("bhr,br->bh", total, rows))
            base = (P.sum(dim=-1) / block.seen.sum(dim=-1).clamp_min(1) * rows).sum(dim=1)[:, None]
            sums.add(f"chance_{name}", base, rows.sum(dim=1)[:, None])
            if self.theta is not None:
                high = (self.theta <= A).float() * w[:, None, :, None]
                sums.add(f"agreement_{name}", (high * P[:, None]).sum(dim=(2, 3)), high.sum(dim=(2, 3)))
                base = (P * w[..., None]).sum(dim=(1, 2))[:, None]
                sums.add(f"chance_agreement_{name}", base, (block.seen * w[..., None]).sum(dim=(1, 2))[:, None])

    def _rings(self, sums: _Sums, A: Tensor) -> None:
        """Mean attention by Chebyshev distance on the patch grid, and to what stands before it (CLS, registers)."""
        height, width = self.grid
        if A.shape[-1] != self.ahead + height * width or A.shape[2] != A.shape[-1]:
            raise SelectionError(
                f"grid={self.grid} and ahead={self.ahead} make {self.ahead + height * width} tokens; the map is of "
                f"{A.shape[2]} by {A.shape[-1]} (in blocks of {ROWS} rows)."
            )
        patches = A[:, :, self.ahead :]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        place = torch.stack([y.flatten(), x.flatten()], dim=1).to(A.device)
        gap = (place[:, None] - place[None]).abs()
        ring, straight = gap.amax(dim=-1), gap.double().pow(2).sum(dim=-1).sqrt().to(A.dtype)
        inner = patches[..., self.ahead :]
        count = torch.full(A.shape[:2], float(patches.shape[2]), device=A.device)
        sums.add("to_first", patches[..., : self.ahead].sum(dim=(2, 3)), count)
        sums.add("distance", (inner * straight).sum(dim=(2, 3)), count)
        for k in range(min(4, max(height, width))):
            here = ring == k
            sums.add(f"ring_{k}", (inner * here).sum(dim=(2, 3)), count)
            size = here.sum(dim=-1)
            some = size > 0
            density = ((inner * here).sum(dim=-1) / size.clamp_min(1))[:, :, some].sum(dim=-1)
            sums.add(f"ring_density_{k}", density, torch.full_like(count, float(some.sum())))

    def _columns(self, call: AttnCall, sums: _Sums, valid: Tensor) -> None:
        """Column means by the causal divisor: how much each key gets from the rows that see it."""
        weight = call.row_valid.expand(valid.shape).float()
        alpha, share = column_means(call, weight)
        first = call.keys.first.expand(len(alpha), -1)[:, None]
        one = torch.ones(alpha.shape[:2], device=alpha.device)
        sums.add("sink_first", (alpha * first).sum(dim=-1), one)
        known = share.expand_as(alpha) >= SINK_ROWS
        most = torch.where(known, alpha, -1.0).amax(dim=-1).clamp_min(0)
        sums.add("sink_largest", most, one)
        sums.add("sinks", ((alpha > SINK) & known).sum(dim=-1).float(), one)

    def _last_row(self, call: AttnCall, out: Tensor) -> None:
        """The last valid row of each input: its map, values and output, for readings of what the head writes there."""
        B, H, n, m = call.map.shape
        end = call.row_valid.expand(B, n).float().cumsum(dim=1).argmax(dim=1)
        kept = {"out": out.detach()[torch.arange(B, device=out.device), :, end].float().cpu()}
        A = torch.stack([call.map.rows(end[b : b + 1])[b, :, 0] for b in range(B)])
        kept["map"] = A.float().cpu()
        # Of long contexts the values would be all that this keeps.
        kept["values"] = call.values.float().cpu() if m <= 2048 else None
        self.last.setdefault(call.site.layer, []).append(kept)


def _visible(call: AttnCall, A: Tensor, i: Tensor, j: Tensor, key_valid: Tensor) -> Tensor:
    """bool [B, r, m]: keys that rows may see; of windows, those that some head gives anything."""
    seen = key_valid[:, None] & torch.ones(1, i.shape[1], 1, dtype=torch.bool, device=A.device)
    if call.site.causal and call.site.kind == "self":
        seen = seen & (j[:, None] <= i[..., None])
    return seen & (A > 0).any(dim=1)


def column_means(call: AttnCall, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha [B, H, m]: mean share that a key gets from the rows that see it, how many rows that are [B or 1, H or 1, m])."""
    seen = call.map.seen_by(weight)
    alpha = call.map.column_mass(weight) / seen.clamp_min(1e-9)
    return alpha.masked_fill(seen <= 0, 0.0), seen


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
        inputs: keyword arguments of the model, each a batch. where: the sites; None: the main stack's self-attention.
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
    where = Where(kinds="self") if where is None else where
    text = grid is None and _has_tokens(model)
    chosen = {n: p for n, p in PATTERNS.items() if text} | dict(patterns or {})
    probe = _Profiled(chosen, theta, dict(spans or {}), text, images, grid, ahead if grid else 0, rows, where=where)
    pairs, shape = sites_of(model, probe)
    found = _weights(model, where, weights, bool(words) or target is not None)
    scales: list[Tensor] = []
    with torch.no_grad(), evaluating(model), steer(model, probe, control=True):
        for batch in inputs:
            final = None if target is None or found[1].norm is None else model.get_submodule(found[1].norm.name)
            with _scales(final, found[1].norm if final is not None else None, batch, scales):
                model(**batch)
    if not probe.found:
        raise SelectionError("head_profile got no inputs; give one batch of keyword arguments of the model or more.")
    heads = tuple(pairs)
    columns = _table(probe, heads)
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
    model: nn.Module, where: Where, wanted: bool, needed: bool
) -> tuple[dict[int, HeadWeights], Readout | None] | None:
    """The weights of the heads where they are wanted and to be had."""
    if not (wanted or needed):
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


def _table(probe: _Profiled, heads: tuple[Pair, ...]) -> dict[str, Column]:
    names = list(dict.fromkeys(n for parts in probe.found.values() for part in parts for n in part))
    raw = {}
    for name in names:
        columns = []
        for layer, head in heads:
            parts = [part[name] for part in probe.found[layer]]
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


def _at_the_last_row(
    probe: _Profiled, weights: Mapping[int, HeadWeights], heads: tuple[Pair, ...]
) -> dict[str, Column]:
    """How far the strongest keys of the last row can be told apart by what they bring, |A_j x_j - s| with x_j = v_j W_O."""
    separable, gap = [], []
    for layer, head in heads:
        G = weights[layer].output[head].double().cpu()
        G = G @ G.T
        s_values, g_values = [], []
        for part in probe.last[layer]:
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


def weight_readings(
    weights: Mapping[int, HeadWeights], readout: Readout | None, heads: tuple[Pair, ...], fold: bool = True
) -> dict[str, Column]:
    """Readings from weights alone, each through a [dv, dv] matrix: no [D, D] or [V, V] product is formed.

    Args:
        fold: gains of the norms in front of the values and of the unembedding are part of the copying score.
    """
    copying, ov_rank, ov_largest, qk_rank = {}, {}, {}, {}
    middle = None
    if readout is not None:
        E, U = readout.embedding.double(), readout.unembedding.double()
        if fold and readout.norm is not None:
            U = readout.norm.gain.double()[:, None] * U
        # W_U W_E, [D, D] of the model's width, once.
        middle = U @ E
    for layer, head in heads:
        w = weights[layer]
        V, O = w.value[w.kv(head)].double(), w.output[head].double()
        O = O if w.post is None else O * w.post.gain.double()
        gain = w.norm.gain.double()[:, None] if fold and w.norm is not None else 1.0
        if middle is not None:
            values = torch.linalg.eigvals(O @ middle @ (gain * V))
            size = float(values.abs().sum())
            copying[layer, head] = float(values.real.sum()) / size if size else math.nan
        spectrum = _singular(gain * V, O.T)
        ov_rank[layer, head], ov_largest[layer, head] = _participation(spectrum), float(spectrum.max())
        if w.query is not None:
            Q, K = w.query[head].double(), w.key[w.kv(head)].double()
            qk_rank[layer, head] = _participation(_singular(gain * Q, gain * K))
    columns = {
        "ov_rank": of_scores(ov_rank, heads, "participation ratio of OV's singular values"),
        "ov_largest": of_scores(ov_largest, heads, "largest singular value of OV"),
    }
    if qk_rank:
        columns["qk_rank"] = of_scores(qk_rank, heads, "participation ratio of QK's singular values, offset 0")
    if copying:
        columns["copying"] = of_scores({p: v for p, v in copying.items() if v == v}, heads, "copying score of OV")
    return columns


def _singular(A: Tensor, B: Tensor) -> Tensor:
    """Singular values of A B^T, for tall A and B, by QR: a [d, d] problem."""
    return torch.linalg.svdvals(torch.linalg.qr(A).R @ torch.linalg.qr(B).R.T)


def _participation(s: Tensor) -> float:
    p = s.pow(2)
    return float(p.sum().pow(2) / p.pow(2).sum()) if float(p.sum()) else 0.0


def _written(probe: _Profiled, weights: Mapping[int, HeadWeights], layer: int, head: int) -> Tensor:
    """What a head writes at the last row of each input, [N, D]."""
    rows = torch.cat([part["out"][:, head] for part in probe.last[layer]])
    w = weights[layer]
    written = rows @ w.output[head].cpu()
    return written if w.post is None else written * w.post.gain.cpu()


def _words(
    probe: _Profiled, weights: Mapping[int, HeadWeights], readout: Readout, count: int, norm: str, tokenizer: Any
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
    probe: _Profiled,
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
