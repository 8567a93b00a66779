"""Intervals against hand-computed values and simulated coverage."""

from __future__ import annotations

import pytest
import torch

from attnsteer.evals.statistics import paired_bootstrap, ratio_bootstrap, wilson


def test_wilson() -> None:
    """Values of Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    table = (
        ((81, 263), 0.2553, 0.3662),
        ((15, 148), 0.0624, 0.1605),
        ((0, 20), 0.0, 0.1611),
        ((1, 29), 0.0061, 0.1718),
    )
    for (r, n), low, high in table:
        found = wilson(r, n)
        assert found.value == r / n
        assert found.low == pytest.approx(low, abs=5e-5) and found.high == pytest.approx(high, abs=5e-5)
    assert wilson(20, 20).high == 1.0 and wilson(5, 10).percent() == "50.0 % [23.7, 76.3]"


@pytest.mark.parametrize("bad", [(1, 0), (3, 2), (-1, 5)])
def test_wilson_refuses(bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="proportion"):
        wilson(*bad)


def test_paired_bootstrap_covers_the_truth() -> None:
    g = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(100):
        before = torch.randn(60, generator=g, dtype=torch.float64)
        after = before + 0.3 + 0.5 * torch.randn(60, generator=g, dtype=torch.float64)
        found = paired_bootstrap(before.tolist(), after.tolist(), draws=500, seed=trial)
        assert found.value == pytest.approx(float((after - before).mean()))
        hits += found.low <= 0.3 <= found.high
    # 95 expected; the pairs vary much less than the values, so an unpaired interval would cover always.
    assert 86 <= hits <= 99
    assert found.high - found.low < 0.35


def test_bootstrap_of_a_constant_and_of_ratios() -> None:
    assert tuple(paired_bootstrap([0, 1, 1], [1, 2, 2], draws=100)) == (1.0, 1.0, 1.0)
    found = ratio_bootstrap([1, 0, 2], [2, 1, 5], draws=1000)
    assert found.value == 3 / 8 and found.low == 0.0 and found.high == 0.5
    assert found == ratio_bootstrap([1, 0, 2], [2, 1, 5], draws=1000)


def test_bootstrap_refuses() -> None:
    with pytest.raises(ValueError, match="2 values before and 1 after"):
        paired_bootstrap([0, 1], [1])
    with pytest.raises(ValueError, match="0 numerators"):
        ratio_bootstrap([], [])
