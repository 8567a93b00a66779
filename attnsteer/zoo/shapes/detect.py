"""The detector: reads a scene back from any image, with no learned weights, and says nothing where it is not sure.

1. What is left of a pixel when the mean of its three channels is taken away (its chroma) points in the direction of a
   colour, and its length tells how much of the pixel the object covers.
2. Connected coloured pixels make a patch, with the soft rim around it. A patch of two colours is debris. Its area and
   centre of mass give the radius and position that each shape would have.
3. Each shape is drawn there by the renderer and compared (soft intersection over union). The best is taken when it
   is good enough and clearly better than the next; otherwise the patch is debris.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .render import cover
from .world import COLOUR_NAMES, COLOURS, RADII, SHAPES, SIZE_LIMIT, SIZES, Object

# Thresholds, chosen on rendered scenes, on autoencoded ones, and on noise.
COVERED = 0.45  # share of a pixel that must be covered to belong to a patch
PURE = 0.85  # share of a patch that must be of its colour
SPECK = 6.0  # pixels of 64x64: smaller patches are neither objects nor counted as debris
FIT = 0.80  # least intersection over union
LEAD = 0.02  # least distance to the next best shape
SLACK = 0.12  # how far a radius may lie outside the range of its size, relative
RIM = 2  # pixels of 64x64


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
    own = share.gather(1, colour[:, None])[:, 0]
    core = patches(own >= COVERED)
    whole = core
    for _ in range(max(1, round(RIM * images.shape[-1] / 64))):
        grown = torch.nn.functional.max_pool2d(whole[:, None].float(), 3, 1, 1)[:, 0].long()
        whole = torch.where(whole == 0, grown, whole)
    return [_read(share[b], colour[b], core[b], whole[b]) for b in range(len(images))]


def unmix(images: Tensor) -> tuple[Tensor, Tensor]:
    """The share of each pixel that each colour would cover [B, 6, S, S] and the nearest colour by hue [B, S, S]."""
    palette = torch.tensor(list(COLOURS.values()), device=images.device)
    palette = palette - palette.mean(dim=1, keepdim=True)
    chroma = images - images.mean(dim=1, keepdim=True)
    along = torch.einsum("bchw,kc->bkhw", chroma, palette)
    length = palette.norm(dim=1)[:, None, None]
    return (along / length**2).clamp(0, 1), (along / length).argmax(dim=1)


def patches(mask: Tensor) -> Tensor:
    """Number the connected patches of a mask [B, S, S] (eight neighbours): integers, 0 for none."""
    b, h, w = mask.shape
    labels = torch.arange(1, h * w + 1, device=mask.device, dtype=torch.float32).view(1, h, w) * mask
    while True:
        spread = torch.nn.functional.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def _read(share: Tensor, colour: Tensor, core: Tensor, whole: Tensor) -> Detection:
    side = core.shape[-1]
    found, debris = [], 0.0
    for label in core.unique().tolist():
        if label == 0:
            continue
        inside = core == label
        pixels = int(inside.sum())
        if pixels < SPECK * (side / 64) ** 2:
            continue
        votes = torch.bincount(colour[inside], minlength=len(COLOURS))
        k = int(votes.argmax())
        alpha = torch.where(whole == label, share[k], 0.0)
        best = _fit(alpha, float(alpha.sum()), side) if int(votes[k]) >= PURE * pixels else None
        if best is None:
            debris += pixels / side**2
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
    (first, second), (best, _) = (v.tolist() for v in fit.topk(2))
    if first < FIT or first - second < LEAD:
        return None
    return (SHAPES[best], x, y, radius), first
