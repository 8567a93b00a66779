"""Intervals against hand-computed values and simulated coverage."""

from __future__ import annotations

import pytest
import torch

from attnsteer.evals.significance import (
    Interval,
    McNemar,
    bootstrap_p,
    holm,
    jackknife,
    jackknife_p,
    mcnemar,
    over_seeds,
    paired_bootstrap,
    ratio_bootstrap,
    resampled_totals,
    student_t,
    wilson,
)


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


def test_resampled_totals_are_sums_of_drawn_rows() -> None:
    columns = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    found = resampled_totals(columns, draws=700, seed=3)
    assert found.shape == (700, 2) and torch.equal(found[:, 1], 10 * found[:, 0])
    g = torch.Generator().manual_seed(3)
    index = torch.cat([torch.randint(3, (500, 3), generator=g), torch.randint(3, (200, 3), generator=g)])
    assert torch.equal(found, columns.double()[index].sum(dim=1))


def test_jackknife_of_a_mean_is_the_classical_interval() -> None:
    values = [1.0, 2.0, 4.0, 7.0, 11.0]
    found = jackknife(5, lambda index: sum(values[i] for i in index) / len(index), groups=5)
    # Mean 5, sum of squared deviations 66: error sqrt(66 / 4 / 5), t(4) = 2.7764.
    assert found.value == 5.0
    assert found.high - 5 == pytest.approx(2.776445 * (66 / 20) ** 0.5, abs=1e-5) and found.low == 10 - found.high
    with pytest.raises(ValueError, match="6 groups of 5"):
        jackknife(5, len, groups=6)


def test_mcnemar() -> None:
    before = [1] * 4 + [0] * 9 + [1] * 1 + [0] * 2
    after = [1] * 4 + [1] * 9 + [0] * 1 + [0] * 2
    # 9 gained, 1 lost: 2 (1 + 10) / 1024.
    assert mcnemar(before, after) == McNemar(9, 1, 22 / 1024) and mcnemar(after, before) == McNemar(1, 9, 22 / 1024)
    assert mcnemar([1, 0], [1, 0]) == McNemar(0, 0, 1.0) and mcnemar([1, 0], [0, 1]).p == 1.0
    # Beyond the range of floats on the way, and still a number.
    assert mcnemar([0] * 5000, [0] * 2500 + [1] * 2500).p == 0.0
    assert 0 < mcnemar([0] * 1000, [1] * 1000).p < 1e-300
    assert str(mcnemar(before, after)) == "9 gained, 1 lost, p = 0.0215"
    with pytest.raises(ValueError, match="1 answers before and 2 after"):
        mcnemar([1], [1, 0])
    with pytest.raises(ValueError, match="nothing else"):
        mcnemar([0.5], [1])


def test_mcnemar_of_groups_counts_each_once() -> None:
    """Copies of answers are no further evidence; a group is gained or lost by its balance, and left out where it has none."""
    before, after = [0] * 3 + [1] * 7, [1] * 3 + [1] * 7
    one = mcnemar(before, after)
    assert mcnemar(before * 4, after * 4, list(range(10)) * 4) == one == McNemar(3, 0, 0.25)
    assert mcnemar(before, after, range(10)) == one
    # Groups of two answers: gained and unchanged, gained and lost, lost twice.
    assert mcnemar([0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0], "aabbcc") == McNemar(1, 1, 1.0)
    with pytest.raises(ValueError, match="2 answers and 1 groups"):
        mcnemar([1, 0], [1, 0], ["a"])


def test_mcnemar_of_independent_groups_is_seldom_significant_by_chance() -> None:
    """Under the null hypothesis, with answers of a group that change together."""
    g = torch.Generator().manual_seed(0)
    seen = alone = 0
    for _ in range(300):
        base, moved = (torch.randint(0, 2, (30,), generator=g) for _ in range(2))
        before, after = (v.repeat_interleave(4).tolist() for v in (base, moved))
        labels = [i // 4 for i in range(120)]
        seen += mcnemar(before, after, labels).p <= 0.05
        alone += mcnemar(before, after).p <= 0.05
    assert seen <= 15 + 10 and alone > 60


def test_p_of_the_bootstrap() -> None:
    """2 (1 + the draws on the other side) / (draws + 1); zero is on both sides."""
    draws = torch.cat([torch.full((95,), 0.2), torch.full((4,), -0.1)])
    assert bootstrap_p(draws) == bootstrap_p(-draws) == 2 * 5 / 100
    assert bootstrap_p(torch.zeros(99)) == 1.0 and bootstrap_p(torch.full((99,), float("nan"))) == 1.0
    assert bootstrap_p(torch.ones(9999)) == 2 / 10000


def test_p_of_the_bootstrap_is_seldom_small_by_chance() -> None:
    g = torch.Generator().manual_seed(0)
    small = 0
    for seed in range(200):
        difference = torch.randn(60, 1, generator=g, dtype=torch.float64)
        small += bootstrap_p(resampled_totals(difference, 500, seed)[:, 0]) <= 0.05
    assert 2 <= small <= 20


def test_p_of_the_jackknife() -> None:
    """At the edge of the 95 % interval p is 0.05; a t of 4.781 with 9 degrees of freedom has p = 0.001 (tables)."""
    assert jackknife_p(Interval(1.0, 0.0, 2.0), 10) == pytest.approx(0.05)
    assert jackknife_p(Interval(-1.0, -2.0, 0.0), 20) == pytest.approx(0.05)
    assert jackknife_p(Interval(4.781, 4.781 - 2.262157, 4.781 + 2.262157), 10) == pytest.approx(0.001, abs=1e-6)
    assert jackknife_p(Interval(0.0, 0.0, 0.0), 10) == 1.0 and jackknife_p(Interval(1.0, 1.0, 1.0), 10) == 0.0


def test_holm() -> None:
    """4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 is raised to its predecessor; never above one."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([0.05]) == [0.05]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([1.5])


@pytest.mark.parametrize(
    ("freedom", "point"), [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (19, 2.093024), (30, 2.042272)]
)
def test_student_t(freedom: int, point: float) -> None:
    assert student_t(freedom) == pytest.approx(point, abs=1e-5)


def test_over_seeds() -> None:
    found = over_seeds([0.50, 0.54, 0.52])
    assert found.mean == pytest.approx(0.52) and found.deviation == pytest.approx(0.02)
    assert (found.least, found.most, found.count) == (0.50, 0.54, 3)
    assert found.interval.high == pytest.approx(0.52 + 4.302653 * 0.02 / 3**0.5, abs=1e-6)
    assert str(found) == "0.520 ± 0.020 (3 seeds)"
    one = over_seeds([0.5])
    assert one.deviation is None and one.interval is None and str(one) == "0.500 (one seed)"
    with pytest.raises(ValueError, match="one per seed"):
        over_seeds([])
