"""`Attention`: one attention computation, and the only code that knows every form of mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A tile of scores of about this many elements stays inside a core's cache on CPU and saturates a GPU.
CPU_TILE = 1 << 20
GPU_TILE = 1 << 26


@dataclass(frozen=True)
class Attention:
    """What the model is about to compute: `out = softmax(cap(scale * q k^T) + mask) v`.

    Attributes:
        q: [B, H, n, d], k: [B, Hkv, m, d], v: [B, Hkv, m, dv]; query head h reads kv head h // (H // Hkv).
        scale: factor on q k^T.
        mask: None, bool (True: visible) or additive float, broadcastable to [B, H, n, m]. Floats at or
            below half of the dtype's minimum count as minus infinity.
        causal: row i sees keys 0..i (upper-left aligned, as in torch).
        softcap: z <- softcap * tanh(z / softcap) before the mask, or None.
        sinks: learned logits [H] that take part in the softmax and are then dropped, or None.
        key_bias: additive bias [B or 1, H or 1, m] per key, or None; kept apart from the mask because a
            kernel can take it as an extra lane of q and k, so that no [n, m] tensor is built.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None
    key_bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, n, m)."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def groups(self) -> int:
        """Query heads per kv head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def stat_dtype(self) -> torch.dtype:
        """Statistics and merges run in fp32, or fp64 where the inputs are."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient may be asked of the result."""
        tensors = (self.q, self.k, self.v, self.mask, self.key_bias, self.sinks)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def replace(self, **changes: object) -> Attention:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def select(self, heads: Sequence[int] | None) -> Attention:
        """The same computation for some query heads; K and V are repeated only where they must be."""
        if heads is None or len(heads) == self.q.shape[1]:
            return self
        index = torch.tensor(heads, device=self.q.device)
        kv = index // self.groups
        pick = lambda t, dim: t if t is None or t.shape[dim] == 1 else t.index_select(dim, index)  # noqa: E731
        mask = self.mask
        if mask is not None and mask.ndim == 4:
            mask = pick(mask, 1)
        return self.replace(
            q=self.q.index_select(1, index),
            k=self.k.index_select(1, kv),
            v=self.v.index_select(1, kv),
            mask=mask,
            sinks=pick(self.sinks, 0),
            key_bias=pick(self.key_bias, 1),
        )

    def one(self, b: int, h: int) -> Attention:
        """The computation of one batch row and one head."""
        g = h // self.groups

        def at(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            t = t[b : b + 1] if t.shape[0] > 1 else t
            return t[:, h : h + 1] if t.shape[1] > 1 else t

        return self.replace(
            q=self.q[b : b + 1, h : h + 1],
            k=self.k[b : b + 1, g : g + 1],
            v=self.v[b : b + 1, g : g + 1],
            mask=at(self.mask4()),
            sinks=None if self.sinks is None else self.sinks[h : h + 1],
            key_bias=at(self.key_bias),
        )

    def expanded_values(self) -> Tensor:
        """V with one entry per query head, [B, H, m, dv] (a view where H = Hkv)."""
        return self.v if self.groups == 1 else self.v.repeat_interleave(self.groups, dim=1)

    def mask4(self) -> Tensor | None:
        """The mask as a 4-D tensor, or None."""
        if self.mask is None:
            return None
        return self.mask[(None,) * (4 - self.mask.ndim)] if self.mask.ndim < 4 else self.mask

    def additive(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as an additive float with true minus infinities (causality and key bias not included)."""
        mask = self.mask4()
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        return mask.to(dtype).masked_fill(hidden, -torch.inf)

    def scores(self, rows: slice, keys: slice, batch: slice = slice(None), kv: slice = slice(None)) -> Tensor:
        """z for a tile, [b, g * groups, rows, keys], in `stat_dtype`, minus infinity where invisible.

        Args:
            rows, keys: with explicit start and stop. batch, kv: batch rows and kv heads of the tile.
        """
        dtype, r = self.stat_dtype, self.groups
        k = self.k[batch, kv, keys].to(dtype)
        q = self.q[batch, slice((kv.start or 0) * r, None if kv.stop is None else kv.stop * r), rows]
        b, h, n, d = q.shape
        # Folding the query heads of a kv group into the rows avoids repeating K.
        folded = q.to(dtype).reshape(b, h // r, r * n, d)
        z = torch.matmul(folded, k.transpose(-1, -2))
        z = z * self.scale if self.requires_grad else z.mul_(self.scale)
        z = self._cap(z.reshape(b, h, n, k.shape[2]))
        heads = slice((kv.start or 0) * r, None if kv.stop is None else kv.stop * r)
        return self._hide(z, rows, keys, batch, heads)

    def _cap(self, z: Tensor) -> Tensor:
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def _hide(self, z: Tensor, rows: slice, keys: slice, batch: slice, heads: slice) -> Tensor:
        mask = self.mask4()
        if mask is not None:
            part = mask[
                batch if mask.shape[0] > 1 else slice(None),
                heads if mask.shape[1] > 1 else slice(None),
                rows if mask.shape[2] > 1 else slice(None),
                keys if mask.shape[3] > 1 else slice(None),
            ]
            if part.dtype == torch.bool:
                z = z.masked_fill(~part, -torch.inf)
            else:
                z = (z + part.to(z.dtype)).masked_fill(part <= torch.finfo(part.dtype).min / 2, -torch.inf)
        if self.key_bias is not None:
            bias = self.key_bias
            part = bias[batch if bias.shape[0] > 1 else slice(None), heads if bias.shape[1] > 1 else slice(None), keys]
            z = z + part[:, :, None].to(z.dtype)
        if self.causal and keys.stop > rows.start + 1:
            i = torch.arange(rows.start, rows.stop, device=z.device)
            j = torch.arange(keys.start, keys.stop, device=z.device)
            z = z.masked_fill(j[None, :] > i[:, None], -torch.inf)
        return z

    def tiles(self) -> list[tuple[slice, slice, slice]]:
        """(batch, kv heads, rows) tiles that bound the memory of a blockwise pass."""
        B, _, n, m = self.shape
        limit = CPU_TILE if self.q.device.type == "cpu" else GPU_TILE
        kv = self.k.shape[1]
        if self.q.device.type == "cpu":
            block = max(16, min(n, limit // max(1, m * self.groups)))
            return [
                (slice(b, b + 1), slice(g, g + 1), slice(s, min(s + block, n)))
                for b in range(B)
                for g in range(kv)
                for s in range(0, n, block)
            ]
        block = max(16, min(n, limit // max(1, m * self.groups * kv * B)))
        return [(slice(0, B), slice(0, kv), slice(s, min(s + block, n))) for s in range(0, n, block)]

    def seen_keys(self, rows: slice) -> slice:
        """The keys that a row block can see by causality alone."""
        m = self.k.shape[2]
        return slice(0, min(m, rows.stop) if self.causal else m)

    def visible_total(self, lse: Tensor) -> Tensor:
        """The sum of each row of the map, [B, H, n]: 1, less the learned sink's share, 0 for blind rows.

        `lse` is the row log-sum-exp with minus infinity for rows that see no key.
        """
        total = torch.ones_like(lse)
        if self.sinks is not None:
            total = total - torch.exp(self.sinks.to(lse.dtype)[None, :, None] - lse)
        return torch.where(torch.isneginf(lse), torch.zeros_like(total), total)
