"""Who is who in the slots of a batch: decided first, so that masks and positions are made of it; and read back from a mask."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Roles:
    """What a method needs to know of slots: each bool or int [B, T].

    Attributes:
        valid: not padding. request: which sequence of its batch row, -1 for padding. index: its number in the sequence.
    """

    valid: Tensor
    request: Tensor

    @cached_property
    def index(self) -> Tensor:
        """0 for padding."""
        out = torch.zeros_like(self.request)
        for b, t in itertools.product(*map(range, self.request.shape)):
            if self.valid[b, t]:
                out[b, t] = int((self.request[b, :t] == self.request[b, t]).sum())
        return out

    def agree(self, other: Roles) -> bool:
        """Whether tokens of `other` are tokens here, divided into the same sequences and counted in the same way."""
        at = other.valid
        if not bool(self.valid[at].all()) or not torch.equal(self.index[at], other.index[at]):
            return False
        pairs = lambda r: r.request[:, :, None] == r.request[:, None]  # noqa: E731
        both = at[:, :, None] & at[:, None]
        return torch.equal(pairs(self)[both], pairs(other)[both])


@dataclass(frozen=True)
class Layout:
    """Batch rows as pieces: a positive number is a sequence of so many tokens, a negative one so much padding.

    Pieces of one row are sequences of their own where `packed`; otherwise they are one sequence with holes.
    """

    rows: tuple[tuple[int, ...], ...]
    packed: bool = False

    @cached_property
    def length(self) -> int:
        """Slots, the same in all rows."""
        return sum(abs(piece) for piece in self.rows[0])

    @cached_property
    def roles(self) -> Roles:
        """Of all slots."""
        out = []
        for row in self.rows:
            number, line = -1, []
            for piece in row:
                number = (number + 1 if self.packed else 0) if piece > 0 else number
                line += [number if piece > 0 else -1] * abs(piece)
            out.append(line)
        request = torch.tensor(out)
        return Roles(request >= 0, request)

    def positions(self, parents: tuple[int, ...] = ()) -> Tensor:
        """int [B, T]: the number of each token in its sequence, or in a tree the number of its ancestors."""
        if not parents:
            return self.roles.index
        depth = [0]
        for parent in parents[1:]:
            depth.append(depth[parent] + 1)
        return torch.tensor(depth).expand(len(self.rows), -1)

    def mask(self, blind: str = "none", parents: tuple[int, ...] = (), window: int | None = None) -> Tensor:
        """bool [B, 1, T, T]: what each row sees.

        Args:
            blind: what padding rows see: "none", "self", or "all".
            parents: a tree: the parent's slot of each token, so that a token sees its ancestors only. window: of slots.
        """
        T, slot = self.length, torch.arange(self.length)
        request, valid = self.roles.request, self.roles.valid
        seen = (request[:, :, None] == request[:, None]) & (slot <= slot[:, None])
        if parents:
            up = torch.eye(T, dtype=torch.bool)
            for t, parent in enumerate(parents):
                if t:
                    up[t] |= up[parent]
            seen = seen & up
        if window is not None:
            seen = seen & (slot > slot[:, None] - window)
        seen = seen & valid[:, :, None] & valid[:, None]
        if blind == "self":
            seen = seen | torch.eye(T, dtype=torch.bool)
        elif blind == "all":
            seen = seen | ~valid[:, :, None]
        return seen[:, None]


def read(seen: Tensor, ends: Sequence[int] | None = None) -> Roles | None:
    """Roles from nothing but a mask, bool [B, T, T]; None where it does not determine them.

    Args:
        ends: for each slot, where the call ends that it is in: a call is judged by the keys up to there. None: it is one call.

    A row is a token if it sees itself and no later row that does not see it back. A token that sees no token before it begins a
    sequence; another one belongs to that of the last token before it that it sees. Sequences stand one behind the other, and see
    none of each other.
    """
    B, T, _ = seen.shape
    end = [T] * T if ends is None else ends
    valid, request = torch.zeros(B, T, dtype=torch.bool), torch.full((B, T), -1)
    for b, t in itertools.product(range(B), range(T)):
        blind = any(seen[b, t, j] and not seen[b, j, t] for j in range(t + 1, end[t]))
        valid[b, t] = bool(seen[b, t, t]) and not blind
    for b in range(B):
        last = -1
        for t in range(T):
            if not valid[b, t]:
                continue
            before = [j for j in range(t) if seen[b, t, j] and valid[b, j]]
            request[b, t] = int(request[b, before[-1]]) if before else last + 1
            if request[b, t] < last:
                return None
            last = int(request[b, t])
        for t in range(T):
            for j in range(end[t]):
                if valid[b, t] and valid[b, j] and seen[b, t, j] and request[b, t] != request[b, j]:
                    return None
    return Roles(valid, request)


def both_ways(seen: Tensor, roles: Roles, ends: Sequence[int]) -> bool:
    """Whether a token sees a later token of its call; arguments as of `read`."""
    B, T, _ = seen.shape
    return any(
        bool(seen[b, t, j] and roles.valid[b, t] and roles.valid[b, j])
        for b, t in itertools.product(range(B), range(T))
        for j in range(t + 1, ends[t])
    )
