"""The page of a comparison of runs: what `Comparison.markdown` says, with the intervals drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...evals.significance import Interval
from ..comparison import Comparison, Difference, Row, arm_name
from ..figures import Figure, p_text
from ..verdict import judged
from . import plots
from .pages import render

ROLES = {"better": "gain", "worse": "loss"}
SHOWN = 6


def comparison_page(found: Comparison) -> str:
    """The HTML."""
    figures = found.figures[:SHOWN]
    return render(
        "comparison",
        title=" against ".join(found.runs),
        found=found,
        figures=figures,
        rows=[_row(found, r, figures) for r in found.rows],
        blocks=[
            _block("Against the run's own baseline", found, [(r, None, r.own) for r in found.rows if r.own]),
            _block(
                f"Against {next(iter(found.runs))}",
                found,
                [(found.rows[d.row], d, _named(d)) for d in found.differences],
            ),
        ],
        recipes=[(k, [json.dumps(v, ensure_ascii=False) for v in values]) for k, values in found.recipes.items()],
    )


def figure(found: Comparison, name: str, value: Interval | float | None, signed: bool = False) -> Figure:
    """A value of the comparison as words."""
    if value is None:
        return Figure(None)
    known: Mapping[str, Any] = value._asdict() if isinstance(value, Interval) else {"value": float(value)}
    return Figure.of(known, name in found.shares, signed)


def _row(found: Comparison, row: Row, names: list[str]) -> dict[str, Any]:
    cost = row.cost
    return {
        "run": row.run,
        "arm": arm_name(row),
        "kind": row.kind,
        "said": row.said,
        "own": figure(found, found.primary, row.own.get(found.primary), signed=True) if row.own else None,
        "figures": [figure(found, n, row.estimates.get(n)) for n in names],
        "relative": "" if cost.get("relative") is None else f"×{cost['relative']:.2f}",
        "memory": "" if cost.get("peak_memory_mb") is None else f"{cost['peak_memory_mb']:.0f} MB",
    }


def _named(d: Difference) -> dict[str, Any]:
    return {f"{d.metric}.{k}": v for k, v in d.estimates.items()}


def _block(title: str, found: Comparison, entries: list[tuple[Row, Difference | None, Mapping[str, Any]]]) -> Any:
    """Rows of one forest: the primary figure."""
    rows = []
    for row, against, values in entries:
        if found.primary not in values:
            continue
        change = figure(found, found.primary, values[found.primary], signed=True)
        key = row.said.key if against is None and row.said else judged(change, found.better)
        if row.unchanged:
            key = "unchanged"
        test = against.mcnemar if against is not None and found.primary in found.tested else None
        rows.append(
            {
                "name": f"{row.run}: {arm_name(row)}",
                "minus": "" if against is None else f"minus {arm_name(found.rows[against.against])}",
                "change": change,
                "key": key,
                "gained": test and test.gained,
                "lost": test and test.lost,
                "p": "" if against is None or test is None else p_text(against.p_holm or test.p),
            }
        )
    axis = plots.Axis([v for r in rows for v in (r["change"].value, r["change"].low, r["change"].high)], zero=True)
    for row in rows:
        row["svg"] = plots.track(row["change"], axis, ROLES.get(row["key"], "none"), zero=True)
    return {"title": title, "rows": rows, "scale": plots.scale(axis, rows[0]["change"]) if rows else ""}
