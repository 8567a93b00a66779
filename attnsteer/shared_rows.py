"""Interventions that requests of one batch have chosen differently: which rows each acts on, and their edits as one.

Rows of different requests see nothing of each other, so edits of different rows are one edit, whatever their methods are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bound import Bound
from .edits import Reweight


@dataclass(frozen=True, eq=False)
class Rows:
    """The batch rows that one intervention acts on; several interventions of a steering may stand behind it.

    Attributes:
        rows: their numbers. mask: bool [B, 1, 1]. owners: numbers of the interventions, as attached. of: bool [K, B], the rows
            of each owner. size: how many those are. whole: whether it is all rows of the batch.
    """

    rows: frozenset[int]
    mask: Tensor
    owners: tuple[int, ...]
    of: Tensor
    size: tuple[int, ...]
    whole: bool

    @staticmethod
    def make(owner_of: Mapping[int, int], batch: int, device: torch.device) -> Rows:
        """From batch row -> number of the intervention that acts there."""
        owners = tuple(sorted(set(owner_of.values())))
        of = torch.zeros(len(owners), batch, dtype=torch.bool)
        for row, owner in owner_of.items():
            of[owners.index(owner), row] = True
        size = tuple(of.sum(dim=1).tolist())
        of = of.to(device)
        return Rows(frozenset(owner_of), of.any(dim=0)[:, None, None], owners, of, size, len(owner_of) == batch)

    def flags(self, moved: Tensor) -> tuple[Tensor, ...]:
        """Whether something moved, 0-d bool for each owner; `moved`: bool [B]."""
        return (self.of & moved).any(dim=1).unbind()


def levels(bounds: Sequence[Bound], rows: Mapping[int, Rows]) -> list[list[Bound]]:
    """The interventions in order, those in one piece whose rows are apart; `rows`: by `id` of each."""
    found: list[list[Bound]] = []
    taken: set[int] = set()
    for bound in bounds:
        own = rows[id(bound)].rows
        if not found or own & taken:
            found.append([])
            taken = set()
        found[-1].append(bound)
        taken |= own
    return found


def together(edits: Sequence[tuple[Rows, Reweight]], dtype: torch.dtype) -> Reweight:
    """One reweighting that does each of `edits` on its own rows, and nothing elsewhere.

    Args:
        edits: of rows that are apart; they agree in `normalise`.
    """
    first = edits[0][1]
    if edits[0][0].whole:
        return first
    groups: list[tuple[Tensor, Tensor]] = []
    rest: Tensor | None = None
    one = torch.ones((), dtype=dtype, device=edits[0][0].mask.device)
    number = lambda w: torch.as_tensor(w, dtype=dtype, device=one.device)  # noqa: E731
    for mask, edit in ((rows.mask, edit) for rows, edit in edits):
        rest = torch.where(mask, number(edit.rest), one if rest is None else rest)
        for i, (keys, weight) in enumerate(edit.groups):
            keys = keys & mask
            if i < len(groups):
                groups[i] = (groups[i][0] | keys, torch.where(mask, number(weight), groups[i][1]))
            else:
                groups.append((keys, torch.where(mask, number(weight), one)))
    return Reweight(tuple(groups), rest, first.normalise)
