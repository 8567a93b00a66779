"""`Attention`: one attention computation, and the only code that knows every form of mask."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A tile of scores of about this many elements stays inside a core's cache on CPU and saturates a GPU.
CPU_TILE = 1 << 20
GPU_TILE = 1 << 26
LOG2E = math.log2(math.e)


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
    def held(self) -> tuple[str, ...]:
        """Which of q, k and v are there already: all, but where a host reads a cache only when it is asked to."""
        return ("q", "k", "v")

    @property
    def groups(self) -> int:
        """Query heads per kv head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def stat_dtype(self) -> torch.dtype:
        """Statistics and merges run in fp32, or fp64 where the inputs are."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @staticmethod
    def cast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in the dtype in which the model's kernel takes them: that of an autocast, which leaves doubles alone."""
        kind = q.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return q, k, v
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
        return q, k, v

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
        index, kv = _places(tuple(heads), self.groups, self.q.device)
        at = lambda t, dim: t if t is None or t.shape[dim] == 1 else t.index_select(dim, index)  # noqa: E731
        return self.replace(
            q=self.q.index_select(1, index),
            k=self.k.index_select(1, kv),
            v=self.v.index_select(1, kv),
            mask=at(self.mask4(), 1),
            sinks=at(self.sinks, 0),
            key_bias=at(self.key_bias, 1),
        )

    def one(self, b: int, h: int) -> Attention:
        """The computation of one batch row and one head."""
        g, row, head = h // self.groups, slice(b, b + 1), slice(h, h + 1)
        at = lambda t: None if t is None else pick(t, row, head)  # noqa: E731
        return self.replace(
            q=self.q[row, head],
            k=self.k[row, g : g + 1],
            v=self.v[row, g : g + 1],
            mask=at(self.mask4()),
            sinks=None if self.sinks is None else self.sinks[head],
            key_bias=at(self.key_bias),
        )

    def key_slice(self, kv: slice) -> Attention:
        """The computation of the query heads that read these kv heads; views."""
        heads = self.heads(kv)
        at = lambda t: None if t is None else pick(t, slice(None), heads)  # noqa: E731
        return self.replace(
            q=self.q[:, heads],
            k=self.k[:, kv],
            v=self.v[:, kv],
            mask=at(self.mask4()),
            sinks=None if self.sinks is None else self.sinks[heads],
            key_bias=at(self.key_bias),
        )

    def pairs(self, b: Tensor, h: Tensor) -> Attention:
        """The computations of the batch rows `b` and heads `h`, [P] each, as a batch of P with one head; without sinks."""
        g, (B, H, _, _) = h // self.groups, self.shape
        # What is the same for all of them stays one.
        at = lambda t: t if t is None or t.shape[:2] == (1, 1) else t.expand(B, H, *t.shape[2:])[b, h, None]  # noqa: E731
        return self.replace(
            q=self.q[b, h, None],
            k=self.k[b, g, None],
            v=self.v[b, g, None],
            mask=at(self.mask4()),
            sinks=None,
            key_bias=at(self.key_bias),
        )

    def take(self, index: Tensor) -> Attention:
        """The same computation for the query rows `index` [r]."""
        mask = self.mask4()
        if mask is not None and mask.shape[2] > 1:
            mask = mask.index_select(2, index)
        if self.causal:
            seen = (torch.arange(self.k.shape[2], device=index.device) <= index[:, None])[None, None]
            if mask is None:
                mask = seen
            else:
                mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
        return self.replace(q=self.q.index_select(2, index), mask=mask, causal=False)

    def until(self, stop: int) -> Attention:
        """The same rows against the first `stop` keys only; for rows that see none of the others."""
        own = lambda t: t if t is None or t.shape[-1] == 1 else t[..., :stop]  # noqa: E731
        return self.replace(
            k=self.k[:, :, :stop], v=self.v[:, :, :stop], mask=own(self.mask4()), key_bias=own(self.key_bias)
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
        return None if mask is None else additive(mask, dtype)

    def reach(self) -> Tensor | None:
        """A bound of each row's scores, |q| |k| scale over all keys, [B, H, n] without gradient; None where something is added."""
        if not self.k.numel() or self.key_bias is not None or (self.mask is not None and self.mask.dtype != torch.bool):
            return None
        q, k = (t.detach().norm(dim=-1, dtype=self.stat_dtype) for t in (self.q, self.k))
        most = k.amax(dim=-1, keepdim=True).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return q * most * abs(self.scale)

    def scores(
        self,
        rows: slice | Tensor,
        keys: slice,
        batch: slice = slice(None),
        kv: slice = slice(None),
        lse: Tensor | None = None,
    ) -> Tensor:
        """z, less the row's `lse` where given, for a tile: [b, g * groups, rows, keys] in `stat_dtype`.

        Minus infinity where invisible, so that exp(z - lse) is the map, also in rows that see no key at all.

        Args:
            rows, keys: with explicit start and stop; or rows by number, int64 [rows], which are read back. batch, kv: batch rows
            and kv heads of the tile. lse: row log-sum-exp [B, H, n] of the whole problem.
        """
        dtype, r = self.stat_dtype, self.groups
        heads = self.heads(kv)
        q, k = self.q[batch, heads, rows], self.k[batch, kv, keys].to(dtype)
        b, h, n, d = q.shape
        # Folding the query heads of a kv group into the rows avoids repeating K.
        q, k = q.to(dtype).reshape(b * h // r, r * n, d), k.flatten(0, 1).transpose(1, 2)
        shift = q.new_zeros(1, 1, 1)
        if lse is not None:
            lse = lse[batch, heads, rows]
            shift = lse.masked_fill(torch.isneginf(lse), 0.0).neg().reshape(b * h // r, r * n, 1)
        if self.softcap is None:
            z = torch.baddbmm(shift, q, k, alpha=self.scale)
        else:
            z = self.softcap * torch.tanh(torch.bmm(q, k) * (self.scale / self.softcap)) + shift
        z = z.reshape(b, h, n, k.shape[2])
        mask = self.mask4()
        if mask is not None:
            z += additive(pick(mask, batch, heads, rows, keys), dtype)
        if self.key_bias is not None:
            z += pick(self.key_bias, batch, heads, keys)[:, :, None].to(dtype)
        if not self.causal:
            return z
        i = rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop, device=z.device)
        # Keys before `first` are seen by every row of the tile.
        first = max(keys.start, (int(rows.min()) if isinstance(rows, Tensor) else rows.start) + 1)
        if keys.stop > first:
            j = torch.arange(first, keys.stop, device=z.device)
            z[..., first - keys.start :].masked_fill_(j > i[:, None], -torch.inf)
        return z

    def heads(self, kv: slice) -> slice:
        """The query heads that read these kv heads."""
        r = self.groups
        return slice((kv.start or 0) * r, None if kv.stop is None else kv.stop * r)

    def tiles(self) -> list[tuple[slice, slice, slice]]:
        """(batch, kv heads, rows) tiles that bound the memory of a blockwise pass."""
        B, H, n, m = self.shape
        kv, cpu = self.k.shape[1], self.q.device.type == "cpu"
        limit = CPU_TILE if cpu else GPU_TILE
        # On CPU a large problem goes one kv head of one batch row at a time.
        b, g = (1, 1) if cpu and B * H * n * m > limit else (max(1, B), kv)
        block = max(1, min(n, max(16, limit // max(1, b * g * self.groups * m))))
        return [
            (slice(i, i + b), slice(j, j + g), slice(s, min(s + block, n)))
            for i in range(0, B, b)
            for j in range(0, kv, g)
            for s in range(0, n, block)
        ]

    def seen_keys(self, rows: slice) -> slice:
        """The keys that a row block can see by causality alone."""
        m = self.k.shape[2]
        return slice(0, min(m, rows.stop) if self.causal else m)

    def visible_total(self, lse: Tensor) -> Tensor:
        """The sum of each row of the map, [B, H, n]: 1, less the learned sink's share, 0 for blind rows.

        `lse` is the row log-sum-exp with minus infinity for rows that see no key.
        """
        return (1.0 - self.sink_share(lse)).masked_fill(torch.isneginf(lse), 0.0)

    def sink_share(self, lse: Tensor) -> Tensor:
        """What the learned sink takes of each row, [B, H, n]; zero without one, and in rows that see no key."""
        if self.sinks is None:
            return torch.zeros_like(lse)
        return torch.exp(self.sinks.to(lse.dtype)[None, :, None] - lse.masked_fill(torch.isneginf(lse), torch.inf))


def _places(heads: tuple[int, ...], groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """These query heads and the kv heads that they read, as tensors."""
    # Traced code would be compiled anew for a memory that grows.
    return (_made_places if torch.compiler.is_compiling() else _known_places)(heads, groups, device)


def key_heads(heads: Sequence[int], groups: int, device: torch.device) -> Tensor:
    """The kv heads that these query heads read, int64."""
    return _places(tuple(heads), groups, device)[1]


def _made_places(heads: tuple[int, ...], groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    index = torch.tensor(heads, device=device)
    return index, index // groups


@functools.lru_cache(maxsize=1024)
def _known_places(heads: tuple[int, ...], groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _made_places(heads, groups, device)


def dense(att: Attention) -> Tensor:
    """The whole map A [B, H, n, m] in fp32; differentiable. Rows that see no key are zero."""
    return dense_with_sink(att)[0]


def dense_with_sink(att: Attention) -> tuple[Tensor, Tensor]:
    """(the whole map, what a learned sink takes of each row [B, H, n]): one less the row's sum, without that difference."""
    _, _, n, m = att.shape
    z = att.scores(slice(0, n), slice(0, m))
    # A finite stand-in for rows of minus infinities, so that neither the map nor its gradient has a NaN.
    blind = torch.isneginf(z).all(dim=-1, keepdim=True)
    z = z.masked_fill_(blind, 0.0)
    if att.sinks is not None:
        sink = att.sinks.to(z.dtype)[None, :, None, None].expand(*z.shape[:3], 1)
        z = torch.cat([z, sink], dim=-1)
    p = torch.softmax(z, dim=-1).masked_fill(blind, 0.0)
    return p[..., :m], p[..., m] if att.sinks is not None else p.new_zeros(p.shape[:3])


def pick(t: Tensor, *at: slice | Tensor) -> Tensor:
    """`t[at]`, with the dimensions of size one left as they are (they broadcast)."""
    return t[tuple(s if size > 1 else slice(None) for s, size in zip(at, t.shape, strict=False))]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean or float mask as an additive float with true minus infinities."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.to(dtype).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)


def visible(mask: Tensor) -> Tensor:
    """Where a boolean or float mask lets a row see a key, bool of its shape."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def any_last(flags: Tensor) -> Tensor:
    """`flags.any(dim=-1)`; on CPU, where the maximum of bytes takes a fortieth of its time, by that."""
    cpu = flags.device.type == "cpu" and flags.shape[-1] > 0
    return flags.view(torch.uint8).amax(dim=-1).view(torch.bool) if cpu else flags.any(dim=-1)


def sees_any(mask: Tensor) -> Tensor:
    """Whether a boolean or float mask [..., m] lets a row see any key, bool of its shape without the last."""
    if mask.dtype == torch.bool:
        return any_last(mask)
    return visible(mask.amax(dim=-1)) if mask.shape[-1] else any_last(visible(mask))


def exponential(z: Tensor) -> Tensor:
    """exp(z), in place. On CPU base two takes a third of the time, and a fortieth where results are subnormal."""
    return z.mul_(LOG2E).exp2_() if z.device.type == "cpu" else z.exp_()


def assemble(tiles: Sequence[tuple[slice, slice, slice]], parts: Sequence[Tensor]) -> Tensor:
    """One tensor from its parts [b, h, rows, ...], one for each of the `tiles`, in their order."""
    for dim in (2, 1, 0):
        run = len({tile[dim].start for tile in tiles})
        if run > 1:
            parts = [torch.cat(parts[i : i + run], dim=dim) for i in range(0, len(parts), run)]
    return parts[0]
