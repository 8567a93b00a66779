"""What rows and keys of a captured map are: tokens with their texts, or places of a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..captured import Captured, Take
from ..errors import SelectionError, brief, listing
from ..parameters import whole

MARK = "▦"


@dataclass(frozen=True)
class Axis:
    """One side of a map.

    Attributes:
        numbers: what each row or key is numbered in its sequence. words: a text for each; of a picture's places too.
        grid: (first place, height, width) of the picture among them, or None.
    """

    numbers: tuple[int, ...]
    words: tuple[str, ...]
    grid: tuple[int, int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; places of the picture have no text of their own, the page writes them."""
        start, stop = (0, 0) if self.grid is None else (self.grid[0], self.grid[0] + self.grid[1] * self.grid[2])
        words = ["" if start <= i < stop else w for i, w in enumerate(self.words)]
        plain = self.numbers == tuple(range(self.numbers[0], self.numbers[0] + len(self.numbers)))
        return {
            "n": len(self.numbers),
            "first": self.numbers[0],
            "numbers": None if plain else list(self.numbers),
            "words": words if any(words) else None,
            "grid": None if self.grid is None else list(self.grid),
        }


def check(captured: Captured, who: str) -> None:
    """Raise where it is no capture that has maps.

    Raises:
        SelectionError: it is none.
    """
    if not isinstance(captured, Captured):
        raise SelectionError(
            f"{who}: {brief(captured)} is no capture; give what `capture` yields, or Captured.load(folder)."
        )
    if not captured.takes:
        raise SelectionError("nothing was captured: run the model inside the block of `capture`.")
    if "map" not in captured.what:
        raise SelectionError(
            f"this capture has {listing(captured.what)}, and no maps; take them: capture(model, what=('map', 'q', 'k'))."
        )


def whole_pair(given: Any, name: str, form: str) -> tuple[int, int]:
    """Two whole numbers.

    Raises:
        SelectionError: it is something else.
    """
    pair = tuple(map(whole, given)) if isinstance(given, (tuple, list)) and len(given) == 2 else (None,)
    if None in pair:
        raise SelectionError(f"{name}={brief(given)}: give {form}, two whole numbers.")
    return pair


def first_sample(captured: Captured) -> int:
    """The first batch row with rows in the capture (of a guided batch, the conditional one where that was captured)."""
    for take in captured.takes:
        there = (take.rows >= 0).any(dim=1).nonzero()
        if len(there):
            return int(there[0])
    raise SelectionError("nothing was captured: run the model inside the block of `capture`.")


def shown_tokens(captured: Captured, sample: int, count: int, tokens: Any = None, tokenizer: Any = None) -> list[str]:
    """The texts of a sample's first `count` tokens; tokens of a capture that nothing names are numbers.

    Raises:
        SelectionError: `tokens` are fewer.
    """
    if tokens is not None:
        found = token_texts(tokens)
        if len(found) < count:
            raise SelectionError(
                f"tokens={brief(tokens)} has {len(found)} texts, the capture has {count} tokens; give each one."
            )
        return found[:count]
    ids = None if captured.ids is None or sample >= len(captured.ids) else captured.ids[sample]
    if ids is None or len(ids) < count:
        return [str(i) for i in range(count)]
    if tokenizer is None:
        return [f"#{i}" for i in ids[:count]]
    return [_text(tokenizer, i) for i in ids[:count]]


def token_texts(tokens: Any) -> list[str]:
    """Of tokens that a caller names.

    Raises:
        SelectionError: it is no list of them.
    """
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise SelectionError(f"tokens={brief(tokens)}: give a list with the text of each token.")
    return [str(t) for t in tokens]


def _text(tokenizer: Any, token: int) -> str:
    """As it is written, with its space in front; what a tokenizer's decoding hides (the start of a text) by its name."""
    found = tokenizer.decode([token])
    if found.strip():
        return found
    return found or str(tokenizer.convert_ids_to_tokens(token))


def grid_of(count: int, grid: Sequence[int] | None, why: str) -> tuple[int, int]:
    """(height, width) of `count` places.

    Raises:
        SelectionError: `grid` has another number of places, or there is none and the places are no square.
    """
    if grid is not None:
        h, w = whole_pair(grid, "grid", "(height, width)")
        if h * w != count or h < 1:
            raise SelectionError(
                f"{why}: grid={(h, w)} has {h * w} places, the image has {count}; give its (height, width)."
            )
        return h, w
    side = math.isqrt(count)
    if side * side != count:
        raise SelectionError(
            f"{why}: {count} image places are no square, so how they lie in the picture is not known; give grid=(height, width)."
        )
    return side, side


def axes(
    take: Take,
    rows: Sequence[int],
    width: int,
    tokens: Sequence[str],
    prompt: Sequence[str],
    image: tuple[int, int] | None,
    grid: Sequence[int] | None,
) -> tuple[Axis, Axis]:
    """(rows, keys) of a map of one sample.

    Args:
        rows: numbers of the rows. width: number of keys. tokens: texts of a language model's tokens. prompt: of a denoiser's.
        image: (start, stop) of the image among the tokens. grid: of the image, where the take does not say.
    """
    rows = tuple(int(i) for i in rows)
    if take.segments or take.kind == "cross":
        return _denoiser(take, rows, width, prompt, grid)
    every = tuple(range(width))
    return _tokens(take, rows, tokens, image, grid), _tokens(take, every, tokens, image, grid)


def _tokens(take: Take, numbers: tuple[int, ...], words: Sequence[str], image: Any, grid: Any) -> Axis:
    texts = tuple(words[i] for i in numbers)
    if image is None:
        return Axis(numbers, texts)
    start, stop = image
    h, w = grid_of(stop - start, grid, take.site)
    whole = tuple(range(start, stop))
    if start not in numbers or numbers[numbers.index(start) : numbers.index(start) + len(whole)] != whole:
        return Axis(numbers, texts)
    return Axis(numbers, texts, (numbers.index(start), h, w))


def _denoiser(take: Take, rows: tuple[int, ...], width: int, prompt: Sequence[str], grid: Any) -> tuple[Axis, Axis]:
    every = tuple(range(width))
    parts = take.segments or {}
    picture, text = parts.get("image"), parts.get("text")
    grid = take.grid if take.grid is not None else grid

    def side(numbers: tuple[int, ...], picture: Any, text: Any) -> Axis:
        first, last = text if text is not None else (0, 0)
        words = tuple(prompt[i - first] if first <= i < last and i - first < len(prompt) else f"{i}" for i in numbers)
        if picture is None or picture[0] not in numbers or not _grid_known(picture, grid):
            return Axis(numbers, words)
        start = numbers.index(picture[0])
        if numbers[start : start + picture[1] - picture[0]] != tuple(range(*picture)):
            return Axis(numbers, words)
        return Axis(numbers, words, (start, *grid_of(picture[1] - picture[0], grid, take.site)))

    if take.kind == "cross":
        return side(rows, picture, None), side(every, None, (0, width))
    return side(rows, picture, text), side(every, picture, text)


@dataclass(frozen=True)
class Fold:
    """A denoiser's text has many places behind its words: rows of those are left out, and the keys are one, their sum.

    Attributes:
        rows, keys: places that stay. rest: keys that become one, behind the others; nothing is folded where there are none.
    """

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    rest: tuple[int, ...]

    @staticmethod
    def of(take: Take, rows: Sequence[int], width: int, words: int) -> Fold | None:
        """That of a map with `words` known words; None where there is nothing to fold."""
        text = (0, width) if take.kind == "cross" else (take.segments or {}).get("text")
        if text is None or not words or text[1] - text[0] - words < 2:
            return None
        idle = range(text[0] + words, text[1])
        stay = [i for i, n in enumerate(rows) if take.kind == "cross" or int(n) not in idle]
        return Fold(tuple(stay), tuple(i for i in range(width) if i not in idle), tuple(idle))

    def maps(self, maps: Tensor) -> Tensor:
        """Maps [H, n, m], folded."""
        maps = maps[:, list(self.rows)]
        return torch.cat([maps[..., list(self.keys)], maps[..., list(self.rest)].sum(dim=-1, keepdim=True)], dim=-1)

    def sides(self, pair: tuple[Axis, Axis]) -> tuple[Axis, Axis]:
        """Rows and keys of the folded maps."""
        rows, keys = (_part(axis, stay) for axis, stay in zip(pair, (self.rows, self.keys), strict=True))
        rest = f"+ {len(self.rest)} behind the words"
        return rows, Axis((*keys.numbers, self.rest[0]), (*keys.words, rest), keys.grid)


def _part(axis: Axis, stay: tuple[int, ...]) -> Axis:
    """Some places of an axis, with the whole of its picture."""
    grid = None if axis.grid is None else (stay.index(axis.grid[0]), *axis.grid[1:])
    return Axis(tuple(axis.numbers[i] for i in stay), tuple(axis.words[i] for i in stay), grid)


def _grid_known(picture: Any, grid: Any) -> bool:
    count = picture[1] - picture[0]
    return grid is not None or math.isqrt(count) ** 2 == count
