"""Column sums, single rows and entropy of a map that is not built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import Attention, additive, assemble, exponential


def column_mass(att: Attention, lse: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """c_j = sum_i w_i A_ij, [B, H, m] in fp32, without storing more than one tile (identity F6).

    Args:
        lse: row log-sum-exp [B, H, n].
        row_weight: [B or 1, n] weights of the query rows (0 leaves a row out), or None for all ones; or r weights of each
            row by head, [B, H, r, n]: then [B, H, r, m] comes back.
    """
    B, H, n, m = att.shape
    weight = torch.ones(1, n, dtype=att.stat_dtype, device=att.q.device) if row_weight is None else row_weight
    single = weight.ndim == 2
    weight = weight.to(att.stat_dtype)
    weight = weight[:, None, None].expand(B, H, 1, n) if single else weight
    out = torch.zeros(B, H, weight.shape[2], m, dtype=att.stat_dtype, device=att.q.device)
    for batch, kv, block in att.tiles():
        heads, keys = att.heads(kv), att.seen_keys(block)
        p = exponential(att.scores(block, keys, batch, kv, lse))
        out[batch, heads, :, keys] += torch.matmul(weight[batch, heads, :, block], p)
    return out[:, :, 0] if single else out


def seen_by(att: Attention, row_weight: Tensor) -> Tensor:
    """sum of `row_weight` [B or 1, n] over the rows that see each key, [B or 1, H or 1, m] in fp32."""
    _, _, n, m = att.shape
    weight = row_weight.to(att.stat_dtype)
    mask = att.mask4()
    if mask is None:
        if not att.causal:
            return weight.sum(dim=-1)[:, None, None].expand(-1, 1, m)
        # Key j is seen by the rows from j on.
        later = weight.flip(-1).cumsum(dim=-1).flip(-1)
        return torch.nn.functional.pad(later, (0, max(0, m - n)))[:, None, :m]
    seen = additive(mask, att.stat_dtype).isneginf().logical_not_().expand(-1, -1, n, m)
    if att.causal:
        seen = seen & torch.ones(n, m, dtype=torch.bool, device=mask.device).tril()
    B = max(len(seen), len(weight))
    return torch.einsum("bhnm,bn->bhm", seen.to(att.stat_dtype).expand(B, -1, -1, -1), weight.expand(B, -1))


def keys_seen(att: Attention) -> Tensor:
    """How many keys each row may see, whatever it gives them, int64 [B or 1, H or 1, n]."""
    _, _, n, m = att.shape
    mask, bias, device = att.mask4(), att.key_bias, att.q.device
    causal = (torch.arange(n, device=device) + 1).clamp_max(m) if att.causal else torch.full((n,), m, device=device)
    if mask is None and bias is None:
        return causal[None, None]
    seen = torch.ones(1, 1, 1, m, dtype=torch.bool, device=device)
    if mask is not None:
        seen = seen & additive(mask, att.stat_dtype).isneginf().logical_not_()
    if bias is not None:
        seen = seen & bias.isneginf().logical_not_()[:, :, None]
    if att.causal:
        seen = seen & torch.ones(n, m, dtype=torch.bool, device=device).tril()
    return seen.sum(dim=-1).expand(-1, -1, n)


def rows(att: Attention, lse: Tensor, index: Tensor) -> Tensor:
    """The rows `index` [r] of the map, [B, H, r, m], in fp32."""
    sub = att.take(index)
    _, _, r, m = sub.shape
    return exponential(sub.scores(slice(0, r), slice(0, m), lse=lse.index_select(2, index)))


def entropy(
    att: Attention,
    lse: Tensor,
    cells: Sequence[tuple[Tensor, Tensor]] = (),
    rest: Tensor | None = None,
) -> Tensor:
    """-sum_j A_ij log A_ij per row, [B, H, n] in fp32, blockwise.

    Args:
        cells: disjoint sets of keys with factors of the map, (bool [B or 1, H or 1, m], [B, H, n]). rest: of the other keys.
    """
    B, H, n, m = att.shape
    if 0 in att.shape:
        return torch.zeros(att.shape[:3], dtype=att.stat_dtype, device=att.q.device)
    tiles, parts, total = att.tiles(), [], att.visible_total(lse)
    for batch, kv, block in tiles:
        heads, keys = att.heads(kv), att.seen_keys(block)
        # exp(-1000) is zero, in fp64 too; minus infinity would make a NaN of the product.
        s = att.scores(block, keys, batch, kv, lse).clamp_(min=-1000.0)
        p = exponential(s.clone())
        # What rounding of the lse leaves of a row's sum: it would enter the entropy times (entropy - 1), so it is taken out.
        found, known = p.sum(dim=-1), total[batch, heads, block]
        blind = (found <= 0) | (known <= 0)
        scale = torch.where(blind, 1.0, known / found.masked_fill(blind, 1.0))
        if rest is None:
            parts.append(-scale * ((p * s).sum(dim=-1) + found * scale.log()))
            continue
        factor = rest[batch, heads, block, None].expand(s.shape)
        for chosen, c in cells:
            inside = chosen.expand(B, H, m)[batch, heads, None, keys]
            factor = torch.where(inside, c[batch, heads, block, None], factor)
        edited = p * factor
        terms = edited * s + p * torch.xlogy(factor, factor)
        parts.append(-scale * (terms.sum(dim=-1) + edited.sum(dim=-1) * scale.log()))
    return assemble(tiles, parts)
