"""The verdict of a run: one function, whose words stand in the report, in comparisons, on boards and in what a command prints.

A headline respects its controls. A gain that random heads (or spans) have as well is no gain of the method; a control at zero
strength that moved makes the run invalid; a method that changed nothing has no result. What was tuned on the samples that it is
shown on says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RunError
from ..recipe.sweep import own_point
from ..run.folder import RunFolder
from .figures import Figure, is_share

# A difference counts as seen where its 95 % interval leaves out zero; of several settings, the p-value adjusted for all
# must be at most this too. A single setting was chosen before the run, so that nothing needs an adjustment.
LEVEL = 0.05
# Of fewer pairs no exact test reaches that level (2 / 2^5 = 0.06), whatever a bootstrap of them says.
LEAST = 6
# What there is to say of a run, the loudest last.
WORDS = {
    "better": "Better",
    "worse": "Worse",
    "none": "No difference seen",
    "changed": "Changed",
    "random": "No better than random",
    "unchanged": "The method did nothing",
    "invalid": "Invalid run",
}
# One character for each, where there is no room for words.
# Kinds of arms that act elsewhere: heads that were drawn, or other spans.
DRAWN = ("random", "span")
SIGNS = {"better": "▲", "worse": "▼", "none": "=", "changed": "●", "random": "≈", "unchanged": "∅", "invalid": "✗"}
# What to say of a run whose method changed nothing.
UNCHANGED = (
    "Not one attention call of any sample was changed, so no figure here says anything about the method. Check its "
    "parameters, and what it selects."
)
TUNED = "tuned on the test"
# Words of a recipe's `chosen` that are no split.
BEFOREHAND = {
    "published": "as published",
    "unsearched": "fixed before any run, without a search",
    "partly": "chosen in part on another split than the test's, the rest fixed before any run; the recipe's notes say which",
}
# Estimates that say how many answers could be read -> whether they count those that could.
PARSED = {"parse_rate": True, "unparsed": False}


@dataclass(frozen=True)
class Control:
    """A control and what it says. name: "Zero strength", "Random heads" or "Random spans". state: "pass", "fail" or "open"."""

    name: str
    state: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a run says of its method in the primary figure.

    Attributes:
        key: of `WORDS`. reason: one sentence more, or "". controls: those of the run. guards: what makes an improvement
            suspicious. parsed: shares of answers that could be read, baseline and method, or "".
        chosen: where strength and heads were chosen. tuned: on the samples of the test, or it is not said where.
        point: of the sweep. best: it is the best of several settings by these very samples.
    """

    key: str
    reason: str
    controls: tuple[Control, ...]
    guards: tuple[str, ...]
    parsed: str
    chosen: str
    tuned: bool
    point: Mapping[str, Any]
    best: bool

    @property
    def words(self) -> str:
        """The verdict in words, with what takes from it."""
        return WORDS[self.key] + (f" ({TUNED})" if self.tuned and self.key in ("better", "changed") else "")

    def lines(self) -> list[str]:
        """All of it, a line each: for a terminal."""
        found = [f"verdict: {self.words}" + (f": {self.reason}" if self.reason else "")]
        found += [f"control: {c.name.lower()}: {c.text}" for c in self.controls]
        found += [f"parsed answers: {self.parsed}"] if self.parsed else []
        found += [f"watch: {g}" for g in self.guards]
        return [*found, f"settings: {self.chosen}"]


def verdict(run: RunFolder, point: Mapping[str, Any] | None = None) -> Verdict:
    """The verdict of a run, from its metrics.json.

    Args:
        point: of the sweep; without it the recipe's own, else the best.

    Raises:
        RunError: the run has no figures yet, or none of its method.
    """
    if run.metrics is None:
        raise RunError(f"{run.path} has no metrics.json yet; start the run again with the same command to finish it.")
    metric, estimate = run.primary()
    best = False
    if point is None:
        point, best = chosen_point(run)
    arm = point["arms"]["method"]
    entry = difference(run, point, metric)
    if estimate not in (entry or {"estimates": {}})["estimates"]:
        raise RunError(
            f"{run.path / 'metrics.json'} has no difference of {arm} from the baseline for {metric}.{estimate} (no sample "
            "may have an answer in every arm yet); start the run again with the same command to finish it."
        )
    zero, moved = _zero(run)
    key, drawn = figure_verdict(run, point, metric, estimate)
    reason = f"fewer than {LEAST} samples" if key == "none" and _few(run) else ""
    if key == "random":
        reason = f"the gain is not seen against the control: {drawn.text}"
    if key == "unchanged":
        reason = UNCHANGED
    if moved:
        key, reason = "invalid", moved
    chosen, tuned = _chosen(run, best)
    return Verdict(
        key,
        reason,
        tuple(c for c in (zero, drawn) if c is not None),
        tuple(guards(run, point)),
        _parsed(run, point),
        chosen,
        tuned,
        point,
        best,
    )


def figure_verdict(run: RunFolder, point: Mapping[str, Any], metric: str, estimate: str) -> tuple[str, Control | None]:
    """What a point says of one figure, the zero control aside: of `WORDS`; and the control of random draws."""
    better = run.measures[metric].better.get(estimate, 0)
    entry = difference(run, point, metric) or {"estimates": {}}
    # Only the primary figure has a p-value that is adjusted for all settings.
    p = entry.get("p_holm") if _settings(run) > 1 and (metric, estimate) == run.primary() else None
    key = judged(entry["estimates"].get(estimate) or {}, better, p)
    if _few(run) and key in ("better", "worse"):
        key = "none"
    drawn = _random(run, point, metric, estimate, better)
    if key == "better" and drawn is not None and drawn.state != "pass":
        key = "random"
    return ("unchanged" if point["arms"]["method"] in run.unchanged else key), drawn


def _few(run: RunFolder) -> bool:
    """Whether there are too few samples for any difference to be seen."""
    return int((run.metrics or {}).get("samples") or LEAST) < LEAST


def judged(change: Any, better: int, p: float | None = None) -> str:
    """A difference by itself, whatever the controls say: "better", "worse", "changed" where no direction is good, or "none".

    Args:
        change: with `value`, `low` and `high`, as a mapping or as attributes. better: 1, -1 or 0. p: adjusted for all settings.
    """
    get = change.get if isinstance(change, Mapping) else lambda k: getattr(change, k, None)
    value, low, high = (get(k) for k in ("value", "low", "high"))
    if value is None or low is None or high is None or low <= 0 <= high or (p is not None and p > LEVEL):
        return "none"
    if better == 0:
        return "changed"
    return "better" if better * value > 0 else "worse"


def chosen_point(run: RunFolder) -> tuple[dict[str, Any], bool]:
    """The point of the sweep that the headline is about, and whether it is only the best by these samples.

    Raises:
        RunError: there is no method.
    """
    points = [p for p in run.points if "method" in p["arms"]]
    if not points:
        raise RunError(f"{run.path}: no arm of kind method; there are {', '.join(run.arms)}.")
    if len(points) == 1:
        return points[0], False
    own = own_point(points, run.recipe)
    if own is not None:
        return own, False
    metric, estimate = run.primary()
    better = run.measures[metric].better.get(estimate, 0)

    def worth(point: dict[str, Any]) -> float:
        found = difference(run, point, metric)
        value = (found or {"estimates": {}})["estimates"].get(estimate, {}).get("value")
        return float("-inf") if value is None else (better or 1) * value

    return max(points, key=worth), True


def difference(
    run: RunFolder, point: Mapping[str, Any], metric: str, role: str = "method", against: str = "baseline"
) -> dict[str, Any] | None:
    """The entry of metrics.json for two roles of a point, and a metric."""
    wanted = (point["point"], role, against, metric)
    rows = run.metrics.get("differences", ())
    return next((d for d in rows if (d["point"], d["arm"], d["against"], d["metric"]) == wanted), None)


def control_name(arm: str) -> str:
    """What an arm of `DRAWN` has in the place of what the method has."""
    if arm.startswith("span-"):
        return f"marked: {arm.partition('-')[2]}"
    if arm.startswith("random-spans"):
        return "random spans"
    return "random heads anywhere" if "anywhere" in arm else "random heads"


def _settings(run: RunFolder) -> int:
    return sum("method" in p["arms"] for p in run.points)


def guards(run: RunFolder, point: Mapping[str, Any]) -> list[str]:
    """What makes an improvement suspicious, of all metrics: texts that loop, lost recall, and the like."""
    found = []
    for d in run.metrics.get("differences", ()):
        if (d["point"], d["arm"], d["against"]) == (point["point"], "method", "baseline"):
            found += d.get("guards") or ()
    return list(dict.fromkeys(found))


def _zero(run: RunFolder) -> tuple[Control | None, str]:
    """The control at zero strength, and what is wrong with it."""
    equal, moved = run.metrics.get("zero_equals_baseline"), ""
    if equal is False:
        told = [w for w in run.metrics.get("warnings", ()) if w.startswith("the method at zero strength differs")]
        how = f" ({told[0].partition('differs from the baseline ')[2]})" if told else ""
        moved = f"the method at zero strength does not answer as the baseline{how}, so something else than the method differs"
    for arm, calls in (run.metrics.get("changed_calls") or {}).items():
        if calls and run.arms.get(arm, {}).get("kind") == "zero" and _counts_changes(run, arm):
            moved = moved or f"at zero strength the method changed something in {calls:,} calls; it must not"
    if equal is None and not moved:
        return None, ""
    if moved:
        return Control("Zero strength", "fail", "is not the baseline" if equal is False else "acts"), moved
    return Control("Zero strength", "pass", "equals the baseline, record for record"), ""


def _counts_changes(run: RunFolder, arm: str) -> bool:
    """Whether the audit of an arm tells changes from edits that left everything as it was."""
    entries = ((run.audit or {}).get("arms") or {}).get(arm) or ()
    return any("changed" in site for entry in entries for site in entry.get("sites", {}).values())


def _random(run: RunFolder, point: Mapping[str, Any], metric: str, estimate: str, better: int) -> Control | None:
    """The method against each random draw: passed where it is better than every one of them."""
    changes, names = [], []
    share = is_share(run, metric, estimate)
    for role, arm in point["arms"].items():
        if run.arms.get(arm, {}).get("kind") not in DRAWN:
            continue
        entry = difference(run, point, metric, against=role)
        if entry is not None and estimate in entry["estimates"]:
            changes.append(Figure.of(entry["estimates"][estimate], share, signed=True))
            names.append(control_name(arm))
    if not changes:
        return None
    said = [judged(c, better) for c in changes]
    what = " and ".join(dict.fromkeys(names))
    state = "pass" if set(said) == {"better"} else "fail" if "worse" in said else "open"
    text = f"method minus {what}: {changes[0]}"
    if len(changes) > 1:
        numbers = ", ".join(c.number for c in changes)
        text = f"method minus {what}, {len(changes)} draws: {numbers}{changes[0].unit}; "
        text += f"better than {said.count('better')} of them"
    return Control(what[0].upper() + what[1:], state, text)


def _parsed(run: RunFolder, point: Mapping[str, Any]) -> str:
    """ "98 % → 71 %": shares of answers that could be read, for the first metric that tells."""
    arms = [point["arms"].get(role, role) for role in ("baseline", "method")]
    for name in run.measures:
        for estimate, counts in PARSED.items():
            found = [run.metrics["arms"].get(a, {}).get(name, {}).get(estimate) for a in arms]
            values = [f.get("value") if isinstance(f, Mapping) else f for f in found]
            if None not in values:
                return " → ".join(f"{100 * (v if counts else 1 - v):.1f} %" for v in values)
    return ""


def _chosen(run: RunFolder, best: bool) -> tuple[str, bool]:
    """Where the settings were chosen, and whether that was on the test or is not said."""
    if best:
        return f"best of {_settings(run)} settings, chosen on these samples: expect less on others", True
    searched = ((run.recipe.get("calibration") or {}).get("data") or {}).get("split")
    heads = f"; {run.recipe['calibration'].get('into', 'heads')} searched on the split {searched}" if searched else ""
    named = run.recipe.get("chosen")
    if named in BEFOREHAND:
        return f"{BEFOREHAND[named]}{heads}", False
    if named:
        return f"chosen on the split {named}{heads}", False
    return f"the recipe does not say on which split its strength and heads were chosen{heads}", True
