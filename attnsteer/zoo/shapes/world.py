"""Scenes of coloured shapes: what a scene is, how it is drawn at random, and which samples belong to which split.

A scene is 1 to 5 objects on a grey ground. Objects never touch. Positions and radii are fractions of the image side,
x to the right and y down, so a scene can be rendered at any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.12, 0.22, 0.90),
    "yellow": (0.96, 0.88, 0.10),
    "purple": (0.62, 0.12, 0.76),
    "cyan": (0.10, 0.78, 0.82),
}
COLOUR_NAMES = tuple(COLOURS)
SIZES = ("small", "large")
TEXTURES = ("plain", "stripes", "checks", "grain")
# Radius of the disc of the same area, as a fraction of the side: (least, most) for each size.
RADII = {"small": (0.086, 0.100), "large": (0.132, 0.152)}
SIZE_LIMIT = 0.116
# Largest distance of a point of the shape from its centre of mass, over that radius.
REACH = {"circle": 1.0, "square": 1.2534, "triangle": 1.5551, "diamond": 1.2534, "cross": 1.2533, "star": 1.5376}
GAP = 2.5 / 64
MOST = 5

# The bias a model can learn, and hallucinate from: shapes that come together, and the usual colour of each shape.
PARTNER = {
    "circle": "star",
    "star": "circle",
    "square": "cross",
    "cross": "square",
    "triangle": "diamond",
    "diamond": "triangle",
}
USUAL = {"circle": "blue", "square": "red", "triangle": "green", "diamond": "purple", "cross": "cyan", "star": "yellow"}


@dataclass(frozen=True)
class Prior:
    """How strongly attributes come together.

    Attributes:
        partner: probability that an object's shape is the partner of one already there, in [0, 1].
        usual: probability that an object has the usual colour of its shape, in [0, 1].
        twin: probability that an object repeats shape and colour of one already there (for counting), in [0, 1].
    """

    partner: float = 0.0
    usual: float = 0.0
    twin: float = 0.0

    def __post_init__(self) -> None:
        for name in ("partner", "usual", "twin"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Prior({name}={getattr(self, name)}): a probability lies in [0, 1].")


FAIR = Prior()
BIASED = Prior(partner=0.6, usual=0.4, twin=0.1)


@dataclass(frozen=True)
class Object:
    """One object: `shape`, `colour`, `size` by name; centre of mass `x`, `y` and `radius` in fractions of the side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def reach(self) -> float:
        """Radius of the disc around the centre that holds the object."""
        return self.radius * REACH[self.shape]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box (x0, y0, x1, y1) in fractions, cut at the border."""
        left, up, right, down = extent(self.shape)
        r = self.radius
        x0, y0, x1, y1 = self.x - left * r, self.y - up * r, self.x + right * r, self.y + down * r
        return max(0.0, x0), max(0.0, y0), min(1.0, x1), min(1.0, y1)


@dataclass(frozen=True)
class Ground:
    """The grey ground: mean `level`, `texture`, its `contrast` (largest deviation), `period` in fractions, `seed`."""

    level: float = 0.5
    texture: str = "plain"
    contrast: float = 0.0
    period: float = 0.125
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """Objects on a ground."""

    objects: tuple[Object, ...]
    ground: Ground = Ground()

    def find(self, *, shape: str | None = None, colour: str | None = None) -> tuple[Object, ...]:
        """The objects of this shape and colour; None stands for any."""
        return tuple(o for o in self.objects if shape in (None, o.shape) and colour in (None, o.colour))


def extent(shape: str) -> tuple[float, float, float, float]:
    """How far a shape of radius one reaches (left, up, right, down) from its centre of mass."""
    reach = REACH[shape]
    if shape == "square":
        side = reach / math.sqrt(2)
        return side, side, side, side
    if shape == "triangle":
        half = reach * math.sqrt(3) / 2
        return half, reach, half, reach / 2
    if shape == "cross":
        arm = 1.1890
        return arm, arm, arm, arm
    if shape == "star":
        side = reach * math.sin(math.radians(72))
        return side, reach, side, reach * math.cos(math.radians(36))
    return reach, reach, reach, reach


# The splits: disjoint streams of random numbers, and for text disjoint halves of a hash (see `reading`).
SPLITS = {"train": 1, "calibration": 2, "test": 3}


def rng(split: str, index: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one sample. Samples of different splits, indices or streams share none.

    Args:
        split: "train", "calibration" or "test".
        index: number of the sample, >= 0.
        stream: separates tasks that use the same split (scenes, questions, layouts).

    Raises:
        ValueError: an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"No split {split!r}; there are {', '.join(SPLITS)}.")
    if index < 0:
        raise ValueError(f"Sample {index} of split {split!r}: the index starts at 0.")
    return np.random.default_rng([SPLITS[split], stream, index])


def sample_scene(
    g: np.random.Generator,
    *,
    count: int | tuple[int, int] = (1, MOST),
    prior: Prior = FAIR,
    textured: bool = True,
) -> Scene:
    """Draw a scene.

    Args:
        g: source of randomness.
        count: number of objects, or (least, most), each equally likely.
        prior: which attributes come together.
        textured: let a ground have a texture.
    """
    n = count if isinstance(count, int) else int(g.integers(count[0], count[1] + 1))
    if not 1 <= n <= MOST:
        raise ValueError(f"A scene has 1 to {MOST} objects; {n} were asked for.")
    looks: list[tuple[str, str]] = []
    for _ in range(n):
        looks.append(_look(g, looks, prior))
    return Scene(place(g, looks), sample_ground(g, textured))


def _look(g: np.random.Generator, others: list[tuple[str, str]], prior: Prior) -> tuple[str, str]:
    if others and g.random() < prior.twin:
        return others[int(g.integers(len(others)))]
    shape = SHAPES[int(g.integers(len(SHAPES)))]
    if others and g.random() < prior.partner:
        shape = PARTNER[others[int(g.integers(len(others)))][0]]
    colour = COLOUR_NAMES[int(g.integers(len(COLOUR_NAMES)))]
    if g.random() < prior.usual:
        colour = USUAL[shape]
    return shape, colour


def place(
    g: np.random.Generator, looks: list[tuple[str, str]], sizes: list[str | None] | None = None
) -> tuple[Object, ...]:
    """Put objects of the given (shape, colour) where they do not touch; sizes left None are drawn."""
    n = len(looks)
    chance = {1: 0.5, 2: 0.5, 3: 0.4}.get(n, 0.25)
    while True:
        found: list[Object] = []
        for i, (shape, colour) in enumerate(looks):
            size = sizes[i] if sizes and sizes[i] else SIZES[int(g.random() < chance)]
            radius = float(g.uniform(*RADII[size]))
            new = _free(g, shape, colour, size, radius, found)
            if new is None:
                break
            found.append(new)
        else:
            return tuple(found)


def _free(
    g: np.random.Generator, shape: str, colour: str, size: str, radius: float, others: list[Object]
) -> Object | None:
    left, up, right, down = (e * radius + GAP / 2 for e in extent(shape))
    for _ in range(40):
        x, y = float(g.uniform(left, 1 - right)), float(g.uniform(up, 1 - down))
        new = Object(shape, colour, size, x, y, radius)
        if all(math.hypot(x - o.x, y - o.y) > new.reach + o.reach + GAP for o in others):
            return new
    return None


def sample_ground(g: np.random.Generator, textured: bool = True) -> Ground:
    """A grey ground; half of them plain unless `textured` is off, then all."""
    level = float(g.uniform(0.35, 0.7))
    if not textured or g.random() < 0.5:
        return Ground(level)
    texture = TEXTURES[int(g.integers(1, len(TEXTURES)))]
    return Ground(level, texture, float(g.uniform(0.03, 0.09)), float(g.uniform(0.1, 0.25)), int(g.integers(2**31 - 1)))
