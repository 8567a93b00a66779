"""Pointing: whether a click, or the largest value of a map, is inside the target.

Sources: the pointing game (Zhang et al. 2018, arXiv 1608.00507) for maps; click accuracy of ScreenSpot as TAG (Xu et al.
2025, arXiv 2412.10840) computes it, with borders inside, for points. For maps also the share of the map that is inside the
target (rho of ControlMLLM, Wu et al. 2024, arXiv 2407.21534, whose energy is (1 - rho)^2), and that share over the
target's share of the area: 1 for a uniform map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import RecordError
from .base import Mean, Metric, Ratio


def metric() -> Metric:
    """Columns: `hit`; for maps also `maps` (1), `mass`, `energy`, `lift`.

    The record has `target`, and `point` or `map`. `point` is (x, y) and `target` a box or a list of boxes in the same unit;
    or `map` is [h][w] and `target` a mask [h][w] or a box in fractions of the image. Where several cells of a map share
    the largest value, all must be inside.
    """
    return Metric(
        "pointing",
        ("target",),
        _read,
        {
            "accuracy": Mean("hit"),
            "mass": Ratio(("mass",), ("maps",)),
            "energy": Ratio(("energy",), ("maps",)),
            "lift": Ratio(("lift",), ("maps",)),
        },
        correct="hit",
        when=dict.fromkeys(("mass", "energy", "lift"), "maps"),
        better={"accuracy": 1, "mass": 1, "energy": -1, "lift": 1},
    )


def _read(record: Mapping[str, Any]) -> dict[str, float]:
    from ..maps import box, grid, inside, nested

    target = record["target"]
    if (record.get("point") is None) == (record.get("map") is None):
        raise RecordError("pointing: a record has either a point or a map.")
    if record.get("point") is not None:
        x, y = (float(v) for v in record["point"])
        boxes = [box(b, "a target") for b in (target if nested(target) else [target])]
        return {"hit": int(any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes))}
    found = grid(record["map"], "the map")
    if float(found.sum()) == 0:
        raise RecordError("pointing: the map is zero everywhere, so it points nowhere.")
    mask = inside(target, tuple(found.shape))
    mass = float((found * mask).sum() / found.sum())
    return {
        "hit": int(bool((mask[found == found.max()] > 0).all())),
        "maps": 1,
        "mass": mass,
        "energy": (1 - mass) ** 2,
        "lift": mass / float(mask.mean()),
    }
