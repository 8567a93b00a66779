"""Intervals for proportions and for paired differences, tests of paired answers, and summaries over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def percent(self) -> str:
        """ "84.2 % [81.0, 87.0]"."""
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


# The 97.5 % point of the normal distribution.
Z = 1.959963984540054


def wilson(successes: int, trials: int) -> Interval:
    """The score interval of a proportion (Wilson 1927, equation 2): right also near 0 and 1.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(
            f"{successes} successes of {trials} trials: a proportion needs 0 <= successes <= trials, trials > 0."
        )
    p, n = successes / trials, trials
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


def paired_bootstrap(before: Sequence[float], after: Sequence[float], draws: int = 10_000, seed: int = 0) -> Interval:
    """The mean of after - before over the same samples, with the percentile interval of resampled samples.

    Args:
        before, after: one value per sample, in the same order. draws: resamples. seed: of the resampling.

    Raises:
        ValueError: lists of different length, or empty ones.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"{len(before)} values before and {len(after)} after: a paired difference needs as many, at least one."
        )
    difference = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    return _bootstrap(difference, torch.ones_like(difference), draws, seed)


def ratio_bootstrap(top: Sequence[float], bottom: Sequence[float], draws: int = 10_000, seed: int = 0) -> Interval:
    """sum(top) / sum(bottom) over samples (such as CHAIR_i), with the percentile interval of resampled samples."""
    if len(top) != len(bottom) or not top:
        raise ValueError(f"{len(top)} numerators and {len(bottom)} denominators: give one of each per sample.")
    return _bootstrap(torch.tensor(top, dtype=torch.float64), torch.tensor(bottom, dtype=torch.float64), draws, seed)


def _bootstrap(top: torch.Tensor, bottom: torch.Tensor, draws: int, seed: int) -> Interval:
    sums = resampled_totals(torch.stack([top, bottom], dim=1), draws, seed)
    return Interval(float(top.sum() / bottom.sum()), *percentiles(sums[:, 0] / sums[:, 1]))


def resampled_totals(columns: torch.Tensor, draws: int = 10_000, seed: int = 0) -> torch.Tensor:
    """The column sums of samples drawn with replacement: [N, K] -> fp64 [draws, K].

    Two tables of as many rows and one seed get the same samples, so that a statistic of sums can be compared in pairs.
    """
    columns = columns.double()
    g = torch.Generator().manual_seed(seed)
    found = []
    # In portions, so that many samples and draws fit into memory.
    for start in range(0, draws, 500):
        index = torch.randint(len(columns), (min(500, draws - start), len(columns)), generator=g)
        times = torch.zeros(index.shape, dtype=torch.float64).scatter_add_(
            1, index, torch.ones(1, dtype=torch.float64).expand(index.shape)
        )
        found.append(times @ columns)
    return torch.cat(found)


def percentiles(values: torch.Tensor) -> tuple[float, float]:
    """The 2.5 and 97.5 % points of resampled values [draws]; undefined ones (0 / 0) count as 0."""
    spread = values.nan_to_num(0.0).sort().values
    return float(spread[int(0.025 * len(spread))]), float(spread[min(len(spread) - 1, int(0.975 * len(spread)))])


def bootstrap_p(differences: torch.Tensor) -> float:
    """The two-sided p-value of resampled differences [draws]: twice the share on the other side of zero, which counts itself.

    That is the level at which the percentile interval just reaches zero (Efron and Tibshirani 1993, 15.4); never zero, since
    draws that were not made could lie there (Davison and Hinkley 1997, 4.2.1). Undefined ones count as 0.
    """
    values = differences.nan_to_num(0.0)
    beyond = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return min(1.0, 2 * (1 + beyond) / (len(values) + 1))


def jackknife_p(found: Interval, groups: int = 20) -> float:
    """The two-sided p-value of an estimate of `jackknife` being zero, by Student's t as its interval."""
    half = found.high - found.value
    if half == 0:
        return 1.0 if found.value == 0 else 0.0
    t = abs(found.value) / half * student_t(groups - 1)
    return min(1.0, max(0.0, 1 - _within(math.atan(t / math.sqrt(groups - 1)), groups - 1)))


def jackknife(count: int, statistic: Callable[[list[int]], float], groups: int = 20) -> Interval:
    """A smooth statistic of a set of samples, with its delete-a-group interval (Efron and Tibshirani 1993, 11.5).

    For statistics that are no function of sums, or that duplicates bias, such as Frechet distances; the value itself is
    not corrected for bias. Group g is every `groups`-th sample from g on.

    Args:
        count: of the samples. statistic: of the chosen samples, by index. groups: at least 2, at most `count`.

    Raises:
        ValueError: fewer than two groups, or more than samples.
    """
    if not 2 <= groups <= count:
        raise ValueError(f"{groups} groups of {count} samples: a jackknife needs 2 <= groups <= samples.")
    value = statistic(list(range(count)))
    left = [statistic([i for i in range(count) if i % groups != g]) for g in range(groups)]
    middle = sum(left) / groups
    error = math.sqrt((groups - 1) / groups * sum((v - middle) ** 2 for v in left))
    half = student_t(groups - 1) * error
    return Interval(value, value - half, value + half)


class McNemar(NamedTuple):
    """Paired answers (or groups of them) that changed, and the two-sided exact p-value of changes being this one-sided."""

    gained: int
    lost: int
    p: float

    def __str__(self) -> str:
        return f"{self.gained} gained, {self.lost} lost, p = {self.p:.4f}"


def mcnemar(before: Sequence[float], after: Sequence[float], groups: Sequence[Hashable] | None = None) -> McNemar:
    """The exact test of paired accuracies (McNemar 1947): the changed answers against a fair coin.

    Answers of one group (one sample under several seeds, questions about one picture) are no independent coins. With
    groups this is the sign test of their balances: a group counts once, as gained where more of its answers were gained
    than lost, and not at all where as many. Groups of one answer each give McNemar's test itself.

    Args:
        before, after: 1 for a right answer and 0 for a wrong one, for the same samples in the same order.
        groups: one label per sample.

    Raises:
        ValueError: lists of different length, empty ones, or values other than 0 and 1.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"{len(before)} answers before and {len(after)} after: McNemar's test needs pairs, at least one."
        )
    if not {*before, *after} <= {0, 1}:
        raise ValueError("McNemar's test takes 1 for a right answer and 0 for a wrong one, nothing else.")
    if groups is not None and len(groups) != len(before):
        raise ValueError(f"{len(before)} answers and {len(groups)} groups: give one group per sample.")
    balance: dict[Hashable, float] = {}
    for label, b, a in zip(range(len(before)) if groups is None else groups, before, after, strict=True):
        balance[label] = balance.get(label, 0) + a - b
    gained, lost = (sum(sign * v > 0 for v in balance.values()) for sign in (1, -1))
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    # Whole numbers until the end, so that no tail is too small for a float.
    return McNemar(gained, lost, min(1.0, 2 * tail / 2**n))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests, in their order (Holm 1979): reject where one is at most the level.

    Raises:
        ValueError: a value outside of [0, 1].
    """
    if not all(0 <= v <= 1 for v in p):
        raise ValueError(f"p-values lie in [0, 1]; got {list(p)}.")
    out, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out


class Seeds(NamedTuple):
    """One figure under several seeds: mean, standard deviation (n - 1), extremes, and the t interval of the mean.

    `deviation` and `interval` are None for a single seed, of which nothing can be said.
    """

    mean: float
    deviation: float | None
    least: float
    most: float
    count: int
    interval: Interval | None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.mean:.3f} (one seed)"
        return f"{self.mean:.3f} ± {self.deviation:.3f} ({self.count} seeds)"


def over_seeds(values: Sequence[float]) -> Seeds:
    """Summarise one figure per seed.

    The interval is about seeds on these samples, not about other samples.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("No values to summarise: give one per seed.")
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return Seeds(mean, None, mean, mean, 1, None)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = student_t(n - 1) * deviation / math.sqrt(n)
    return Seeds(mean, deviation, min(values), max(values), n, Interval(mean, mean - half, mean + half))


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t distribution, by bisection of its closed form (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    if freedom < 1:
        raise ValueError(f"Student's t with {freedom} degrees of freedom: at least one is needed.")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|t| <= sqrt(freedom) tan(angle))."""
    cos, odd = math.cos(angle), freedom % 2
    term, total = (cos if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cos * cos * (k - 1) / k
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
