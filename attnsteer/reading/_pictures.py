"""Pictures and maps over them: components, thresholds, sizes. Pictures are PIL images; nothing of PIL is imported here."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SelectionError

# PIL's numbers of its filters.
LANCZOS = 1


def checked_picture(name: str, image: Any) -> Any:
    """The picture in RGB.

    Raises:
        SelectionError: it is no PIL image.
    """
    if not all(hasattr(image, m) for m in ("convert", "resize", "crop", "tobytes", "frombytes", "size")):
        raise SelectionError(f"{name}: the image is a {type(image).__name__}; give a PIL image.")
    return image.convert("RGB")


def pixels(image: Any) -> Tensor:
    """uint8 [height, width, 3] of an RGB picture."""
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, -1)


def picture(like: Any, values: Tensor) -> Any:
    """A picture of uint8 [height, width, 3], or [height, width] for one in grey."""
    mode = "RGB" if values.ndim == 3 else "L"
    made = like.convert(mode).resize((values.shape[1], values.shape[0]))
    made.frombytes(values.contiguous().cpu().numpy().tobytes())
    return made


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [..., h, w] at (height, width), bilinear between the centres of cells."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    out = F.interpolate(flat, size=size, mode="bilinear", align_corners=False, antialias=True)
    return out.reshape(*maps.shape[:-2], *size)


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of all values, linear between order statistics (as numpy.percentile; torch.quantile has a limit of size)."""
    ordered = values.flatten().sort().values
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def components(mask: Tensor, diagonal: bool = False) -> Tensor:
    """int64 [h, w]: 0 where bool `mask` [h, w] is False, else the number of its connected component, from 1, by first pixel.

    Args:
        diagonal: whether pixels that touch at a corner are connected.
    """
    reach = 1 if diagonal else 0
    parent: list[int] = []
    runs: list[list[tuple[int, int, int]]] = []

    def root(a: int) -> int:
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        return a

    for y, row in enumerate(mask.cpu()):
        edges = F.pad(row.to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
        here = []
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            name = len(parent)
            parent.append(name)
            for above, below, other in runs[y - 1] if y else ():
                if above < stop + reach and below > start - reach:
                    a, b = sorted((root(other), root(name)))
                    parent[b] = a
            here.append((start, stop, name))
        runs.append(here)
    label = torch.zeros(mask.shape, dtype=torch.long)
    numbers: dict[int, int] = {}
    for y, here in enumerate(runs):
        for start, stop, name in here:
            label[y, start:stop] = numbers.setdefault(root(name), len(numbers) + 1)
    return label


def box_of(mask: Tensor) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1), ends excluded, of the True pixels of bool [h, w]; the whole picture where there are none."""
    rows, columns = (mask.any(dim=d).nonzero()[:, 0] for d in (1, 0))
    if not len(rows):
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def minmax(values: Tensor) -> Tensor:
    """Scaled to [0, 1] over the last two axes; zero where all are equal."""
    low, high = values.amin(dim=(-2, -1), keepdim=True), values.amax(dim=(-2, -1), keepdim=True)
    return torch.where(high > low, (values - low) / torch.where(high > low, high - low, 1.0), 0.0)
