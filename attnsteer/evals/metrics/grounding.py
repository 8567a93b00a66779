"""Grounding and referring segmentation: intersection over union of boxes or masks.

`miou` is the mean over samples, `oiou` the sum of intersections over the sum of unions (the two usual figures of RefCOCO),
`precision_50` and so on the share of samples with IoU above 0.5 (P@X; strictly above). Empty against empty is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import RecordError
from .base import Mean, Metric, Ratio

LIMITS = (50, 70, 90)


def metric() -> Metric:
    """Columns: `intersection`, `union` (areas in the record's unit), `iou`, `above_50`, `above_70`, `above_90`.

    The record has `predicted` and `target`: two boxes (x0, y0, x1, y1) in one unit, or two masks [h][w] of 0 and 1.
    """
    return Metric(
        "grounding",
        ("predicted", "target"),
        _read,
        {
            "miou": Mean("iou"),
            "oiou": Ratio(("intersection",), ("union",)),
            **{f"precision_{limit}": Mean(f"above_{limit}") for limit in LIMITS},
        },
        correct="above_50",
        better={"miou": 1, "oiou": 1, **{f"precision_{limit}": 1 for limit in LIMITS}},
    )


def _read(record: Mapping[str, Any]) -> dict[str, float]:
    from ..maps import box, grid, nested

    first, second = record["predicted"], record["target"]
    if nested(first) != nested(second):
        raise RecordError("grounding: one of predicted and target is a box and the other a mask.")
    if nested(first):
        a, b = grid(first, "the predicted mask"), grid(second, "the target mask")
        if a.shape != b.shape or not all(bool(((m == 0) | (m == 1)).all()) for m in (a, b)):
            raise RecordError(
                f"grounding: masks of the shapes {list(a.shape)} and {list(b.shape)}; masks of one shape of 0 and 1 are needed."
            )
        shared, union = float((a * b).sum()), float(a.maximum(b).sum())
    else:
        a, b = box(first, "the predicted box"), box(second, "the target box")
        shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        union = sum((v[2] - v[0]) * (v[3] - v[1]) for v in (a, b)) - shared
    iou = shared / union if union > 0 else 1.0
    return {
        "intersection": shared,
        "union": union,
        "iou": iou,
        **{f"above_{limit}": int(iou > limit / 100) for limit in LIMITS},
    }
