"""Column sums, single rows, entropy and the dense map (the reference that every fast path is tested against)."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Attention


def dense(att: Attention) -> Tensor:
    """The whole map A [B, H, n, m] in fp32; differentiable. Rows that see no key are zero."""
    _, _, n, m = att.shape
    z = att.scores(slice(0, n), slice(0, m))
    if att.sinks is not None:
        sink = att.sinks.to(z.dtype)[None, :, None, None].expand(*z.shape[:3], 1)
        z = torch.cat([z, sink], dim=-1)
    # A finite stand-in for rows of minus infinities, so that neither the map nor its gradient has a NaN.
    blind = torch.isneginf(z[..., :m]).all(dim=-1, keepdim=True)
    p = torch.softmax(z.masked_fill(blind, 0.0), dim=-1)[..., :m]
    return p.masked_fill(blind, 0.0)


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
    for batch, kv, rows in _column_tiles(att):
        heads = slice(kv.start * att.groups, kv.stop * att.groups)
        keys = att.seen_keys(rows)
        p = _probabilities(att, lse, rows, keys, batch, kv)
        w = weight[batch, None, None, rows].expand(p.shape[0], p.shape[1], 1, -1)
        out[batch, heads, keys] += torch.matmul(w, p)[:, :, 0]
    return out


def rows(att: Attention, lse: Tensor, index: Tensor) -> Tensor:
    """The rows `index` [r] of the map, [B, H, r, m], in fp32."""
    sub = att.replace(q=att.q.index_select(2, index), causal=False, mask=_row_mask(att, index))
    part = lse.index_select(2, index)
    _, _, r, m = sub.shape
    z = sub.scores(slice(0, r), slice(0, m))
    return torch.exp(z - part.masked_fill(torch.isneginf(part), 0.0)[..., None])


def entropy(att: Attention, lse: Tensor) -> Tensor:
    """-sum_j A_ij log A_ij per row, [B, H, n] in fp32, blockwise."""
    B, H, n, _ = att.shape
    out = torch.zeros(B, H, n, dtype=att.stat_dtype, device=att.q.device)
    for batch, kv, block in _column_tiles(att):
        heads = slice(kv.start * att.groups, kv.stop * att.groups)
        p = _probabilities(att, lse, block, att.seen_keys(block), batch, kv)
        out[batch, heads, block] = torch.special.entr(p).sum(dim=-1)
    return out


def _probabilities(att: Attention, lse: Tensor, rows: slice, keys: slice, batch: slice, kv: slice) -> Tensor:
    heads = slice(kv.start * att.groups, kv.stop * att.groups)
    part = lse[batch, heads, rows]
    part = part.masked_fill(torch.isneginf(part), 0.0)[..., None]
    plain = att.softcap is None and att.mask is None and att.key_bias is None and not att.requires_grad
    if plain and batch.stop - batch.start == 1 and kv.stop - kv.start == 1:
        # One fused product with the log-sum-exp as its additive term; causality touches the last square only.
        q = att.q[batch.start, heads, rows].to(att.stat_dtype)
        k = att.k[batch.start, kv.start, keys].to(att.stat_dtype)
        h, r, d = q.shape
        z = torch.addmm(part.reshape(h * r, 1).neg(), q.reshape(h * r, d), k.t(), alpha=att.scale)
        z = z.view(1, h, r, -1)
        if att.causal and keys.stop > rows.start:
            corner = z[..., rows.start :]
            i = torch.arange(rows.start, rows.stop, device=z.device)
            j = torch.arange(rows.start, keys.stop, device=z.device)
            corner.masked_fill_(j[None, :] > i[:, None], -torch.inf)
        return z.exp_()
    return torch.exp(att.scores(rows, keys, batch, kv) - part)


def _column_tiles(att: Attention) -> list[tuple[slice, slice, slice]]:
    return att.tiles()


def _row_mask(att: Attention, index: Tensor) -> Tensor | None:
    mask = att.mask4()
    if mask is not None and mask.shape[2] > 1:
        mask = mask.index_select(2, index)
    if not att.causal:
        return mask
    seen = torch.arange(att.shape[3], device=index.device)[None, :] <= index[:, None]
    if mask is None:
        return seen[None, None]
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, -torch.inf)
