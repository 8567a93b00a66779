"""Layouts in words, and as a language model writes them: phrases of a prompt to boxes, checked before anything is run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SelectionError, brief, did_you_mean, listing
from .phrases import checked, occurrences
from .regions import Box, is_finite, layouts

# Place -> (start, stop) along one axis, in fractions of the image.
ACROSS = {"left": (0.0, 0.5), "right": (0.5, 1.0)}
DOWN = {"top": (0.0, 0.5), "bottom": (0.5, 1.0)}
THIRDS = {"left": (0.0, 1 / 3), "right": (2 / 3, 1.0), "top": (0.0, 1 / 3), "bottom": (2 / 3, 1.0)}
MIDDLE, WHOLE = (0.25, 0.75), (0.0, 1.0)
SAME = {"upper": "top", "above": "top", "lower": "bottom", "below": "bottom", "center": "centre", "middle": "centre"}
# Words that say nothing of the place.
FILLING = frozenset({"in", "on", "at", "the", "of", "to", "side", "half", "part", "corner", "image", "picture"})
# A layout is a few boxes; what is longer than this is none.
LONGEST, LONGEST_LINE, MOST = 100_000, 300, 100
# Brackets at which JSON may begin, behind words.
TRIES = 20
# Names under which language models give an object's phrase, its box, and the list of objects.
PHRASE, BOX, LIST = (
    ("phrase", "object", "name", "label", "caption"),
    ("box", "bbox", "bounding_box", "boxes"),
    ("boxes", "objects", "layout"),
)
LINE = re.compile(r"^\W*(.+?)\s*:\s*[\[(]\s*([^()\[\]]*?)\s*[\])]\W*$")


def box_of(place: str) -> Box:
    """The box (x0, y0, x1, y1), in fractions of the image, that a place in words stands for.

    "left", "right", "top", "bottom" are halves, two of them a quarter ("top left"), "left third" and the like thirds, "centre" the
    middle half in both directions, "top centre" a half of it beside an edge, "everywhere" the image.

    Raises:
        SelectionError: a word that is no place, or two places along one axis.
    """
    if not isinstance(place, str):
        raise SelectionError(f"a place is words such as 'top left', not {brief(place)}.")
    words = [SAME.get(w, w) for w in re.findall(r"[a-z]+", place.lower()) if w not in FILLING]
    known = {*ACROSS, *DOWN, "centre", "third", "everywhere"}
    for word in words:
        if word not in known:
            raise SelectionError(
                f"{word!r} in {place!r} is no place; there are {listing(sorted(known))}.{did_you_mean(word, known)}"
            )
    across, down = ([w for w in words if w in axis] for axis in (ACROSS, DOWN))
    rest = [w for w in words if w in ("centre", "third", "everywhere")]
    twice = len(across) > 1 or len(down) > 1 or len(rest) > 1
    third, centre = rest == ["third"], rest == ["centre"]
    if not words or twice or (rest == ["everywhere"] and len(words) > 1) or (third and len(across) + len(down) != 1):
        raise SelectionError(
            f"{place!r} is no one place; give e.g. 'left', 'top right', 'bottom third', 'centre' or 'everywhere'."
        )
    free = MIDDLE if centre else WHOLE
    x0, x1 = (THIRDS if third else ACROSS)[across[0]] if across else free
    y0, y1 = (THIRDS if third else DOWN)[down[0]] if down else free
    return x0, y0, x1, y1


def boxes(places: Mapping[str, Any], prompt: str | None = None) -> dict[Any, Any]:
    """Boxes for `AttentionRefocusing` and others: phrase -> place in words, a box in fractions, or several of either.

    Args:
        prompt: where given, each phrase must be in it, exactly once.

    Raises:
        SelectionError: no phrase, no place, a box outside the image or without area, a phrase that is not in the prompt or is
            there several times.
    """
    if not isinstance(places, Mapping):
        raise SelectionError(f"give phrase -> place, such as {{'red cube': 'top left'}}, not {brief(places)}.")
    found = {phrase: _places(phrase, given) for phrase, given in places.items()}
    _check(found, prompt)
    return found


def _places(phrase: Any, given: Any) -> list[Any]:
    several = list(given) if isinstance(given, (list, tuple)) and not _numbers(given) else [given]
    if not several:
        raise SelectionError(f"the phrase {phrase!r} has no place.")
    return [box_of(one) if isinstance(one, str) else one for one in several]


def _numbers(given: Sequence[Any]) -> bool:
    return bool(given) and all(isinstance(v, (int, float)) for v in given)


def _check(found: dict[Any, Any], prompt: str | None) -> None:
    if sum(map(len, found.values())) > MOST:
        raise SelectionError(f"a layout of {sum(map(len, found.values()))} boxes; at most {MOST} are taken.")
    layouts(found)
    for phrase in found if prompt is not None else ():
        text, which = phrase if isinstance(phrase, tuple) and isinstance(phrase[0], str) else (phrase, None)
        count = occurrences(prompt, text) if isinstance(text, str) else 1
        if count == 0:
            raise SelectionError(
                f"the phrase {text!r} is not in the prompt: {prompt!r}. Phrases are whole words, as they are written."
            )
        if count > 1 and which is None:
            raise SelectionError(f"the phrase {text!r} is {count} times in the prompt {prompt!r}; give a longer one.")


def read(text: str, size: tuple[float, float] | None = None, prompt: str | None = None) -> dict[str, list[Box]]:
    """The layout that a language model wrote: phrase -> boxes in fractions of the image.

    Taken are a JSON object {phrase: box or boxes}, a list of objects with a phrase and a box, either below "boxes", "objects" or
    "layout", or one line "phrase: (x0, y0, x1, y1)" for each object; words or code fences around it are passed over. A
    phrase that comes several times has several boxes. A box may be a place in words.

    Args:
        size: (width, height) of the canvas in whose pixels the boxes are; None: they are fractions. prompt: see `boxes`.

    Raises:
        SelectionError: no layout, one that is cut off, or what `boxes` refuses.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise SelectionError(f"give the text of a layout, up to {LONGEST} characters, not {brief(text)}.")
    if size is not None and not (
        isinstance(size, (tuple, list)) and len(size) == 2 and all(_positive(v) for v in size)
    ):
        raise SelectionError(f"size={brief(size)}: give (width, height) of the canvas in pixels.")
    pairs = _lines(text)
    if not pairs:
        value = _value(text)
        pairs = [] if value is None else _pairs(value)
    if not pairs:
        raise SelectionError(
            f"no layout in {brief(text)}: give JSON such as "
            + '{"red cube": [0, 0, 0.5, 0.5]}, or lines such as "red cube: '
            '(0, 0, 256, 256)".'
        )
    found: dict[str, list[Any]] = {}
    for phrase, box in pairs:
        found.setdefault(str(checked("phrase", phrase)[0]), []).append(_scaled(phrase, box, size))
    _check(found, prompt)
    return {phrase: [tuple(map(float, box)) for box in several] for phrase, several in found.items()}


def _positive(value: Any) -> bool:
    return is_finite(value) and value > 0


def _scaled(phrase: Any, box: Any, size: tuple[float, float] | None) -> Any:
    if isinstance(box, str):
        return box_of(box)
    if not isinstance(box, list) or len(box) != 4 or not _numbers(box) or any(isinstance(v, bool) for v in box):
        raise SelectionError(
            f"the box of {phrase!r} is {brief(box)}; give four numbers (x0, y0, x1, y1), or a place in words."
        )
    if not all(map(is_finite, box)):
        raise SelectionError(f"the box {brief(box)} of {phrase!r}: boxes are finite numbers.")
    if size is None:
        if max(box) > 1:
            raise SelectionError(
                f"the box {brief(tuple(box))} of {phrase!r} is not in fractions of the image; give size=(width, height) of its "
                "canvas."
            )
        return tuple(box)
    return box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]


def _no_constant(name: str) -> Any:
    raise SelectionError(f"a layout with {name}: boxes are finite numbers.")


def _value(text: str) -> Any:
    """The first JSON object or list in a text, objects as lists of pairs; None where there is none."""
    decoder = json.JSONDecoder(object_pairs_hook=_Pairs, parse_constant=_no_constant, parse_int=_whole)
    problem, other = None, None
    for start in [m.start() for m in re.finditer(r"[\[{]", text)][:TRIES]:
        try:
            value = decoder.raw_decode(text, start)[0]
        except (json.JSONDecodeError, RecursionError) as error:
            problem = problem or error
            continue
        if isinstance(value, _Pairs) or any(isinstance(v, _Pairs) for v in value):
            return value
        other = other or value
    if problem is not None:
        raise SelectionError(f"the JSON of the layout does not end, or is none: {problem}.")
    return other


def _whole(digits: str) -> int | float:
    """Python turns no more than 4,300 digits into an integer."""
    return int(digits) if len(digits) < LONGEST_LINE else float(digits)


class _Pairs(list):
    """A JSON object, with keys that come twice."""


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    """(phrase, box) of each object of a layout."""
    if isinstance(value, _Pairs):
        under = [v for k, v in value if k in LIST and not _is_box(v)]
        if len(under) == 1 and not any(k in PHRASE for k, _ in value):
            return _pairs(under[0])
        if any(k in PHRASE for k, _ in value):
            return _object(value)
        return [pair for phrase, given in value for pair in _several(phrase, given)]
    if isinstance(value, list) and value and all(isinstance(v, _Pairs) for v in value):
        return [pair for v in value for pair in _pairs(v)]
    raise SelectionError(
        f"a layout is an object of phrases, or a list of objects with a phrase and a box, not {brief(value)}."
    )


def _object(value: _Pairs) -> list[tuple[Any, Any]]:
    phrases, own = ([v for k, v in value if k in names] for names in (PHRASE, BOX))
    if len(phrases) != 1 or len(own) != 1:
        raise SelectionError(
            f"an object of the layout has {len(phrases)} phrases and {len(own)} boxes: {brief(dict(value))}."
        )
    return _several(phrases[0], own[0])


def _is_box(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and not isinstance(value, _Pairs) and _numbers(value))


def _several(phrase: Any, given: Any) -> list[tuple[Any, Any]]:
    return [(phrase, given)] if _is_box(given) or not isinstance(given, list) else [(phrase, box) for box in given]


def _lines(text: str) -> list[tuple[str, Any]]:
    """Lines "phrase: (x0, y0, x1, y1)"; others are passed over."""
    found = []
    for line in text.splitlines():
        match = LINE.match(line) if '"' not in line and len(line) <= LONGEST_LINE else None
        numbers = match[2].split(",") if match else []
        if match and all(re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", n) for n in numbers):
            found.append((match[1].strip(" '*`"), [float(n) for n in numbers]))
    return found
