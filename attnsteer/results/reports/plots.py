"""Plots as inline SVG without a script: places along x in percent, so that they fit any width and text keeps its size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from markupsafe import Markup, escape

from ..figures import Figure

# Height of a row's track, and of the sweep, in pixels.
ROW, SWEEP = 30, 240


class Axis:
    """Values along a line, as percent of its length, with round ticks.

    Args:
        values: what must be on it; None is passed over. zero: whether zero must be. margin: percent left free on each side.
    """

    def __init__(self, values: Iterable[float | None], zero: bool = False, margin: float = 4.0):
        known = [v for v in values if v is not None] + [0.0] * zero
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        if high - low < 1e-9:
            low, high = low - 0.01, high + 0.01
        self.low, self.high, self.margin = low, high, margin

    def at(self, value: float) -> float:
        """Percent from the left."""
        return self.margin + (100 - 2 * self.margin) * (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values on the axis."""
        rough = (self.high - self.low) / count
        power = 10 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def track(figure: Figure, axis: Axis, role: str, *, zero: bool = False, claim: float | None = None) -> Markup:
    """One row: the interval as a line and the value as a mark.

    Args:
        role: "baseline", "method", "random", "zero", "gain", "loss" or "none": class of colour and shape of mark.
        zero: draw the line of zero. claim: a published value, as a tick.
    """
    middle = ROW / 2
    parts = [_line(axis.at(t), 0, axis.at(t), ROW, "grid") for t in axis.ticks()]
    if zero:
        parts.append(_line(axis.at(0.0), 0, axis.at(0.0), ROW, "axis"))
    if figure.value is not None:
        if figure.low is not None and figure.high is not None:
            parts.append(_line(axis.at(figure.low), middle, axis.at(figure.high), middle, f"whisker {role}"))
            parts += [
                _line(axis.at(v), middle - 5, axis.at(v), middle + 5, f"cap {role}") for v in (figure.low, figure.high)
            ]
        parts.append(_mark(axis.at(figure.value), middle, role))
    if claim is not None and axis.low <= claim <= axis.high:
        parts.append(_line(axis.at(claim), 2, axis.at(claim), ROW - 2, "claim"))
    return _svg(parts, ROW, str(figure), "track")


def scale(axis: Axis, figure: Figure) -> Markup:
    """The numbers below rows of `track`; `figure` says how numbers are written."""
    parts = []
    for t, text in zip(axis.ticks(), _numbers(axis, figure), strict=True):
        parts.append(f'<text x="{axis.at(t):.2f}%" y="13" text-anchor="middle" class="tick">{escape(text)}</text>')
    return _svg(parts, 18, "axis", "track")


def _numbers(axis: Axis, figure: Figure) -> list[str]:
    """The ticks as text, without ".0" where all are whole."""
    found = [Figure(t, percent=figure.percent, signed=figure.signed).number for t in axis.ticks()]
    whole = all(set(n.partition(".")[2]) <= {"0"} for n in found)
    return [n.partition(".")[0] if whole else n for n in found]


def sweep(points: Sequence[tuple[float, Figure]], baseline: Figure, name: str, chosen: int) -> Markup:
    """Value against the swept parameter, with intervals; the baseline as a band.

    Args:
        points: (parameter, figure), ascending. name: of the parameter. chosen: index of the headline's point.
    """
    bottom, top = SWEEP - 44, 14
    figures = [f for _, f in points] + [baseline]
    axis = Axis([v for f in figures for v in (f.value, f.low, f.high)], margin=0.0)
    across = Axis([x for x, _ in points], margin=0.0)

    def x(value: float) -> float:
        return 3 + 94 * across.at(value) / 100

    def y(value: float) -> float:
        return bottom - (bottom - top) * axis.at(value) / 100

    parts = []
    for t in axis.ticks():
        parts.append(_line(0, y(t), 100, y(t), "grid"))
    for t, text in zip(axis.ticks(), _numbers(axis, baseline), strict=True):
        # Left of the plot, in the margin that the style sheet leaves.
        parts.append(f'<text x="-8" y="{y(t) + 4:.1f}" text-anchor="end" class="tick">{escape(text)}</text>')
    if baseline.value is not None:
        if baseline.low is not None and baseline.high is not None:
            parts.append(
                f'<rect x="0" y="{y(baseline.high):.1f}" width="100%" '
                f'height="{y(baseline.low) - y(baseline.high):.1f}" class="band"/>'
            )
        parts.append(_line(0, y(baseline.value), 100, y(baseline.value), "level"))
    known = [(v, f) for v, f in points if f.value is not None]
    for (a, f), (b, g) in pairwise(known):
        parts.append(_line(x(a), y(f.value), x(b), y(g.value), "curve"))
    for i, (value, figure) in enumerate(points):
        parts.append(f'<text x="{x(value):.2f}%" y="{bottom + 20}" text-anchor="middle" class="tick">{value:g}</text>')
        if figure.value is None:
            continue
        if figure.low is not None and figure.high is not None:
            parts.append(_line(x(value), y(figure.low), x(value), y(figure.high), "whisker method"))
        if i == chosen:
            parts.append(f'<circle cx="{x(value):.2f}%" cy="{y(figure.value):.1f}" r="10" class="halo"/>')
        parts.append(_mark(x(value), y(figure.value), "method", f"{name} {value:g}: {figure}"))
    parts.append(f'<text x="50%" y="{SWEEP - 6}" text-anchor="middle" class="label">{escape(name)}</text>')
    return _svg(parts, SWEEP, f"{name} against the primary figure", "sweep")


def head_grid(
    used: Iterable[tuple[int, int]], scores: Mapping[tuple[int, int], float], shape: tuple[int, int]
) -> Markup:
    """Layers down, heads across; used heads filled, darker for a larger score."""
    cell, left, top = 20, 34, 22
    used = set(used)
    low, high = (min(scores.values()), max(scores.values())) if scores else (0.0, 0.0)
    every = [max(1, -(-n // 16)) for n in shape]
    parts = []
    for head in range(0, shape[1], every[1]):
        parts.append(f'<text x="{left + head * cell + 9}" y="14" text-anchor="middle" class="tick">{head}</text>')
    for layer in range(shape[0]):
        if layer % every[0] == 0:
            parts.append(
                f'<text x="{left - 6}" y="{top + layer * cell + 13}" text-anchor="end" class="tick">{layer}</text>'
            )
        for head in range(shape[1]):
            name, role, extra = f"layer {layer}, head {head}", "idle", ""
            if (layer, head) in used:
                role, score = "used", scores.get((layer, head))
                if score is not None:
                    share = 1.0 if high == low else 0.3 + 0.7 * (score - low) / (high - low)
                    name, extra = f"{name}: {score:.3g}", f' fill-opacity="{share:.2f}"'
            parts.append(
                f'<rect x="{left + head * cell}" y="{top + layer * cell}" width="18" height="18" rx="3" '
                f'class="head {role}"{extra}><title>{escape(name)}</title></rect>'
            )
    width, height = left + shape[1] * cell + 4, top + shape[0] * cell + 4
    return Markup(
        f'<svg class="heads" role="img" aria-label="{len(used)} of {shape[0] * shape[1]} heads" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
    )


def balance(gained: int, lost: int) -> Markup:
    """Gained against lost answers, both from the middle."""
    top = max(gained, lost, 1)
    a, b = 50 * gained / top, 50 * lost / top
    parts = [
        f'<rect x="{50 - b:.2f}%" y="0" width="{b:.2f}%" height="14" class="bar loss"/>',
        f'<rect x="50%" y="0" width="{a:.2f}%" height="14" class="bar gain"/>',
        _line(50, 0, 50, 14, "axis"),
    ]
    return _svg(parts, 14, f"{gained} gained, {lost} lost", "balance")


def _line(x1: float, y1: float, x2: float, y2: float, role: str) -> str:
    return f'<line x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}" class="{role}"/>'


def _mark(x: float, y: float, role: str, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    if role in ("random", "zero"):
        # A shape of its own, so that colour is not all that tells them apart; a nested svg places it in percent.
        shape = "M6 0 12 6 6 12 0 6Z" if role == "random" else "M1 1H11V11H1Z"
        return (
            f'<svg x="{x:.2f}%" y="{y - 6:.1f}" width="12" height="12" overflow="visible">'
            f'<path d="{shape}" transform="translate(-6 0)" class="mark {role}">{inner}</path></svg>'
        )
    return f'<circle cx="{x:.2f}%" cy="{y:.1f}" r="6" class="mark {role}">{inner}</circle>'


def _svg(parts: Sequence[str], height: int, label: str, kind: str) -> Markup:
    return Markup(
        f'<svg class="{kind}" role="img" aria-label="{escape(label)}" width="100%" height="{height}">'
        f"{''.join(parts)}</svg>"
    )
