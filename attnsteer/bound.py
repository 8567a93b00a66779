"""One intervention of a steering, bound to its place in the order, its selection and its doors."""

from __future__ import annotations

from dataclasses import dataclass, field

from .intervention import Intervention
from .where import Where

Heads = tuple[int, ...]


@dataclass(frozen=True)
class Bound:
    """One intervention of a steering: its place in the order, its selection, the doors it uses.

    Attributes:
        name: class name of the method. timed: whether `where` selects by phase or step, so that it must be asked at each call.
    """

    index: int
    method: Intervention
    where: Where
    doors: frozenset[str]
    # Read at each call of each site, so they are plain attributes.
    name: str = field(init=False)
    timed: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", type(self.method).__name__)
        object.__setattr__(self, "timed", self.where.phases is not None or self.where.steps is not None)
