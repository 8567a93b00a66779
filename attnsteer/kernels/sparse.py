"""Attention of rows that see some blocks of keys only, without a mask over keys: one pass of the kernel for the rows of each block,
merged by their log-sum-exps (identity F8)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .lse import attend_lse
from .problem import Attention, pick, visible

# Up to so many rows the mask is smaller than the bookkeeping of blocks.
FEW = 64


@dataclass(frozen=True)
class KeyBlocks:
    """Which blocks of keys each row sees.

    Attributes:
        block: int64 [B or 1, m], the block of each key, from 0 to C - 1; a key of block -1 is seen as before by all rows.
        keep: bool [B or 1, H or 1, n, C], whether a row sees the keys of a block (those that the model lets it see).
    """

    block: Tensor
    keep: Tensor

    @property
    def count(self) -> int:
        """C, the number of blocks."""
        return self.keep.shape[-1]

    def seen(self) -> Tensor:
        """`keep` for each key, bool [B or 1, H or 1, n, m]."""
        B = max(len(self.block), len(self.keep))
        index = self.block.clamp_min(0)[:, None, None].expand(B, *self.keep.shape[1:3], -1)
        return self.keep.expand(B, -1, -1, -1).gather(-1, index) | (self.block < 0)[:, None, None]


def hide_blocks(att: Attention, blocks: KeyBlocks) -> Attention:
    """The same computation with the blocks as a mask of every row and key: exact in every form, and as large as the map."""
    mask, seen = att.mask4(), blocks.seen()
    if mask is None:
        return att.replace(mask=seen)
    return att.replace(mask=mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf))


def attend_blocks(att: Attention, blocks: KeyBlocks) -> tuple[Tensor, Tensor]:
    """Output [B, H, n, dv] and row log-sum-exp [B, H, n] of rows that see the kept blocks only.

    Reads back how many rows each block has. Gradients, learned sinks, compiled code and a few rows take the mask instead.
    """
    B, H, n, m = att.shape
    if att.requires_grad or torch.compiler.is_compiling() or att.sinks is not None or n <= FEW or 0 in att.shape:
        return attend_lse(hide_blocks(att, blocks))
    out = torch.zeros(B, H, n, att.v.shape[-1], dtype=att.stat_dtype, device=att.q.device)
    lse = torch.full((B, H, n), -torch.inf, dtype=att.stat_dtype, device=att.q.device)
    diagonal = _diagonal(att, blocks)
    if att.causal and diagonal is None:
        lower = torch.ones(n, m, dtype=torch.bool, device=att.q.device).tril()[None, None]
        mask = att.mask4()
        if mask is not None:
            lower = mask & lower if mask.dtype == torch.bool else mask.masked_fill(~lower, -torch.inf)
        att = att.replace(mask=lower, causal=False)
    layouts = [_layout(blocks.block[b], blocks.count) for b in range(len(blocks.block))]
    for b in range(B):
        order, bounds = layouts[b if len(layouts) > 1 else 0]
        row = att if order is None else _reordered(att, b, order)
        for h in range(H):
            own = row.one(b if order is None else 0, h)
            keep = pick(blocks.keep, slice(b, b + 1), slice(h, h + 1))[0, 0]
            if diagonal is not None:
                keep = keep & _before(bounds, n, blocks.count, keep.device)
                _own_blocks(own, diagonal, out[b, h], lse[b, h])
            _other_blocks(own, keep, bounds, out[b, h], lse[b, h])
    return out.to(att.v.dtype), lse


def _diagonal(att: Attention, blocks: KeyBlocks) -> int | None:
    """The size of blocks under causality where they are equal slices of the keys and every row sees its own; else None."""
    n, m = att.shape[2:]
    if not att.causal or n != m or att.mask is not None or att.key_bias is not None or len(blocks.block) > 1:
        return None
    block = blocks.block[0]
    size = -(-m // blocks.count)
    plain = torch.arange(m, device=block.device) // size
    own = blocks.keep.gather(-1, block.clamp_min(0)[None, None, :, None].expand(*blocks.keep.shape[:2], -1, 1))
    return size if bool(torch.equal(block, plain)) and bool(own.all()) else None


def _before(bounds: list[int], n: int, count: int, device: torch.device) -> Tensor:
    """bool [n, C]: the blocks that end before a row."""
    stops = torch.tensor(bounds[1 : count + 1], device=device)
    return torch.arange(n, device=device)[:, None] >= stops


def _layout(block: Tensor, count: int) -> tuple[Tensor | None, list[int]]:
    """(order of the keys that puts blocks one after the other, or None; where each begins and ends, those of no block last)."""
    block = torch.where(block < 0, count, block)
    sorted_already = bool((block[1:] >= block[:-1]).all())
    order = None if sorted_already else block.argsort(stable=True)
    sizes = torch.bincount(block, minlength=count + 1)
    return order, [0, *sizes.cumsum(0).tolist()]


def _reordered(att: Attention, b: int, order: Tensor) -> Attention:
    """One batch row of `att` with its keys in another order."""
    at = slice(b, b + 1)
    mask, bias = att.mask4(), att.key_bias
    if mask is not None:
        mask = pick(mask, at)
        mask = mask if mask.shape[-1] == 1 else mask.index_select(-1, order)
    bias = None if bias is None else pick(bias, at).index_select(-1, order)
    k, v = att.k[at].index_select(2, order), att.v[at].index_select(2, order)
    return att.replace(q=att.q[at], k=k, v=v, mask=mask, key_bias=bias)


def _own_blocks(att: Attention, size: int, out: Tensor, lse: Tensor) -> None:
    """Each row over the keys of its own block up to itself, [n, dv] and [n] in place; blocks of `size`, the last may be short."""
    n = len(out)
    full = n // size
    for start, count, rows in ((0, full, size), (full * size, 1, n - full * size)):
        if count and rows:
            stop = start + count * rows
            split = lambda t: t[0, 0, start:stop].reshape(count, 1, rows, -1)  # noqa: B023, E731
            o, l = attend_lse(att.replace(q=split(att.q), k=split(att.k), v=split(att.v)))
            out[start:stop] = o.reshape(stop - start, -1)
            lse[start:stop] = l.reshape(-1)


def _other_blocks(att: Attention, keep: Tensor, bounds: list[int], out: Tensor, lse: Tensor) -> None:
    """Merge the kept blocks of one head into `out` [n, dv] and `lse` [n], in place."""
    n, count = keep.shape
    # The rows of all blocks, block after block.
    rows = keep.t().nonzero()[:, 1]
    ends = keep.sum(dim=0).cumsum(0).tolist()
    starts = [0, *ends]
    for c in range(count + 1):
        lo, hi = bounds[c], bounds[c + 1]
        if lo == hi:
            continue
        every = c == count or ends[c] - starts[c] == n
        index = None if every else rows[starts[c] : ends[c]]
        if index is not None and not len(index):
            continue
        part = att.replace(causal=False) if every else _rows(att, index)
        o, l = attend_lse(_keys(part, slice(lo, hi)))
        _merge(out, lse, o[0, 0], l[0, 0], index)


def _rows(att: Attention, index: Tensor) -> Attention:
    mask = att.mask4()
    if mask is not None and mask.shape[2] > 1:
        mask = mask.index_select(2, index)
    return att.replace(q=att.q.index_select(2, index), mask=mask, causal=False)


def _keys(att: Attention, keys: slice) -> Attention:
    mask, bias = att.mask4(), att.key_bias
    if mask is not None:
        mask = mask[..., keys] if mask.shape[-1] > 1 else mask
        # A block that all of these rows see whole needs none.
        mask = None if bool(visible(mask).all()) and (mask.dtype == torch.bool or not bool(mask.any())) else mask
    bias = None if bias is None else bias[..., keys]
    return att.replace(k=att.k[:, :, keys], v=att.v[:, :, keys], mask=mask, key_bias=bias)


def _merge(out: Tensor, lse: Tensor, o: Tensor, l: Tensor, index: Tensor | None) -> None:
    """Add attention over further keys to that of the rows `index` (None: all), in place."""
    old = lse if index is None else lse[index]
    new = torch.logaddexp(old, l)
    safe = new.masked_fill(torch.isneginf(new), 0.0)
    weight = torch.exp(l - safe)[:, None]
    before = out if index is None else out[index]
    # The weights of both add up to one.
    merged = torch.lerp(before, o.to(before.dtype), weight)
    if index is None:
        out.copy_(merged)
        lse.copy_(new)
    else:
        out.index_copy_(0, index, merged)
        lse.index_copy_(0, index, new)
