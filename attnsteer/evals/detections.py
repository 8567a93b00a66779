"""Reads the parts of an image's record: what was asked for, and what a detector found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..errors import RecordError
from ..zoo.shapes.language import Phrase, parse
from ..zoo.shapes.layouts import CATEGORIES, SIDES, Layout
from ..zoo.shapes.world import COLOUR_NAMES, SHAPES, Object


def shapes(detected: Sequence[Mapping[str, Any]]) -> tuple[Object, ...]:
    """The objects that the detector of the shapes world found: dicts with shape, colour, size, x, y, radius.

    Raises:
        RecordError: one is of another form.
    """
    names = [f.name for f in fields(Object)]
    found = []
    for item in detected:
        if not isinstance(item, Mapping) or not set(names) <= set(item):
            raise RecordError(f"a detected object of the shapes world has {', '.join(names)}; this is {item!r}.")
        found.append(Object(**{n: item[n] for n in names}))
    return tuple(found)


def phrases(asked: Sequence[Any]) -> tuple[Phrase, ...]:
    """Phrases of the shapes world: dicts with colour, shape and, where they are said, size and count; or their texts.

    Raises:
        RecordError: one is of another form, or names a colour or shape that does not exist.
    """
    found = []
    for item in asked:
        if isinstance(item, str):
            read = parse(item)
            if len(read) != 1:
                raise RecordError(f"{item!r} is no phrase of the shapes world, such as 'a small red circle'.")
            found += read
            continue
        known = {f.name for f in fields(Phrase)}
        if not isinstance(item, Mapping) or not {"colour", "shape"} <= set(item) <= known:
            raise RecordError(
                f"a phrase is a text, or has colour, shape, and perhaps size and count; this is {item!r}."
            )
        phrase = Phrase(**item)
        if phrase.colour not in COLOUR_NAMES or phrase.shape not in SHAPES or phrase.count < 1:
            raise RecordError(f"{item!r} is nothing of the shapes world.")
        found.append(phrase)
    if not found:
        raise RecordError("no phrases: nothing was asked for.")
    return tuple(found)


def requested_layout(record: Mapping[str, Any]) -> Layout:
    """The layout of a record: `phrases`, and where they are there `prompt`, `boxes`, `category` and `side`.

    Raises:
        RecordError: a part is of another form, or does not fit the others.
    """
    asked, category, side = phrases(record["phrases"]), record.get("category") or "objects", record.get("side")
    boxes = tuple(tuple(float(v) for v in b) for b in record.get("boxes") or ())
    if category not in CATEGORIES:
        raise RecordError(f"the category is {category!r}; there are {', '.join(CATEGORIES)}.")
    if boxes and (len(boxes) != len(asked) or any(len(b) != 4 for b in boxes)):
        raise RecordError(f"{len(boxes)} boxes for {len(asked)} phrases; give (x0, y0, x1, y1) for each phrase.")
    if category == "spatial" and (side not in SIDES or len(asked) != 2):
        raise RecordError(
            f"side={side!r} with {len(asked)} phrases; 'spatial' needs two and one of {', '.join(SIDES)}."
        )
    return Layout(str(record.get("prompt", "")), asked, boxes, category, side)
