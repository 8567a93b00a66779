"""Column sums, single rows, entropy and the dense map (the reference that every fast path is tested against)."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Attention, assemble, exponential


def dense(att: Attention) -> Tensor:
    """The whole map A [B, H, n, m] in fp32; differentiable. Rows that see no key are zero."""
    _, _, n, m = att.shape
    z = att.scores(slice(0, n), slice(0, m))
    # A finite stand-in for rows of minus infinities, so that neither the map nor its gradient has a NaN.
    blind = torch.isneginf(z).all(dim=-1, keepdim=True)
    z = z.masked_fill_(blind, 0.0)
    if att.sinks is not None:
        sink = att.sinks.to(z.dtype)[None, :, None, None].expand(*z.shape[:3], 1)
        z = torch.cat([z, sink], dim=-1)
    return torch.softmax(z, dim=-1)[..., :m].masked_fill(blind, 0.0)


def column_mass(att: Attention, lse: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """c_j = sum_i w_i A_ij, [B, H, m] in fp32, without storing more than one tile (identity F6).

    Args:
        lse: row log-sum-exp [B, H, n].
        row_weight: [B or 1, n] weights of the query rows (0 leaves a row out), or None for all ones.
    """
    B, H, n, m = att.shape
    out = torch.zeros(B, H, m, dtype=att.stat_dtype, device=att.q.device)
    weight = torch.ones(1, n, dtype=att.stat_dtype, device=att.q.device) if row_weight is None else row_weight
    weight = weight.to(att.stat_dtype).expand(B, n)
    for batch, kv, block in att.tiles():
        heads, keys = att.heads(kv), att.seen_keys(block)
        p = exponential(att.scores(block, keys, batch, kv, lse))
        w = weight[batch, None, None, block].expand(*p.shape[:2], 1, -1)
        out[batch, heads, keys] += torch.matmul(w, p)[:, :, 0]
    return out


def rows(att: Attention, lse: Tensor, index: Tensor) -> Tensor:
    """The rows `index` [r] of the map, [B, H, r, m], in fp32."""
    sub = att.take(index)
    _, _, r, m = sub.shape
    return exponential(sub.scores(slice(0, r), slice(0, m), lse=lse.index_select(2, index)))


def entropy(att: Attention, lse: Tensor) -> Tensor:
    """-sum_j A_ij log A_ij per row, [B, H, n] in fp32, blockwise."""
    if 0 in att.shape:
        return torch.zeros(att.shape[:3], dtype=att.stat_dtype, device=att.q.device)
    tiles, parts = att.tiles(), []
    for batch, kv, block in tiles:
        # exp(-1000) is zero, in fp64 too; minus infinity would make a NaN of the product.
        s = att.scores(block, att.seen_keys(block), batch, kv, lse).clamp_(min=-1000.0)
        parts.append(-(exponential(s.clone()) * s).sum(dim=-1))
    return assemble(tiles, parts)
