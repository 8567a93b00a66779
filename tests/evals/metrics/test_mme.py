"""MME: pairs of questions, the official parser and score, and intervals over pairs."""

from __future__ import annotations

import pytest

from attnsteer.errors import RecordError
from attnsteer.evals.metrics import get_metric
from attnsteer.evals.metrics.base import UndefinedMetric
from attnsteer.evals.metrics.mme import official


def records(answers: dict[str, tuple[str, str]], category: str = "existence") -> list[dict]:
    """Pair -> answers to the question to be affirmed and to the one to be denied."""
    return [
        {"label": label, "generated": said, "pair": f"{category}/{pair}", "category": category}
        for pair, both in answers.items()
        for label, said in zip(("yes", "no"), both, strict=True)
    ]


def values(metric, rows: list[dict]) -> dict[str, float]:
    found = metric.aggregate([metric.sample(r) for r in rows], draws=200)
    return {k: v.value for k, v in found.items()}


def test_two_pictures_by_hand() -> None:
    # Right and right, right and wrong: 3 of 4 questions, 1 of 2 pairs.
    found = values(get_metric("mme"), records({"a": ("Yes", "No."), "b": ("yes, there is", "Yes")}))
    assert found == {
        "accuracy": 0.75, "accuracy_plus": 0.5, "score": pytest.approx(125), "yes_ratio": 0.75, "unparsed": 0.0,
    }  # fmt: skip


def test_the_total_is_the_sum_of_the_categories() -> None:
    metric = get_metric("mme", by=["existence", "count", "OCR"])
    rows = records({"a": ("yes", "no"), "b": ("yes", "yes")}) + records({"a": ("no", "no")}, "count")
    found = values(metric, rows)
    assert found["score_existence"] == pytest.approx(125) and found["score_count"] == pytest.approx(50)
    assert found["score"] == pytest.approx(175) and found["accuracy"] == pytest.approx(4 / 6)
    assert found["accuracy_plus"] == pytest.approx(1 / 3) and found["accuracy_plus_count"] == 0
    # A category that was not asked about has no figures, and adds nothing.
    assert "score_OCR" not in found
    # One name that ends as another: each has its own figures.
    two = get_metric("mme", by=["text", "alt_text"])
    assert set(values(two, records({"a": ("yes", "no")}, "alt_text"))) >= {"score_alt_text"}
    assert "score_text" not in values(two, records({"a": ("yes", "no")}, "alt_text"))


def test_saying_yes_to_everything_has_half_the_accuracy_and_no_pair() -> None:
    found = values(get_metric("mme"), records({str(i): ("yes", "yes") for i in range(6)}))
    assert found["accuracy"] == 0.5 and found["accuracy_plus"] == 0 and found["score"] == 50


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"), ("NO", "no"), ("yes, it is", "yes"), ("\nNo", "no"), ("I know", None), ("know", "no"), ("No, yes", "no"),
        ("A: yes", None), ("", None), ("not", "no"),
    ],
)  # fmt: skip
def test_the_official_parser(text: str, said: str | None) -> None:
    assert official(text) == said


def test_pairs_are_resampled_as_pairs() -> None:
    """Right and wrong always together: the interval is that of as many pairs, not of twice as many questions."""
    rows = records({str(i): ("yes", "no") if i % 2 else ("no", "yes") for i in range(40)})
    metric = get_metric("mme")
    samples = [metric.sample(r) for r in rows]
    found = metric.aggregate(samples, draws=2000)
    assert found["accuracy"].value == 0.5 and 0.25 < found["accuracy"].high - found["accuracy"].low < 0.36
    # Scenes that have several pairs are drawn as wholes.
    wide = metric.aggregate(samples, groups=[i // 16 for i in range(80)], draws=2000)
    assert wide["accuracy_plus"].value == 0.5


def test_differences_are_of_the_same_pairs() -> None:
    metric = get_metric("mme")
    before = [metric.sample(r) for r in records({str(i): ("yes", "yes") for i in range(20)})]
    after = [metric.sample(r) for r in records({str(i): ("yes", "no") for i in range(20)})]
    found = metric.compare(before, after, draws=300)
    assert found["accuracy"] == (0.5, 0.5, 0.5) and found["accuracy_plus"].value == 1.0
    assert found["score"].value == pytest.approx(150)
    assert metric.p_value("score", before, after, draws=300) < 0.05 and metric.mcnemar(before, after) is None
    # The second seed asks the same pairs once more.
    twice = metric.aggregate([*after, *before], draws=50)
    assert twice["accuracy_plus"].value == 0.5


def test_half_a_pair_is_none() -> None:
    metric = get_metric("mme")
    rows = records({"a": ("yes", "no"), "b": ("yes", "no")})[:3]
    found = values(metric, rows)
    assert found["accuracy"] == 1.0 and found["accuracy_plus"] == 1.0
    with pytest.warns(UndefinedMetric) as told:
        assert values(metric, rows[2:])["accuracy_plus"] == 0.0
    assert any("accuracy_plus is 0 / 0" in str(w.message) for w in told)


def test_refuses() -> None:
    with pytest.raises(RecordError, match=r"no parser 'offical'.*Did you mean 'official'"):
        get_metric("mme", parser="offical")
    with pytest.raises(RecordError, match="give different names"):
        get_metric("mme", by=["count", "count"])
    metric = get_metric("mme", by=["count"])
    row = records({"a": ("yes", "no")}, "count")[0]
    for change, said in (
        ({"label": "maybe"}, "the label is 'maybe'"),
        ({"generated": None}, "texts are needed"),
        ({"category": "counts"}, "Did you mean 'count'"),
    ):
        with pytest.raises(RecordError, match=said):
            metric.sample({**row, **change})
    with pytest.raises(RecordError, match="'pair' is missing"):
        metric.sample({k: v for k, v in row.items() if k != "pair"})
    one = [metric.sample(row)]
    with pytest.raises(RecordError, match="1 samples before and 2 after"):
        metric.compare(one, one * 2)
    with pytest.raises(RecordError, match="give one group per sample"):
        metric.aggregate(one, groups=[1, 2])
