"""The detector: reads a scene back from any image, with no learned weights, and says nothing where it is not sure.

1. A pixel is a mix of grey and one colour: its chroma (what is left when the mean of the three channels is taken
   away) points in that colour's direction, and its length tells how much of the pixel the object covers.
2. Connected pixels of one colour make a patch. Its area and centre of mass give the radius and position that each
   shape would have.
3. Each shape is drawn there by the renderer and compared (soft intersection over union). The best is taken when it
   is good enough; otherwise the patch is debris.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .render import cover
from .world import COLOUR_NAMES, COLOURS, RADII, SHAPES, SIZE_LIMIT, SIZES, Object

# Thresholds, chosen on rendered scenes, on autoencoded ones, and on noise.
COVERED = 0.5  # share of a pixel that must be covered to belong to a patch
OFF_HUE = 0.5  # deviation from the colour's direction, over the covered part
SPECK = 6.0  # pixels of 64x64: smaller patches are neither objects nor counted as debris
FIT = 0.80  # least intersection over union
STRAY = 0.02  # debris of a clean image, over its whole area
SLACK = 0.15  # how far a radius may lie outside the range of its size, relative


@dataclass(frozen=True)
class Found:
    """A detected object and how well the drawn shape fits it: intersection over union in [0, 1]."""

    object: Object
    fit: float


@dataclass(frozen=True)
class Detection:
    """What was read from one image.

    Attributes:
        found: the objects, from left to right.
        debris: area of coloured patches that are no known shape, over the area of the image.
    """

    found: tuple[Found, ...]
    debris: float

    @property
    def objects(self) -> tuple[Object, ...]:
        """The objects, from left to right."""
        return tuple(f.object for f in self.found)

    @property
    def valid(self) -> bool:
        """At least one object, and nothing else: every coloured patch is a clean known shape."""
        return bool(self.found) and self.debris == 0.0

    def find(self, *, shape: str | None = None, colour: str | None = None) -> tuple[Object, ...]:
        """The objects of this shape and colour; None stands for any."""
        return tuple(o for o in self.objects if shape in (None, o.shape) and colour in (None, o.colour))


def detect(images: Tensor) -> list[Detection]:
    """Read the objects of each image.

    Args:
        images: [B, 3, S, S] or [3, S, S], values in [0, 1] (values outside are clamped), square.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"detect() takes square images [B, 3, S, S]; this has the shape {list(images.shape)}.")
    images = images.detach().float().clamp(0, 1)
    if not images.isfinite().all():
        raise ValueError("detect() was given an image with values that are not finite.")
    share, colour = unmix(images)
    labels = patches(share >= COVERED, colour)
    return [_read(share[b], colour[b], labels[b]) for b in range(len(images))]


def unmix(images: Tensor) -> tuple[Tensor, Tensor]:
    """For each pixel the share that its colour covers (0 where no colour fits) and the index of the colour."""
    palette = torch.tensor(list(COLOURS.values()), device=images.device)
    palette = palette - palette.mean(dim=1, keepdim=True)
    chroma = images - images.mean(dim=1, keepdim=True)
    share = torch.einsum("bchw,kc->bkhw", chroma, palette) / (palette**2).sum(dim=1)[None, :, None, None]
    parts = share[:, :, None] * palette[None, :, :, None, None]
    off = (chroma[:, None] - parts).norm(dim=2)
    off, colour = off.min(dim=1)
    share = share.gather(1, colour[:, None])[:, 0]
    length = palette.norm(dim=1)[colour]
    fits = (share > 0) & (off < OFF_HUE * share * length)
    return torch.where(fits, share.clamp(0, 1), 0.0), colour


def patches(mask: Tensor, colour: Tensor) -> Tensor:
    """Number the connected patches of one colour (eight neighbours): [B, S, S] integers, 0 for none."""
    b, h, w = mask.shape
    own = mask[:, None] & (colour[:, None] == torch.arange(len(COLOURS), device=mask.device)[:, None, None])
    labels = torch.arange(1, h * w + 1, device=mask.device, dtype=torch.float32).view(1, 1, h, w) * own
    while True:
        spread = torch.nn.functional.max_pool2d(labels, 3, 1, 1) * own
        if torch.equal(spread, labels):
            return labels.sum(dim=1).long()
        labels = spread


def _read(share: Tensor, colour: Tensor, labels: Tensor) -> Detection:
    side = labels.shape[-1]
    scale = (side / 64) ** 2
    found, debris = [], 0.0
    for label in labels.unique().tolist():
        if label == 0:
            continue
        core = labels == label
        k = int(colour[core][0])
        # The soft rim of the patch belongs to it: pixels beside it that are partly of its colour.
        near = torch.nn.functional.max_pool2d(core[None, None].float(), 3, 1, 1)[0, 0] > 0
        alpha = torch.where(near & (colour == k) & ((labels == 0) | core), share, 0.0)
        area = float(alpha.sum())
        if area < SPECK * scale:
            continue
        best = _fit(alpha, area, side)
        if best is None:
            debris += area / side**2
            continue
        (shape, x, y, radius), fit = best
        size = SIZES[int(radius > SIZE_LIMIT)]
        found.append(Found(Object(shape, COLOUR_NAMES[k], size, x, y, radius), fit))
    found.sort(key=lambda f: f.object.x)
    return Detection(tuple(found), debris)


def _fit(alpha: Tensor, area: float, side: int) -> tuple[tuple[str, float, float, float], float] | None:
    """The shape, centre and radius that explain a patch best, or None when none does."""
    radius = math.sqrt(area / math.pi) / side
    least, most = RADII["small"][0] * (1 - SLACK), RADII["large"][1] * (1 + SLACK)
    if not least <= radius <= most:
        return None
    at = (torch.arange(side, device=alpha.device) + 0.5) / side
    x, y = float((alpha.sum(dim=0) * at).sum()) / area, float((alpha.sum(dim=1) * at).sum()) / area
    n = len(SHAPES)
    drawn = cover(
        torch.arange(n, device=alpha.device), *(torch.full((n,), v, device=alpha.device) for v in (x, y, radius)), side
    )
    fit = torch.minimum(drawn, alpha).sum(dim=(1, 2)) / torch.maximum(drawn, alpha).sum(dim=(1, 2))
    best = int(fit.argmax())
    if float(fit[best]) < FIT:
        return None
    return (SHAPES[best], x, y, radius), float(fit[best])
