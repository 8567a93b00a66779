"""Checks of the form of answers, cut ones included."""

from __future__ import annotations

import pytest

from attnsteer.errors import RecordError
from attnsteer.evals.metrics import get_metric


@pytest.mark.parametrize(
    ("kind", "text", "finished", "right"),
    [
        ("begin", "Today, bees ...", True, 1),
        ("begin", ' "TODAY is', True, 1),
        ("begin", "Todays bees", True, 0),
        ("begin", "So today", True, 0),
        ("key", "It is so.\nNot today!", True, 1),
        ("key", "todays", True, 0),
        ("bullet", "* one\n\n* two", True, 1),
        ("bullet", "* one\n*", False, 1),
        ("bullet", "* one\n*", True, 0),
        ("bullet", "*", False, 0),
        ("bullet", "List:\n* one", True, 0),
        ("bullet", "", True, 0),
        ("json", '{"today": "bees"}', True, 1),
        ("json", '```json\n{"today": ["bees"]}\n```', True, 1),
        ("json", '{"today": "be', False, 1),
        ("json", '{"today": "be', True, 0),
        ("json", '{"other": "be', False, 0),
        ("json", '["today"]', True, 0),
        ("json", 'Here: {"today": 1}', True, 0),
    ],
)
def test_checks(kind: str, text: str, finished: bool, right: int) -> None:
    record = {"generated": text, "category": kind, "name": "today", "finished": finished}
    assert get_metric("instructions").sample(record) == {"right": right, f"is_{kind}": 1, f"right_{kind}": right}


def test_figures_by_kind_and_records_of_another_form() -> None:
    metric = get_metric("instructions")
    made = [
        {"generated": t, "category": k, "name": "tea"} for t, k in (("Tea!", "begin"), ("x", "begin"), ("tea", "key"))
    ]
    found = metric.aggregate([metric.sample(r) for r in made])
    assert found["followed"].value == pytest.approx(2 / 3) and "followed_json" not in found
    assert (found["followed_begin"].value, found["followed_key"].value) == (0.5, 1.0)
    with pytest.raises(RecordError, match=r"no check 'keys'.*Did you mean 'key'"):
        metric.sample({"generated": "x", "category": "keys", "name": "tea"})
    with pytest.raises(RecordError, match="is no text"):
        metric.sample({"generated": None, "category": "key", "name": "tea"})
