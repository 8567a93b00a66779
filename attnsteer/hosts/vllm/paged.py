"""Keys and values of requests in vLLM's paged cache: where they lie, read as tensors, and attention over them without gathering."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...edits import Reweight, Share
from ...errors import UnsupportedHost
from ...forms import Moves
from ...kernels import Attention
from . import split

# How the keys of a block lie in memory.
ACROSS, ALONG = "lane, token", "token, lane"


@dataclass(frozen=True)
class Layout:
    """How a layer's cache is read: logically [blocks, kv heads, tokens, keys and values].

    Attributes:
        halves: whether a block holds all keys, then all values; else each token has its keys beside its values.
        keys: `ACROSS` or `ALONG`, or the place of (token, lane) in a block as an index [tokens * lanes].
    """

    halves: bool = False
    keys: str | Tensor = ALONG

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """(k, v) [Hkv, len(blocks) * size, d] of some blocks."""
        _, heads, size, both = cache.shape
        d = both // 2
        held = cache.index_select(0, blocks)
        if not self.halves:
            held = held.transpose(0, 1).reshape(heads, -1, both)
            return held[..., :d], held[..., d:]
        held = held.reshape(len(blocks), heads, 2 * size, d).transpose(0, 1)
        k, v = held[:, :, :size], held[:, :, size:]
        if isinstance(self.keys, Tensor):
            k = k.reshape(heads, len(blocks), size * d)[..., self.keys].view(heads, len(blocks), size, d)
        elif self.keys == ACROSS:
            k = k.reshape(heads, len(blocks), d, size).transpose(-1, -2)
        return k.reshape(heads, -1, d), v.reshape(heads, -1, d)


def cpu_layout(isa: str, dtype: torch.dtype, size: int, d: int, cache_dtype: str) -> Layout:
    """Where vLLM's CPU kernels keep a block: found by writing one, not from a table.

    Raises:
        UnsupportedHost: what was written is not to be found again.
    """
    from vllm import _custom_ops as ops

    def written(x: Tensor) -> tuple[Tensor, Tensor]:
        held = torch.zeros(2, 1, size * 2, d, dtype=dtype)
        k, v = held.chunk(2, dim=2)
        x = x.to(dtype)[:, None].contiguous()
        slots = torch.arange(size) + size
        ops.cpu_attn_reshape_and_cache(x, x, k, v, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype=cache_dtype)
        return k[1, 0].reshape(-1).long(), v[1, 0].reshape(-1).long()

    # Token and lane in two writes, so that half precision holds both.
    token = torch.arange(size)[:, None].expand(size, d)
    lane = torch.arange(d)[None].expand(size, d)
    (kt, vt), (kl, vl) = written(token), written(lane)
    place, every = kt * d + kl, torch.arange(size * d)
    if not torch.equal(vt * d + vl, every) or not torch.equal(place.sort().values, every):
        raise UnsupportedHost(
            f"vLLM's CPU cache ({isa}, {dtype}, blocks of {size}, {d} lanes) does not hold what was written into it in a form that "
            "is known here; this version of vLLM keeps it otherwise."
        )
    if torch.equal(place, every):
        return Layout(True, ALONG)
    if torch.equal(place.view(d, size).T.reshape(-1), every):
        return Layout(True, ACROSS)
    return Layout(True, torch.argsort(place))


class PagedAttention(Attention):
    """The attention of requests whose keys and values stay in the cache until somebody reads them."""

    def __init__(
        self,
        q: Tensor,
        kv_heads: int,
        size: int,
        make: Callable[[], tuple[Tensor, Tensor]],
        scale: float,
        mask: Tensor | None = None,
        causal: bool = False,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ):
        """`make` gives k and v, [B, kv_heads, size, d]."""
        values = {"q": q, "scale": scale, "mask": mask, "causal": causal, "softcap": softcap, "sinks": sinks}
        for name, value in {**values, "key_bias": None, "_make": make, "_kv": (kv_heads, size)}.items():
            object.__setattr__(self, name, value)

    def _read(self) -> tuple[Tensor, Tensor]:
        found = self.__dict__.get("_pair")
        if found is None:
            found = self._make()
            object.__setattr__(self, "_pair", found)
        return found

    @property
    def k(self) -> Tensor:  # type: ignore[override]
        """[B, Hkv, m, d]."""
        return self._read()[0]

    @property
    def v(self) -> Tensor:  # type: ignore[override]
        """[B, Hkv, m, d]."""
        return self._read()[1]

    @property
    def held(self) -> tuple[str, ...]:
        """Which of q, k and v are there already."""
        return ("q", "k", "v") if "_pair" in self.__dict__ else ("q",)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (*self.q.shape[:3], self._kv[1])

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self._kv[0]

    def replace(self, **changes: object) -> Attention:
        own = {n: getattr(self, n) for n in ("q", "scale", "mask", "causal", "softcap", "sinks", "key_bias")}
        own |= {n: changes[n] if n in changes else getattr(self, n) for n in ("k", "v")}
        return Attention(**{**own, **changes})

    def select(self, heads: Sequence[int] | None) -> Attention:
        if heads is None or len(heads) == self.q.shape[1]:
            return self
        whole = Attention(self.q, self.q[:, :: self.groups], self.q[:, :: self.groups], self.scale, sinks=self.sinks)
        part = whole.select(heads)
        index = torch.tensor(heads, device=self.q.device) // self.groups

        def make() -> tuple[Tensor, Tensor]:
            k, v = self._read()
            return k.index_select(1, index), v.index_select(1, index)

        return PagedAttention(
            part.q, len(heads), self._kv[1], make, self.scale, self.mask, self.causal, self.softcap, part.sinks
        )


@dataclass(eq=False)
class Decoding:
    """Decode rows of some requests at one layer, one each: what `split` reads.

    Attributes:
        q: [B, H, d]. cache, layout: of the layer. table: int32 [B, blocks]. length, first, pad: int64 [B], see `split`.
    """

    q: Tensor
    cache: Tensor
    layout: Layout
    table: Tensor
    length: Tensor
    first: Tensor
    pad: Tensor
    scale: float

    def halves(self, keys: Tensor, heads: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(out, lse) of the keys inside a set [B or 1, h or 1, slots], and of those outside: [B, h, 1, d] and [B, h, 1]."""
        _, kv_heads, size, both = self.cache.shape
        d, every = both // 2, self.q.shape[1]
        index, kv = _places(tuple(heads), every // kv_heads)
        q = self.q if len(heads) == every else self.q.index_select(1, index)
        B, h = q.shape[:2]
        outs = torch.empty(2, B, h, d)
        sums = torch.empty(2, B, h)
        block = kv_heads * size * both
        split.compiled()(
            q.contiguous().numpy(), self.cache.view(-1).numpy(), (block, size * both, size * d), self.layout.keys == ACROSS,
            self.table.numpy(), self.length.numpy(), self.first.numpy(), self.pad.numpy(), keys.contiguous().numpy(), kv.numpy(),
            self.scale, size, outs[0].numpy(), outs[1].numpy(), sums[0].numpy(), sums[1].numpy(),
        )  # fmt: skip
        return outs[0][:, :, None], sums[0][:, :, None], outs[1][:, :, None], sums[1][:, :, None]


@functools.lru_cache(maxsize=1024)
def _places(heads: tuple[int, ...], groups: int) -> tuple[Tensor, Tensor]:
    """These query heads, and the kv heads that they read."""
    with torch.inference_mode(False):
        index = torch.tensor(heads)
        return index, index // groups


class PagedForms:
    """Edits of decode rows that split the keys in two: each is one interpolation between the two parts (see `forms.WholeForms`).

    Args:
        rows: the rows. base: the model's own output, [B, H, 1, d].
    """

    def __init__(self, rows: Decoding, base: Callable[[], Tensor]):
        self.rows, self._base = rows, base
        self._edited: list[tuple[tuple[int, ...], Tensor]] = []

    def takes_bias(self, edit: Any, chosen: Tensor | None) -> bool:
        """Whether an edit is one of two groups, renormalised."""
        if not isinstance(edit, Reweight) or not edit.normalise or len(edit.groups) != 1 or chosen is not None:
            return False
        return all(edit.positive if isinstance(w, Tensor) else w > 0 for w in (edit.rest, edit.groups[0][1]))

    def rescored(self, *args: Any) -> None:
        """Edits that come after another one take the general way."""

    def add_bias(self, key: Any, heads: tuple[int, ...] | None, edit: Reweight, chosen: Tensor | None) -> Moves:
        """Take such an edit; whether it moves anything: 0-d bool, and by batch row."""
        heads = self._all(heads)
        keys, weight = edit.groups[0]
        out_in, lse_in, out, lse = self.rows.halves(keys, heads)
        # Over the weight of the rest, so that rows which see nothing else stay.
        shift = _log(weight) - _log(edit.rest)
        share = torch.sigmoid(lse_in + shift - lse)
        self._edited.append((heads, torch.lerp(out, out_in, share[..., None])))
        moves = (lse_in > -torch.inf) & (lse > -torch.inf) & (torch.as_tensor(shift) != 0)
        by_row = moves.flatten(1).any(dim=1)
        return by_row.any(), by_row

    def share(self, heads: tuple[int, ...] | None, edit: Any) -> tuple[Tensor, Tensor] | None:
        """Take a `Share`; the shares before and after, [B, h, 1]. None: not taken."""
        if not isinstance(edit, Share):
            return None
        heads = self._all(heads)
        out_in, lse_in, out, lse = self.rows.halves(edit.keys, heads)
        before = torch.sigmoid(lse_in - lse)
        after = torch.where((before <= 0) | (before >= 1), before, edit.of(before))
        self._edited.append((heads, torch.lerp(out, out_in, after[..., None])))
        return before, after

    def out(self) -> Tensor | None:
        """The output of all heads with the edits taken, [B, H, 1, d]; None where there is none."""
        if not self._edited:
            return None
        out = self._base()
        for heads, own in self._edited:
            out = own if len(heads) == out.shape[1] else out.index_copy(1, torch.tensor(heads), own)
        return out

    def _all(self, heads: tuple[int, ...] | None) -> tuple[int, ...]:
        return tuple(range(self.rows.q.shape[1])) if heads is None else heads


@dataclass(eq=False)
class _Entry:
    """One edit of some rows and heads, and what tells the audit, filled in by the pass.

    Attributes:
        requests: whose rows they are. rows, table, length, pad: of the rows, int64 [b] and int32 [b, blocks], see `Decoding`.
            keys: the set. of: new share of old, or None. shift: what is added to the logarithm of the keys inside, or None.
            told: tensors to fill in.
    """

    requests: Sequence[Any]

    rows: Tensor
    table: Tensor
    length: Tensor
    pad: Tensor
    keys: Tensor
    of: Callable[[Tensor], Tensor] | None
    shift: Tensor | None
    told: tuple[Tensor, ...]


# What of an edit is by row.
_OF_ROWS = ("rows", "length", "pad", "table")


class Together:
    """The edits of all batches of decode rows at one layer, done in one pass when all are known.

    Args:
        query: [tokens, H, d]. cache, layout, scale: of the layer. window: keys that a row sees, 0 for all.
    """

    def __init__(self, query: Tensor, cache: Tensor, layout: Layout, scale: float, window: int):
        self.query, self.cache, self.layout, self.scale, self.window = query, cache, layout, scale, window
        self._entries: dict[tuple[int, ...], list[_Entry]] = {}

    def add(self, heads: tuple[int, ...], entry: _Entry) -> None:
        """One edit more."""
        self._entries.setdefault(heads, []).append(entry)

    def run(self, whole: bool = False) -> Iterator[tuple[Tensor, tuple[int, ...], Tensor]]:
        """(packed rows [b], heads, their outputs [b, h, d]) of all edits.

        Args:
            whole: give all heads of these rows, those that no edit has as the model has them: one pass for all.
        """
        if not whole:
            for heads, entries in self._entries.items():
                rows, length, pad, table = (torch.cat([getattr(e, n) for e in entries]) for n in _OF_ROWS)
                own, at = [], 0
                for e in entries:
                    own.append((e, slice(at, at + len(e.rows)), None))
                    at += len(e.rows)
                yield rows, heads, self._outputs(rows, length, pad, table, heads, own)
            return
        placed = [(e, heads) for heads, entries in self._entries.items() for e in entries]
        if not placed:
            return
        every, length, pad, table = (torch.cat([getattr(e, n) for e, _ in placed]) for n in _OF_ROWS)
        rows, place = every.unique(return_inverse=True)
        # Equal rows have equal values.
        first = torch.empty_like(rows).scatter_(0, place, torch.arange(len(every)))
        own, at, size = [], 0, self.query.shape[1]
        for e, heads in placed:
            index = None if len(heads) == size else torch.tensor(heads)
            own.append((e, place[at : at + len(e.rows)], index))
            at += len(e.rows)
        heads = tuple(range(size))
        yield rows, heads, self._outputs(rows, length[first], pad[first], table[first], heads, own)

    def _outputs(
        self,
        rows: Tensor,
        length: Tensor,
        pad: Tensor,
        table: Tensor,
        heads: tuple[int, ...],
        own: list[tuple[_Entry, Any, Tensor | None]],
    ) -> Tensor:
        """Outputs [b, h, d] of some rows and heads. own: edits, the places of their rows among these, and of their heads."""
        first = (length - self.window).clamp_min(0) if self.window else torch.zeros_like(length)
        query = self.query.index_select(0, rows)
        decoding = Decoding(query, self.cache, self.layout, table, length, first, pad, self.scale)
        wide = max(e.keys.shape[1] if index is None else len(heads) for e, _, index in own)
        member = torch.zeros(len(rows), wide, max(e.keys.shape[2] for e, *_ in own), dtype=torch.bool)
        for e, at, index in own:
            slots = slice(0, e.keys.shape[2])
            if index is None:
                member[at, :, slots] = e.keys
            else:
                member[at[:, None], index, slots] = e.keys
        out_in, lse_in, out, lse = decoding.halves(member, heads)
        share = torch.sigmoid(lse_in - lse)
        for e, at, index in own:
            place = at if index is None else (at[:, None], index)
            new = share[place]
            self._weigh(e, new, lse_in[place], lse[place])
            share[place] = new
        return torch.lerp(out, out_in, share[..., None])[:, :, 0]

    @staticmethod
    def _weigh(entry: _Entry, share: Tensor, lse_in: Tensor, lse: Tensor) -> None:
        """The new share of the keys inside, in place; and what the audit is told."""
        unsure = [i for i, request in enumerate(entry.requests) if request.changed is not True]
        if entry.of is not None:
            before, after = entry.told
            before.copy_(share)
            after.copy_(torch.where((before <= 0) | (before >= 1), before, entry.of(before)))
            share.copy_(after)
            by_row = (before != after).flatten(1).any(dim=1) if unsure else None
        else:
            anywhere, by_row = entry.told
            share.copy_(torch.sigmoid(lse_in + entry.shift - lse))
            moves = (lse_in > -torch.inf) & (lse > -torch.inf) & (entry.shift != 0)
            by_row.copy_(moves.flatten(1).any(dim=1))
            anywhere.copy_(by_row.any())
        for i in unsure:
            # Rows of decoding are on CPU here.
            entry.requests[i].changed = entry.requests[i].changed | bool(by_row[i])


class TogetherForms(PagedForms):
    """The edits of one batch, of those that are done together.

    Args:
        together: of the layer. rows: the rows. packed: where they are among all rows, int64 [B]. base: see `PagedForms`.
        requests: whose they are. groups: how many groups of heads are asked.
    """

    def __init__(
        self, together: Together, rows: Decoding, packed: Tensor, base: Callable[[], Tensor], requests: Sequence[Any],
        groups: int,
    ):  # fmt: skip
        super().__init__(rows, base)
        self._together, self._packed, self._requests = together, packed, requests
        self.taken, self._groups = 0, groups

    @property
    def whole(self) -> bool:
        """Whether each group of heads gave an edit that was taken, so that nothing else is to be written."""
        return self.taken == self._groups

    def _add(self, heads: tuple[int, ...], keys: Tensor, of: Any, shift: Any, told: tuple[Tensor, ...]) -> None:
        rows = self.rows
        entry = _Entry(self._requests, self._packed, rows.table, rows.length, rows.pad, keys, of, shift, told)
        self._together.add(heads, entry)
        self.taken += 1

    def add_bias(self, key: Any, heads: tuple[int, ...] | None, edit: Reweight, chosen: Tensor | None) -> Moves:
        """Take such an edit; what it moves is known when all are done."""
        keys, weight = edit.groups[0]
        told = torch.zeros((), dtype=torch.bool), torch.zeros(len(self._packed), dtype=torch.bool)
        self._add(self._all(heads), keys, None, _log(weight) - _log(edit.rest), told)
        return told

    def share(self, heads: tuple[int, ...] | None, edit: Any) -> tuple[Tensor, Tensor] | None:
        """Take a `Share`; the shares are known when all are done."""
        if not isinstance(edit, Share):
            return None
        heads = self._all(heads)
        before, after = torch.zeros(2, len(self._packed), len(heads), 1).unbind()
        self._add(heads, edit.keys, edit.of, None, (before, after))
        return before, after

    def out(self) -> Tensor | None:
        """The model's own output as it is, if anything was taken: the pass writes the edits. Nobody reads it if all was."""
        if self.whole:
            return self.rows.q[:, :, None]
        return self._base() if self.taken else None


def _log(weight: Tensor | float) -> Tensor:
    return torch.as_tensor(weight, dtype=torch.float32).log()


def takes_split(cache: Tensor, layout: Layout, softcap: float | None, sinks: Tensor | None) -> bool:
    """Whether `split` reads a layer's cache: float32 on CPU, in a form that it knows, with a plain softmax."""
    plain = softcap is None and sinks is None and layout.halves and isinstance(layout.keys, str)
    return plain and cache.dtype == torch.float32 and cache.device.type == "cpu" and cache.is_contiguous()
