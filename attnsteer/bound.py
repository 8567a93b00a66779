"""One intervention of a steering, bound to its place in the order, its selection and its doors."""

from __future__ import annotations

from dataclasses import dataclass

from .intervention import Intervention
from .where import Where

Heads = tuple[int, ...]


@dataclass(frozen=True)
class Bound:
    """One intervention of a steering: its place in the order, its selection, the doors it uses."""

    index: int
    method: Intervention
    where: Where
    doors: frozenset[str]

    @property
    def name(self) -> str:
        """Class name of the method."""
        return type(self.method).__name__
