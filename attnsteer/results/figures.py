"""Figures in words: values with intervals, shares in percent, p-values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..evals.metrics.base import SAMPLES, Metric, Totals
from ..run.folder import Key, RunFolder

MINUS, DASH = "−", "–"


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval (None: has none), and how it is written.

    Attributes:
        percent: written as a percentage; a difference then is in points. signed: a difference.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    percent: bool = False
    signed: bool = False

    @classmethod
    def of(cls, found: Any, percent: bool = False, signed: bool = False) -> Figure:
        """From {"value", "low", "high"}, a number, or None."""
        if isinstance(found, Mapping):
            return cls(found.get("value"), found.get("low"), found.get("high"), percent, signed)
        return cls(found, None, None, percent, signed)

    @property
    def unit(self) -> str:
        """ " %", " points" or nothing."""
        return "" if not self.percent else " points" if self.signed else " %"

    @property
    def number(self) -> str:
        """The value, without its unit."""
        return "–" if self.value is None else self._write(self.value)

    @property
    def span(self) -> str:
        """The interval, or nothing."""
        if self.low is None or self.high is None:
            return ""
        return f"{self._write(self.low)} to {self._write(self.high)}"

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        return f"{self.number}{self.unit}" + (f" [{self.span}]" if self.span else "")

    def _write(self, value: float) -> str:
        value = 100 * value if self.percent else value
        digits = 1 if self.percent else 3 if abs(value) < 10 else 1
        # A rounded zero has no sign.
        value = round(value, digits) or 0.0
        text = f"{abs(value):.{digits}f}"
        return (MINUS if value < 0 else "+" if self.signed and value > 0 else "") + text


def values_text(values: Mapping[str, Any]) -> str:
    """ "beta 0.4, tau 20" of a sweep point."""
    return ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in values.items())


def per_sample(metric: Metric, estimate: str, rows: Mapping[Key, Mapping[str, Any]]) -> dict[Key, float | None]:
    """The estimate of each record by itself; None where it is 0 / 0, nothing where it is defined on sets only."""
    statistic = metric.statistics.get(estimate)
    if statistic is None or not rows:
        return {}
    read = [metric.sample(r) for r in rows.values()]
    names = list(dict.fromkeys(k for r in read for k in r))
    if metric.when.get(estimate, SAMPLES) not in [*names, SAMPLES]:
        return {}
    columns = {n: torch.tensor([float(r.get(n, 0.0)) for r in read], dtype=torch.float64) for n in names}
    found = statistic(Totals({**columns, SAMPLES: torch.ones(len(read), dtype=torch.float64)})).tolist()
    return {k: None if v != v else v for k, v in zip(rows, found, strict=True)}


def shares(run: RunFolder) -> set[str]:
    """The figures that are written in percent."""
    return {f"{n}.{e}" for n, metric in run.measures.items() for e in metric.better if is_share(run, n, e)}


def is_share(run: RunFolder, name: str, estimate: str) -> bool:
    """Whether a figure is written in percent: it has a good direction, and lies in [0, 1] for each sample."""
    metric = run.measures[name]
    if estimate not in metric.better:
        return False
    values = [v for rows in run.records.values() for v in per_sample(metric, estimate, rows).values()]
    known = [v for v in values if v is not None]
    return bool(known) and all(0 <= v <= 1 for v in known)


def p_text(p: float | None) -> str:
    """ "p = 0.013", "p < 0.0001", or nothing."""
    return "" if p is None else "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}" if p < 0.01 else f"p = {p:.2f}"
