"""The short result of a run, as a command prints it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..run import store
from ..run.folder import read_run
from .verdict import Verdict, verdict

HEAD = ("point", "arm", "{primary}", "difference to baseline", "{p}", "per second", "time")


def table(folder: str | Path) -> tuple[tuple[str, ...], list[tuple[str, ...]], list[str]]:
    """Heading, a row for each arm and point, and lines below: what to watch for."""
    folder = Path(folder)
    found = json.loads((folder / store.METRICS).read_text(encoding="utf-8"))
    metric, _, name = found["primary"].partition(".")
    differences = {
        (d["point"], d["arm"]): d for d in found["differences"] if d["against"] == "baseline" and d["metric"] == metric
    }
    # Of several settings one is looked for, so only adjusted tests are shown; controls are outside their family.
    sweep = len(found["points"]) > 1
    rows = []
    for point in found["points"]:
        values = ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in point["values"].items())
        for role, arm in point["arms"].items():
            if arm not in found["arms"]:
                continue
            difference = differences.get((point["point"], role))
            p = difference and difference.get("p_holm" if sweep else "p")
            cost = found["cost"].get(arm, {})
            rows.append(
                (
                    values,
                    role,
                    interval(found["arms"][arm][metric].get(name)),
                    interval(difference["estimates"].get(name), sign="+") if difference else "",
                    f"{p:.3g}" if p is not None else "",
                    f"{cost['per_second']:.3g} {cost['unit']}" if cost else "",
                    f"{cost['relative']:.2f}x" if cost and cost["relative"] else "",
                )
            )
    head = tuple(h.format(primary=found["primary"], p="p (Holm)" if sweep else "p") for h in HEAD)
    if not any(r[0] for r in rows):
        head, rows = head[1:], [r[1:] for r in rows]
    return head, rows, remarks(folder, found)


def remarks(folder: Path, found: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures must know: the verdict, its controls and guards, and warnings."""
    out = ["partial: only the samples that every arm has answered are counted"] if found["partial"] else []
    if found["differences"]:
        out += verdict(read_run(folder)).lines()
    return out + [f"warning: {w}" for w in found["warnings"]]


def verdict_of(folder: str | Path) -> Verdict:
    """The verdict of a run folder."""
    return verdict(read_run(folder))


def interval(value: Mapping[str, float | None] | None, sign: str = "") -> str:
    """ "0.662 [0.632, 0.691]"."""
    if value is None or value["value"] is None:
        return "-"
    text = f"{value['value']:{sign}.3f}"
    if value["low"] is None or value["high"] is None:
        return text
    return f"{text} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"
