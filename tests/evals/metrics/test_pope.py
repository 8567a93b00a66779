"""POPE: the parsers, their known quirks, and the figures of a hand-made confusion table."""

from __future__ import annotations

import pytest

from attnsteer.errors import RecordError
from attnsteer.evals.metrics import get_metric
from attnsteer.evals.metrics.base import UndefinedMetric
from attnsteer.evals.metrics.pope import PARSERS
from attnsteer.evals.significance import wilson

LABELS = ["yes", "yes", "no", "no"]
ANSWERS = ["Yes, there is.", "No.", "no", "It seems so"]


def samples(parser: str, labels=LABELS, answers=ANSWERS) -> list[dict]:
    metric = get_metric("pope", parser=parser)
    return [metric.sample({"label": y, "generated": a}) for y, a in zip(labels, answers, strict=True)]


def test_the_official_vector() -> None:
    found = get_metric("pope", parser="official").aggregate(samples("official"), draws=500)
    assert {k: v.value for k, v in found.items()} == {
        "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5, "unparsed": 0.0,
    }  # fmt: skip
    assert found["precision"] == wilson(1, 2) and found["accuracy"] == wilson(2, 4)
    assert found["f1"].low == 0.0 and found["f1"].high == 1.0


def test_unparsed_answers_are_wrong_and_no_yes() -> None:
    # "It seems so" is nothing to us: TP 1, FN 1, TN 1, unparsed 1.
    found = get_metric("pope").aggregate(samples("own"), draws=100)
    assert {k: v.value for k, v in found.items()} == {
        "accuracy": 0.5, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "yes_ratio": 0.25, "unparsed": 0.25,
    }  # fmt: skip
    missed = samples("own", ["yes"], ["perhaps"])[0]
    assert missed == {"right": 0, "tp": 0, "tn": 0, "fp": 0, "fn": 1, "said_yes": 0, "unparsed": 1}


def test_an_arm_that_never_says_yes() -> None:
    with pytest.warns(UndefinedMetric, match="precision is 0 / 0"):
        found = get_metric("pope").aggregate(samples("own", ["yes", "no"], ["no", "no"]), draws=50)
    assert found["precision"].value == 0.0 and found["f1"].value == 0.0 and found["accuracy"] == wilson(1, 2)


@pytest.mark.parametrize(
    ("text", "own", "official", "lmms_eval", "vlmevalkit"),
    [
        ("Yes", "yes", "yes", "yes", "yes"),
        (" no\n", "no", "yes", "no", "no"),
        ("No", "no", "no", "no", "no"),
        ("NO", "no", "yes", "no", "no"),
        ("No!", "no", "yes", None, "no"),
        ("No, there is no dog.", "no", "no", None, "no"),
        ("There is a dog. It is not small.", "no", "yes", None, None),
        ("There isn't one.", "no", "yes", None, None),
        ("I do not know", "no", "no", None, None),
        ("There is a dog.", None, "yes", None, None),
        ("It could be yes or no", None, "no", None, None),
        ("Yes, but not a big one", "yes", "no", None, "yes"),
        ("The answer is: yes", "yes", "yes", None, "yes"),
        ("Nothing is known about noses", None, "yes", None, None),
        ("", None, "yes", None, None),
    ],
)
def test_parsers(text: str, own: str, official: str, lmms_eval: str, vlmevalkit: str) -> None:
    found = {name: PARSERS[name](text, "yes") for name in ("own", "official", "lmms_eval", "vlmevalkit")}
    assert found == {"own": own, "official": official, "lmms_eval": lmms_eval, "vlmevalkit": vlmevalkit}


def test_vcd_looks_at_the_label() -> None:
    vcd = PARSERS["vcd"]
    assert vcd("I do not know", "no") == "no" and vcd("I do not know", "yes") == "no"
    assert vcd("There is a dog", "yes") == "no" and vcd("There is a dog", "no") == "yes"
    assert vcd("Yes and no", "yes") == "yes" and vcd("Yes and no", "no") == "no"


def test_refuses() -> None:
    with pytest.raises(RecordError, match=r"no parser 'offical'.*Did you mean 'official'"):
        get_metric("pope", parser="offical")
    with pytest.raises(RecordError, match="label is 'Yes'"):
        get_metric("pope").sample({"label": "Yes", "generated": "yes"})
    with pytest.raises(RecordError, match="a text is needed"):
        get_metric("pope").sample({"label": "yes", "generated": None})
