"""One intervention per modality on the embedded models, before and after: figures, and a contact sheet.

A demonstration, not an evaluation: few samples, settings chosen beforehand on other splits. The intervals are wide and
are shown for that reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import zoo
from .evals.significance import Interval, paired_bootstrap
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
class Sheet:
    """Pictures of one model: a label for each row, a prompt for each column."""

    rows: list[tuple[str, list[Tensor]]]
    prompts: list[str]


def showcase(out: Path, names: Sequence[str] | None = None) -> tuple[list[Line], list[Path]]:
    """Steer embedded models, before and after.

    Args:
        out: folder of the contact sheets. names: of the models; None: all of this installation.

    Returns:
        the lines, and the paths of the contact sheets, one for each model that draws pictures.
    """
    lines: list[Line] = []
    paths: list[Path] = []
    for name in names or zoo.available():
        line, sheet = PARTS[name](name)
        lines.append(line)
        if sheet is not None:
            from .viz import contact_sheet

            path = out / f"{name}.png"
            labels, images = zip(*sheet.rows, strict=True)
            contact_sheet(images, rows=labels, columns=sheet.prompts, path=path)
            paths.append(path)
    return lines, paths


def _compare(name: str, target: Any, method: Any, figure: str, measure: Callable[[], list[float]]) -> Line:
    begun = time.monotonic()
    before = measure()
    with steer(target, method) as run:
        after = measure()
    fired = sum(record.edits for record in run.audit.records.values())
    mean = lambda v: sum(v) / len(v)  # noqa: E731
    change = paired_bootstrap(before, after, draws=2000)
    spent = time.monotonic() - begun
    return Line(name, repr(method), figure, mean(before), mean(after), change, fired, spent)


def _text(name: str) -> tuple[Line, Sheet | None]:
    from .intervention import Intervention
    from .zoo.measure.text import choose
    from .zoo.shapes.reading import reading

    model, tokenizer = zoo.load(name)
    items = [reading("test", i, "one-shot") for i in range(READINGS)]
    method = Intervention.from_pretrained(zoo.folder(name) / "act")

    def measure() -> list[float]:
        return [float(r.answer == c) for r, c in zip(items, choose(model, tokenizer, items), strict=True)]

    return _compare(name, model, method, f"one-shot reading accuracy, {READINGS} passages", measure), None


def _vision(name: str) -> tuple[Line, Sheet | None]:
    from .methods.vhr import VHR
    from .zoo.measure.text import answer
    from .zoo.shapes.questions import pope

    model, processor = zoo.load(name)
    asked = [(s, q) for s, qs in (pope("test", i, "adversarial") for i in range(SCENES)) for q in qs]

    def measure() -> list[float]:
        said = answer(model, processor, [s for s, _ in asked], [q for _, q in asked])
        return [float(q.answer == w) for (_, q), w in zip(asked, said, strict=True)]

    return _compare(
        name, model, VHR(alpha=1.3), f"existence accuracy, {len(asked)} adversarial questions", measure
    ), None


def _boxes(name: str) -> tuple[Line, Sheet | None]:
    from .methods.attention_refocusing import AttentionRefocusing
    from .where import Where
    from .zoo.measure.image_quality import generate, shorter
    from .zoo.shapes.detect import detect
    from .zoo.shapes.layouts import in_boxes, layout

    pipe = zoo.load(name)
    wanted = [layout("test", i) for i in range(PICTURES)]
    # Sites and step sizes of the recipes attention-refocusing/shapes-layouts and shapes-mmdit.
    sites, step_size = {
        "shapes-sd": (Where(modules=[r".*down_blocks\.1.*attn2", r".*up_blocks\.0.*attn2"]), 0.0025),
        "shapes-mmdit": (Where(layers=[0, 2, 3]), 0.01),
    }[name]
    method = AttentionRefocusing(
        [{p.words: b for p, b in zip(w.phrases, w.boxes, strict=True)} for w in wanted],
        own=0.0,
        relative=True,
        step_size=step_size,
        sharpness=None,
        where=sites,
    )
    rows = []

    def measure() -> list[float]:
        images = generate(pipe, [w.prompt for w in wanted], **shorter(pipe))
        rows.append([_framed(i, w.boxes) for i, w in zip(images, wanted, strict=True)])
        read = detect(images)
        return [sum(in_boxes(w, d.objects)) / len(w.boxes) for w, d in zip(wanted, read, strict=True)]

    line = _compare(name, pipe, method, f"objects in their boxes, {2 * PICTURES} boxes", measure)
    labels = (f"{name}", "AttentionRefocusing (frames: the boxes asked for)")
    return line, Sheet(list(zip(labels, rows, strict=True)), [w.prompt for w in wanted])


def _framed(image: Tensor, boxes: Any) -> Tensor:
    """The image twice as large, with the boxes' outlines in white and black."""
    large = image.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).clone()
    side = large.shape[-1]
    for k, box in enumerate(boxes):
        x0, y0, x1, y1 = (min(side - 1, round(v * side)) for v in box)
        tone = 1.0 - k
        large[:, y0, x0 : x1 + 1] = large[:, y1, x0 : x1 + 1] = tone
        large[:, y0 : y1 + 1, x0] = large[:, y0 : y1 + 1, x1] = tone
    return large


PARTS = {"shapes-lm": _text, "shapes-lvlm": _vision, "shapes-sd": _boxes, "shapes-mmdit": _boxes}
