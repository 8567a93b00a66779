"""Whether a picture of the shapes world is what its prompt asks for, clean, and laid out as its boxes say.

`right` is `attnsteer.zoo.shapes.layouts.satisfied`, `in_box` its `in_boxes`: an object of the phrase's colour and shape has
its centre in the phrase's box (the measure of BoxDiff and attention refocusing on layouts, without a learned detector).
`exact` is its `exact` in a valid picture: what is asked and nothing else, so duplicates and additions count against it.
Read placement beside correctness: layout losses can raise one and lower the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import RecordError
from .base import Mean, Metric, Ratio


def metric() -> Metric:
    """Columns: `right`, `exact`, `valid`, `boxed` (phrases with a box), `in_box`, `has_boxes`, `all_in_box`.

    The record has `phrases`, `detected` and `valid`, and where they apply `boxes`, `category`, `side`.
    """
    return Metric(
        "layout",
        ("phrases", "detected", "valid"),
        _read,
        {
            "right": Mean("right"),
            "exact": Mean("exact"),
            "valid": Mean("valid"),
            "in_box": Ratio(("in_box",), ("boxed",)),
            "all_in_box": Ratio(("all_in_box",), ("has_boxes",)),
        },
        correct="right",
        when={"in_box": "boxed", "all_in_box": "boxed"},
        note="detector: exact, of the shapes world",
        better={"right": 1, "exact": 1, "valid": 1, "in_box": 1, "all_in_box": 1},
        only_with={"valid": "right"},
    )


def _read(record: Mapping[str, Any]) -> dict[str, float]:
    from ...zoo.shapes.layouts import exact, in_boxes, satisfied
    from ..detections import requested_layout, shapes

    layout, objects = requested_layout(record), shapes(record["detected"])
    if record["valid"] not in (True, False):
        raise RecordError(f"layout: valid is {record['valid']!r}; true or false is needed.")
    found = {
        "right": int(satisfied(layout, objects)),
        "exact": int(record["valid"] and exact(layout, objects)),
        "valid": int(record["valid"]),
    }
    if layout.boxes:
        inside = in_boxes(layout, objects)
        found |= {"boxed": len(inside), "in_box": sum(inside), "has_boxes": 1, "all_in_box": int(all(inside))}
    return found
