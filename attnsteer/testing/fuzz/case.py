"""One case of the fuzz, and how it is drawn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

HOSTS = ("llama", "mistral", "qwen3", "gemma2", "gpt_oss", "gpt2", "gemma3_text")
# With layers of two kinds of masks, and with windows at all.
MIXED, WINDOWED = ("gemma2", "gpt_oss", "gemma3_text"), ("mistral", "gemma2", "gpt_oss", "gemma3_text")
WINDOW = 5
METHODS = ("ZeroTuning", "ACT", "SpotLight", "PASTA", "HeadGate")
FORMS = ("none", "2d", "positions", "bool", "float", "tree")
WAYS = ("whole", "decode", "chunks", "crop", "reorder")
Picker = Callable[[str, Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        host, method: names. strength: of the method. layer, heads: where it acts. phases: "all", "prefill" or "decode".
        form: of the mask. rows: the layout. blind: what padding rows see. parents: of a tree.
        way: the calls. cuts: their edges. seed: of the tokens.
    """

    host: str
    method: str
    strength: float
    layer: int
    heads: tuple[int, ...]
    phases: str
    form: str
    rows: tuple[tuple[int, ...], ...]
    blind: str
    parents: tuple[int, ...]
    way: str
    cuts: tuple[int, ...]
    seed: int

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def parse(text: str) -> Case:
        """From its `str`."""
        frozen = lambda v: tuple(map(frozen, v)) if isinstance(v, list) else v  # noqa: E731
        return Case(**{name: frozen(value) for name, value in json.loads(text).items()})


STRENGTHS = {
    "ZeroTuning": (0.2, 3.0, 9.0),
    "ACT": (0.0, 0.3, 0.7),
    "SpotLight": (0.2, 0.6, 0.9),
    "PASTA": (0.02, 0.5, 3.0),
    "HeadGate": (-0.5, 0.0, 2.0),
}


def draw(pick: Picker) -> Case:
    """A case; `pick(name, options)` chooses one of the options."""
    host, method, form = pick("host", HOSTS), pick("method", METHODS), pick("form", FORMS)
    if form == "tree" and host in WINDOWED:
        # A window hides ancestors: a token that then sees itself only cannot be told from the first of another sequence.
        form = "none"
    ways = [w for w in WAYS if form in ("none", "2d") or w == "whole" or (form != "positions" and w != "reorder")]
    if form in ("positions", "tree") or (host in WINDOWED and form in ("bool", "float")):
        # A mask for a window cache counts other slots.
        ways = ["whole"]
    if host in WINDOWED:
        # The library cannot cut a window cache back.
        ways = [w for w in ways if w != "crop"]
    way = pick("way", ways)
    packed = form in ("positions", "bool", "float")
    rows = _rows(pick, form, packed, way)
    length = sum(map(abs, rows[0]))
    blinds = ["none"]
    if form in ("bool", "float"):
        # Padding at the end of a call that sees itself and all before it cannot be told from a token.
        blinds = (
            ["none"]
            if way != "whole"
            else ["none", "self", "all"]
            if all(row[-1] > 0 for row in rows)
            else ["none", "self"]
        )
    parents = tuple(pick("parent", range(max(1, t))) for t in range(length)) if form == "tree" else ()
    steps = pick("steps", (1, 2, 3))
    if way == "chunks":
        cuts = tuple(sorted({pick("cut", range(1, length)), pick("cut", range(1, length))}))
    elif way == "crop":
        cuts = (pick("cut", range(1, length)), pick("back", (1, 2)))
    else:
        cuts = (steps,)
    return Case(
        host, method, pick("strength", STRENGTHS[method]), pick("layer", (0, 1, 2)),
        pick("heads", ((0, 1, 2, 3), (0, 2), (3,))), pick("phases", ("all", "prefill", "decode")), form, rows,
        pick("blind", blinds), parents, way, cuts, pick("seed", range(1000)),
    )  # fmt: skip


def _rows(pick: Picker, form: str, packed: bool, way: str) -> tuple[tuple[int, ...], ...]:
    length = pick("length", (8, 11, 13, 17))
    if form in ("none", "tree"):
        return ((length,),) * pick("batch", (1, 2, 3))
    if form == "2d":
        return tuple(_padded(pick, length, way) for _ in range(pick("batch", (1, 2, 3))))
    return tuple(_packed(pick, length, form) for _ in range(pick("batch", (1, 2))))


def _padded(pick: Picker, length: int, way: str) -> tuple[int, ...]:
    """One sequence with padding on the left, on the right, or in a hole."""
    side = pick("side", ("none", "left", "right", "hole", "both"))
    if side == "none":
        return (length,)
    size = pick("padding", (1, 2, length - 6))
    if side == "left":
        return (-size, length - size)
    if side == "right" and way == "whole":
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
