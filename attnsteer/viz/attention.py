"""Attention over an image: per generated word before and after, and per prompt word with boxes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import SelectionError
from .head_figures import new_figure, saved
from .sheet import as_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .record import Box

# Inches of one panel; characters of a title above it, and of a line beside it.
PANEL, TITLE, LABEL = 1.7, 18, 26
# Panels side by side before a new line of words begins.
ACROSS = 8


def word_attention(
    image: Any,
    words: Sequence[str],
    before: Tensor,
    after: Tensor | None = None,
    path: str | Path | None = None,
    *,
    labels: tuple[str, str] = ("before", "after"),
    title: str = "",
) -> Figure:
    """Attention over the image per generated word: one panel each, with the row "after" below "before".

    Args:
        image: as in `contact_sheet`. words: one per map. before, after: [words, h, w], shares of attention; one colour scale
            holds for all, and each panel says the map's sum.
        path: also save the figure there.

    Raises:
        SelectionError: maps and words do not fit each other.
        MissingExtra: matplotlib is not installed.
    """
    rows = [before] if after is None else [before, after]
    for maps in rows:
        _check(maps, words)
    picture = as_image(image)
    lines = -(-len(words) // ACROSS)
    columns = min(len(words), ACROSS)
    figure = new_figure(PANEL * columns + 1.6, (PANEL + 0.35) * lines * len(rows) + (0.6 if title else 0.2))
    axes = figure.subplots(lines * len(rows), columns, squeeze=False)
    top = max(float(maps.max()) for maps in rows)
    drawn = None
    for line in range(lines):
        part = range(line * ACROSS, min((line + 1) * ACROSS, len(words)))
        for k, maps in enumerate(rows):
            row = axes[line * len(rows) + k]
            for j in range(columns):
                if j >= len(part):
                    row[j].set_axis_off()
                    continue
                i = part[j]
                drawn = _overlay(row[j], picture, maps[i], top)
                row[j].set_title(f"{_cut(words[i]) if k == 0 else ''}\n{float(maps[i].sum()):.2f}".strip(), fontsize=9)
            if len(rows) > 1:
                row[0].set_ylabel(labels[k], fontsize=10)
    figure.colorbar(drawn, ax=axes, label="attention", fraction=0.03, pad=0.01)
    if title:
        figure.suptitle(title)
    return saved(figure, path)


def cross_attention(
    image: Any,
    words: Sequence[str],
    maps: Tensor | Mapping[str, Tensor],
    path: str | Path | None = None,
    *,
    boxes: Mapping[str, Box] | None = None,
    title: str = "",
) -> Figure:
    """The map of each prompt word over the image, with its box; one row per site or step where several are given.

    Args:
        image: as in `contact_sheet`. words: one per map. maps: [words, h, w], or `{row label: [words, h, w]}`; each panel has
            its own colour scale, since words differ in mass.
        path: also save the figure there.
        boxes: word -> (x0, y0, x1, y1) in fractions of the image; the panel then also says the share of the map inside the
            box over the box's share of the area.

    Raises:
        SelectionError: maps and words do not fit, a box of another word, or a box outside the image.
        MissingExtra: matplotlib is not installed.
    """
    from .record import box_ratio

    boxes = dict(boxes or {})
    rows = dict(maps) if isinstance(maps, Mapping) else {"": maps}
    for row in rows.values():
        _check(row, words)
    unknown = [w for w in boxes if w not in words]
    if unknown:
        raise SelectionError(f"cross_attention got boxes for {unknown}, the words are {list(words)}.")
    picture = as_image(image)
    figure = new_figure(PANEL * (len(words) + 1) + 0.6, (PANEL + 0.35) * len(rows) + (0.6 if title else 0.2))
    axes = figure.subplots(len(rows), len(words) + 1, squeeze=False)
    for i, (label, row) in enumerate(rows.items()):
        _bare(axes[i, 0]).imshow(picture, extent=(0, 1, 1, 0))
        axes[i, 0].set_ylabel("\n".join(textwrap.wrap(label, LABEL)), fontsize=8)
        for box, colour in zip(boxes.values(), _colours(len(boxes)), strict=True):
            _frame(axes[i, 0], box, colour)
        for j, word in enumerate(words):
            panel = axes[i, j + 1]
            _overlay(panel, picture, row[j], float(row[j].max()))
            text = [_cut(word)] if i == 0 else []
            if word in boxes:
                _frame(panel, boxes[word], _colours(len(boxes))[list(boxes).index(word)])
                text.append(f"{float(box_ratio(row[j].float().cpu(), boxes[word])):.2f}x in its box")
            panel.set_title("\n".join(text), fontsize=9)
    if title:
        figure.suptitle(title)
    return saved(figure, path)


def _check(maps: Tensor, words: Sequence[str]) -> None:
    if isinstance(words, str) or not words or getattr(maps, "ndim", 0) != 3 or len(maps) != len(words):
        raise SelectionError(
            f"maps of shape {tuple(getattr(maps, 'shape', ()))} for the words {words!r}; give a list of words and maps "
            "[words, h, w]."
        )


def _overlay(axes: Any, picture: Any, values: Tensor, top: float) -> Any:
    """The picture in grey below a map; returns what a colour bar needs."""
    _bare(axes).imshow(picture.convert("L"), extent=(0, 1, 1, 0), cmap="gray", vmin=0, vmax=255)
    values = values.detach().float().cpu().tolist()
    return axes.imshow(values, extent=(0, 1, 1, 0), cmap="inferno", vmin=0.0, vmax=top or 1.0, alpha=0.65)


def _bare(axes: Any) -> Any:
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    return axes


def _frame(axes: Any, box: Box, colour: str) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2))


def _colours(count: int) -> list[str]:
    ring = ["#00e5ff", "#7cff00", "#ff4fd8", "#ffd400", "#ff7a00", "#b388ff"]
    return [ring[i % len(ring)] for i in range(count)]


def _cut(text: str) -> str:
    return text if len(text) <= TITLE else text[: TITLE - 1] + "…"
