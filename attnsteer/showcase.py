"""One intervention per modality on the embedded models, before and after: figures, and a contact sheet.

A demonstration, not an evaluation: few samples, settings chosen beforehand on other splits. The intervals are wide and
are shown for that reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import zoo
from .evals.statistics import Interval, paired_bootstrap
from .steering import steer

READINGS, SCENES, PICTURES = 300, 60, 8


@dataclass(frozen=True)
class Line:
    """What one intervention did.

    Attributes:
        model: of the zoo. method: repr of the intervention. figure: what is measured.
        before, after: means. change: paired, with its 95 % interval. fired: attention calls that were edited.
        seconds: for both arms.
    """

    model: str
    method: str
    figure: str
    before: float
    after: float
    change: Interval
    fired: int
    seconds: float


@dataclass(frozen=True)
class Tile:
    """A row of the contact sheet: images before and after, with a label each."""

    label: str
    images: list[Tensor]


def showcase(out: Path) -> tuple[list[Line], Path | None]:
    """Run what the installed models allow.

    Returns:
        the lines, and the path of the contact sheet (None where no model draws pictures).
    """
    lines: list[Line] = []
    tiles: list[Tile] = []
    for name in zoo.available():
        found, rows = SCENES_OF[name](name)
        lines.append(found)
        tiles += rows
    if not tiles:
        return lines, None
    from .viz import contact_sheet

    width = max(len(t.images) for t in tiles)
    images = [[*t.images, *[None] * (width - len(t.images))] for t in tiles]
    path = out / "before-after.png"
    contact_sheet(images, rows=[t.label for t in tiles], columns=[str(i + 1) for i in range(width)], path=path)
    return lines, path


def _compare(
    name: str, target: Any, method: Any, figure: str, measure: Callable[[], list[float]]
) -> Line:
    begun = time.monotonic()
    before = measure()
    with steer(target, method) as run:
        after = measure()
    fired = sum(row.edited_calls for row in run.audit.rows)
    mean = lambda v: sum(v) / len(v)  # noqa: E731
    change = paired_bootstrap(before, after, draws=2000)
    spent = time.monotonic() - begun
    return Line(name, repr(method), figure, mean(before), mean(after), change, fired, spent)


def _text(name: str) -> tuple[Line, list[Tile]]:
    from .intervention import Intervention
    from .zoo.measure.text import choose
    from .zoo.shapes.reading import reading

    model, tokenizer = zoo.load(name)
    items = [reading("test", i) for i in range(READINGS)]
    method = Intervention.from_pretrained(zoo.folder(name) / "act")

    def measure() -> list[float]:
        return [float(r.answer == c) for r, c in zip(items, choose(model, tokenizer, items), strict=True)]

    return _compare(name, model, method, f"reading accuracy, {READINGS} passages", measure), []


def _vision(name: str) -> tuple[Line, list[Tile]]:
    from .methods.vhr import VHR
    from .zoo.measure.text import answer
    from .zoo.shapes.questions import pope

    model, processor = zoo.load(name)
    asked = [(s, q) for s, qs in (pope("test", i, "adversarial") for i in range(SCENES)) for q in qs]

    def measure() -> list[float]:
        said = answer(model, processor, [s for s, _ in asked], [q for _, q in asked])
        return [float(q.answer == w) for (_, q), w in zip(asked, said, strict=True)]

    return _compare(name, model, VHR(), f"existence accuracy, {len(asked)} adversarial questions", measure), []
