"""Multiple choice by likelihood and by letter, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from attnsteer.errors import RecordError
from attnsteer.evals.metrics import get_metric
from attnsteer.evals.metrics.letter import first_token, labels_of, parse
from attnsteer.evals.significance import wilson


def record(scores, answer, choices=("ab", "abcd")) -> dict:
    return {"choices": list(choices), "scores": list(scores), "answer": answer}


def test_by_likelihood() -> None:
    metric = get_metric("choice")
    # exp: 0.2 and 0.6, so 1/4 and 3/4. By bytes -1.609 / 2 = -0.805 and -0.511 / 4 = -0.128.
    found = metric.sample(record([math.log(0.2), math.log(0.6)], 0))
    assert found["right"] == 0 and found["confidence"] == pytest.approx(0.25) and found["chance"] == 0.5
    assert found["loss"] == pytest.approx(math.log(4)) and found["right_by_bytes"] == 0
    # -1 / 2 = -0.5 and -1.6 / 4 = -0.4: the length turns the answer over.
    found = metric.sample(record([-1.0, -1.6], 0))
    assert (found["right"], found["right_by_bytes"]) == (1, 0)
    # A tie goes to the first; what is impossible only loses.
    assert metric.sample(record([-1.0, -1.0], 0))["right"] == 1 and metric.sample(record([-1.0, -1.0], 1))["right"] == 0
    found = metric.sample(record([-math.inf, -2.0], 0))
    assert found["right"] == 0 and found["confidence"] == 0 and found["loss"] == pytest.approx(744.44, abs=0.01)
    # No underflow for long answers.
    assert metric.sample(record([-5000.0, -5001.0], 1))["loss"] == pytest.approx(math.log(1 + math.e))


def test_by_likelihood_over_samples() -> None:
    metric = get_metric("choice")
    samples = [metric.sample(record(s, 0)) for s in ([-1, -2], [-1, -2], [-2, -1], [-1, -2])]
    found = metric.aggregate(samples, draws=100)
    assert found["accuracy"] == wilson(3, 4) and found["chance"].value == 0.5
    p = 1 / (1 + math.exp(-1))
    assert found["confidence"].value == pytest.approx((3 * p + (1 - p)) / 4)
    assert metric.mcnemar(samples, [samples[0]] * 4) == (1, 0, 1.0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (record([-1.0], 0), "2 choices and 1 scores"),
        (record([-1.0, -2.0], 2), "no index"),
        (record([-1.0, -2.0], True), "no index"),
        (record([-1.0, -2.0], "A"), "no index"),
        (record([-1.0, math.nan], 0), "cannot be ranked"),
        (record([-math.inf, -math.inf], 0), "cannot be ranked"),
        (record([], 0, ()), "0 choices"),
        (record(["x", "y"], 0), "cannot read"),
    ],
)
def test_by_likelihood_refuses(bad: dict, words: str) -> None:
    with pytest.raises(RecordError, match=words):
        get_metric("choice").sample(bad)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B.", "B"),
        ("(B) the red one", "B"),
        ("**B**", "B"),
        ("B: a circle", "B"),
        ("The answer is (C).", "C"),
        ("the correct answer is B because a circle is round", "B"),
        ("Answer: D", "D"),
        ("ANSWER is A", "A"),
        ("First I thought the answer is B, but the answer is C", "C"),
        ("I would go with C", "C"),
        ("A dog is in the picture", None),
        ("A. a dog", "A"),
        ("A", "A"),
        ("A dog, so B", "B"),
        ("B or C", None),
        ("Both B and B", "B"),
        ("E", None),
        ("Because", None),
        ("b", None),
        ("", None),
        ("a red circle", None),
        ("It's B's turn", None),
    ],
)
def test_letters_are_parsed(text: str, letter: str | None) -> None:
    assert parse(text, ("A", "B", "C", "D")) == letter


def test_first_token() -> None:
    labels = ("A", "B")
    assert [first_token(t, labels) for t in ("A", " (B) x", "A.", "A dog", "the A", "", "C")] == [
        "A", "B", "A", "A", None, None, None,
    ]  # fmt: skip


def test_by_letter_over_samples() -> None:
    metric = get_metric("letter")
    said = ["B", "The answer is B", "C", "none of them"]
    samples = [metric.sample({"choices": ["x", "y", "z"], "answer": 1, "generated": g}) for g in said]
    assert metric.aggregate(samples) == {
        "accuracy": wilson(2, 4),
        "accuracy_of_parsed": wilson(2, 3),
        "parse_rate": wilson(3, 4),
    }
    official = get_metric("letter", parser="first_token")
    assert official.sample({"choices": ["x", "y"], "answer": 1, "generated": said[1]}) == {"right": 0, "parsed": 0}
    assert official.note == "parser: first_token"
    # Choices that are letters are their own labels.
    assert metric.sample({"choices": ["D", "B"], "answer": 0, "generated": "D"}) == {"right": 1, "parsed": 1}
    assert labels_of(["D", "B"]) == ("D", "B") and labels_of(["D", "Bx"]) == ("A", "B")


def test_by_letter_refuses() -> None:
    with pytest.raises(RecordError, match="no parser 'mine'"):
        get_metric("letter", parser="mine")
    with pytest.raises(RecordError, match="0 choices"):
        get_metric("letter").sample({"choices": [], "answer": 0, "generated": "A"})
    with pytest.raises(RecordError, match="cannot read"):
        get_metric("letter").sample({"choices": ["x"], "answer": 0, "generated": None})
