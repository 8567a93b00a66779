"""Compare runs over the same samples: paired differences between their methods, tests over the whole family, and cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RunError, listing
from ..evals.metrics import Metric
from ..evals.significance import Interval, McNemar, holm
from ..run.folder import Key, RunFolder, read_run
from .figures import shares
from .verdict import Verdict, difference, verdict

# Fields of a recipe that say what the run is called, not what it computes.
NAMES = ("name", "summary", "notes", "claims")
# Figures of a table.
SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One arm of one run.

    Attributes:
        run, arm: its run's label, its id. kind: baseline or method. values: of the sweep, or {}. count: records.
        estimates: "metric.estimate" -> value over the samples that all runs have, with its interval if it has one.
        cost: of metrics.json, or {}. unchanged: its interventions changed nothing.
        said: the verdict of its run on a method; None for a baseline, and where the run has no figures yet.
        own: the estimates of a method minus its own run's baseline, over the samples that all runs have.
    """

    run: str
    arm: str
    kind: str
    values: dict[str, Any]
    count: int
    estimates: dict[str, Interval | float]
    cost: dict[str, Any]
    unchanged: bool = False
    said: Verdict | None = None
    own: dict[str, Interval | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One arm minus another on the same samples: estimates, and McNemar's test (p_holm: over all tests of the comparison)."""

    row: int
    against: int
    metric: str
    estimates: dict[str, Interval | float]
    mcnemar: McNemar | None
    p_holm: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        runs: label -> folder. primary: "metric.estimate" of the first run. paired: samples (times seeds) in common.
        figures: "metric.estimate" that have a good direction, the primary one first.
        tested: those of them that McNemar's test is about. rows: the arms; differences point to them.
        recipes: field -> its value in each run, where they differ.
        notes: what a reader must know: unlike samples, unlike machines, metrics left out.
        better: 1, -1 or 0: the good direction of the primary figure. shares: the figures that are written in percent.
    """

    runs: dict[str, str]
    primary: str
    paired: int
    figures: list[str]
    tested: list[str]
    rows: list[Row]
    differences: list[Difference]
    recipes: dict[str, list[Any]]
    notes: list[str] = field(default_factory=list)
    better: int = 0
    shares: frozenset[str] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; estimates as {"value", "low", "high"}, the last two None where there is no interval."""
        found = asdict(self) | {"shares": sorted(self.shares)}
        for row, out in zip(self.rows, found["rows"], strict=True):
            out["estimates"] = {k: _plain(v) for k, v in row.estimates.items()}
            out["own"] = {k: _plain(v) for k, v in row.own.items()}
            said = row.said
            out["said"] = said and {
                "verdict": said.key,
                "words": said.words,
                "reason": said.reason,
                "chosen": said.chosen,
            }
        for one, out in zip(self.differences, found["differences"], strict=True):
            out["estimates"] = {k: _plain(v) for k, v in one.estimates.items()}
            out["mcnemar"] = one.mcnemar and one.mcnemar._asdict()
        return found

    def markdown(self) -> str:
        """Tables for a terminal or a document."""
        shown = self.figures[:SHOWN]
        out = [f"# {' against '.join(self.runs)}", ""]
        out += [f"{self.paired} paired records; primary figure: {self.primary}.", ""]
        out += [f"- {note}" for note in self.notes] + [""] * bool(self.notes)
        body = [
            [
                r.run,
                arm_name(r),
                r.said.words if r.said else "",
                signed(r.own[self.primary]) if self.primary in r.own else "",
                *(_written(r.estimates[k]) if k in r.estimates else "" for k in shown),
                *_cost(r.cost),
            ]
            for r in self.rows
        ]
        head = [
            "run",
            "arm",
            "verdict of the run",
            "minus its own baseline",
            *shown,
            "s / sample",
            "relative",
            "peak MB",
        ]
        out += table(head, body)
        out += ["", "## Differences", ""]
        body = []
        for d in self.differences:
            for key, value in d.estimates.items():
                name = f"{d.metric}.{key}"
                if name not in shown:
                    continue
                test = ("", "")
                if d.mcnemar is not None and name in self.tested:
                    test = (str(d.mcnemar), "" if d.p_holm is None else f"{d.p_holm:.4f}")
                body.append([self._name(d.row), self._name(d.against), name, signed(value), *test])
        out += table(["arm", "minus", "figure", "difference", "McNemar", "p (Holm)"], body)
        if self.recipes:
            out += ["", "## What differs in the recipes", ""]
            body = [[k, *(json.dumps(v, ensure_ascii=False) for v in values)] for k, values in self.recipes.items()]
            out += table(["field", *self.runs], body)
        return "\n".join(out) + "\n"

    def _name(self, row: int) -> str:
        return f"{self.rows[row].run}: {arm_name(self.rows[row])}"


def compare(
    folders: Sequence[str | Path],
    *,
    other_samples: bool = False,
    other_model: bool = False,
    partial: bool = False,
    draws: int = 10_000,
) -> Comparison:
    """Compare two or more runs.

    Each other run's methods are compared with the first run's method (of a sweep, its first setting) on the (seed, id)
    that all runs have. Its baseline should be the first run's; where it gives other numbers, that difference is stated
    too, outside the family of tests.

    Args:
        folders: of the runs; the first is what the others are compared with.
        other_samples: also compare runs of unlike sample sets, on the samples that are equal in all.
        other_model: also compare runs of unlike models. partial: also compare unfinished runs.
        draws: of the bootstrap.

    Raises:
        RunError: fewer than two runs, a damaged or unfinished one, unlike samples or models, or nothing in common.
    """
    if len(folders) < 2:
        raise RunError(
            f"compare needs two runs or more, it got {len(folders)}; for one run there is `attnsteer report`."
        )
    runs = [read_run(f) for f in folders]
    labels = _labels(runs)
    notes = _checked(runs, labels, other_samples, other_model, partial)
    measures, left_out = _common_metrics(runs)
    if left_out:
        notes.append(f"metrics that not every run has, or with other options: {listing(left_out)}")
    arms = [_arms(run) for run in runs]
    keys = _common_keys(runs, arms)
    if not keys:
        raise RunError(f"{' and '.join(labels)} have no sample in common, so nothing can be paired.")
    groups = runs[0].groups(keys)
    if groups is not None:
        notes.append(
            f"the records are of {len(set(groups))} groups (one picture, one sample under several seeds): a group is "
            "gained or lost by its balance"
        )
    rows, read = [], []
    for run, label, chosen in zip(runs, labels, arms, strict=True):
        bases: dict[str, Any] = {}
        for arm, kind, values in chosen:
            found = {n: [m.sample(run.records[arm][k]) for k in keys] for n, m in measures.items()}
            estimates = {
                f"{n}.{k}": v
                for n, m in measures.items()
                for k, v in m.aggregate(found[n], groups=groups, draws=draws).items()
            }
            cost = dict(((run.metrics or {}).get("cost") or {}).get(arm) or {})
            bases[arm] = found
            own = {} if kind == "baseline" else _own(bases[run.base(arm)], found, measures, groups, draws)
            said = None if kind == "baseline" else _said(run, arm)
            rows.append(
                Row(label, arm, kind, values, len(run.records[arm]), estimates, cost, arm in run.unchanged, said, own)
            )
            read.append(found)
    differences = list(_differences(rows, read, measures, groups, labels[0], draws))
    unlike = [rows[d.row].run for d in differences if rows[d.row].kind == "baseline"]
    if unlike:
        notes.append(f"the baseline of {listing(dict.fromkeys(unlike))} gives other numbers than that of {labels[0]}")
    notes += [
        f"{arm_name(row)} in {row.run}: its figures and differences say nothing about the method"
        for row in rows
        if row.unchanged
    ]
    primary = ".".join(runs[0].primary())
    return Comparison(
        runs={label: str(run.path) for label, run in zip(labels, runs, strict=True)},
        primary=primary,
        paired=len(keys),
        figures=list(dict.fromkeys([primary, *(f"{n}.{k}" for n, m in measures.items() for k in m.better)])),
        tested=[f"{n}.{k}" for n, m in measures.items() for k in m.statistics if m.tested(k)],
        rows=rows,
        differences=_with_holm(differences, rows),
        recipes=recipe_differences([r.recipe for r in runs]),
        notes=notes + _machines(runs, labels),
        better=runs[0].measures[primary.partition(".")[0]].better.get(primary.partition(".")[2], 0),
        shares=frozenset(shares(runs[0])),
    )


def _own(
    before: Mapping[str, Any], after: Mapping[str, Any], measures: Mapping[str, Metric], groups: Any, draws: int
) -> dict[str, Interval | float]:
    """A method minus the baseline of its own run."""
    return {
        f"{n}.{k}": v
        for n, m in measures.items()
        for k, v in m.compare(before[n], after[n], groups=groups, draws=draws).items()
    }


def _said(run: RunFolder, arm: str) -> Verdict | None:
    """The verdict of a run on one of its methods."""
    point = next(p for p in run.points if p["arms"].get("method") == arm)
    if run.metrics is None or difference(run, point, run.primary()[0]) is None:
        return None
    return verdict(run, point)


def _labels(runs: Sequence[RunFolder]) -> list[str]:
    """The recipes' names, or the folders where two have one name, or numbers where those are equal too."""
    for found in ([r.name for r in runs], [r.path.name for r in runs], [str(r.path) for r in runs]):
        if len(set(found)) == len(found):
            return found
    raise RunError(f"{runs[0].path} is given more than once; name different runs.")


def _checked(
    runs: Sequence[RunFolder], labels: Sequence[str], other_samples: bool, other_model: bool, partial: bool
) -> list[str]:
    notes = []
    first = runs[0]
    for run, label in zip(runs, labels, strict=True):
        if not run.complete:
            said = f"{label} is {run.status['state']}, {run.status.get('done')} of {run.status.get('total')} records"
            if not partial:
                raise RunError(f"{said}. Start the run again to finish it, or compare what there is with --partial.")
            notes.append(said)
        if run.identity.get("samples") != first.identity.get("samples"):
            common = sum(first.samples.get(i) == s for i, s in run.samples.items())
            said = (
                f"{labels[0]} and {label} are over different samples ({len(first.samples)} and {len(run.samples)}; "
                f"{common} are equal)"
            )
            if not other_samples:
                raise RunError(f"{said}. To compare on the equal ones give --other-samples.")
            notes.append(said + ": compared on the equal ones")
        one, two = ((r.identity.get("model"), r.tiny) for r in (first, run))
        if one != two:
            names = [json.dumps(r.recipe.get("model"), sort_keys=True) for r in (first, run)]
            if first.tiny != run.tiny:
                names = ["a tiny stand-in" if r.tiny else n for r, n in zip((first, run), names, strict=True)]
            said = f"{labels[0]} and {label} are of different models ({names[0]} and {names[1]})"
            if not other_model:
                raise RunError(f"{said}. To compare them all the same give --other-model.")
            notes.append(said)
        if run.tiny:
            notes.append(f"{label} ran with a tiny random model: its figures say nothing about the method")
    return notes


def _common_metrics(runs: Sequence[RunFolder]) -> tuple[dict[str, Metric], list[str]]:
    options = [r.metric_options() for r in runs]
    every = list(dict.fromkeys(n for o in options for n in o))
    common = [n for n in every if all(n in o and o[n] == options[0].get(n) for o in options)]
    name = runs[0].primary()[0]
    if name not in common:
        raise RunError(
            f"the primary metric {name} of {runs[0].name} is not computed by every run with the same options "
            f"({listing(json.dumps(o.get(name)) for o in options)}); compare runs of one evaluation."
        )
    return {n: runs[0].measures[n] for n in common}, [n for n in every if n not in common]


def _arms(run: RunFolder) -> list[tuple[str, str, dict[str, Any]]]:
    """(arm, kind, values of its sweep point) of the baseline and of each method."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for point in run.points:
        base = point["arms"].get("baseline", "baseline")
        if base not in {a for a, _, _ in found}:
            found.append((base, "baseline", point["values"] if found else {}))
        arm = point["arms"].get("method")
        if arm is not None and arm not in {a for a, _, _ in found}:
            found.append((arm, "method", point["values"]))
    missing = [a for a, _, _ in found if not run.records.get(a)]
    if missing or len(found) < 2:
        raise RunError(
            f"{run.path} has no records of {listing(missing) or 'a method'}; start the run again to finish it."
        )
    return found


def _common_keys(runs: Sequence[RunFolder], arms: Sequence[Sequence[tuple[str, str, Any]]]) -> list[Key]:
    """(seed, id) with a record in all arms, of samples that are equal in all runs; in the first run's order."""
    first = runs[0]
    equal = {i for i, s in first.samples.items() if all(r.samples.get(i) == s for r in runs[1:])}
    keys = {k for k in first.records[arms[0][0][0]] if k[1] in equal}
    for run, chosen in zip(runs, arms, strict=True):
        for arm, _, _ in chosen:
            keys &= set(run.records[arm])
    order = {i: n for n, i in enumerate(first.samples)}
    return sorted(keys, key=lambda k: (k[0], order[k[1]]))


def _differences(
    rows: Sequence[Row],
    read: Sequence[Mapping[str, list[dict[str, float]]]],
    measures: Mapping[str, Metric],
    groups: Sequence[str] | None,
    first: str,
    draws: int,
) -> Iterator[Difference]:
    for i, row in enumerate(rows):
        if row.run == first:
            continue
        against = next(j for j, r in enumerate(rows) if r.run == first and r.kind == row.kind)
        for name, metric in measures.items():
            before, after = read[against][name], read[i][name]
            if row.kind == "baseline" and before == after:
                continue
            estimates = metric.compare(before, after, groups=groups, draws=draws)
            yield Difference(i, against, name, estimates, metric.mcnemar(before, after, groups=groups))


def _with_holm(found: Sequence[Difference], rows: Sequence[Row]) -> list[Difference]:
    tests = [i for i, d in enumerate(found) if d.mcnemar is not None and rows[d.row].kind == "method"]
    adjusted = dict(zip(tests, holm([found[i].mcnemar.p for i in tests]), strict=True))
    return [
        Difference(d.row, d.against, d.metric, d.estimates, d.mcnemar, adjusted.get(i)) for i, d in enumerate(found)
    ]


def recipe_differences(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted field -> its value in each recipe, where they differ; None where one has no such field."""
    flat = [dict(_flat(r)) for r in recipes]
    fields = dict.fromkeys(k for f in flat for k in f)
    return {
        k: [f.get(k) for f in flat]
        for k in fields
        if k.split(".")[0] not in NAMES and any(f.get(k) != flat[0].get(k) for f in flat)
    }


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items: Any = None
    if value in ({}, []):
        return
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(v, Mapping | list) for v in value):
        items = enumerate(value)
    if items is None:
        yield prefix, value
        return
    for key, inner in items:
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))


def _machines(runs: Sequence[RunFolder], labels: Sequence[str]) -> list[str]:
    """Why times and last digits may differ."""
    found = []
    for key in ("cpu", "gpu", "device", "versions"):
        values = [r.environment.get(key) for r in runs]
        if any(v != values[0] for v in values):
            found.append(f"{key} differ between the runs: compare their times with care")
    return found


def _plain(value: Interval | float) -> dict[str, float | None]:
    return value._asdict() if isinstance(value, Interval) else {"value": float(value), "low": None, "high": None}


def _written(value: Interval | float) -> str:
    return str(value) if isinstance(value, Interval) else f"{value:.3f}"


def arm_name(row: Row) -> str:
    """An arm with the values of its setting."""
    values = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in row.values.items())
    name = f"{row.arm} ({values})" if values else row.arm
    return f"{name}, changed nothing" if row.unchanged else name


def _cost(cost: Mapping[str, Any]) -> list[str]:
    shown = (("seconds_per_sample", ".4f"), ("relative", ".2f"), ("peak_memory_mb", ".0f"))
    return ["" if cost.get(k) is None else format(cost[k], form) for k, form in shown]


def signed(value: Interval | float) -> str:
    """ "+0.031 [-0.002, +0.064]"; without an interval the value alone."""
    if not isinstance(value, Interval):
        return f"{value:+.3f}"
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, columns aligned."""
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]
