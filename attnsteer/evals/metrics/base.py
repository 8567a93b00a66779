"""What a metric is: numbers per sample, and estimates that are functions of their sums.

Accuracy, CHAIR_i, F1 and perplexity are all functions of sums over samples, so one resampling of samples serves every one
of them, ratios included, and two arms are compared on the same resamples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import RecordError, listing
from ..significance import Interval, McNemar, bootstrap_p, mcnemar, percentiles, resampled_totals, wilson

Sample = Mapping[str, float]
# The column of ones that every sample has.
SAMPLES = "samples"


class UndefinedMetric(UserWarning):
    """An estimate is 0 / 0 on these samples, such as CHAIR_i when no object was mentioned; it is reported as 0."""


class Totals(dict[str, Tensor]):
    """Sums by column, fp64 [draws]; a column that no sample has is zero."""

    def __missing__(self, name: str) -> Tensor:
        return torch.zeros_like(self[SAMPLES])


Statistic = Callable[[Totals], Tensor]


@dataclass(frozen=True)
class Ratio:
    """The sum of some columns over the sum of others; NaN for 0 / 0."""

    top: tuple[str, ...]
    bottom: tuple[str, ...]

    def __call__(self, totals: Totals) -> Tensor:
        return sum(totals[c] for c in self.top) / sum(totals[c] for c in self.bottom)


def Mean(column: str) -> Ratio:
    """The mean of a column over the samples."""
    return Ratio((column,), (SAMPLES,))


def f1(true_positives: str, false_positives: str, false_negatives: str) -> Statistic:
    """2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall."""

    def statistic(totals: Totals) -> Tensor:
        twice = 2 * totals[true_positives]
        return twice / (twice + totals[false_positives] + totals[false_negatives])

    return statistic


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: in the table.
        needs: keys that a record must have.
        read: the per-sample function: record -> numbers (columns that are zero may be left out).
        statistics: estimates, by name: functions of the columns' sums.
        correct: the column of 0 and 1 that McNemar's test is for, where there is one.
        when: estimates that are left out where no sample has this column.
        note: what a reader must know to compare the figures with others: parser, features, synonyms.
        better: 1 where a larger value is better, -1 where a smaller one is, by estimate; others are neither.
        only_with: estimates that count for a single sample only where it has this column: a picture that is clean, but of
            something else, is no gain.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, float]]
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    correct: str | None = None
    when: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    better: Mapping[str, int] = field(default_factory=dict)
    only_with: Mapping[str, str] = field(default_factory=dict)

    def sample(self, record: Mapping[str, Any]) -> dict[str, float]:
        """The numbers of one record.

        Raises:
            RecordError: a key is missing, or a value is not what the metric reads.
        """
        for key in self.needs:
            if key not in record:
                raise RecordError(
                    f"the metric {self.name} needs {listing(self.needs)} in a record; {key!r} is missing, there are "
                    f"{listing(record)}."
                )
        try:
            found = self.read(record)
            self._finite(found)
        except RecordError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise RecordError(
                f"the metric {self.name} cannot read this record ({type(error).__name__}: {error}); see docs/metrics.md "
                "for what it takes."
            ) from error
        return found

    def _finite(self, found: Mapping[str, Any]) -> None:
        for key, value in found.items():
            if not math.isfinite(value):
                raise RecordError(f"the metric {self.name} got {key} = {value} from a record; a number is needed.")

    def aggregate(
        self, samples: Sequence[Sample], *, groups: Sequence[Any] | None = None, draws: int = 10_000, seed: int = 0
    ) -> dict[str, Interval | float]:
        """Estimates over samples with 95 % intervals.

        Wilson's interval where every sample is at most one trial with one outcome, else the percentile bootstrap.

        Args:
            samples: what `sample` gave. groups: one label per sample; samples of one label (questions about one image,
            seeds of one prompt) are resampled together. draws, seed: of the bootstrap.

        Raises:
            RecordError: no samples, or not one group per sample.
        """
        names, table = self._table([samples], groups)
        statistics = self._present(names)
        sums = resampled_totals(table[0], draws, seed)
        out: dict[str, Interval | float] = {}
        for key, statistic in statistics.items():
            value = self._value(key, statistic, names, table[0])
            exact = self._trials(statistic, names, table[0]) if groups is None else None
            out[key] = wilson(*exact) if exact else Interval(value, *percentiles(statistic(_totals(names, sums))))
        return out

    def compare(
        self,
        before: Sequence[Sample],
        after: Sequence[Sample],
        *,
        groups: Sequence[Any] | None = None,
        draws: int = 10_000,
        seed: int = 0,
    ) -> dict[str, Interval | float]:
        """after - before for every estimate, with the interval of the paired bootstrap: both arms get the same resamples.

        Args:
            before, after: the same samples in the same order, from two arms. groups, draws, seed: see `aggregate`.

        Raises:
            RecordError: as `aggregate`, or lists of different length.
        """
        names, first, second, low, high = self._resampled(before, after, groups, draws, seed)
        out: dict[str, Interval | float] = {}
        for key, statistic in self._present(names).items():
            value = self._value(key, statistic, names, second) - self._value(key, statistic, names, first)
            out[key] = Interval(value, *percentiles(_change(statistic, low, high)))
        return out

    def p_value(
        self,
        estimate: str,
        before: Sequence[Sample],
        after: Sequence[Sample],
        *,
        groups: Sequence[Any] | None = None,
        draws: int = 10_000,
        seed: int = 0,
    ) -> float | None:
        """The two-sided p-value of one estimate's difference: McNemar's where it is about it, else that of the bootstrap.

        None where there is neither: an estimate that these samples do not have, or sets too small for an interval.

        Args:
            estimate: its name. before, after, groups, draws, seed: see `compare`.

        Raises:
            RecordError: as `compare`.
        """
        if self.tested(estimate):
            test = self.mcnemar(before, after, groups=groups)
            return None if test is None else test.p
        names, _, _, low, high = self._resampled(before, after, groups, draws, seed)
        statistic = self._present(names).get(estimate)
        return None if statistic is None else bootstrap_p(_change(statistic, low, high))

    def _resampled(
        self, before: Sequence[Sample], after: Sequence[Sample], groups: Sequence[Any] | None, draws: int, seed: int
    ) -> tuple[list[str], Tensor, Tensor, Totals, Totals]:
        """The columns, the table of each arm [N, K], and each arm's totals of the same resamples."""
        if len(before) != len(after):
            raise RecordError(
                f"{self.name}: {len(before)} samples before and {len(after)} after; a paired difference needs the same ones."
            )
        names, (first, second) = self._table([before, after], groups)
        low, high = (_totals(names, resampled_totals(t, draws, seed)) for t in (first, second))
        return names, first, second, low, high

    def mcnemar(
        self, before: Sequence[Sample], after: Sequence[Sample], *, groups: Sequence[Any] | None = None
    ) -> McNemar | None:
        """The exact test on the answers that changed; None for a metric that has no right and wrong.

        Args:
            before, after: see `compare`. groups: see `aggregate`; a group counts once, by its balance.
        """
        if self.correct is None:
            return None
        return mcnemar(*([s.get(self.correct, 0) for s in arm] for arm in (before, after)), groups=groups)

    def tested(self, estimate: str) -> bool:
        """Whether `mcnemar` is about this estimate: the share of right answers."""
        return self.correct is not None and self.statistics.get(estimate) == Mean(self.correct)

    def _present(self, names: Sequence[str]) -> dict[str, Statistic]:
        return {k: s for k, s in self.statistics.items() if self.when.get(k, SAMPLES) in names}

    def _table(self, arms: Sequence[Sequence[Sample]], groups: Sequence[Any] | None) -> tuple[list[str], list[Tensor]]:
        count = len(arms[0])
        if count == 0:
            raise RecordError(f"{self.name}: no samples; an estimate needs at least one.")
        if groups is not None and len(groups) != count:
            raise RecordError(f"{self.name}: {count} samples and {len(groups)} groups; give one group per sample.")
        names = [*dict.fromkeys(k for arm in arms for s in arm for k in s), SAMPLES]
        tables = [
            torch.tensor([[float(s.get(k, 0.0)) for k in names[:-1]] + [1.0] for s in arm], dtype=torch.float64)
            for arm in arms
        ]
        if groups is not None:
            place: dict[Any, int] = {}
            index = torch.tensor([place.setdefault(g, len(place)) for g in groups])
            tables = [t.new_zeros(len(place), len(names)).index_add_(0, index, t) for t in tables]
        return names, tables

    def _value(self, key: str, statistic: Statistic, names: Sequence[str], table: Tensor) -> float:
        value = float(statistic(_totals(names, table.sum(dim=0, keepdim=True))))
        if math.isnan(value):
            warnings.warn(
                f"{self.name}: {key} is 0 / 0 on these samples; reported as 0.", UndefinedMetric, stacklevel=3
            )
            return 0.0
        return value

    @staticmethod
    def _trials(statistic: Statistic, names: Sequence[str], table: Tensor) -> tuple[int, int] | None:
        """(successes, trials) where every sample is at most one trial."""
        if not isinstance(statistic, Ratio):
            return None
        columns = dict(zip(names, table.unbind(dim=1), strict=True))
        zero = torch.zeros(len(table), dtype=torch.float64)
        top, bottom = (sum((columns.get(c, zero) for c in part), zero) for part in (statistic.top, statistic.bottom))
        single = ((top == 0) | (top == 1)) & ((bottom == 0) | (bottom == 1)) & (top <= bottom)
        return (int(top.sum()), int(bottom.sum())) if bool(single.all()) and bool(bottom.any()) else None


def _change(statistic: Statistic, low: Totals, high: Totals) -> Tensor:
    return statistic(high).nan_to_num(0.0) - statistic(low).nan_to_num(0.0)


def _totals(names: Sequence[str], sums: Tensor) -> Totals:
    return Totals(zip(names, sums.unbind(dim=1), strict=True))
