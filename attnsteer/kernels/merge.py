"""Merging weighted groups of keys into an edited output (identities F2, F3, F8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import Attention
from .statistics import rows as map_rows

# How much a subtraction may magnify rounding before the row is computed directly: the output of a
# half-precision kernel carries about 2^-9, an fp32 one about 2^-24.
LIMIT = {torch.float16: 4.0, torch.bfloat16: 4.0, torch.float32: 8.0, torch.float64: 1e6}


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key blocks, each (out [B, H, n, dv], lse [B, H, n]) (identity F8)."""
    lse = torch.stack([part[1] for part in parts]).logsumexp(dim=0)
    safe = lse.masked_fill(torch.isneginf(lse), 0.0)
    out = sum(torch.exp(l - safe)[..., None] * o.to(l.dtype) for o, l in parts)
    return out.to(parts[0][0].dtype), lse


def reweight(
    att: Attention,
    out: Tensor,
    lse: Tensor,
    groups: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    rest: Tensor | float,
    normalise: bool,
) -> Tensor:
    """The output of A'_ij = w_{i,g(j)} A_ij, with `rest` for keys in no group; optionally renormalised.

    Renormalising is what adding log w to the scores would do; a learned sink keeps weight one.

    Args:
        out: attention output [B, H, n, dv]. lse: row log-sum-exp [B, H, n].
        groups: (keys bool [B or 1, H or 1, m], weight, mass [B, H, n], partial output [B, H, n, dv]) of
            disjoint sets; weights broadcast to [B, H, n].
        rest: weight of the remaining keys, broadcastable to [B, H, n].
        normalise: divide by the new row sum.

    Returns:
        [B, H, n, dv] in the dtype of `out`. Where all weights are one the row is returned bit for bit.
    """
    dtype = att.stat_dtype
    total = att.visible_total(lse)
    rest = torch.as_tensor(rest, dtype=dtype, device=out.device).expand_as(total)
    gained = [(torch.as_tensor(w, dtype=dtype, device=out.device) - rest) for _, w, _, _ in groups]
    sink = torch.where(torch.isneginf(lse), torch.zeros_like(total), 1.0 - total)
    kept = rest * total + sum(g * m for g, (_, _, m, _) in zip(gained, groups, strict=True))
    new = rest[..., None] * out.to(dtype)
    for g, (_, _, _, u) in zip(gained, groups, strict=True):
        new = new + g[..., None] * u
    scale = (sink + kept) if normalise else torch.ones_like(kept)
    new = new / scale.masked_fill(scale <= 0, 1.0)[..., None]
    blind = (total <= 0) | (scale <= 0)
    new = torch.where(blind[..., None], out.to(dtype), new)
    risky = (rest.abs() > LIMIT[out.dtype] * (sink + kept).clamp_min(0.0)) & ~blind & (rest != 0)
    # Only a group with less weight than the rest can make the difference small against its terms.
    shrunk = torch.zeros_like(risky)
    for g in gained:
        shrunk = shrunk | (g < 0)
    risky = risky & shrunk
    if bool(risky.any()):
        new = _direct(att, lse, groups, rest, sink, normalise, new, risky)
    return new.to(out.dtype)


def _direct(
    att: Attention,
    lse: Tensor,
    groups: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    rest: Tensor,
    sink: Tensor,
    normalise: bool,
    new: Tensor,
    risky: Tensor,
) -> Tensor:
    """The rows in `risky` from their own map rows, without any subtraction."""
    B, H, n, m = att.shape
    new = new.clone()
    for b, h in risky.any(dim=-1).nonzero().tolist():
        at = risky[b, h].nonzero()[:, 0]
        for chunk in at.split(256):
            p = map_rows(att.one(b, h), lse[b : b + 1, h : h + 1], chunk)[0, 0]
            weight = rest[b, h, chunk][:, None].expand(-1, m).clone()
            for keys, w, _, _ in groups:
                inside = keys.expand(B, H, m)[b, h]
                value = torch.as_tensor(w, dtype=p.dtype, device=p.device).expand(B, H, n)[b, h, chunk]
                weight = torch.where(inside[None], value[:, None], weight)
            p = p * weight
            value = att.v[b, h // att.groups].to(p.dtype)
            edited = p @ value
            if normalise:
                norm = sink[b, h, chunk] + p.sum(dim=-1)
                # A row that keeps no weight at all has no renormalised form: it stays as it was.
                edited = torch.where(norm[:, None] > 0, edited / norm.clamp_min(1e-37)[:, None], new[b, h, chunk])
            new[b, h, chunk] = edited
    return new
