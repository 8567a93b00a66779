"""Reads maps, masks and boxes of a record, as torch tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import RecordError


def grid(values: Any, what: str) -> Tensor:
    """A map [h][w] of numbers that are finite and not negative -> fp64 [h, w].

    Raises:
        RecordError: it has another form.
    """
    try:
        found = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecordError(f"{what} is no grid of numbers: {error}.") from error
    if found.ndim != 2 or found.numel() == 0 or not bool(found.isfinite().all()) or bool((found < 0).any()):
        raise RecordError(f"{what} has the shape {list(found.shape)}; a grid [h][w] of finite numbers >= 0 is needed.")
    return found


def box(values: Any, what: str) -> tuple[float, float, float, float]:
    """A box (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1.

    Raises:
        RecordError: it has another form.
    """
    found = tuple(float(v) for v in values)
    if len(found) != 4 or not (found[0] <= found[2] and found[1] <= found[3]):
        raise RecordError(f"{what} is {values!r}; (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1 is needed.")
    return found


def nested(values: Any) -> bool:
    """Whether a target is a grid or a list of boxes, not one box."""
    return len(values) > 0 and not isinstance(values[0], int | float)


def inside(target: Any, size: tuple[int, int]) -> Tensor:
    """The mask of a target on a map: fp64 [h, w].

    Args:
        target: a mask [h][w] of the map's size, with values in [0, 1]; or a box in fractions of the image, which takes
            the cells whose centre it holds. size: (h, w) of the map.

    Raises:
        RecordError: another form or size, or nothing of the map is inside.
    """
    h, w = size
    if nested(target):
        mask = grid(target, "the mask")
        if tuple(mask.shape) != size or float(mask.max()) > 1:
            raise RecordError(
                f"the mask has the shape {list(mask.shape)} and values up to {float(mask.max()):g}; the map has "
                f"{list(size)}: resize the mask, to values in [0, 1]."
            )
    else:
        x0, y0, x1, y1 = box(target, "the target")
        x, y = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (w, h))
        mask = (((y >= y0) & (y <= y1))[:, None] & ((x >= x0) & (x <= x1))[None, :]).double()
    if float(mask.sum()) == 0:
        raise RecordError(
            f"nothing of the {h} x {w} map is inside of the target {target if len(target) == 4 else 'mask'}."
        )
    return mask
