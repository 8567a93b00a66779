"""Everything a report shows, computed once; the HTML page and the Markdown text only lay it out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ...errors import RunError
from ...run.folder import RunFolder
from ..figures import Figure, p_text, shares, values_text
from ..verdict import DRAWN, TUNED, WORDS, control_name, difference, figure_verdict, guards, judged
from . import plots
from .album import Album
from .head_grids import grids, heads_of
from .headline import Headline, headline
from .overlays import overlays
from .sample_browser import browser

# Pairs below which an interval says little; rows of the first picture, and blocks of the differences.
FEW = 30
ROWS = 7
GROUPS = ("minus the baseline", "minus a control")


def content(run: RunFolder) -> dict[str, Any]:
    """The page's parts, by name.

    Raises:
        RunError: the run has no figures yet.
    """
    if run.metrics is None:
        raise RunError(
            f"{run.path} has no metrics.json yet ({run.status['state']}, {run.status.get('done')} of "
            f"{run.status.get('total')} records); start the run again with the same command to finish it."
        )
    percent = shares(run)
    head = headline(run, percent)
    album = Album(run.path, run.recipe)
    data = browser(run, head, album)
    counts = {
        s: sum(x["outs"].get(head.arm, {}).get("state") == s for x in data["samples"]) for s in ("gained", "lost")
    }
    return {
        "title": run.name,
        "summary": run.recipe.get("summary", ""),
        "head": head,
        "alerts": _alerts(run, head),
        "tiny": run.tiny,
        "cautions": _cautions(run, head),
        "sentence": _sentence(run, head),
        "method": _method(run, head),
        "strip": _strip(run, head, percent),
        "claims": _claims(run),
        "counts": counts,
        "balance": plots.balance(head.gained, head.lost) if head.gained is not None else None,
        "checks": head.verdict.controls,
        "facts": _facts(run, head),
        "figures": _figures(run, head, percent),
        "forest": _forest(run, head, percent),
        "sweep": _sweep(run, head, percent),
        "data": data,
        "heads": _heads(run, head),
        "seeds": _seeds(run, head, percent),
        "attention": overlays(run.attention, album, run.samples),
        "cost": _cost(run),
        "recipe": (run.path / "recipe.yaml").read_text(encoding="utf-8"),
        "environment": _flat(run.environment),
        "identity": _flat(run.identity),
        "audit": None if run.audit is None else json.dumps(run.audit, indent=1),
        "status": run.status,
    }


def _alerts(run: RunFolder, head: Headline) -> list[tuple[str, str]]:
    """(loud word, sentence) of what makes the whole run unfit for conclusions."""
    found = []
    if head.key in ("unchanged", "invalid", "random"):
        found.append((WORDS[head.key], _capital(head.verdict.reason)))
    if run.tiny:
        found.append(
            ("Tiny stand-in model", "A random model took the place of the recipe's. No figure here says anything.")
        )
    if not run.complete:
        done, total = run.status.get("done"), run.status.get("total")
        state = {"running": "still running", "complete": "not over all samples"}.get(run.status["state"])
        said = f"{done} of {total} records. Start the run again with the same command to finish it."
        if run.status["state"] == "failed" and run.status.get("message"):
            said += f" It said: {run.status['message']}"
        found.append((f"Unfinished: {state or run.status['state']}", said))
    return found


def _cautions(run: RunFolder, head: Headline) -> list[str]:
    """What a reader must know before believing the headline."""
    found = [f"{_capital(TUNED)}: {head.verdict.chosen}."] if head.verdict.tuned else []
    if len(run.points) > 1 and head.p_holm is None:
        found.append(f"Nothing here is adjusted for the {len(run.points)} settings that were tried.")
    if head.records < FEW:
        found.append(f"Only {head.records} pairs: so few say little, whatever their interval.")
    found += [f"{_capital(g).rstrip('.')}." for g in guards(run, head.point)]
    return list(dict.fromkeys([*found, *run.metrics.get("warnings", ())]))


def _sentence(run: RunFolder, head: Headline) -> str:
    name = head.estimate.replace("_", " ")
    change = head.difference
    if head.key == "unchanged":
        return head.verdict.reason
    if judged(change, head.better, head.p_holm if len(run.points) > 1 else None) == "none":
        said = f"{name} changes by {change}: the interval includes zero."
        if change.low is not None and not change.low <= 0 <= change.high:
            said = f"{name} changes by {change}, but not once all {len(run.points)} settings are accounted for."
    else:
        way = "rises" if (change.value or 0) > 0 else "falls"
        size = Figure(abs(change.value or 0), percent=change.percent).number
        unit = " points" if change.percent else ""
        said = f"{name} {way} by {size}{unit} (95 % interval {change.span})."
    return said[0].upper() + said[1:]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _method(run: RunFolder, head: Headline) -> str:
    """ "ACT" or "VAR with PASTA", with the sweep's values."""
    names = [str(i.get("method", "?")) for i in run.recipe.get("interventions", ())]
    values = values_text(head.point["values"])
    return (" with ".join(names) or head.arm) + (f", {values}" if values else "")


def _role(kind: str) -> str:
    return "random" if kind in DRAWN else kind if kind in ("baseline", "method", "random", "zero") else "none"


def _label(run: RunFolder, arm: str) -> str:
    kind = run.arms.get(arm, {}).get("kind")
    if kind == "random":
        return f"{control_name(arm)} {arm.rpartition('-')[2]}".strip()
    if kind == "span":
        return control_name(arm)
    if kind == "method":
        point = next((p for p in run.points if p["arms"].get("method") == arm), {"values": {}})
        return values_text(point["values"]) or "method"
    return arm if kind != "zero" else "zero strength"


def _strip(run: RunFolder, head: Headline, percent: set[str]) -> dict[str, Any]:
    """Rows of the first picture: baseline, method, controls, on one axis."""
    share = f"{head.metric}.{head.estimate}" in percent
    arms = dict.fromkeys([head.base, head.arm, *head.point["arms"].values()])
    found = []
    for arm in list(arms)[:ROWS]:
        figure = Figure.of(run.metrics["arms"].get(arm, {}).get(head.metric, {}).get(head.estimate), share)
        kind = run.arms.get(arm, {}).get("kind", "none")
        label = _method(run, head) if arm == head.arm else _label(run, arm)
        found.append((label, _role(kind), figure))
    axis = plots.Axis([v for _, _, f in found for v in (f.value, f.low, f.high)])
    rows = [{"label": la, "role": r, "figure": f, "svg": plots.track(f, axis, r)} for la, r, f in found]
    return {"rows": rows, "scale": plots.scale(axis, found[0][2])}


def _claims(run: RunFolder) -> list[dict[str, Any]]:
    """The published figures beside ours."""
    found = []
    for claim in run.metrics.get("claims", ()):
        percent = claim.get("unit") == "percent"
        factor = 0.01 if percent else 1.0
        theirs = [claim.get(k) for k in ("baseline", "value")]
        change = None if None in theirs else factor * (theirs[1] - theirs[0])
        ours = claim.get("ours") or {}
        found.append(
            {
                "metric": claim.get("metric", ""),
                "source": claim.get("source", ""),
                "setting": claim.get("setting", ""),
                "theirs": [Figure(None if v is None else factor * v, percent=percent) for v in theirs],
                "theirs_change": Figure(change, percent=percent, signed=True),
                "ours": [Figure.of(ours.get(k), percent) for k in ("baseline", "value")],
                "ours_change": Figure.of(ours.get("difference"), percent, signed=True),
            }
        )
    return found


def _facts(run: RunFolder, head: Headline) -> list[tuple[str, str]]:
    """(name, value) of the first screen."""
    cost = (run.metrics.get("cost") or {}).get(head.arm) or {}
    found = [("samples", f"{len(run.samples):,}".replace(",", " "))]
    if head.verdict.parsed:
        found.append(("answers parsed", head.verdict.parsed))
    if len(run.seeds) > 1:
        found.append(("seeds", str(len(run.seeds))))
    if cost.get("relative") is not None:
        found.append(("time against baseline", f"×{cost['relative']:.2f}"))
    if cost.get("peak_memory_mb") is not None:
        found.append(("peak memory", f"{cost['peak_memory_mb']:,.0f} MB".replace(",", " ")))
    took = _took(run.status)
    return found + ([("run took", took)] if took else [])


def _took(status: Mapping[str, Any]) -> str:
    try:
        start, end = (datetime.fromisoformat(str(status[k])) for k in ("started", "ended"))
    except (KeyError, ValueError):
        return ""
    seconds = int((end - start).total_seconds())
    hours, rest = divmod(seconds, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"


def _figures(run: RunFolder, head: Headline, percent: set[str]) -> list[dict[str, Any]]:
    """One row per figure: baseline, method, and their difference; then the other arms."""
    others = [a for a in head.point["arms"].values() if a not in (head.base, head.arm)]
    # Many draws are one column.
    drawn = [a for a in others if run.arms.get(a, {}).get("kind") == "random"]
    draws = [[a for a in drawn if control_name(a) == name] for name in dict.fromkeys(map(control_name, drawn))]
    columns = [[a] for a in others if a not in drawn] + draws
    arms = run.metrics["arms"]
    claims = {c["metric"]: c for c in _claims(run)}
    found = []
    for name, metric in run.measures.items():
        entry = difference(run, head.point, name) or {"estimates": {}}
        for estimate in arms.get(head.base, {}).get(name, {}):
            key = f"{name}.{estimate}"
            share, better = key in percent, metric.better.get(estimate, 0)
            change = Figure.of(entry["estimates"].get(estimate), share, signed=True)
            primary = (name, estimate) == (head.metric, head.estimate)
            found.append(
                {
                    "metric": name,
                    "estimate": estimate.replace("_", " "),
                    "primary": primary,
                    "better": better,
                    "baseline": Figure.of(arms[head.base][name][estimate], share),
                    "method": Figure.of(arms.get(head.arm, {}).get(name, {}).get(estimate), share),
                    "others": [
                        _together([Figure.of(arms.get(a, {}).get(name, {}).get(estimate), share) for a in column])
                        for column in columns
                    ],
                    "change": change,
                    "verdict": figure_verdict(run, head.point, name, estimate)[0],
                    "note": metric.note,
                    "claim": claims.get(key),
                }
            )
    found.sort(key=lambda r: not r["primary"])
    names = [_label(run, c[0]) if len(c) == 1 else f"{control_name(c[0])}: mean, range of {len(c)}" for c in columns]
    return [{"others": names, "rows": found}] if found else []


def _together(figures: list[Figure]) -> Figure:
    """One figure as it is; several as their mean and range."""
    values = [f.value for f in figures if f.value is not None]
    if len(figures) == 1 or not values:
        return figures[0]
    return Figure(sum(values) / len(values), min(values), max(values), figures[0].percent)


def _forest(run: RunFolder, head: Headline, percent: set[str]) -> dict[str, Any]:
    """The differences of the primary figure, each with its test, and those of the other shares."""
    share = f"{head.metric}.{head.estimate}" in percent
    seen, rows = set(), []
    arms = {p["point"]: p["arms"] for p in run.points}
    for d in run.metrics.get("differences", ()):
        # Points share equal arms, and then their differences.
        pair = tuple(arms.get(d["point"], {}).get(d[k], d[k]) for k in ("arm", "against"))
        if d["metric"] != head.metric or head.estimate not in d["estimates"] or pair in seen:
            continue
        seen.add(pair)
        change = Figure.of(d["estimates"][head.estimate], share, signed=True)
        rows.append(_difference_row(run, head, d, change, *pair))
    rows.sort(key=lambda r: (GROUPS.index(r["group"]), r["kind"] != "method"))
    axis = plots.Axis([v for r in rows for v in (r["change"].value, r["change"].low, r["change"].high)], zero=True)
    for row in rows:
        row["svg"] = plots.track(row["change"], axis, row["role"], zero=True)
    name = f"{head.metric} {head.estimate}".replace("_", " ")
    return {"name": name, "rows": rows, "scale": plots.scale(axis, head.difference), "share": share}


def _difference_row(
    run: RunFolder, head: Headline, d: Mapping[str, Any], change: Figure, arm: str, against: str
) -> dict[str, Any]:
    kind = run.arms.get(arm, {}).get("kind")
    name = _label(run, arm)
    if name == "method":
        name = _method(run, head)
    about = run.measures[head.metric].tested(head.estimate)
    said = judged(change, head.better, d.get("p_holm") if len(run.points) > 1 else None)
    if arm in run.unchanged:
        said = "unchanged"
    test = (d.get("mcnemar") or {}) if about else {}
    return {
        "name": name,
        "kind": kind,
        "group": GROUPS[d["against"] != "baseline"],
        "against": "" if d["against"] == "baseline" else f"minus {_label(run, against)}",
        "main": arm == head.arm and against == head.base,
        "change": change,
        "verdict": said,
        "role": {"better": "gain", "worse": "loss"}.get(said, "none"),
        "gained": test.get("gained"),
        "lost": test.get("lost"),
        # A control has McNemar's test or none; it is outside the family of the settings.
        "p": p_text(test.get("p", d.get("p"))),
        "holm": p_text(d.get("p_holm")),
    }


def _sweep(run: RunFolder, head: Headline, percent: set[str]) -> dict[str, Any] | None:
    """Value over the settings: a curve for one number, else rows."""
    points = [p for p in run.points if "method" in p["arms"]]
    if len(points) < 2:
        return None
    share = f"{head.metric}.{head.estimate}" in percent

    def figure(arm: str) -> Figure:
        return Figure.of(run.metrics["arms"].get(arm, {}).get(head.metric, {}).get(head.estimate), share)

    baseline = figure(head.base)
    rows = [(p["values"], figure(p["arms"]["method"]), p["arms"]["method"] == head.arm) for p in points]
    names = list(dict.fromkeys(k for values, _, _ in rows for k in values))
    name = names[0].rpartition(".")[2] if names else "setting"
    numbers = [v.get(names[0]) if len(names) == 1 else None for v, _, _ in rows]
    if all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        order = sorted(range(len(rows)), key=lambda i: numbers[i])
        curve = [(float(numbers[i]), rows[i][1]) for i in order]
        chosen = next((k for k, i in enumerate(order) if rows[i][2]), -1)
        return {"svg": plots.sweep(curve, baseline, name, chosen), "rows": [], "name": name, "chosen": head.chosen}
    axis = plots.Axis([v for f in [baseline, *(f for _, f, _ in rows)] for v in (f.value, f.low, f.high)])
    tracks = [{"label": "baseline", "figure": baseline, "svg": plots.track(baseline, axis, "baseline")}]
    tracks += [{"label": values_text(v), "figure": f, "svg": plots.track(f, axis, "method")} for v, f, _ in rows]
    return {"svg": None, "rows": tracks, "scale": plots.scale(axis, baseline), "name": name, "chosen": head.chosen}


def _heads(run: RunFolder, head: Headline) -> list[dict[str, Any]]:
    """A grid per arm that has heads: the method's, then the random draws."""
    draws = [a for a in head.point["arms"].values() if run.arms.get(a, {}).get("kind") == "random"]
    rows = [
        (_method(run, head) if arm == head.arm else _label(run, arm), used, arm == head.arm)
        for arm in [head.arm, *draws]
        for used in heads_of(run.arms.get(arm, {}))
    ]
    return grids(run, rows) if rows else []


def _seeds(run: RunFolder, head: Headline, percent: set[str]) -> list[dict[str, Any]]:
    """The primary figure of each arm seed by seed; nothing for a single seed."""
    key = f"{head.metric}.{head.estimate}"
    found = []
    for arm, table in (run.metrics.get("seeds") or {}).items():
        if key in table:
            row = table[key]
            mean = Figure(row["mean"], row.get("low"), row.get("high"), key in percent)
            values = [Figure(v, percent=key in percent).number for v in row["values"]]
            found.append({"arm": _label(run, arm), "mean": mean, "by_seed": values})
    return found


def _cost(run: RunFolder) -> list[dict[str, Any]]:
    table = run.metrics.get("cost") or {}
    top = max((c.get("relative") or 0 for c in table.values()), default=0) or 1
    return [
        {
            "arm": _label(run, arm),
            "seconds": _plain(c.get("seconds_per_sample"), "{:.4g} s"),
            "rate": _plain(c.get("per_second"), "{:.4g} ") + str(c.get("unit", "")) + "/s",
            "relative": _plain(c.get("relative"), "×{:.2f}"),
            "share": 100 * (c.get("relative") or 0) / top,
            "memory": _plain(c.get("peak_memory_mb"), "{:.0f} MB"),
        }
        for arm, c in table.items()
    ]


def _plain(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [x for k, v in value.items() for x in _flat(v, f"{prefix} {k}".strip())]
    text = ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    return [(prefix, text)]
