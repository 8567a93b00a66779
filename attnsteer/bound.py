"""One intervention of a steering, bound to its place, its selection and its doors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .intervention import Intervention
from .where import Where

if TYPE_CHECKING:
    pass


Heads = tuple[int, ...]


@dataclass(frozen=True)
class Bound:
    """One intervention of a steering: its place in the order, its selection, the doors it uses."""

    index: int
    method: Intervention
    where: Where
    doors: frozenset[str]
