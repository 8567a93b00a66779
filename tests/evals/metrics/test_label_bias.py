"""The metric of label bias against counting pairs by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from attnsteer.errors import RecordError
from attnsteer.evals.metrics import get_metric


def records(leads: list[float], answers: list[int]) -> list[dict[str, Any]]:
    return [
        {"choices": ["a", "b"], "scores": [-1.0, -1.0 + d], "answer": a} for d, a in zip(leads, answers, strict=True)
    ]


def test_a_biased_model_that_knows() -> None:
    # Every lead is below zero, and ranks the two labels without a fault.
    metric = get_metric("label_bias")
    found = metric.aggregate(
        [metric.sample(r) for r in records([-5.0, -4.0, -3.0, -2.0, -1.5, -1.0], [0, 0, 0, 1, 1, 1])]
    )
    assert found == {"auc": 1.0, "balanced": 1.0, "accuracy": 0.5, "says_first": 1.0, "first": 0.5}


def test_auc_counts_pairs_and_ties() -> None:
    g = torch.Generator().manual_seed(0)
    leads = (torch.randn(40, generator=g) * 2).round().tolist()
    answers = torch.randint(0, 2, (40,), generator=g).tolist()
    metric = get_metric("label_bias")
    samples = [metric.sample(r) for r in records(leads, answers)]
    ones, zeros = ([d for d, a in zip(leads, answers, strict=True) if a == k] for k in (1, 0))
    wins = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in itertools.product(ones, zeros)]
    found = metric.aggregate(samples)
    assert found["auc"].value == pytest.approx(sum(wins) / len(wins)) and found["auc"].low < found["auc"].high
    assert found["says_first"].value == sum(d <= 0 for d in leads) / 40
    shifted = [metric.sample(r) for r in records([d + 1.0 for d in leads], answers)]
    change = metric.compare(samples, shifted)
    # A bias moves what is said, and neither the ranking nor what the median divides.
    assert (change["auc"].value, change["balanced"].value) == (0.0, 0.0) and change["says_first"].value < 0


def test_records_of_another_form() -> None:
    metric = get_metric("label_bias")
    with pytest.raises(RecordError, match="about two labels"):
        metric.sample({"choices": ["a", "b", "c"], "scores": [0.0, 1.0, 2.0], "answer": 0})
    with pytest.raises(RecordError, match="no index of two labels"):
        metric.sample({"choices": ["a", "b"], "scores": [0.0, 1.0], "answer": True})
    with pytest.raises(RecordError, match="no finite difference"):
        metric.sample({"choices": ["a", "b"], "scores": [0.0, float("nan")], "answer": 1})
