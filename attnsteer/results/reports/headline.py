"""What a run says: the verdict of its headline, and every figure as words a page can show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import RunError
from ...evals.metrics.base import SAMPLES, Metric, Totals
from ...recipe.sweep import own_point
from ...run.folder import Key, RunFolder

# A difference counts as seen where its 95 % interval leaves out zero; of several settings, the p-value adjusted for all
# must be at most this too. A single setting was chosen before the run, so that nothing needs an adjustment.
LEVEL = 0.05
# Verdict -> how a page says it. "unchanged": the method changed nothing, so that a difference says nothing about it.
VERDICTS = {
    "better": "Better",
    "worse": "Worse",
    "none": "No difference seen",
    "changed": "Changed",
    "unchanged": "The method changed nothing",
}
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


@dataclass(frozen=True)
class Headline:
    """The primary figure of baseline and method.

    Attributes:
        metric, estimate: the primary figure. better: 1, -1, or 0 where no direction is good.
        point: of the sweep; its values. arm: the method's; base: its baseline's. chosen: why this point, or "".
        baseline, method, difference: of the figure. gained, lost: of McNemar's test, or None where it is not about this figure.
        test, p, p_holm: "McNemar" or "Resampling", its p-value, and the one adjusted for all settings, or None.
        verdict: of `VERDICTS`. records: pairs.
        grouped: gained and lost count groups of answers (about one picture, of one sample under several seeds).
    """

    metric: str
    estimate: str
    better: int
    point: dict[str, Any]
    arm: str
    base: str
    chosen: str
    baseline: Figure
    method: Figure
    difference: Figure
    gained: int | None
    lost: int | None
    test: str
    p: float | None
    p_holm: float | None
    verdict: str
    records: int
    grouped: bool

    @property
    def words(self) -> str:
        """The verdict."""
        return VERDICTS[self.verdict]


def headline(run: RunFolder, percent: set[str]) -> Headline:
    """The headline of a run; with a sweep, of the recipe's own point, else of the best one.

    Args:
        percent: the figures ("metric.estimate") that are shares.

    Raises:
        RunError: metrics.json has no difference of the method from the baseline for the primary figure.
    """
    metric, estimate = run.primary()
    better = run.measures[metric].better.get(estimate, 0)
    point, chosen = _point(run, metric, estimate, better)
    arm = point["arms"]["method"]
    base = run.base(arm)
    found = difference(run, point, metric)
    if found is None or estimate not in found["estimates"]:
        raise RunError(
            f"{run.path / 'metrics.json'} has no difference of {arm} from the baseline for {metric}.{estimate} (no sample "
            "may have an answer in every arm yet); start the run again with the same command to finish it."
        )
    share = f"{metric}.{estimate}" in percent
    change = Figure.of(found["estimates"][estimate], share, signed=True)
    test = (found.get("mcnemar") or {}) if run.measures[metric].tested(estimate) else {}
    p_holm = found.get("p_holm")
    arms = run.metrics["arms"]
    paired = sorted(set(run.records.get(base, {})) & set(run.records.get(arm, {})))
    return Headline(
        metric,
        estimate,
        better,
        point,
        arm,
        base,
        chosen,
        Figure.of(arms.get(base, {}).get(metric, {}).get(estimate), share),
        Figure.of(arms.get(arm, {}).get(metric, {}).get(estimate), share),
        change,
        test.get("gained"),
        test.get("lost"),
        "McNemar" if test else "Resampling",
        found.get("p"),
        p_holm,
        verdict(change, better, p_holm if len(run.points) > 1 else None, arm in run.unchanged),
        len(paired),
        run.groups(paired) is not None,
    )


def verdict(change: Figure, better: int, p: float | None, unchanged: bool = False) -> str:
    """One of `VERDICTS`: "changed" where no direction is good, "none" where chance explains the difference.

    Args:
        unchanged: the arm's interventions changed nothing.
    """
    if unchanged:
        return "unchanged"
    if change.low is None or change.high is None or change.low <= 0 <= change.high or (p is not None and p > LEVEL):
        return "none"
    if better == 0:
        return "changed"
    return "better" if better * change.value > 0 else "worse"


def difference(
    run: RunFolder, point: Mapping[str, Any], metric: str, role: str = "method", against: str = "baseline"
) -> dict[str, Any] | None:
    """The entry of metrics.json for two roles of a point, and a metric."""
    wanted = (point["point"], role, against, metric)
    rows = run.metrics.get("differences", ())
    return next((d for d in rows if (d["point"], d["arm"], d["against"], d["metric"]) == wanted), None)


def _point(run: RunFolder, metric: str, estimate: str, better: int) -> tuple[dict[str, Any], str]:
    points = [p for p in run.points if "method" in p["arms"]]
    if not points:
        raise RunError(f"{run.path}: no arm of kind method; there are {', '.join(run.arms)}.")
    if len(points) == 1:
        return points[0], ""
    own = own_point(points, run.recipe)
    if own is not None:
        return own, f"the recipe's own of {len(points)} settings"

    def worth(point: dict[str, Any]) -> float:
        found = difference(run, point, metric)
        value = (found or {"estimates": {}})["estimates"].get(estimate, {}).get("value")
        return float("-inf") if value is None else (better or 1) * value

    return max(points, key=worth), f"best of {len(points)} settings, chosen on these samples: expect less on others"


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
    """The figures that are written in percent: they have a good direction, and lie in [0, 1] for each sample."""
    found = set()
    for name, metric in run.measures.items():
        for estimate in metric.better:
            values = [v for rows in run.records.values() for v in per_sample(metric, estimate, rows).values()]
            known = [v for v in values if v is not None]
            if known and all(0 <= v <= 1 for v in known):
                found.add(f"{name}.{estimate}")
    return found


def p_text(p: float | None) -> str:
    """ "p = 0.013", "p < 0.0001", or nothing."""
    return "" if p is None else "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}" if p < 0.01 else f"p = {p:.2f}"
