"""Regions of the image that belong to phrases: boxes in fractions of the image, or masks, on the grid of a map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SelectionError, brief
from .phrases import is_phrase

Box = tuple[float, float, float, float]
# Per prompt: (phrase, its boxes or its mask [h, w]).
Layout = tuple[tuple[Any, Any], ...]


def layouts(boxes: Any) -> tuple[Layout, ...]:
    """Checked layouts, one per prompt or one for all.

    Args:
        boxes: phrase -> (x0, y0, x1, y1) in fractions of the image, several of them, or a mask [h, w]; or a list of such
            mappings, one per prompt.

    Raises:
        SelectionError: no phrase, a box outside the image or without area, a mask that is empty or full.
    """
    several = isinstance(boxes, (list, tuple))
    each = list(boxes) if several else [boxes]
    if not each or not all(isinstance(b, Mapping) and b for b in each):
        raise SelectionError(
            f"boxes={brief(boxes)}: give phrase -> (x0, y0, x1, y1) in fractions of the image, or one such mapping per prompt."
        )
    return tuple(tuple((_phrase(p), _region(p, r)) for p, r in mapping.items()) for mapping in each)


def _phrase(phrase: Any) -> Any:
    if not is_phrase(phrase):
        raise SelectionError(
            f"boxes has the key {phrase!r}: a phrase of the prompt, ('cat', 2), or a (start, stop) range."
        )
    return phrase if isinstance(phrase, str) else tuple(phrase)


def _region(phrase: Any, region: Any) -> Any:
    if isinstance(region, Tensor):
        share = float(region.float().mean()) if region.ndim == 2 else 0.0
        if not 0 < share < 1:
            raise SelectionError(
                f"the mask of {phrase!r} must be [h, w], neither empty nor full; it is {tuple(region.shape)}."
            )
        return region
    given = list(region) if isinstance(region, (list, tuple)) else []
    several = given if given and all(isinstance(b, (list, tuple)) for b in given) else [given]
    return tuple(_box(phrase, box) for box in several)


def _box(phrase: Any, box: Any) -> Box:
    if len(box) != 4 or not all(map(is_finite, box)) or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise SelectionError(
            f"the box {brief(tuple(box))} of {phrase!r} is not inside the image: (x0, y0, x1, y1) are fractions with "
            "0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, from the left and from the top."
        )
    return tuple(float(v) for v in box)


def is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def cells(region: Any, grid: tuple[int, int], truncate: bool, phrase: Any = "") -> list[Tensor]:
    """bool [h, w] for each box of a region, or for its mask.

    Args:
        truncate: cells int(c n) to int(c' n), end excluded, as the released code has it; otherwise the cells whose centre
            lies inside.

    Raises:
        SelectionError: a box is smaller than one cell of this grid, or a mask has no cell.
    """
    if isinstance(region, Tensor):
        shrunk = F.adaptive_avg_pool2d(region.float()[None, None], grid)[0, 0] >= 0.5
        if not bool(shrunk.any()):
            raise SelectionError(f"the mask of {phrase!r} covers no cell of the {grid[0]} x {grid[1]} map.")
        return [shrunk]
    found = []
    for x0, y0, x1, y1 in region:
        if (x1 - x0) * grid[1] < 1 - 1e-9 or (y1 - y0) * grid[0] < 1 - 1e-9:
            raise SelectionError(
                f"the box {(x0, y0, x1, y1)} of {phrase!r} is smaller than one cell of the {grid[0]} x {grid[1]} map; give a "
                "larger box, or sites with larger maps."
            )
        found.append(_span(y0, y1, grid[0], truncate)[:, None] & _span(x0, x1, grid[1], truncate)[None])
    return found


def _span(start: float, stop: float, n: int, truncate: bool) -> Tensor:
    """bool [n]"""
    i = torch.arange(n)
    if truncate:
        return (i >= int(start * n)) & (i < int(stop * n))
    # Rounding errors of the fractions must not cost the cell that a box exactly covers.
    centre = (i.double() + 0.5) / n
    return (centre >= start - 1e-9) & (centre < stop - 1e-9)


def union(parts: list[Tensor]) -> Tensor:
    """bool [h, w]"""
    return torch.stack(parts).any(dim=0)
