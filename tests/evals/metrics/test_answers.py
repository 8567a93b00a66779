"""Answers in free text: names with negations, and agreement with people."""

from __future__ import annotations

import pytest

from attnsteer.errors import RecordError
from attnsteer.evals.metrics import get_metric
from attnsteer.evals.metrics.contains import variants, without_negations
from attnsteer.evals.metrics.vqa import normalise
from attnsteer.evals.significance import wilson


@pytest.mark.parametrize(
    ("text", "official", "own"),
    [
        ("The object is a cat, not a dog.", "The object is a cat,", "The object is a cat,"),
        ("The object is a notebook, black.", "The object is a black.", "The object is a notebook, black."),
        ("It is a dog not a cat", "It is a dog not a cat", "It is a dog not a cat"),
        ("There is no dog, only a cat.", "There is only a cat.", "There is only a cat."),
        ("a nose, red", "a red", "a nose, red"),
    ],
)
def test_negations(text: str, official: str, own: str) -> None:
    assert without_negations(text, official=True) == official and without_negations(text) == own


def test_contains() -> None:
    metric = get_metric("contains")
    rows = [
        ("It is a cat, not a dog.", "dog", (), 0),
        ("It is a cat, not a dog.", "cat", (), 1),
        ("a fire hydrant", "fire_hydrant", (), 1),
        ("an automobile", "car", ("car_(automobile)",), 1),
        ("A Cat", "cat", (), 0),
    ]
    samples = [metric.sample({"generated": t, "name": n, "synonyms": list(s)}) for t, n, s, _ in rows]
    assert [s["right"] for s in samples] == [r[-1] for r in rows]
    assert metric.aggregate(samples)["accuracy"] == wilson(3, 5)
    assert get_metric("contains", ignore_case=True).sample({"generated": "A Cat", "name": "cat"})["right"] == 1
    official = get_metric("contains", official=True)
    assert official.sample({"generated": "a notebook, black.", "name": "notebook"})["right"] == 0
    assert variants("car_(automobile)") == ["car", "automobile"] and variants("a_b") == ["a b"]
    with pytest.raises(RecordError, match="no texts"):
        metric.sample({"generated": "a", "name": ""})


def test_vqa() -> None:
    metric = get_metric("vqa")
    for matches, score in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        record = {"generated": "Two dogs.", "answers": ["2 dogs"] * matches + ["cat"] * (10 - matches)}
        assert metric.sample(record)["score"] == pytest.approx(score)
    for text, plain in (
        ("The red Dog!", "red dog"),
        ("it's 3,000.5 m", "its 3000.5 m"),
        ("A", ""),
        ("yes, no", "yes no"),
        ("none", "0"),
    ):
        assert normalise(text) == plain
    with pytest.raises(RecordError, match="at least two"):
        metric.sample({"generated": "a", "answers": ["a"]})
