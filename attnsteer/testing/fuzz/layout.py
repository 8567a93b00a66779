"""Who is who in the slots of a batch, decided first; masks, positions and the oracle's roles are all made of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
    def valid(self) -> Tensor:
        """bool [B, T]."""
        return torch.tensor([[p > 0 for p in row for _ in range(abs(p))] for row in self.rows])

    @cached_property
    def request(self) -> Tensor:
        """int [B, T], -1 for padding."""
        out = []
        for row in self.rows:
            number, line = -1, []
            for piece in row:
                number = (number + 1 if self.packed else 0) if piece > 0 else number
                line += [number if piece > 0 else -1] * abs(piece)
            out.append(line)
        return torch.tensor(out)

    @cached_property
    def index(self) -> Tensor:
        """int [B, T]: number of each token in its sequence; 0 for padding."""
        out = torch.zeros_like(self.request)
        for b, t in itertools.product(range(len(self.rows)), range(self.length)):
            if self.valid[b, t]:
                out[b, t] = int((self.request[b, :t] == self.request[b, t]).sum())
        return out

    def mask(self, blind: str = "none", parents: tuple[int, ...] = (), window: int | None = None) -> Tensor:
        """bool [B, 1, T, T]: what each row sees.

        Args:
            blind: what padding rows see: "none", "self", or "all".
            parents: a tree: the parent's slot of each token, so that a token sees its ancestors only. window: of slots.
        """
        T, slot = self.length, torch.arange(self.length)
        seen = (self.request[:, :, None] == self.request[:, None]) & (slot <= slot[:, None])
        if parents:
            up = torch.eye(T, dtype=torch.bool)
            for t, parent in enumerate(parents):
                if t:
                    up[t] |= up[parent]
            seen = seen & up
        if window is not None:
            seen = seen & (slot > slot[:, None] - window)
        seen = seen & self.valid[:, :, None] & self.valid[:, None]
        if blind == "self":
            seen = seen | torch.eye(T, dtype=torch.bool)
        elif blind == "all":
            seen = seen | ~self.valid[:, :, None]
        return seen[:, None]
