"""The row-batched search gives what one steered forward per head and sample gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnsteer import ACT, HeadGate, HeadSet, Where, ZeroTuning
from attnsteer.errors import NeverFired
from attnsteer.search import calibrate_act, calibrate_heads
from attnsteer.testing import tiny_transformers
from tests.search.common import random_choices, slow_search

PAIRS = [(layer, head) for layer in range(3) for head in range(4)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_transformers("llama")


def expected(model: Any, method: Any, samples: Any, pairs: Any) -> dict[str, dict[tuple[int, int], float]]:
    """Gains in both metrics, from the slow search and the definition of each metric."""
    found, plain = slow_search(model, method, samples, pairs)

    def mean(rows: list[list[float]]) -> tuple[float, float]:
        right = [r[s.answer] for r, s in zip(rows, samples, strict=True)]
        best = [max(range(len(r)), key=r.__getitem__) == s.answer for r, s in zip(rows, samples, strict=True)]
        return sum(best) / len(samples), sum(right) / len(samples)

    base = mean(plain)
    gains = {p: mean(found[p]) for p in pairs}
    return {
        "accuracy": {p: g[0] - base[0] for p, g in gains.items()},
        "log_likelihood": {p: g[1] - base[1] for p, g in gains.items()},
    }


METHODS = {
    "act": ACT(beta=0.2, threshold=0.08),
    "act-late-sinks": ACT(beta=0.0, threshold=0.12, min_rows=3),
    "act-prefill": ACT(beta=0.2, threshold=0.08, decode="prefill_only"),
    "act-running": ACT(beta=0.2, alpha=1.0, decode="running"),
    "act-some": ACT(heads=HeadSet({1: [0, 3], 2: [2]}), beta=0.2, threshold=0.08),
    "zerotuning": ZeroTuning(gamma=1.7, where=Where(layers=[0, 2])),
    "decode-only": ZeroTuning(gamma=2.5, where=Where(phases="decode")),
}


@pytest.mark.parametrize("longest", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_equal_to_one_forward_per_head_and_sample(model: Any, name: str, longest: int) -> None:
    method, samples = METHODS[name], random_choices(7, longest=longest)
    pairs = [(1, 0), (1, 3), (2, 2)] if name == "act-some" else [p for p in PAIRS if name != "zerotuning" or p[0] != 1]
    if name == "decode-only" and longest == 1:
        with pytest.raises(NeverFired):
            calibrate_heads(model, method, samples, progress=False)
        return
    want = expected(model, method, samples, pairs)
    assert any(abs(g) > 1e-4 for g in want["log_likelihood"].values())
    for metric in ("accuracy", "log_likelihood"):
        found = calibrate_heads(model, method, samples, metric=metric, keep="all", batch=5, progress=False)
        assert list(found) == pairs and found.shape == (3, 4)
        for pair in pairs:
            assert found.scores[pair] == pytest.approx(want[metric][pair], abs=2e-6)
