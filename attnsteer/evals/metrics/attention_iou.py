"""Attention-IoU: how far two maps agree (Serianni et al. 2025, arXiv 2503.19846; code aaronserianni/attention-iou).

With p = a / sum(a) and q = b / sum(b), it is sum(p q) / sum(((p + q) / 2)^2), in [0, 1]: 1 for p = q, 0 for maps that do not
overlap. Against a mask this is the paper's mask score, against the map of another attribute its heatmap score. A uniform
map already scores above 0, so that score is given beside it. The paper's maps are GradCAM's, scaled to [0, 1] by their
extremes (`scale="minmax"`); attention maps are probabilities and are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import RecordError
from .base import Mean, Metric

SCALES = ("none", "minmax")


def metric(scale: str = "none") -> Metric:
    """Columns: `score`, `uniform` (score of a uniform map against the same target).

    The record has `map` [h][w], and `target`: a map or mask [h][w], or a box in fractions of the image.
    """
    if scale not in SCALES:
        raise RecordError(f"attention_iou: no scale {scale!r}; there are {', '.join(SCALES)}.")

    def read(record: Mapping[str, Any]) -> dict[str, float]:
        from ..maps import grid, inside, nested

        first = grid(record["map"], "the map")
        target = record["target"]
        second = grid(target, "the target") if nested(target) else inside(target, tuple(first.shape))
        if scale == "minmax":
            first = first - first.min()
        return {"score": attention_iou(first, second), "uniform": attention_iou(first * 0 + 1, second)}

    return Metric(
        "attention_iou",
        ("map", "target"),
        read,
        {"attention_iou": Mean("score"), "uniform": Mean("uniform")},
        note=f"maps scaled: {scale}",
        better={"attention_iou": 1},
    )


def attention_iou(a: Tensor, b: Tensor) -> float:
    """The score of two maps [h, w] that are not negative.

    Raises:
        RecordError: maps of different shape, or one that is all zero.
    """
    if a.shape != b.shape:
        raise RecordError(f"attention_iou: maps of the shapes {list(a.shape)} and {list(b.shape)}; resize one of them.")
    if float(a.sum()) == 0 or float(b.sum()) == 0:
        raise RecordError("attention_iou: a map is zero everywhere, so it has no place to compare.")
    p, q = a.double() / a.double().sum(), b.double() / b.double().sum()
    return float((p * q).sum() / ((p + q) / 2).square().sum())
