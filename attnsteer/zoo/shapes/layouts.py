"""Prompts for text-to-image models with what has to be true of the picture, and boxes for layout methods.

The four categories are those of HRS-Bench (Bakr et al. 2023) as attention refocusing uses it: spatial, size, colour,
count; "objects" is the plain kind: one or more phrases, all of which must be in the picture.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .language import Phrase, join, parse
from .questions import holds
from .world import COLOUR_NAMES, SHAPES, SIZES, Object, place, rng

CATEGORIES = ("objects", "spatial", "size", "colour", "count")
SIDES = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Layout:
    """A prompt and what it asks for.

    Attributes:
        prompt: for the text-to-image model.
        phrases: the objects that it names.
        boxes: (x0, y0, x1, y1) in fractions of the image, one for each phrase of count one; else empty.
        category: of `CATEGORIES`.
        side: for "spatial", where the first object is seen from the second.
    """

    prompt: str
    phrases: tuple[Phrase, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    category: str
    side: str | None = None


def layout(split: str, index: int, category: str = "objects", count: int = 2) -> Layout:
    """Layout `index` of a split.

    Args:
        split: "train", "calibration" or "test".
        index: >= 0.
        category: of `CATEGORIES`.
        count: number of different phrases, 1 to 4; spatial and size have two.

    Raises:
        ValueError: an unknown category or count.
    """
    if category not in CATEGORIES:
        raise ValueError(f"No layouts of the category {category!r}; there are {', '.join(CATEGORIES)}.")
    if not 1 <= count <= 4:
        raise ValueError(f"A layout has 1 to 4 phrases; {count} were asked for.")
    g = rng(split, index, stream=30 + CATEGORIES.index(category))
    n = 2 if category in ("spatial", "size") else count
    # Different shapes and different colours: a phrase then names one thing, and a swap is seen as one.
    shapes = [SHAPES[int(i)] for i in g.permutation(len(SHAPES))[:n]]
    colours = [COLOUR_NAMES[int(i)] for i in g.permutation(len(COLOUR_NAMES))[:n]]
    if category == "colour":
        shapes = [shapes[0]] * n
    sizes: list[str | None] = [None] * n
    if category == "size":
        sizes = [SIZES[int(i)] for i in g.permutation(2)]
    counts = [int(g.integers(2, 4)) if category == "count" and i == 0 else 1 for i in range(n)]
    found = tuple(Phrase(c, s, z, k) for c, s, z, k in zip(colours, shapes, sizes, counts, strict=True))
    if max(counts) > 1:
        return Layout(join(found), found, (), category)
    objects = place(g, list(zip(shapes, colours, strict=True)), ["large" if z is None else z for z in sizes])
    boxes = tuple(_around(o) for o in objects)
    if category != "spatial":
        return Layout(join(found), found, boxes, category)
    while not any(holds(objects[0], s, objects[1]) for s in SIDES):
        objects = place(g, list(zip(shapes, colours, strict=True)), ["large"] * n)
        boxes = tuple(_around(o) for o in objects)
    sides = [s for s in SIDES if holds(objects[0], s, objects[1])]
    # The training captions know no relations, so the side is a matter of the boxes alone.
    return Layout(join(found), found, boxes, category, sides[int(g.integers(len(sides)))])


def _around(o: Object, margin: float = 0.03) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = o.box
    return max(0.0, x0 - margin), max(0.0, y0 - margin), min(1.0, x1 + margin), min(1.0, y1 + margin)


def satisfied(wanted: Layout, objects: tuple[Object, ...]) -> bool:
    """Whether detected objects are what the layout's prompt asks for (the boxes aside).

    Every phrase is there, "count" exactly as often as it says; sizes are as said, and the side is right.
    """
    seen = Counter((o.colour, o.shape) for o in objects)
    for phrase in wanted.phrases:
        number = seen[phrase.colour, phrase.shape]
        if number == 0 or (wanted.category == "count" and number != phrase.count):
            return False
        if phrase.size and not any(
            (o.colour, o.shape, o.size) == (phrase.colour, phrase.shape, phrase.size) for o in objects
        ):
            return False
    if wanted.side is None:
        return True
    first, second = ([o for o in objects if (o.colour, o.shape) == (p.colour, p.shape)] for p in wanted.phrases)
    return any(holds(a, wanted.side, b) for a in first for b in second)


def exact(wanted: Layout, objects: tuple[Object, ...]) -> bool:
    """`satisfied`, and nothing else in the picture: captions count, so "a red circle" means one of them."""
    seen = Counter((o.colour, o.shape) for o in objects)
    asked: Counter[tuple[str, str]] = Counter()
    for phrase in wanted.phrases:
        asked[phrase.colour, phrase.shape] += phrase.count
    return seen == asked and satisfied(wanted, objects)


def in_boxes(wanted: Layout, objects: tuple[Object, ...]) -> tuple[bool, ...]:
    """For each phrase with a box: whether an object of its colour and shape has its centre in the box."""
    return tuple(
        any((o.colour, o.shape) == (p.colour, p.shape) and x0 <= o.x <= x1 and y0 <= o.y <= y1 for o in objects)
        for p, (x0, y0, x1, y1) in zip(wanted.phrases, wanted.boxes, strict=bool(wanted.boxes))
    )


def chair(text: str, objects: tuple[Object, ...]) -> tuple[int, int, int]:
    """CHAIR's counts (Rohrbach et al. 2018) for a caption: mentions, hallucinated mentions, classes of the scene named.

    An object class is a colour and a shape; every mention counts, as in the official code.
    """
    there = {(o.colour, o.shape) for o in objects}
    said = [(p.colour, p.shape) for p in parse(text)]
    return len(said), sum(s not in there for s in said), len(there & set(said))
