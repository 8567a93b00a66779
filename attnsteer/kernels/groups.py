"""Mass and partial output of a set of keys (identities F1 and F2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .lse import attend_lse
from .problem import CPU_TILE, Attention, additive, assemble, exponential, pick

# Below this many keys a gathered product beats a second fused call.
FUSED_SLICE = 256
# A set with at most one hole in so many keys of its span is taken as the span less its holes,
HOLES = 8
# but for the rows that have less than this part of the span's mass outside of the holes: a difference would lose digits.
LEFT = 0.1
# A mass outside a set below this is summed over the other keys instead of subtracted: in fp32 a mass is off by 2^-24 times
# the scores, which reach the hundreds; that of a half-precision kernel by up to 1e-4, then a unit in the last place at most.
NEAR = {torch.float16: 0.05, torch.bfloat16: 0.05, torch.float32: 0.3, torch.float64: 0.05}
# Scores of this size ask for all of what fp32 has above; smaller ones for less, down to what the others have.
FAR = 64.0
# So many rows of a head are summed at a time: their scores stay in the processor's cache.
SOME_ROWS = 128
# Up to this many scores a head costs less than the call that computes it.
SHORT = 1 << 16
# Gathered positions by the tensor that says which keys, with its version.
_INDICES: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class KeyIndex:
    """A boolean key set [B or 1, H or 1, m] as gathered positions.

    Attributes:
        index: [b, h, s] positions, padded with 0. valid: [b, h, s] bool, False for the padding.
        full: no padding. span: (start, stop) when every batch row and head has this one contiguous range.
        some: whether every batch row and head has a key. first: the first of all keys, m where there is none.
        runs: for large sets with few holes, by batch row (or one entry for all): (start, stop, holes); None: not of that form.
    """

    index: Tensor
    valid: Tensor
    full: bool
    span: tuple[int, int] | None
    some: bool = False
    first: int = 0
    runs: tuple[tuple[int, int, KeyIndex | None], ...] | None = None

    @property
    def size(self) -> int:
        """The largest number of keys of any batch row and head."""
        return self.index.shape[-1]


def index_keys(keys: Tensor) -> KeyIndex:
    """Turn a boolean key set [B or 1, H or 1, m] into gathered positions; made once for each tensor, which is freed with it."""
    if torch.compiler.is_compiling():
        return _indexed(keys)
    version = 0 if keys.is_inference() else keys._version
    found = _INDICES.get(keys)
    if found is None or found[0] != version:
        found = _INDICES[keys] = (version, _indexed(keys))
    return found[1]


def _indexed(keys: Tensor) -> KeyIndex:
    counts, m = keys.sum(dim=-1), keys.shape[-1]
    if counts.numel() and m:
        # All that has to be read back at once. The last member is the first one from behind.
        flags = keys.to(torch.int8)
        first = flags.argmax(dim=-1).masked_fill(counts == 0, m).amin()
        last = m - 1 - flags.flip(-1).argmax(dim=-1).amin()
        least, size, first, last = torch.stack([*counts.aminmax(), first, last]).tolist()
    else:
        least, size, first, last = 0, 0, m, -1
    # A stable sort of "not in the set" puts the members first, in order.
    index = torch.argsort((~keys).to(torch.int8), dim=-1, stable=True)[..., :size]
    valid = torch.arange(size, device=keys.device) < counts[..., None]
    span = (first, last + 1) if size and keys.shape[:2] == (1, 1) and last - first == size - 1 else None
    runs = _runs(keys, index, counts) if keys.shape[1] == 1 and least >= FUSED_SLICE else None
    return KeyIndex(index.masked_fill(~valid, 0), valid, least == size, span, least > 0, first, runs)


def _runs(keys: Tensor, index: Tensor, counts: Tensor) -> tuple[tuple[int, int, KeyIndex | None], ...] | None:
    """(start, stop, holes) of each batch row, if none has many holes."""
    last = index.gather(-1, counts[..., None] - 1)[:, 0, 0].tolist()
    found = []
    for b, (start, stop, count) in enumerate(zip(index[:, 0, 0].tolist(), last, counts[:, 0].tolist(), strict=True)):
        missing = stop + 1 - start - count
        if missing * HOLES > count:
            return None
        holes = torch.zeros_like(keys[b : b + 1])
        holes[..., start : stop + 1] = ~keys[b : b + 1, :, start : stop + 1]
        found.append((start, stop + 1, index_keys(holes) if missing else None))
    return tuple(found)


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
    if torch.compiler.is_compiling():
        return masked_group(att, lse, ~keys)[0]
    outside = (att.visible_total(lse) - inside).clamp_min(0.0)
    close = (outside < _near(att)) & ~torch.isneginf(lse)
    if bool(close.any()):
        outside = outside.clone()
        for b, h, at, mass in _other_masses(att, lse, keys, close):
            outside[b, h, at] = mass
    return outside


def _other_masses(
    att: Attention, lse: Tensor, keys: Tensor, wanted: Tensor
) -> Iterator[tuple[Tensor | int, Tensor | int, Tensor, Tensor]]:
    """As `complement`, without the output: (batch row, head, rows, their mass). The sum of a few rows' scores alone takes less than
    half of the time of a kernel that is given them with a mask."""
    n, m = att.shape[2:]
    if n * m <= SHORT:
        for b, h, at, _, found in complement(att, lse, keys, wanted):
            yield b, h, at, found
        return
    for b, h in wanted.any(dim=-1).nonzero().tolist():
        one, own = att.one(b, h), slice(b, b + 1)
        others = (~pick(keys, own, slice(h, h + 1))[0, 0]).to(att.stat_dtype)
        for at in wanted[b, h].nonzero()[:, 0].split(SOME_ROWS):
            seen = slice(0, min(m, int(at[-1]) + 1) if att.causal else m)
            p = exponential(one.scores(at, seen, lse=lse[own, h : h + 1]))
            yield b, h, at, torch.mv(p[0, 0], others[seen])


def _near(att: Attention) -> Tensor | float:
    """`NEAR`, by row where it depends on the scores."""
    least, most = NEAR[torch.float64], NEAR[att.q.dtype]
    reach = att.reach() if att.q.dtype == torch.float32 else None
    return most if reach is None else (most / FAR * reach).clamp(least, most)


def complement(
    att: Attention, lse: Tensor, keys: Tensor, wanted: Tensor
) -> Iterator[tuple[Tensor | int, Tensor | int, Tensor, Tensor, Tensor]]:
    """Attention over the keys that are not in `keys`, for the rows `wanted` [B, H, n], without any subtraction.

    Yields:
        Where r of the rows are: batch row and head (one number each for all, or [r]) and query row [r]; their output over
        those keys [r, dv] and its mass [r].
    """
    B, H, n, m = att.shape
    bias = torch.zeros(keys.shape, dtype=att.stat_dtype, device=lse.device).masked_fill(keys, -torch.inf)
    att = att.replace(sinks=None, key_bias=bias if att.key_bias is None else att.key_bias + bias)
    pairs = wanted.any(dim=-1).nonzero()
    if n * m <= SHORT:
        # One call for many heads, with all of their rows: so little work takes less time than a call.
        for b, h in (some.unbind(dim=1) for some in pairs.split(max(1, CPU_TILE // (m * max(n, att.q.shape[-1]))))):
            out, part = attend_lse(att.pairs(b, h))
            i, at = wanted[b, h].nonzero().unbind(dim=1)
            b, h = b[i], h[i]
            yield b, h, at, out[i, 0, at], torch.exp(part[i, 0, at] - lse[b, h, at])
        return
    for b, h in pairs.tolist():
        one = att.one(b, h)
        index = wanted[b, h].nonzero()[:, 0]
        # With many rows one call for all of them is cheaper: a causal flag stays one.
        whole = 2 * len(index) >= n
        for at in (index,) if whole else index.split(256):
            # Under causality the last of the rows sees most.
            seen = one.until(min(m, int(at[-1]) + 1)) if att.causal and not whole else one
            out, part = attend_lse(one if whole else seen.take(at))
            out, part = (t[0, 0, at] if whole else t[0, 0] for t in (out, part))
            yield b, h, at, out, torch.exp(part - lse[b, h, at])


def masked_group(att: Attention, lse: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """As `partial`, by a pass in which only `keys` are seen: for compiled code, where a set cannot be read to be gathered."""
    hidden = torch.zeros(keys.shape, dtype=att.stat_dtype, device=lse.device).masked_fill(~keys, -torch.inf)[:, :, None]
    mask = att.additive(att.stat_dtype)
    out, part = attend_lse(att.replace(mask=hidden if mask is None else hidden + mask, sinks=None))
    share = torch.exp(part - lse.masked_fill(torch.isneginf(lse), 0.0))
    return share, out.to(att.stat_dtype) * share[..., None]


def _group(att: Attention, lse: Tensor, keys: Tensor | KeyIndex, want_values: bool) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return masked_group(att, lse, keys)
    chosen = keys if isinstance(keys, KeyIndex) else index_keys(keys)
    if chosen.runs is None or att.requires_grad:
        return _gathered(att, lse, chosen, want_values)
    if len(chosen.runs) == 1:
        return _run(att, lse, chosen, chosen.runs[0])
    parts = []
    for b, run in enumerate(chosen.runs):
        one = KeyIndex(chosen.index[b : b + 1], chosen.valid[b : b + 1], chosen.full, None)
        parts.append(_run(_batch_row(att, b), lse[b : b + 1], one, run))
    return torch.cat([m for m, _ in parts]), torch.cat([u for _, u in parts])


def _run(att: Attention, lse: Tensor, chosen: KeyIndex, run: tuple[int, int, KeyIndex | None]) -> tuple[Tensor, Tensor]:
    """A span by fused calls, less its few holes; rows where that would lose digits from the set itself."""
    start, stop, holes = run
    whole, out = _fused_span(att, lse, (start, stop))
    if holes is None:
        return whole, out
    inside, values = _gathered(att, lse, holes, True)
    share = (whole - inside).clamp_min_(0.0)
    out = out.sub_(values)
    thin = share < LEFT * whole
    for b, h in thin.any(dim=-1).nonzero().tolist():
        rows = thin[b, h].nonzero()[:, 0]
        own = KeyIndex(pick(chosen.index, slice(b, b + 1)), pick(chosen.valid, slice(b, b + 1)), chosen.full, None)
        part = _gathered(att.one(b, h).take(rows), lse[b : b + 1, h : h + 1, rows], own, True)
        share[b, h, rows], out[b, h, rows] = part[0][0, 0], part[1][0, 0]
    return share, out


def _batch_row(att: Attention, b: int) -> Attention:
    row = slice(b, b + 1)
    at = lambda t: None if t is None else pick(t, row)  # noqa: E731
    return att.replace(q=att.q[row], k=att.k[row], v=att.v[row], mask=at(att.mask4()), key_bias=at(att.key_bias))


def _gathered(att: Attention, lse: Tensor, chosen: KeyIndex, want_values: bool) -> tuple[Tensor, Tensor]:
    B, H, n, _ = att.shape
    dtype, size, width = att.stat_dtype, chosen.size, att.v.shape[-1] if want_values else 0
    if not size or not B * n:
        zeros = torch.zeros((), dtype=dtype, device=att.q.device).expand(B, H, n, 1 + width)
        return zeros[..., 0], zeros[..., 1:]
    sub = _gather(att, chosen)
    tiles, masses, outs = sub.tiles(), [], []
    for batch, kv, block in tiles:
        heads = sub.heads(kv)
        z = sub.scores(block, slice(0, size), batch, kv, lse)
        p = exponential(_hide(att, chosen, z, batch, heads, block))
        b, h, r, _ = p.shape
        folded = p.reshape(b, h // sub.groups, sub.groups * r, size)
        outs.append(torch.matmul(folded, sub.v[batch, kv, :, :width].to(dtype)).reshape(b, h, r, width))
        masses.append(p.sum(dim=-1))
    return assemble(tiles, masses), assemble(tiles, outs)


def _gather(att: Attention, chosen: KeyIndex) -> Attention:
    """The same rows against the chosen keys only; who sees which of them is left to `_hide`."""
    B, H, _, m = att.shape
    index, size, kv = chosen.index, chosen.size, att.k.shape[1]
    if chosen.span is not None and att.key_bias is None:
        own = slice(*chosen.span)
        return att.replace(k=att.k[:, :, own], v=att.v[:, :, own], mask=None, causal=False, sinks=None)
    # With a set for each query head the gathered K has a head for each of them; only `size` keys of it.
    h = kv if index.shape[1] == 1 else H
    batch = torch.arange(B, device=index.device)[:, None, None]
    head = torch.arange(h, device=index.device)[None, :, None] // (h // kv)
    bias = att.key_bias
    if bias is not None:
        lead = torch.broadcast_shapes(bias.shape[:2], index.shape[:2])
        bias = bias.expand(*lead, m).gather(-1, index.expand(*lead, size))
    k, v = att.k[batch, head, index], att.v[batch, head, index]
    return att.replace(k=k, v=v, mask=None, causal=False, sinks=None, key_bias=bias)


def _hide(att: Attention, chosen: KeyIndex, z: Tensor, batch: slice, heads: slice, rows: slice) -> Tensor:
    """The scores of a tile of `_gather`, minus infinity where the row does not see the key."""
    index = pick(chosen.index, batch, heads)[:, :, None]
    if not chosen.full:
        z = z.masked_fill_(~pick(chosen.valid, batch, heads)[:, :, None], -torch.inf)
    if att.causal:
        i = torch.arange(rows.start, rows.stop, device=z.device)
        z = z.masked_fill_(index > i[:, None], -torch.inf)
    mask = att.mask4()
    if mask is not None:
        mask = pick(mask, batch, heads, rows)
        lead = (*torch.broadcast_shapes(mask.shape[:2], index.shape[:2]), mask.shape[2])
        mask = mask.expand(*lead, att.shape[3]).gather(-1, index.expand(*lead, chosen.size))
        z += additive(mask, z.dtype)
    return z


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
            sinks=None,
            key_bias=bias,
        )
        o, l = attend_lse(sub)
        out[:, :, first:last] = o.to(out.dtype)
        part[:, :, first:last] = l
    share = torch.exp(part - lse.masked_fill(torch.isneginf(lse), 0.0))
    return share, out * share[..., None]
