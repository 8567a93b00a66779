"""What a visitor can turn: methods with one number each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import SelectionError, brief, listing
from ..heads import HeadSet
from ..intervention import Intervention
from ..methods import PAG, PAI, SEG, HeadGate, InstABoost, SoftPAG, SpotLight, ZeroTuning
from ..where import Where

LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Choice:
    """What a visitor chose beside the number: token ranges, and (layer, head) pairs; empty: all heads."""

    spans: tuple[tuple[int, int], ...] = ()
    heads: tuple[tuple[int, int], ...] = ()

    @property
    def where(self) -> Where:
        """Of the heads."""
        return Where(heads=HeadSet(list(self.heads))) if self.heads else Where()


@dataclass(frozen=True)
class Dial:
    """A method and its number.

    Attributes:
        name: the method. parameter: the number; low to high, `log`: by factors; off: where it changes nothing; start: at first.
        about: one sentence. marks, heads: whether it needs marked tokens, or chosen heads.
    """

    name: str
    parameter: str
    low: float
    high: float
    off: float
    start: float
    about: str
    make: Callable[[float, Choice], Intervention]
    log: bool = False
    marks: bool = False
    heads: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For the page."""
        return {k: v for k, v in asdict(self).items() if k != "make"}

    def method(self, value: Any, choice: Choice) -> Intervention | None:
        """The method at a value; None: it is off, or waits for marks or heads.

        Raises:
            SelectionError: no number, or one that the method refuses.
        """
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        # A whole number may have more digits than any float.
        if not known or not abs(value) <= LARGEST:
            raise SelectionError(f"{self.name}({self.parameter}={brief(value)}): give a number.")
        if value == self.off or (self.marks and not choice.spans) or (self.heads and not choice.heads):
            return None
        return self.make(float(value), choice)


TEXT = (
    Dial(
        "SpotLight", "target", 0.0, 0.95, 0.0, 0.3, "Every row gives the marked tokens at least about this share.",
        lambda v, c: SpotLight([list(c.spans)], target=v, where=c.where), marks=True,
    ),
    Dial(
        "InstABoost", "factor", 1.0, 50.0, 1.0, 4.0, "The attention to the marked tokens times this factor.",
        lambda v, c: InstABoost([list(c.spans)], factor=v, where=c.where), log=True, marks=True,
    ),
    Dial(
        "ZeroTuning", "gamma", 0.05, 20.0, 1.0, 3.0, "The attention to the first token times this factor.",
        lambda v, c: ZeroTuning(gamma=v, where=c.where), log=True,
    ),
    Dial(
        "HeadGate", "gate", -1.0, 3.0, 1.0, 0.0, "The outputs of the chosen heads times this number; 0 takes them out.",
        lambda v, c: HeadGate(dict.fromkeys(c.heads, v)), heads=True,
    ),
)  # fmt: skip
VISION = (
    *TEXT,
    Dial(
        "PAI", "alpha", 0.0, 2.0, 0.0, 0.5, "The scores of the picture’s tokens rise by this share of their size.",
        lambda v, c: PAI(alpha=v, where=c.where if c.heads else Where(layers=None)),
    ),
)  # fmt: skip


def image_dials(layers: Any) -> tuple[Dial, ...]:
    """Those of a pipeline; layers: the `Where` of weak branches."""
    return (
        Dial(
            "PAG", "scale", 0.0, 6.0, 0.0, 2.0, "Away from a branch whose self-attention sees only itself.",
            lambda v, c: PAG(scale=v, where=c.where if c.heads else layers),
        ),
        Dial(
            "SEG", "scale", 0.0, 6.0, 0.0, 2.0, "Away from a branch whose queries are all their mean.",
            lambda v, c: SEG(scale=v, where=c.where if c.heads else layers),
        ),
        Dial(
            "SoftPAG", "strength", 0.0, 1.0, 0.0, 0.5, "PAG at scale 3, mixed in by this strength.",
            lambda v, c: SoftPAG(scale=3.0, strength=v, where=c.where if c.heads else layers),
        ),
    )  # fmt: skip


def dial(dials: tuple[Dial, ...], name: Any) -> Dial:
    """The one of a name.

    Raises:
        SelectionError: there is none.
    """
    found = next((d for d in dials if d.name == name), None)
    if found is None:
        raise SelectionError(f"method {brief(name)}: there are {listing(d.name for d in dials)}.")
    return found
