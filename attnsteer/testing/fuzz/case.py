"""One case of the fuzz, and how it is drawn."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .hosts import GENERATE, HOSTS, Host

# The forms of each method.
METHODS = {
    "ZeroTuning": ("plain",),
    "ACT": ("plain", "plain", "alpha", "first_hit", "running", "prefill_only"),
    "SpotLight": ("plain", "pooled", "words"),
    "PASTA": ("plain", "include", "words"),
    "HeadGate": ("plain",),
}
STRENGTHS = {
    "ZeroTuning": (0.2, 3.0, 9.0),
    "ACT": (0.0, 0.3, 0.7),
    "SpotLight": (0.2, 0.6, 0.9),
    "PASTA": (0.02, 0.5, 3.0),
    "HeadGate": (-0.5, 0.0, 2.0),
}
# Masks of rows and keys.
SQUARE = ("bool", "float", "bias", "tree")
Picker = Callable[[str, Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        host, method: names. variant: form of the method. strength: of the method, one for all or one for each sample.
        layer, heads: where it acts. phases: "all", "prefill" or "decode". region: query rows: "all", "last", or "some".
        form: of the mask. packed: pieces of a row are sequences of their own. rows: the layout. blind: what padding rows see.
        parents: of a tree. way: the calls. cuts: their edges. threads: two at once, each with tokens of its own.
        seed: of the tokens.
    """

    host: str
    method: str
    variant: str
    strength: tuple[float, ...]
    layer: int
    heads: tuple[int, ...]
    phases: str
    region: str
    form: str
    packed: bool
    rows: tuple[tuple[int, ...], ...]
    blind: str
    parents: tuple[int, ...]
    way: str
    cuts: tuple[int, ...]
    threads: bool
    seed: int

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def parse(text: str) -> Case:
        """From its `str`."""
        frozen = lambda v: tuple(map(frozen, v)) if isinstance(v, list) else v  # noqa: E731
        return Case(**{name: frozen(value) for name, value in json.loads(text).items()})


def cases(seed: int) -> Iterator[Case]:
    """Cases without an end, the same ones for a seed."""
    source = random.Random(seed)
    while True:
        yield draw(lambda _, options: source.choice(options))


def draw(pick: Picker) -> Case:
    """A case; `pick(name, options)` chooses one of the options."""
    name, method = pick("host", tuple(HOSTS)), pick("method", tuple(METHODS))
    host, variant = HOSTS[name], pick("variant", METHODS[method])
    way, form = pick("way", host.ways), pick("form", host.forms)
    if way in GENERATE and form not in ("none", "2d"):
        form = "2d"
    if (way == "reorder" and form in SQUARE) or (form == "tree" and way not in ("whole", "chunks", "crop")):
        way = "whole"
    if way == "crop" and variant == "words":
        # The words of other tokens stand elsewhere.
        variant = "plain"
    packed = form == "positions" or (form in SQUARE and form != "tree" and pick("packed", (True, True, False)))
    rows = _rows(pick, host, form, packed, way)
    length = sum(map(abs, rows[0]))
    blind = pick("blind", ("none", "self", "all")) if form in SQUARE and form != "tree" else "none"
    if way in ("decode", "score", "rewind"):
        # Padding at the end of a prompt that goes on sees nothing, or the tokens behind it would be of two sequences.
        blind = "none"
    parents = tuple(pick("parent", range(max(1, t))) for t in range(length)) if form == "tree" else ()
    # The last row is that of each call, and here calls are divided otherwise.
    regions = (
        ("all", "all", "some")
        if way in ("lookup", "assisted", "uncached", "crop", "score")
        else ("all", "all", "some", "last")
    )
    strengths = STRENGTHS[method]
    many = pick("per sample", (False, False, True))
    return Case(
        name, method, variant,
        tuple(pick("strength", strengths) for _ in rows) if many else (pick("strength", strengths),),
        pick("layer", (0, 1, 2)), pick("heads", ((0, 1, 2, 3), (0, 2), (3,))),
        pick("phases", ("all", "all", "prefill", "decode")), pick("region", regions), form, packed, rows, blind, parents,
        way, _cuts(pick, host, way, rows), variant != "words" and pick("threads", (False, False, False, True)),
        pick("seed", range(1000)),
    )  # fmt: skip


def _cuts(pick: Picker, host: Host, way: str, rows: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Edges of calls, or the number of generated tokens. A first call holds the whole image."""
    length = sum(map(abs, rows[0]))
    first = 2 + len(host.image) + max(0, *(-row[0] for row in rows)) if host.image else 1
    first = max(1, min(first, length - 2))
    inside = range(first, length)
    if way == "chunks":
        return tuple(sorted({pick("cut", inside), pick("cut", inside)}))
    if way == "crop":
        return (pick("cut", inside), pick("to", inside), pick("back", (1, 2)))
    if way == "rewind":
        steps = pick("steps", (2, 3))
        return (steps, pick("to", range(steps)))
    return (pick("steps", (1, 2, 3)),)


def _rows(pick: Picker, host: Host, form: str, packed: bool, way: str) -> tuple[tuple[int, ...], ...]:
    length = pick("length", (8, 11, 13, 17)) + len(host.image)
    batch = 1 if way in ("lookup", "assisted") else pick("batch", (1, 2, 3))
    if form in ("none", "tree"):
        return ((length,),) * batch
    if packed:
        return tuple(_packed(pick, length, form) for _ in range(batch))
    return tuple(_padded(pick, host, length, way) for _ in range(batch))


def _padded(pick: Picker, host: Host, length: int, way: str) -> tuple[int, ...]:
    """One sequence with padding on the left, on the right, or in a hole."""
    sides = ("none", "left") if way in GENERATE or host.image else ("none", "left", "right", "hole", "both")
    side = pick("side", sides)
    if side == "none":
        return (length,)
    size = pick("padding", (1, 2, length - len(host.image) - 6))
    if side == "left":
        return (-size, length - size)
    if side == "right" and way in ("whole", "chunks", "crop"):
        return (length - size, -size)
    if side == "hole":
        return (3, -size, length - size - 3)
    return (-1, 2, -1, length - 4)


def _packed(pick: Picker, length: int, form: str) -> tuple[int, ...]:
    """Two or three sequences; between and around them padding, where the mask can say so."""
    first = pick("first", range(2, length - 3))
    pieces = [first, length - first]
    if pieces[1] > 5 and pick("third", (True, False)):
        pieces[1:] = [2, pieces[1] - 2]
    if form == "positions":
        return tuple(pieces)
    pads = pick("pads", ("none", "left", "between", "right"))
    # Padding is as wide in every row, so that all have the same length.
    at = {"none": 1, "left": 0, "between": 1, "right": len(pieces)}[pads]
    return tuple([*pieces[:at], -2, *pieces[at:]])
