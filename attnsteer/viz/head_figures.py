"""The head-by-layer grid of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtra, SelectionError
from ..heads import HeadSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From this many heads or layers on, not every one has a tick, and cells have no numbers.
CROWDED = 16


def head_grid(
    scores: HeadSet | Mapping[tuple[int, int], float],
    path: str | Path | None = None,
    *,
    selected: HeadSet | None = None,
    shape: tuple[int, int] | None = None,
    title: str = "",
    label: str = "score",
) -> Figure:
    """Layers downwards, heads across, a colour for each score; chosen heads have a frame.

    Args:
        scores: `{(layer, head): score}`, or a `HeadSet`: its heads are framed, and the others are coloured too where a
            calibration left the whole table in the provenance.
        selected: the heads to frame. shape: (layers, heads per layer); by default the set's, or what the scores need.
        title: above the grid. label: beside the colour bar. path: also save the figure there.

    Raises:
        SelectionError: there is no score, or one outside `shape`.
        MissingExtra: matplotlib is not installed.
    """
    if isinstance(scores, HeadSet):
        selected = scores if selected is None else selected
        shape = scores.shape if shape is None else shape
        scores = scores.scores if scores.towers else _whole_table(scores)
    if any(len(p) == 3 for p in [*scores, *(selected or ())]):
        raise SelectionError("a grid is of one stack of layers; take one tower of the set, heads.tower(name).")
    if not scores:
        raise SelectionError("head_grid got no scores; give {(layer, head): score}, or a HeadSet with scores.")
    if shape is None:
        members = [*scores, *(selected or ())]
        shape = (1 + max(p[0] for p in members), 1 + max(p[1] for p in members))
    wrong = [p for p in [*scores, *(selected or ())] if p[0] >= shape[0] or p[1] >= shape[1]]
    if wrong:
        raise SelectionError(f"head_grid: {wrong[0]} is outside the shape {tuple(shape)} (layers, heads per layer).")
    layers, heads = shape
    cell = 0.42 if max(layers, heads) <= CROWDED else 0.24
    figure = new_figure(min(16.0, max(5.5, cell * heads + 2.4)), min(16.0, max(3.0, 0.85 * cell * layers + 1.6)))
    axes = figure.add_subplot()
    table = [[scores.get((i, j), math.nan) for j in range(heads)] for i in range(layers)]
    low, high = min(scores.values()), max(scores.values())
    signed = low < 0 < high
    most = max(-low, high)
    limits = {"vmin": -most, "vmax": most} if signed else {"vmin": low, "vmax": high if high > low else low + 1.0}
    axes.set_facecolor("#dddddd")
    drawn = axes.imshow(table, cmap="RdBu_r" if signed else "viridis", aspect="auto", **limits)
    figure.colorbar(drawn, ax=axes, label=label, fraction=0.05, pad=0.02)
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        axis.set_ticks(range(0, count, max(1, math.ceil(count / CROWDED))))
    axes.set(xlabel="head", ylabel="layer", title=title)
    if max(layers, heads) <= CROWDED:
        for (i, j), value in scores.items():
            axes.text(j, i, _short(value), ha="center", va="center", fontsize=6.5, color=_ink(drawn, value))
    _frames(axes, selected or (), "#00b050" if signed else "#ff1744")
    return saved(figure, path)


def _whole_table(heads: HeadSet) -> dict[tuple[int, int], float]:
    facts = heads.provenance
    table = facts.get("gains", {}).get(facts.get("metric"))
    if table is None:
        return heads.scores
    return {(i, j): v for i, row in enumerate(table) for j, v in enumerate(row) if v is not None}


def _short(value: float) -> str:
    text = f"{value:.2g}"
    return text.replace("e-0", "e-").replace("0.", ".", 1) if abs(value) < 1 else text


def _ink(drawn: Any, value: float) -> str:
    red, green, blue, _ = drawn.cmap(drawn.norm(value))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"


def _frames(axes: Any, selected: Any, colour: str) -> None:
    from matplotlib.patches import Rectangle

    for layer, head in selected:
        axes.add_patch(Rectangle((head - 0.47, layer - 0.47), 0.94, 0.94, fill=False, edgecolor=colour, linewidth=2))


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches: pyplot's global list of figures is not touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("figures need matplotlib, which is not installed: pip install 'attnsteer[viz]'.") from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, saved where a path is given."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure
