"""The headline of a report: the primary figure of baseline and method, and the verdict on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...run.folder import RunFolder
from ..figures import Figure
from ..verdict import Verdict, difference, verdict


@dataclass(frozen=True)
class Headline:
    """The primary figure of baseline and method.

    Attributes:
        metric, estimate: the primary figure. better: 1, -1, or 0 where no direction is good.
        point: of the sweep; its values. arm: the method's; base: its baseline's. chosen: why this point, or "".
        baseline, method, difference: of the figure. gained, lost: of McNemar's test, or None where it is not about this figure.
        test, p, p_holm: "McNemar" or "Resampling", its p-value, and the one adjusted for all settings, or None.
        verdict: on it. records: pairs.
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
    verdict: Verdict
    records: int
    grouped: bool

    @property
    def words(self) -> str:
        """The verdict."""
        return self.verdict.words

    @property
    def key(self) -> str:
        """Of the verdict."""
        return self.verdict.key


def headline(run: RunFolder, percent: set[str]) -> Headline:
    """The headline of a run; with a sweep, of the recipe's own point, else of the best one.

    Args:
        percent: the figures ("metric.estimate") that are shares.

    Raises:
        RunError: metrics.json has no difference of the method from the baseline for the primary figure.
    """
    metric, estimate = run.primary()
    better = run.measures[metric].better.get(estimate, 0)
    said = verdict(run)
    point = said.point
    arm = point["arms"]["method"]
    base = run.base(arm)
    found = difference(run, point, metric)
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
        _chosen(run, said),
        Figure.of(arms.get(base, {}).get(metric, {}).get(estimate), share),
        Figure.of(arms.get(arm, {}).get(metric, {}).get(estimate), share),
        change,
        test.get("gained"),
        test.get("lost"),
        "McNemar" if test else "Resampling",
        found.get("p"),
        p_holm,
        said,
        len(paired),
        run.groups(paired) is not None,
    )


def _chosen(run: RunFolder, said: Verdict) -> str:
    """Why this point of the sweep; "" where there is one."""
    settings = sum("method" in p["arms"] for p in run.points)
    if settings < 2:
        return ""
    return said.chosen if said.best else f"the recipe's own of {settings} settings"
