"""Mass and partial output of a set of keys (identities F1 and F2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .lse import attend_lse
from .problem import Attention
from .statistics import rows as map_rows

# Below this many keys a gathered product beats a second fused call.
FUSED_SLICE = 256


@dataclass(frozen=True)
class KeyIndex:
    """A boolean key set [B or 1, H or 1, m] as gathered positions.

    Attributes:
        index: [b, h, s] positions, padded with 0. valid: [b, h, s] bool, False for the padding.
        span: (start, stop) when every batch row and head has this one contiguous range.
    """

    index: Tensor
    valid: Tensor
    span: tuple[int, int] | None

    @property
    def size(self) -> int:
        """The largest number of keys of any batch row and head."""
        return self.index.shape[-1]


def index_keys(keys: Tensor) -> KeyIndex:
    """Turn a boolean key set [B or 1, H or 1, m] into gathered positions."""
    counts = keys.sum(dim=-1)
    size = int(counts.max()) if counts.numel() else 0
    # A stable sort of "not in the set" puts the members first, in order.
    index = torch.argsort((~keys).to(torch.int8), dim=-1, stable=True)[..., :size]
    valid = torch.arange(size, device=keys.device) < counts[..., None]
    span = None
    if size and keys.shape[:2] == (1, 1) and int(index[0, 0, -1]) - int(index[0, 0, 0]) == size - 1:
        span = (int(index[0, 0, 0]), int(index[0, 0, -1]) + 1)
    return KeyIndex(index.masked_fill(~valid, 0), valid, span)


def mass(att: Attention, lse: Tensor, keys: Tensor | KeyIndex) -> Tensor:
    """sum_{j in keys} A_ij, [B, H, n] in fp32; exact from the row log-sum-exp."""
    return _group(att, lse, keys, want_values=False)[0]


def partial(att: Attention, lse: Tensor, keys: Tensor | KeyIndex) -> tuple[Tensor, Tensor]:
    """(mass [B, H, n], sum_{j in keys} A_ij v_j [B, H, n, dv]) in fp32."""
    return _group(att, lse, keys, want_values=True)


def leftover(att: Attention, lse: Tensor, keys: Tensor, inside: Tensor) -> Tensor:
    """sum_{j not in keys} A_ij, [B, H, n], without loss of digits where nearly all mass is inside.

    Args:
        keys: [B or 1, H or 1, m] bool. inside: their mass, as `mass` returns it.
    """
    B, H, n, m = att.shape
    outside = (att.visible_total(lse) - inside).clamp_min(0.0)
    close = (outside < 0.1) & ~torch.isneginf(lse)
    if not bool(close.any()):
        return outside
    outside = outside.clone()
    keep = ~keys.expand(B, H, m)
    for b, h in close.any(dim=-1).nonzero().tolist():
        for at in close[b, h].nonzero()[:, 0].split(256):
            p = map_rows(att.one(b, h), lse[b : b + 1, h : h + 1], at)[0, 0]
            outside[b, h, at] = (p * keep[b, h]).sum(dim=-1)
    return outside


def _group(att: Attention, lse: Tensor, keys: Tensor | KeyIndex, want_values: bool) -> tuple[Tensor, Tensor]:
    chosen = keys if isinstance(keys, KeyIndex) else index_keys(keys)
    if chosen.span is not None and chosen.size >= FUSED_SLICE and not att.requires_grad and att.sinks is None:
        return _fused_span(att, lse, chosen.span)
    return _gathered(att, lse, chosen, want_values)


def _gathered(att: Attention, lse: Tensor, chosen: KeyIndex, want_values: bool) -> tuple[Tensor, Tensor]:
    B, H, n, _ = att.shape
    dtype, size = att.stat_dtype, chosen.size
    m_out = torch.zeros(B, H, n, dtype=dtype, device=att.q.device)
    u_out = torch.zeros(B, H, n, att.v.shape[-1] if want_values else 0, dtype=dtype, device=att.q.device)
    if not size:
        return m_out, u_out
    sub = _gather_problem(att, chosen)
    pieces: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for batch, kv, rows in sub.tiles():
        heads = slice(kv.start * sub.groups, kv.stop * sub.groups)
        z = sub.scores(rows, slice(0, size), batch, kv)
        p = torch.exp(z - lse[batch, heads, rows].masked_fill(torch.isneginf(lse[batch, heads, rows]), 0.0)[..., None])
        b, h, r, _ = p.shape
        if want_values:
            values = sub.v[batch, kv].to(dtype)
            u = torch.matmul(p.reshape(b, h // sub.groups, sub.groups * r, size), values).reshape(b, h, r, -1)
        else:
            u = u_out[batch, heads, rows]
        if att.requires_grad:
            pieces.setdefault((batch.start, kv.start), []).append((p.sum(dim=-1), u))
        else:
            m_out[batch, heads, rows] = p.sum(dim=-1)
            u_out[batch, heads, rows] = u
    if not att.requires_grad:
        return m_out, u_out
    whole = {key: tuple(torch.cat(t, dim=2) for t in zip(*tiles, strict=True)) for key, tiles in pieces.items()}
    batches, kvs = sorted({b for b, _ in whole}), sorted({g for _, g in whole})
    join = lambda i: torch.cat([torch.cat([whole[b, g][i] for g in kvs], dim=1) for b in batches])  # noqa: E731
    return join(0), join(1)


def _gather_problem(att: Attention, chosen: KeyIndex) -> Attention:
    """The same rows against the gathered keys only; visibility is baked into a float mask."""
    B, H, n, m = att.shape
    size, dtype = chosen.size, att.stat_dtype
    shared_heads = chosen.index.shape[1] == 1
    kv = att.k.shape[1]
    if shared_heads:
        at = chosen.index.expand(B, kv, size)
        k, v = (_take(t, at) for t in (att.k, att.v))
    else:
        at = chosen.index.expand(B, H, size)
        # Each query head has its own keys, so the gathered K is per query head; only `size` keys of it.
        group = torch.arange(H, device=att.q.device) // att.groups
        b = torch.arange(B, device=att.q.device)[:, None, None]
        k, v = (t[b, group[None, :, None], at] for t in (att.k, att.v))
    mask = torch.zeros(1, 1, 1, size, dtype=dtype, device=att.q.device)
    mask = mask.masked_fill(~chosen.valid[:, :, None], -torch.inf)
    full = att.additive(dtype)
    if full is not None:
        rows = full.shape[2]
        h = max(full.shape[1], chosen.index.shape[1])
        b = max(full.shape[0], chosen.index.shape[0])
        picked = chosen.index[:, :, None].expand(b, h, rows, size)
        mask = mask + full.expand(b, h, rows, m).gather(-1, picked)
    if att.causal:
        i = torch.arange(n, device=att.q.device)
        mask = mask.masked_fill(chosen.index[:, :, None] > i[None, None, :, None], -torch.inf)
    bias = None
    if att.key_bias is not None:
        h = max(att.key_bias.shape[1], chosen.index.shape[1])
        b = max(att.key_bias.shape[0], chosen.index.shape[0])
        bias = att.key_bias.expand(b, h, m).gather(-1, chosen.index.expand(b, h, size))
    return att.replace(k=k, v=v, mask=mask, causal=False, sinks=None, key_bias=bias)


def _take(t: Tensor, at: Tensor) -> Tensor:
    return t.gather(2, at[..., None].expand(*at.shape, t.shape[-1]))


def _fused_span(att: Attention, lse: Tensor, span: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A large contiguous set by further fused calls on the slice of K and V."""
    B, H, n, _ = att.shape
    start, stop = span
    out = torch.zeros(B, H, n, att.v.shape[-1], dtype=att.stat_dtype, device=att.q.device)
    part = torch.full((B, H, n), -torch.inf, dtype=att.stat_dtype, device=att.q.device)
    # Under causality the rows inside the span form a square causal block and the later ones see all of it.
    blocks = [(0, n, False)] if not att.causal else [(start, min(stop, n), True), (stop, n, False)]
    mask = att.mask4()
    for first, last, causal in blocks:
        if first >= last:
            continue
        keys = slice(start, min(stop, start + last - first) if causal else stop)
        piece = None
        if mask is not None:
            rows = slice(first, last) if mask.shape[2] > 1 else slice(None)
            piece = mask[:, :, rows, keys if mask.shape[3] > 1 else slice(None)]
        bias = None if att.key_bias is None else att.key_bias[:, :, keys]
        sub = att.replace(
            q=att.q[:, :, first:last],
            k=att.k[:, :, keys],
            v=att.v[:, :, keys],
            mask=piece,
            causal=causal,
            key_bias=bias,
        )
        o, l = attend_lse(sub)
        out[:, :, first:last] = o.to(out.dtype)
        part[:, :, first:last] = l
    share = torch.exp(part - lse.masked_fill(torch.isneginf(lse), 0.0))
    return share, out * share[..., None]
