"""Perplexity, and the guards of length and repetition, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from attnsteer.errors import RecordError
from attnsteer.evals.metrics import get_metric
from attnsteer.evals.metrics.fluency import distinct, guard
from attnsteer.evals.significance import Interval, wilson


def test_perplexity_is_over_tokens_not_texts() -> None:
    metric = get_metric("perplexity")
    # Three tokens of probability 1/8 and one of 1/2: exp((3 ln 8 + ln 2) / 4) = 2^2.5. The mean over texts would be 5.
    records = [
        {"log_likelihood": -3 * math.log(8), "tokens": 3, "words": 2, "bytes": 10},
        {"log_likelihood": -math.log(2), "tokens": 1, "words": 1, "bytes": 10},
    ]
    samples = [metric.sample(r) for r in records]
    found = metric.aggregate(samples, draws=300)
    assert found["perplexity"].value == pytest.approx(2**2.5)
    assert (found["perplexity"].low, found["perplexity"].high) == (pytest.approx(2), pytest.approx(8))
    assert found["word_perplexity"].value == pytest.approx(2 ** (10 / 3)) and found[
        "bits_per_byte"
    ].value == pytest.approx(0.5)
    # A text of unknown length in bytes does not count for the bytes.
    mixed = [*samples, metric.sample({"log_likelihood": -100.0, "tokens": 1})]
    assert metric.aggregate(mixed, draws=10)["bits_per_byte"].value == pytest.approx(0.5)
    bare = [metric.sample({"log_likelihood": -1.0, "tokens": 2})]
    assert set(metric.aggregate(bare, draws=10)) == {"perplexity"}
    assert metric.compare(samples, samples, draws=50)["perplexity"] == Interval(0, 0, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"log_likelihood": 0.5}, "<= 0"),
        ({"log_likelihood": -math.inf}, "-inf"),
        ({"log_likelihood": math.nan}, "<= 0"),
        ({"tokens": 0}, "at least 1"),
        ({"words": 1.5}, "whole number"),
        ({"tokens": None}, "at least 1"),
    ],
)
def test_perplexity_refuses(change: dict, words: str) -> None:
    with pytest.raises(RecordError, match=words):
        get_metric("perplexity").sample({"log_likelihood": -1.0, "tokens": 1} | change)


def test_repetition() -> None:
    # a b c d a b c d: five 4-grams, four of them distinct; seven pairs, four distinct.
    words = "a b c d a b c d".split()
    assert distinct(words, 1) == 0.5 and distinct(words, 2) == 4 / 7 and distinct(words, 4) == 4 / 5
    assert distinct(words[:3], 4) is None and distinct([], 1) is None
    metric = get_metric("fluency")
    texts = ["a b c d A b c d", "x x x x x x", "one two", ""]
    samples = [metric.sample({"generated": t}) for t in texts]
    # x: three 4-grams, one distinct, so 2/3 are repeated.
    assert samples[1]["repeated_4"] == pytest.approx(2 / 3) and samples[1]["looping"] == 1
    found = metric.aggregate(samples, draws=200)
    assert found["length"].value == 4.0 and found["empty"] == wilson(1, 4) and found["looping"] == wilson(1, 4)
    assert found["repetition"].value == pytest.approx((1 / 5 + 2 / 3) / 2)
    assert found["distinct_1"].value == pytest.approx((1 / 2 + 1 / 6 + 1) / 3) and "cut" not in found
    ended = [metric.sample({"generated": "a", "finished": f}) for f in (True, False, False)]
    assert metric.aggregate(ended, draws=10)["cut"] == wilson(2, 3)
    with pytest.raises(RecordError, match="a text is needed"):
        metric.sample({"generated": 3})


def test_guard() -> None:
    before = {"recall": Interval(0.8, 0.7, 0.9), "length": 80.0, "repetition": 0.05, "empty": 0.0}
    assert guard(before, before) == []
    assert guard(before, before | {"recall": 0.71, "length": 41.0, "repetition": 0.14}) == []
    found = guard(
        before, {"recall": Interval(0.69, 0.6, 0.7), "length": 39.0, "repetition": 0.16, "looping": 1.0, "empty": 0.2}
    )
    assert [f.split()[0] for f in found] == ["recall", "the", "repeated", "empty"]
    assert "from 80.0% to 69.0%" in found[0] and "from 80.0 to 39.0 words" in found[1]
    assert guard({"length": 10}, {"length": 16}) and guard({}, {"length": 1}) == []
