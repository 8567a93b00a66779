"""What `metrics.json` says: estimates of each arm, paired differences with tests, cost, and the paper's claims beside them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecipeError, RecordError, listing
from ..evals.metrics import get_metric
from ..evals.metrics.base import Metric
from ..evals.significance import Interval, holm, over_seeds
from ..recipe.schema import Recipe
from ..recipe.sweep import own_point
from .changes import changed_calls

# (seed, id) of a record.
Key = tuple[int, str]
Records = Mapping[str, Mapping[Key, Mapping[str, Any]]]
SCHEMA_VERSION = 1
# Keys in which equal answers of two arms differ.
OWN = ("arm", "image")
# Up to which log-likelihoods of equal answers differ where arms share batches: a kernel may round the rows of one differently.
ROUNDING = 1e-4


def measures(recipe: Recipe, there: Sequence[str] | None = None) -> dict[str, Metric]:
    """The metrics of a recipe by name.

    Args:
        there: keys that its records will have.

    Raises:
        RecipeError: a metric that does not exist, or that needs what the records will not have.
    """
    found = {}
    for spec in recipe.metrics:
        metric = get_metric(spec.name, **spec.options)
        missing = [k for k in metric.needs if there is not None and k not in there]
        if missing:
            raise RecipeError(
                f"metrics: {spec.name} needs {listing(metric.needs)} in each record; the task {recipe.task} on these data "
                f"gives {listing(there or ())}, and no {listing(missing)}."
            )
        found[spec.name] = metric
    return found


class Scores:
    """The numbers of all records, and what follows from them.

    Args:
        recipe: resolved. plan: what arms.json holds. samples: by id. records: of each arm, by (seed, id).
        timings: lines of timings.jsonl. audits: of each arm, as audit.json has them.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]],
        records: Records,
        timings: Sequence[Mapping[str, Any]],
        audits: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ):
        self.recipe, self.plan, self.records, self.timings = recipe, plan, records, timings
        self.audits = audits or {}
        self.arms = [a["id"] for a in plan["arms"]]
        self.shared = [a for a in self.arms if any("shared" in t for t in timings if t["arm"] == a)]
        self.measures = measures(recipe)
        self.warnings: list[str] = []
        every = [(seed, s["id"]) for seed in recipe.seeds for s in samples]
        # Where a run was interrupted, the samples that every arm has answered.
        self.keys = [k for k in every if all(k in records.get(a, {}) for a in self.arms)]
        self.partial = len(self.keys) < len(every)
        groups = {s["id"]: str(s.get("group", s["id"])) for s in samples}
        labels = [groups[i] for _, i in self.keys]
        self.groups = None if len(set(labels)) == len(labels) else labels
        self.numbers = {
            arm: {m: [metric.sample(records[arm][k]) for k in self.keys] for m, metric in self.measures.items()}
            for arm in self.arms
        }
        self._compared: dict[tuple[str, str, str], Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds."""
        if not self.keys:
            return {
                "schema": SCHEMA_VERSION,
                "partial": True,
                "primary": self.recipe.primary,
                "arms": {},
                "differences": [],
                "points": self.plan["points"],
                "zero_equals_baseline": None,
                "changed_calls": {},
                "unchanged": [],
                "cost": self.cost(),
                "claims": [],
                "warnings": ["no sample has an answer in every arm yet"],
            }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            arms = {arm: self._estimates(arm) for arm in self.arms}
            out: dict[str, Any] = {
                "schema": SCHEMA_VERSION,
                "partial": self.partial,
                "primary": self.recipe.primary,
                "samples": len({i for _, i in self.keys}),
                "arms": {arm: {m: self._plain(e) for m, e in own.items()} for arm, own in arms.items()},
            }
            if len(self.recipe.seeds) > 1:
                out["seeds"] = {arm: self._seeds(arm) for arm in self.arms}
            out["differences"] = self._differences(arms)
        out["points"] = self.plan["points"]
        out["zero_equals_baseline"] = self._zero()
        out["changed_calls"] = {arm: changed_calls(audit) for arm, audit in self.audits.items() if audit}
        out["unchanged"] = self._unchanged(out["changed_calls"])
        out["cost"] = self.cost()
        if self.shared:
            self.warnings.append(
                f"{listing(self.shared)} answered in shared batches: their cost is an equal share of these, and not what each takes"
            )
        out["claims"] = self._claims(arms)
        told = [str(w.message) for w in caught]
        out["warnings"] = list(dict.fromkeys([*self.warnings, *told]))
        return out

    def _estimates(self, arm: str) -> dict[str, dict[str, Any]]:
        return {m: metric.aggregate(self.numbers[arm][m], groups=self.groups) for m, metric in self.measures.items()}

    def _plain(self, estimates: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._interval(name, e) for name, e in estimates.items()}

    def _interval(self, name: str, estimate: Any) -> dict[str, float | None]:
        parts = estimate if isinstance(estimate, Interval) else Interval(float(estimate), math.nan, math.nan)
        out: dict[str, float | None] = {}
        for key, value in zip(("value", "low", "high"), parts, strict=True):
            out[key] = float(value) if math.isfinite(value) else None
            if out[key] is None:
                self.warnings.append(f"{name}: a {key} is not finite, and is null")
        return out

    def _seeds(self, arm: str) -> dict[str, Any]:
        out = {}
        for m, metric in self.measures.items():
            of_seeds = []
            for seed in self.recipe.seeds:
                rows = [i for i, (s, _) in enumerate(self.keys) if s == seed]
                if not rows:
                    continue
                groups = None if self.groups is None else [self.groups[i] for i in rows]
                try:
                    of_seeds.append(metric.aggregate([self.numbers[arm][m][i] for i in rows], groups=groups, draws=1))
                except RecordError as error:
                    # Figures of sets need more samples than a seed that is not whole may have.
                    self.warnings.append(f"seed {seed}: {error}")
            # A seed that is not whole may lack what an estimate is about, such as the questions of one category.
            for name in dict.fromkeys(k for e in of_seeds for k in e):
                values = [float(getattr(e[name], "value", e[name])) for e in of_seeds if name in e]
                known = [v for v in values if math.isfinite(v)]
                row: dict[str, Any] = {"mean": None, "low": None, "high": None}
                if known:
                    found = over_seeds(known)
                    low, high = (None, None) if found.interval is None else found.interval[1:]
                    row = {"mean": found.mean, "low": low, "high": high}
                if len(known) < len(values):
                    self.warnings.append(f"{name}: a seed's value is not finite, and is null")
                out[f"{m}.{name}"] = {**row, "values": [v if math.isfinite(v) else None for v in values]}
        return out

    def _differences(self, arms: Mapping[str, Any]) -> list[dict[str, Any]]:
        out = []
        for point in self.plan["points"]:
            roles = point["arms"]
            randoms = [r for r in roles if r.startswith(("random", "span"))]
            pairs = [(r, "baseline") for r in ("method", "zero", *randoms) if r in roles]
            pairs += [("method", r) for r in randoms if "method" in roles]
            for role, other in pairs:
                for m in self.measures:
                    entry = self._compare(roles[role], roles[other], m, arms)
                    out.append({"point": point["point"], "arm": role, "against": other, **entry})
        self._adjust(out)
        return out

    def _adjust(self, differences: Sequence[dict[str, Any]]) -> None:
        """The primary figure's tests, method against baseline, with Holm's adjustment; points with both arms in common are one."""
        m, _, estimate = self.recipe.primary.partition(".")
        arms = {p["point"]: p["arms"] for p in self.plan["points"]}
        entries: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for d in differences:
            if (d["arm"], d["against"], d["metric"]) == ("method", "baseline", m):
                roles = arms[d["point"]]
                entries.setdefault((roles["method"], roles["baseline"]), []).append(d)
        found = {
            (arm, base): self.measures[m].p_value(
                estimate, self.numbers[base][m], self.numbers[arm][m], groups=self.groups
            )
            for arm, base in entries
        }
        tests = {pair: p for pair, p in found.items() if p is not None}
        for (pair, p), adjusted in zip(tests.items(), holm(list(tests.values())), strict=True):
            for d in entries[pair]:
                d |= {"p": p, "p_holm": adjusted}

    def _compare(self, arm: str, other: str, m: str, arms: Mapping[str, Any]) -> dict[str, Any]:
        if (arm, other, m) not in self._compared:
            from ..evals.metrics.fluency import guard

            metric, before, after = self.measures[m], self.numbers[other][m], self.numbers[arm][m]
            found = metric.compare(before, after, groups=self.groups)
            test = metric.mcnemar(before, after, groups=self.groups)
            self._compared[arm, other, m] = {
                "metric": m,
                "estimates": self._plain(found),
                "mcnemar": None if test is None else dict(test._asdict()),
                # Of the primary figure, method against baseline.
                "p": None,
                "p_holm": None,
                "guards": guard(arms[other][m], arms[arm][m]),
            }
        return dict(self._compared[arm, other, m])

    def _zero(self) -> bool | None:
        """Whether the method at zero strength answered as the baseline, record for record; None without such an arm.

        In shared batches that is up to rounding, and the audit tells whether it changed anything.
        """
        pairs = {
            (p["arms"]["zero"], p["arms"]["baseline"])
            for p in self.plan["points"]
            if "zero" in p["arms"] and "baseline" in p["arms"]
        }
        decoding = {a["id"]: a["decoding"] for a in self.plan["arms"]}
        # A baseline with a decoding of its own is not what the method at zero strength does.
        pairs = {(z, b) for z, b in pairs if decoding[z] == decoding[b]}
        if not pairs:
            return None
        differ = sum(self._differing(zero, base) for zero, base in pairs)
        if differ:
            self.warnings.append(
                f"the method at zero strength differs from the baseline in {differ} of {len(self.keys) * len(pairs)} records"
            )
        return differ == 0

    def _differing(self, arm: str, other: str) -> int:
        """In how many records two arms differ."""
        rounding = ROUNDING if arm in self.shared or other in self.shared else 0.0
        return sum(not _same(self.records[arm][k], self.records[other][k], rounding) for k in self.keys)

    def _unchanged(self, changed: Mapping[str, int | None]) -> list[str]:
        """The arms whose interventions changed nothing, although they should have; a control at zero strength should not.

        Where an audit cannot tell, an arm changed nothing if it answered as its baseline does, record for record.
        """
        kinds = {a["id"]: a["kind"] for a in self.plan["arms"]}
        bases = {arm: p["arms"].get("baseline") for p in self.plan["points"] for arm in p["arms"].values()}
        found = []
        for arm, calls in changed.items():
            if kinds[arm] == "zero":
                if calls and any("changed" in s for entry in self.audits[arm] for s in entry["sites"].values()):
                    self.warnings.append(
                        f"the control at zero strength changed something in {calls} calls; it should change nothing"
                    )
            elif calls == 0 or (calls is None and bases[arm] in self.records and not self._differing(arm, bases[arm])):
                found.append(arm)
            else:
                self.warnings += [
                    f"{entry['intervention']} of the arm {arm} changed nothing"
                    for entry in self.audits[arm]
                    if len(self.audits[arm]) > 1 and changed_calls([entry]) == 0
                ]
        if found:
            self.warnings.append(f"{listing(found)} changed nothing: the figures say nothing about the method")
        return found

    def cost(self) -> dict[str, Any]:
        """Per arm: seconds per sample, units per second, peak memory, and time relative to the baseline.

        The first batch of an arm in a process warms things up, and is left out where there are others. Arms that answered in
        one batch have equal shares of its time, and no time relative to each other.
        """
        out: dict[str, Any] = {}
        for arm in self.arms:
            lines = [t for t in self.timings if t["arm"] == arm]
            warm = [t for t in lines if not t.get("first")] or lines
            if not warm:
                continue
            seconds, samples = sum(t["seconds"] for t in warm), sum(t["samples"] for t in warm)
            unit = next((u for u in ("tokens", "images") if u in warm[0]), "samples")
            out[arm] = {
                "seconds_per_sample": seconds / samples,
                "per_second": sum(t[unit] for t in warm) / seconds,
                "unit": unit,
                "peak_memory_mb": max(t["peak_memory"] for t in lines) / 2**20,
                "relative": None,
                **({"shared": True} if arm in self.shared else {}),
            }
        for arm, own in out.items():
            # Settings of decoding give each point a baseline of its own.
            bases = (p["arms"].get("baseline") for p in self.plan["points"] if arm in p["arms"].values())
            base = next((b for b in bases if b in out), None)
            if base is not None and not own.get("shared") and not out[base].get("shared"):
                own["relative"] = own["seconds_per_sample"] / out[base]["seconds_per_sample"]
        return out

    def _claims(self, arms: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The paper's figures, with ours beside them: of the recipe's own point, else of the first one."""
        out = []
        points = self.plan["points"]
        roles = (own_point(points, self.recipe.dump()) or points[0])["arms"]
        for claim in self.recipe.claims:
            m, _, name = claim.metric.partition(".")
            entry: dict[str, Any] = {**claim.model_dump(mode="json"), "ours": None}
            if name in arms[roles["method"]].get(m, {}):
                difference = self._compare(roles["method"], roles["baseline"], m, arms)["estimates"][name]
                entry["ours"] = {
                    "baseline": self._interval(name, arms[roles["baseline"]][m][name]),
                    "value": self._interval(name, arms[roles["method"]][m][name]),
                    "difference": difference,
                }
            out.append(entry)
        return out


def _same(one: Mapping[str, Any], two: Mapping[str, Any], rounding: float) -> bool:
    """Whether two records say the same, log-likelihoods up to `rounding`."""
    scores = [r.get("scores", []) for r in (one, two)]
    rest = [{k: v for k, v in r.items() if k not in (*OWN, "scores")} for r in (one, two)]
    near = len(scores[0]) == len(scores[1]) and all(abs(a - b) <= rounding for a, b in zip(*scores, strict=True))
    return near and rest[0] == rest[1]
