"""The account of rows: whose token each row and each key of a forward is. Plain tensors; it knows no library.

A batch row is a line of slots, those of the cache. A slot holds padding or a token of a request; a request's tokens are counted
from its first one that is not padding, whatever stands before or between them:

    slot        0    1    2    3    4    5    6    7    8
                pad  pad  The  cat  sat  down .    It   ran
    valid       -    -    x    x    x    x    x    x    x
    index                 0    1    2    3    4    5    6       what spans and `Where(rows=...)` count
    generated                                      x    x       behind the prompt

Packed rows hold several requests, each counted from its own first token:

    slot        0    1    2    3    4    5
                The  cat  sat  It   ran  .
    request     0    0    0    1    1    1
    index       0    1    2    0    1    2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .errors import SelectionError


class made_once:
    """A property that is kept once it was made; one without a lock, which compiled code cannot hold. There it is made each time."""

    def __init__(self, make: Callable[[Any], Any]):
        self.make, self.name, self.__doc__ = make, make.__name__, make.__doc__

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        if owner is None:
            return self
        made = self.make(owner)
        if not torch.compiler.is_compiling():
            owner.__dict__[self.name] = made
        return made


class Samples:
    """Which sample each row of a batch belongs to: how a parameter with one value per sample reaches the rows.

    Args:
        of_row: number of samples -> the sample of each row of the batch, e.g. {2: (0, 0, 1, 1)} where two samples were
            repeated for beams. There may be several such counts (prompts, and images of a pipeline), the first of which
            is named in messages.
    """

    def __init__(self, of_row: Mapping[int, Sequence[int]]):
        self.of_row = {count: tuple(rows) for count, rows in of_row.items()}

    @staticmethod
    def plain(batch: int) -> Samples:
        """Each row is a sample."""
        return Samples({batch: range(batch)})

    @classmethod
    def repeated(cls, count: int, batch: int) -> Samples:
        """`count` samples in order, each repeated for rows that stand side by side; each row is a sample if that cannot be."""
        return cls({count: [b // (batch // count) for b in range(batch)]}) if batch % count == 0 else cls.plain(batch)

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(next(iter(self.of_row.values())))

    def rows(self, count: int, batch: int | None = None) -> tuple[int, ...]:
        """The sample of each row, of `count` samples.

        Args:
            batch: rows of an attention call that folds frames or positions into the batch; they follow their row.

        Raises:
            SelectionError: the batch is not of so many samples, or has other rows.
        """
        found = self.of_row.get(count)
        if found is None:
            raise SelectionError(f"{count} values for {self}; give one value for all, or one per sample.")
        if batch is None or batch == len(found):
            return found
        if batch % len(found):
            raise SelectionError(f"an attention call with {batch} rows is not of the {len(found)} rows of this batch.")
        return tuple(b for b in found for _ in range(batch // len(found)))

    def taken(self, index: Sequence[int]) -> Samples:
        """Those of the rows `index`, in that order."""
        return Samples({count: [rows[i] for i in index] for count, rows in self.of_row.items()})

    def __str__(self) -> str:
        counts = " or ".join(map(str, self.of_row))
        rows = "" if self.batch in self.of_row else f" ({self.batch} rows)"
        return f"a batch of {counts} sample{'' if counts == '1' else 's'}{rows}"


class Beginnings(Samples):
    """Rows that several samples begin with, each under the values of one of these; once repeated for all samples, each is one."""

    def taken(self, index: Sequence[int]) -> Samples:
        return Samples.plain(len(index)) if len(index) in self.of_row else super().taken(index)


@dataclass(frozen=True, eq=False)
class Track:
    """The rows, or the keys, of one attention call.

    Attributes:
        slot: int [size], the slot of each among those of its batch row.
        index: int [B or 1, size], its number in its request, from 0; padding has that of the token before it,
            negative before the first. Virtual tokens of an adapter are negative too.
        request: int [B or 1, size], which of the requests in its batch row; 0 where there is one.
        valid: bool [B or 1, size], False for padding and for slots that hold nothing yet.
        generated: bool [B or 1, size], behind the prompt of its request.
        padded: whether any may be padding; False is a promise.
        packed: whether batch rows may hold several requests; False is a promise.
        start: the index of a request's first token: 0, less the virtual tokens before it.
        begins: the index of the first of these, where all are valid tokens of one request, in a row; None: that is not known.
    """

    slot: Tensor
    index: Tensor
    request: Tensor
    valid: Tensor
    generated: Tensor
    padded: bool = False
    packed: bool = False
    start: int = 0
    begins: int | None = None

    @property
    def size(self) -> int:
        """Number of rows or keys."""
        return self.slot.shape[0]

    @made_once
    def prompt(self) -> Tensor:
        """bool [B or 1, size]: valid tokens of a prompt."""
        return self.valid & ~self.generated

    @made_once
    def first(self) -> Tensor:
        """bool [B or 1, size]: the first token of each request."""
        return (self.index == self.start) & self.valid

    @made_once
    def last(self) -> Tensor:
        """bool [B or 1, size]: the last valid token of each request among these."""
        if not self.padded and not self.packed:
            return (self.slot == self.slot[-1:])[None]
        return self._last_of(self.valid)

    @made_once
    def last_prompt(self) -> Tensor:
        """bool [B or 1, size]: the last prompt token of each request among these, whether or not generated ones follow."""
        return self._last_of(self.prompt)

    def _last_of(self, chosen: Tensor) -> Tensor:
        """bool [B or 1, size]: the last of the `chosen` tokens of each request."""
        top = torch.where(chosen, self.index, -1)
        if not self.packed:
            return chosen & (self.index == top.amax(dim=-1, keepdim=True))
        B = max(self.request.shape[0], top.shape[0])
        request, top = self.request.expand(B, -1), top.expand(B, -1)
        # Requests are few: one maximum for each.
        most = top.new_full((B, int(request.max()) + 1), -1).scatter_reduce(1, request, top, "amax")
        return chosen & (self.index == most.gather(1, request))

    def tensors(self) -> list[Tensor]:
        """All that is said of these rows or keys."""
        said = [self.slot, self.index, self.request, self.valid, self.generated]
        return [*said, self.prompt, self.first, self.last, self.last_prompt]

    @staticmethod
    def plain(size: int, device: torch.device) -> Track:
        """One request without padding, all of it prompt."""
        slot = torch.arange(size, device=device)
        yes = torch.ones((), dtype=torch.bool, device=device).expand(1, size)
        return Track(slot, slot[None], torch.zeros_like(slot)[None], yes, ~yes, begins=0)


def plain(size: int, device: torch.device) -> Callable[[], Track]:
    """Rows or keys without padding, all of them of one prompt; made on the first call."""
    make = partial(Track.plain, size, device)
    # torch.compile cannot trace the making of a cache, and does nothing twice anyway.
    return make if torch.compiler.is_compiling() else cache(make)


class Account:
    """One forward of a stack of layers: the slots so far, and which of them are its rows. Made once, read by all layers.

    Args:
        batch: batch rows B. past: slots filled before this forward. new: slots of this forward, its rows.
        device: of the tensors it hands out.
        valid: bool [B or 1, past + new], or None: no padding.
        request: int [B or 1, past + new], or None: one request in each batch row.
        prompt: slots of the prompt: a number, or one for each batch row, int [B]; None: all of the slots.
        virtual: slots in front of each batch row that an adapter fills: valid, but no tokens of the user's.
        phase: "prefill" where some row belongs to a prompt, else "decode". mixed: whether rows of both are in this forward.
    """

    def __init__(
        self,
        batch: int,
        past: int,
        new: int,
        device: torch.device,
        *,
        valid: Tensor | None = None,
        request: Tensor | None = None,
        prompt: int | Tensor | None = None,
        phase: str = "prefill",
        mixed: bool = False,
        virtual: int = 0,
    ):
        self.virtual = virtual
        self.batch, self.past, self.new, self.device = batch, past, new, device
        self.valid = None if valid is None else valid.to(device)
        self.request = None if request is None else request.to(device)
        self.prompt = prompt.to(device) if isinstance(prompt, Tensor) else prompt
        self.phase, self.mixed = phase, mixed
        self._keys: dict[tuple[int, int], Track] = {}

    @property
    def length(self) -> int:
        """Slots so far, those of this forward included."""
        return self.past + self.new

    @made_once
    def rows(self) -> Track:
        """The rows of this forward."""
        return self._track(self.past, self.new)

    def keys(self, size: int, slots: int | None = None) -> Track:
        """The keys of a self-attention call that has `size` of them.

        Args:
            slots: of the cache, where more than `size` were handed out and the last ones cut off.

        A window cache hands out its last slots, a static one all that it has, the unused ones at the end.
        """
        slots = size if slots is None else slots
        found = self._keys.get((size, slots))
        if found is None:
            found = self._keys[size, slots] = self._track(max(0, self.length - slots), size)
        return found

    def ranges(self, ranges: Sequence[Sequence[tuple[int, int]]], samples: Samples | None = None) -> Tensor:
        """bool [B, T]: the tokens of these ranges, given for each sample and counted from its first valid token.

        Args:
            samples: which sample each batch row belongs to; None: each is one.

        Raises:
            SelectionError: a range ends after its sample; the batch is not of so many samples.
        """
        samples = Samples.plain(self.batch) if samples is None else samples
        if len(ranges) not in samples.of_row:
            raise SelectionError(f"ranges were given for {len(ranges)} samples; this is {samples}.")
        of_row = samples.rows(len(ranges))
        track = self._track(0, self.length)
        index, valid = (t.expand(self.batch, -1) for t in (track.index, track.valid))
        found = torch.zeros_like(valid)
        for b in range(self.batch):
            for start, stop in ranges[of_row[b]]:
                if stop > int(valid[b].sum()):
                    raise SelectionError(
                        f"range ({start}, {stop}) of sample {b} ends after its {int(valid[b].sum())} tokens; ranges count from the "
                        "sample's first token that is not padding."
                    )
                found[b] |= (index[b] >= start) & (index[b] < stop) & valid[b]
        return found

    @made_once
    def _index(self) -> Tensor | None:
        """int [B or 1, T]: number of each slot's token in its request; None where it is the slot's own number."""
        if self.valid is None and self.request is None:
            return None
        one = torch.ones((), dtype=torch.bool, device=self.device).expand(1, self.length)
        valid = one if self.valid is None else self.valid
        count = valid.long().cumsum(dim=-1)
        before = torch.zeros_like(count)
        if self.request is not None:
            start = torch.nn.functional.pad(self.request.diff(dim=-1) != 0, (1, 0), value=True)
            before = torch.where(start, count - valid.long(), 0).cummax(dim=-1).values
        return count - 1 - before

    def _track(self, start: int, size: int) -> Track:
        stop = start + size
        slot = torch.arange(start, stop, device=self.device)
        yes = torch.ones((), dtype=torch.bool, device=self.device).expand(1, size)
        empty = stop > self.length
        at = slot.clamp_max(self.length - 1) if empty else slice(start, stop)
        used = (slot < self.length)[None] if empty else yes
        valid = used if self.valid is None else self.valid[:, at] & used
        index = slot[None] if self._index is None else self._index[:, at]
        index = index - self.virtual if self.virtual else index
        request = torch.zeros_like(slot)[None] if self.request is None else self.request[:, at]
        if self.prompt is None:
            generated = ~yes
        else:
            border = self.prompt[:, None] if isinstance(self.prompt, Tensor) else self.prompt
            generated = slot[None] >= border
        padded = empty or self.valid is not None
        plain = not padded and self.request is None
        return Track(
            slot, index, request, valid, generated,
            padded=padded, packed=self.request is not None, start=-self.virtual, begins=start - self.virtual if plain else None,
        )  # fmt: skip
