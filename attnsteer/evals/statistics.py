"""Intervals for proportions and for paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    g = torch.Generator().manual_seed(seed)
    found = []
    # In portions, so that many samples and draws fit into memory.
    for start in range(0, draws, 500):
        index = torch.randint(len(top), (min(500, draws - start), len(top)), generator=g)
        found.append(top[index].sum(dim=1) / bottom[index].sum(dim=1))
    spread = torch.cat(found).nan_to_num(0.0).sort().values
    low, high = spread[int(0.025 * draws)], spread[min(draws - 1, int(0.975 * draws))]
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))
