"""`ScoredHeads`: a `HeadSet` whose scores are means over samples, with the values of each sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import SelectionError
from ..evals.significance import Interval, holm, percentiles, resampled_totals
from ..heads import HeadSet


class ScoredHeads(HeadSet):
    """Heads with a score that is a mean over samples; a `HeadSet` everywhere, so methods take it as it is.

    Args:
        pairs: the heads, in the order of the columns. samples: one row for each sample, [N, heads]; NaN where a sample says
            nothing of a head. scores: None: the means of the columns.
        shape, provenance: of `HeadSet`. Saved are scores and provenance (with errors and t), not the samples.

    Attributes:
        samples: [N, heads] float64; the columns are `columns`. columns: the heads.
    """

    __slots__ = ("columns", "samples")

    def __init__(
        self,
        pairs: Iterable[tuple[int, int]],
        samples: Tensor,
        *,
        scores: Mapping[tuple[int, int], float] | None = None,
        shape: tuple[int, int] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        pairs = list(pairs)
        samples = samples.detach().to("cpu", torch.float64)
        if samples.ndim != 2 or samples.shape[1] != len(pairs) or not len(samples):
            raise SelectionError(
                f"ScoredHeads got samples {tuple(samples.shape)} for {len(pairs)} heads; give [N, heads]."
            )
        self.columns, self.samples = tuple(pairs), samples
        if scores is None:
            scores = {p: float(m) for p, m in zip(pairs, samples.nanmean(dim=0), strict=True)}
        known = {p: s for p, s in scores.items() if not math.isnan(s)}
        super().__init__(pairs, scores=known, shape=shape, provenance=provenance)

    def errors(self) -> dict[tuple[int, int], float]:
        """The standard error of each head's mean; NaN with fewer than two samples."""
        return {p: _error(column) for p, column in zip(self.columns, self.samples.T, strict=True)}

    def t(self) -> dict[tuple[int, int], float]:
        """Mean over standard error; NaN where there is none."""
        means = self.samples.nanmean(dim=0).tolist()
        errors = self.errors()
        return {p: m / errors[p] if errors[p] > 0 else math.nan for p, m in zip(self.columns, means, strict=True)}

    def intervals(self, draws: int = 2000, seed: int = 0) -> dict[tuple[int, int], Interval]:
        """Means with 95 % percentile intervals of resampled samples; the same resamples for all heads."""
        known = ~self.samples.isnan()
        totals = resampled_totals(torch.cat([self.samples.nan_to_num(0.0), known.double()], dim=1), draws, seed)
        n = len(self.columns)
        means = self.samples.nanmean(dim=0).tolist()
        return {
            p: Interval(means[i], *percentiles(totals[:, i] / totals[:, n + i])) for i, p in enumerate(self.columns)
        }

    def significant(self, level: float = 0.05) -> HeadSet:
        """The heads whose mean is not zero, by t against a normal distribution, corrected for all heads (Holm 1979)."""
        t = {p: v for p, v in self.t().items() if not math.isnan(v)}
        adjusted = holm([math.erfc(abs(v) / math.sqrt(2)) for v in t.values()])
        found = [p for p, a in zip(t, adjusted, strict=True) if a <= level]
        return HeadSet(found, scores=self.scores, shape=self.shape, provenance=self.provenance)


def _error(column: Tensor) -> float:
    known = column[~column.isnan()]
    return float(known.std() / math.sqrt(len(known))) if len(known) > 1 else math.nan


def table(shape: Any, scores: Mapping[tuple[Any, ...], float]) -> Any:
    """Layer by head, JSON-able: None where there is no number; a table for each of several towers."""
    if isinstance(shape, Mapping):
        return {
            name: table(size, {entry[1:]: score for entry, score in scores.items() if entry[0] == name})
            for name, size in shape.items()
        }

    def cell(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else value

    return [[cell(scores.get((layer, head))) for head in range(shape[1])] for layer in range(shape[0])]
