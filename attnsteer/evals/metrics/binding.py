"""Attribute binding in the manner of T2I-CompBench (Huang et al. 2023, arXiv 2307.06350, section 4.1), without a judge.

T2I-CompBench asks a BLIP-VQA model about each noun phrase and multiplies the probabilities of yes. Here the exact detector
of the shapes world answers: a phrase is bound when an object of its shape has its colour (and its size, where it is said).
`binding` is the mean over images of the product over phrases, so all must be bound; these figures are not comparable with
T2I-CompBench's own. `swapped` says why it fails: the shape is there, in another phrase's colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Mean, Metric, Ratio


def metric() -> Metric:
    """Columns: `all_bound`, `phrases`, `bound`, `shape_there` (phrases whose shape is drawn), `swapped`.

    The record has `phrases` and `detected`.
    """
    return Metric(
        "binding",
        ("phrases", "detected"),
        _read,
        {
            "binding": Mean("all_bound"),
            "phrase_binding": Ratio(("bound",), ("phrases",)),
            "shape_there": Ratio(("shape_there",), ("phrases",)),
            "swapped": Ratio(("swapped",), ("phrases",)),
        },
        correct="all_bound",
        note="detector: exact, of the shapes world",
        better={"binding": 1, "phrase_binding": 1, "shape_there": 1, "swapped": -1},
    )


def _read(record: Mapping[str, Any]) -> dict[str, float]:
    from ..detections import phrases, shapes

    asked, objects = phrases(record["phrases"]), shapes(record["detected"])
    bound = shape_there = swapped = 0
    for p in asked:
        same = [o for o in objects if o.shape == p.shape]
        fits = any(o.colour == p.colour and p.size in (None, o.size) for o in same)
        others = {q.colour for q in asked if q.colour != p.colour}
        bound += fits
        shape_there += bool(same)
        swapped += not fits and any(o.colour in others for o in same)
    return {
        "all_bound": int(bound == len(asked)),
        "phrases": len(asked),
        "bound": bound,
        "shape_there": shape_there,
        "swapped": swapped,
    }
