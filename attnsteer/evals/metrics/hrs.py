"""HRS-Bench's counting, spatial, size and colour skills (Bakr et al. 2023, arXiv 2304.05390), from any detector.

The rules are those of attention refocusing's fork of the scripts, with its errors corrected; `official=True` keeps them:

- counting, per class that was asked for n times and found p times: TP += min(n, p), FP += max(p - n, 0),
  FN += max(n - p, 0), summed over images; classes that were not asked for are ignored. The fork leaves an image that is
  missing out; here its objects are missed.
- spatial and size: every relation holds between objects of its classes. The fork takes the last detection of each class,
  and compares the left edges for "left" but the right edges for "right", so that both can hold; here some choice of
  detections must fulfil all relations, and centres are compared. A missing class or image is wrong.
- colour, per object that was asked for: some detection of its class has the colour. A detector may give the name, or the
  hue, which the fork averages as if it were no circle (`mean_hue`); that step is the detector's.

Detections of one box are one object with several labels (boxes in pixels: of the same whole pixels).

On the shapes world a class is a colour and a shape, and spatial and size are `attnsteer.zoo.shapes.layouts.satisfied`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...errors import RecordError
from .base import Metric, Ratio, Statistic, Totals, f1

LEVELS = ("easy", "medium", "hard")
CATEGORIES = ("count", "spatial", "size", "colour")
# Largest OpenCV hue (0 to 179) that still has the name, exclusive.
HUES = ((15, "red"), (22, "orange"), (39, "yellow"), (78, "green"), (131, "blue"), (180, "red"))
Box = tuple[float, float, float, float]


def metric(levels: bool = False, official: bool = False) -> Metric:
    """Columns: `count`, `count_tp`, `count_fp`, `count_fn`; `spatial`, `spatial_right`; `size`, `size_right`; `colour`
    (objects asked for), `colour_right`; each with "_easy", "_medium", "_hard" when there are levels.

    The record has `category` (of `CATEGORIES`) and `detected`, and of the shapes world `phrases` and, for spatial, `side`.
    Of any other world, `detected` is a list of {"label": class or list of classes, "box": [x0, y0, x1, y1], "colour": name,
    or "hue": 0 to 179}, or None for a missing image; count and colour have `phrases`, a list of {"label", "count",
    "colour"}; spatial and size have `relations`, a list of [class, relation, class] or [class, "between", class, class].

    Args:
        levels: the record has `level`, of `LEVELS`, and each figure is the plain mean over the levels that are there.
        official: keep the errors of the fork.
    """

    def read(record: Mapping[str, Any]) -> dict[str, float]:
        category = record["category"]
        if category not in CATEGORIES:
            raise RecordError(f"hrs: the category is {category!r}; there are {', '.join(CATEGORIES)}.")
        if levels and record["level"] not in LEVELS:
            raise RecordError(f"hrs: the level is {record['level']!r}; there are {', '.join(LEVELS)}.")
        asked = record.get("phrases")
        labelled = asked is None or all(isinstance(p, Mapping) and "label" in p for p in asked)
        found = _labelled(record, category, official) if labelled else _shapes(record, category)
        return {f"{k}_{record['level']}": v for k, v in found.items()} if levels else found

    means = {c: _over_levels(c, Ratio((f"{c}_right",), (c,)), levels) for c in CATEGORIES[1:]}
    counting = {
        "count_precision": Ratio(("count_tp",), ("count_tp", "count_fp")),
        "count_recall": Ratio(("count_tp",), ("count_tp", "count_fn")),
        "count_f1": f1("count_tp", "count_fp", "count_fn"),
    }
    statistics = {k: _over_levels("count", s, levels) for k, s in counting.items()} | means
    # With levels the first that is there decides, so every level's column is in every sample of the category.
    when = {k: k.split("_")[0] for k in statistics}
    note = f"rules: {'of the fork, uncorrected' if official else 'corrected'}{'; mean over levels' if levels else ''}"
    return Metric(
        "hrs",
        ("category", "detected", "level") if levels else ("category", "detected"),
        (lambda record: read(record) | {record["category"]: 1}) if levels else read,
        statistics,
        when=when,
        note=note,
        better=dict.fromkeys(statistics, 1),
    )


def _over_levels(category: str, statistic: Statistic, levels: bool) -> Statistic:
    if not levels:
        return statistic

    def mean(totals: Totals) -> Tensor:
        total = there = totals["samples"] * 0
        for level in LEVELS:
            own = Totals({k.removesuffix(f"_{level}"): v for k, v in totals.items() if k.endswith(f"_{level}")})
            own["samples"] = totals["samples"]
            present = own[category] > 0
            total = total + statistic(own).nan_to_num(0.0) * present
            there = there + present
        return total / there

    return mean


def _shapes(record: Mapping[str, Any], category: str) -> dict[str, float]:
    from ...zoo.shapes.layouts import satisfied
    from ..detections import requested_layout, shapes

    layout, objects = requested_layout(record), shapes(record["detected"] or ())
    found = [{(o.colour, o.shape)} for o in objects]
    if category == "count":
        return _count([((p.colour, p.shape), p.count) for p in layout.phrases], found)
    if category == "colour":
        right = sum({(p.colour, p.shape)} in found for p in layout.phrases)
        return {"colour": len(layout.phrases), "colour_right": right}
    return {category: 1, f"{category}_right": int(satisfied(layout, objects))}


def _labelled(record: Mapping[str, Any], category: str, official: bool) -> dict[str, float]:
    missing, objects = record["detected"] is None, merge(record["detected"] or ())
    if category in ("count", "colour") and not record.get("phrases"):
        raise RecordError(f"hrs: {category} needs phrases, a list of {{'label', 'count', 'colour'}}.")
    if category == "count":
        if missing and official:
            return {}
        asked = [(p["label"].lower(), int(p["count"])) for p in record["phrases"]]
        return _count(asked, [{label.lower() for label in labels} for labels, _ in objects])
    if category == "colour":
        right = 0
        for p in record["phrases"]:
            own = [d for d in record["detected"] or () if p["label"] in _labels(d)]
            right += any(p["colour"] == (d["colour"] if "colour" in d else hue_name(d["hue"])) for d in own)
        return {"colour": len(record["phrases"]), "colour_right": right}
    if not record.get("relations"):
        raise RecordError(f"hrs: {category} needs relations, a list of [class, relation, class].")
    return {category: 1, f"{category}_right": int(related(record["relations"], objects, official))}


def _count(asked: Sequence[tuple[Any, int]], found: Sequence[set[Any]]) -> dict[str, float]:
    pairs = [(n, sum(wanted in labels for labels in found)) for wanted, n in asked]
    return {
        "count": 1,
        "count_tp": sum(min(n, p) for n, p in pairs),
        "count_fp": sum(max(p - n, 0) for n, p in pairs),
        "count_fn": sum(max(n - p, 0) for n, p in pairs),
    }


def _labels(detection: Mapping[str, Any]) -> list[str]:
    label = detection["label"]
    return [label] if isinstance(label, str) else list(label)


def merge(detected: Sequence[Mapping[str, Any]]) -> list[tuple[list[str], Box]]:
    """Detections -> objects (labels, box): those of one box are one object; boxes in pixels are cut to whole pixels."""
    objects: dict[Any, tuple[list[str], Box]] = {}
    for d in detected:
        box = tuple(float(v) for v in d["box"])
        if len(box) != 4:
            raise RecordError(f"hrs: the box {d['box']!r} is not (x0, y0, x1, y1).")
        key = tuple(int(v) for v in box) if max(box) > 1 else box
        objects.setdefault(key, ([], box))[0].extend(_labels(d))
    return list(objects.values())


def related(
    relations: Sequence[Sequence[str]], objects: Sequence[tuple[list[str], Box]], official: bool = False
) -> bool:
    """Whether all relations hold: between the last detections of each class (official), or for some choice of them."""
    classes = list(dict.fromkeys(name for r in relations for name in (r[0], *r[2:])))
    boxes = {c: [box for labels, box in objects if (c == labels[0] if official else c in labels)] for c in classes}
    if not all(boxes.values()):
        return False
    choices = [boxes[c][-1:] if official else boxes[c] for c in classes]
    for chosen in itertools.product(*choices):
        at = dict(zip(classes, chosen, strict=True))
        if all(_holds(r[1], [at[c] for c in (r[0], *r[2:])], official) for r in relations):
            return True
    return False


def _holds(relation: str, boxes: Sequence[Box], official: bool) -> bool:
    """One relation of the first box to the second, or "between" the second and third."""
    a, b = boxes[:2]
    if relation == "between":
        c = boxes[2]
        return any(
            _holds(s, (a, b), official) and _holds(t, (a, c), official)
            for s, t in (("right", "left"), ("left", "right"), ("above", "below"), ("below", "above"))
        )
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    sides = {
        "left": (a[0] < b[0], a[0] + a[2] < b[0] + b[2]),
        "right": (a[2] > b[2], a[0] + a[2] > b[0] + b[2]),
        "above": (a[1] < b[1] or a[3] < b[3], a[1] + a[3] < b[1] + b[3]),
        "below": (a[1] > b[1] or a[3] > b[3], a[1] + a[3] > b[1] + b[3]),
        "bigger": (area_a > area_b,) * 2,
        "smaller": (area_a < area_b,) * 2,
    }
    name = {"on": "above", "over": "above", "top": "above", "larger": "bigger"}.get(relation, relation)
    name = name.removesuffix(" of")
    if name not in sides:
        raise RecordError(f"hrs: no relation {relation!r}; there are {', '.join(sides)}, between.")
    return sides[name][0 if official else 1]


def hue_name(hue: float) -> str:
    """The colour that a mean OpenCV hue (0 to 179) stands for."""
    if not 0 <= hue < 180:
        raise RecordError(f"hrs: the hue {hue!r} is not in 0 to 179.")
    return next(name for limit, name in HUES if hue < limit)


def mean_hue(hues: Sequence[float], official: bool = False) -> float:
    """The mean of OpenCV hues on their circle; the fork's plain mean of those above zero, which makes reds blue."""
    if official:
        hues = [h for h in hues if h > 0]
        return sum(hues) / len(hues) if hues else 0.0
    angles = [math.radians(2 * h) for h in hues]
    mean = math.atan2(sum(math.sin(a) for a in angles), sum(math.cos(a) for a in angles))
    # Rounded first, so that an angle just below zero does not become a whole turn.
    return round(math.degrees(mean) / 2, 9) % 180
