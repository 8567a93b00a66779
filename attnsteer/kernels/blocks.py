"""The map of a short call as it is, in blocks of rows with the keys that causality lets them see: where so many scores cost less
than the operators around identities, and nothing has to be read back to gather keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Attention, exponential

# Rows of a block under causality.
BLOCK = 128


@dataclass(frozen=True)
class RowBlocks:
    """softmax(z) of a whole call.

    Attributes:
        blocks: (rows, map [B, H, r, s]); rows of a block see the first s keys only.
        exact: whether rows sum to one but for their own rounding, each of them.
    """

    att: Attention
    blocks: tuple[tuple[slice, Tensor], ...]
    exact: bool

    @staticmethod
    def of(att: Attention, lse: Callable[[], Tensor]) -> RowBlocks:
        """`lse`: gives the row log-sum-exp [B, H, n]; asked where masks, learned sinks or soft-capping are in the call."""
        n = att.shape[2]
        size = -(-n // max(1, round(n / BLOCK))) if att.causal else n
        plain = att.mask is None and att.key_bias is None and att.softcap is None and att.sinks is None
        shift = None if plain else lse()
        blocks = []
        for start in range(0, n, size):
            rows = slice(start, min(n, start + size))
            if plain:
                blocks.append((rows, torch.softmax(_scores(att, rows), dim=-1)))
            else:
                blocks.append((rows, exponential(att.scores(rows, att.seen_keys(rows), lse=shift))))
        return RowBlocks(att, tuple(blocks), plain)

    def column_mass(self, row_weight: Tensor | None = None) -> Tensor:
        """sum_i w_i A_ij, [B, H, m]; `row_weight` [B or 1, n], None: all ones."""
        B, H, _, m = self.att.shape
        total: Tensor | None = None
        for rows, p in self.blocks:
            if row_weight is None:
                part = p.sum(dim=2)
            else:
                part = torch.matmul(row_weight[:, None, None, rows].to(p.dtype), p)[:, :, 0]
            if total is None and part.shape[-1] == m:
                total = part
                continue
            if total is None:
                total = torch.zeros(B, H, m, dtype=p.dtype, device=p.device)
            total[..., : part.shape[-1]] += part
        return total

    def dense(self) -> Tensor:
        """[B, H, n, m]."""
        if len(self.blocks) == 1 and self.blocks[0][1].shape[-1] == self.att.shape[3]:
            return self.blocks[0][1]
        p = self.blocks[0][1]
        A = torch.zeros(self.att.shape, dtype=p.dtype, device=p.device)
        for rows, p in self.blocks:
            A[:, :, rows, : p.shape[-1]] = p
        return A

    def share(self, keys: Tensor, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Another share of each row on `keys` [B or 1, H or 1, m]; no gradient.

        Returns:
            (share before, share after, both [B, H, n]; output [B, H, n, dv] in the dtype of statistics, of any value in rows that
            stay). A learned sink keeps what it has.
        """
        keys, m, tiny = keys[:, :, None], keys.shape[-1], torch.finfo(self.blocks[0][1].dtype).tiny
        parts, inside, outside = [], [], []
        for _, p in self.blocks:
            own = p * (keys if p.shape[-1] == m else keys[..., : p.shape[-1]])
            other = p - own
            parts.append((own, other))
            inside.append(own.sum(dim=-1))
            outside.append(other.sum(dim=-1))
        one = len(parts) == 1
        a, b = (t[0] if one else torch.cat(t, dim=2) for t in (inside, outside))
        if self.exact:
            before = a
        elif self.att.sinks is None:
            # Rounding of the log-sum-exp does not show in shares; those of rows that see no key are zero.
            before = a / (a + b).clamp_min(tiny)
        else:
            before = a
        # What has next to nothing on one side stays. Elsewhere values may be NaN or infinite, and nobody looks.
        after = torch.where(torch.minimum(a, b) <= tiny, before, of(before))
        left = 1.0 - after if self.att.sinks is None else (a + b) - after
        grow, shrink = (after / a)[..., None], (left / b)[..., None]
        outs = []
        for (rows, _), (own, other) in zip(self.blocks, parts, strict=True):
            p = own.mul_(grow if one else grow[:, :, rows]).addcmul_(other, shrink if one else shrink[:, :, rows])
            B, H, r, s = p.shape
            v = (self.att.v if s == m else self.att.v[:, :, :s]).to(p.dtype)
            outs.append(torch.bmm(p.view(B * v.shape[1], -1, s), v.flatten(0, 1)).view(B, H, r, -1))
        return before, after, outs[0] if one else torch.cat(outs, dim=2)


def _scores(att: Attention, rows: slice) -> Tensor:
    """scale q k^T without masks but causality, [B, H, r, s]."""
    dtype, stop = att.stat_dtype, att.seen_keys(rows).stop
    _, H, n, m = att.shape
    q = (att.q if rows.stop - rows.start == n else att.q[:, :, rows]).to(dtype)
    k = (att.k if stop == m else att.k[:, :, :stop]).to(dtype)
    B, g, r, d = q.shape[0], k.shape[1], q.shape[2], q.shape[3]
    hidden = _hidden(rows if att.causal else None, stop, H // g, dtype, q.device)
    z = torch.baddbmm(hidden, q.reshape(B * g, -1, d), k.flatten(0, 1).transpose(1, 2), alpha=att.scale)
    return z.view(B, H, r, stop)


def _hidden(rows: slice | None, keys: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity where a key stands behind its row, [1, groups * rows, keys]; zero for None."""
    make = _made_hidden if torch.compiler.is_compiling() else _known_hidden
    return make(*((0, 0) if rows is None else (rows.start, rows.stop)), keys, groups, dtype, device)


def _made_hidden(start: int, stop: int, keys: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if start == stop:
        return torch.zeros(1, 1, 1, dtype=dtype, device=device)
    one = torch.full((stop - start, keys), -torch.inf, dtype=dtype, device=device).triu(start + 1)
    return one.repeat(groups, 1)[None]


@functools.lru_cache(maxsize=8)
def _known_hidden(start: int, stop: int, keys: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _made_hidden(start, stop, keys, groups, dtype, device)
