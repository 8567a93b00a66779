"""The report as Markdown: the page without its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...run.folder import RunFolder
from ..comparison import table
from ..figures import p_text
from .headline import Headline


def markdown(run: RunFolder, found: Mapping[str, Any]) -> str:
    """The text of `content`."""
    head: Headline = found["head"]
    out = [f"# {found['title']}", "", found["summary"], ""]
    out += [f"> **{word}.** {text}" for word, text in found["alerts"]] + [""] * bool(found["alerts"])
    out += [
        f"**{head.words}: {head.baseline.number} → {head.method.number}{head.method.unit}.** {found['sentence']}",
        "",
    ]
    what = "groups of answers " if head.grouped else ""
    changed = f": {what}{head.gained} gained, {head.lost} lost," if head.gained is not None else ""
    tested = f" {head.test}{changed} {p_text(head.p)}" if head.p is not None else ""
    if head.p_holm is not None and head.p_holm != head.p:
        tested += f" ({p_text(head.p_holm).replace('p', 'Holm', 1)})"
    tested += "." if tested else ""
    out += [
        f"{head.metric}.{head.estimate}, {head.records} pairs.{tested}" + (f" {head.chosen}." if head.chosen else "")
    ]
    out += [""] + [f"- {c.name}: {c.text}" for c in found["checks"]] + [f"- {k}: {v}" for k, v in found["facts"]] + [""]
    if found["cautions"]:
        out += ["Read with care:", "", *(f"- {c}" for c in found["cautions"]), ""]
    for block in found["figures"]:
        rows = [
            [
                f"**{r['metric']}.{r['estimate']}**" if r["primary"] else f"{r['metric']}.{r['estimate']}",
                *map(str, (r["baseline"], r["method"], r["change"])),
                *map(str, r["others"]),
            ]
            for r in block["rows"]
        ]
        out += [
            "## Result",
            "",
            *table(["figure", "baseline", found["method"], "difference", *block["others"]], rows),
            "",
        ]
    if found["claims"]:
        rows = [
            [
                c["metric"],
                " → ".join(map(str, c["theirs"])) + f" ({c['theirs_change'].number})",
                " → ".join(f.number for f in c["ours"]) + f" ({c['ours_change']})",
                "; ".join(t for t in (c["source"], c["setting"]) if t),
            ]
            for c in found["claims"]
        ]
        out += ["## Published", "", *table(["figure", "published", "here", "source"], rows), ""]
    rows = [
        [
            f"{r['name']} {r['against'] or 'minus baseline'}",
            str(r["change"]),
            "" if r["gained"] is None else f"{r['gained']} / {r['lost']}",
            r["p"],
            r["holm"],
        ]
        for r in found["forest"]["rows"]
    ]
    out += [f"## Differences: {found['forest']['name']}", ""]
    out += [*table(["arms", "difference", "gained / lost", head.test, "Holm"], rows), ""]
    if found["cost"]:
        rows = [[c["arm"], c["seconds"], c["rate"], c["relative"], c["memory"]] for c in found["cost"]]
        out += ["## Cost", "", *table(["arm", "per sample", "rate", "time against baseline", "peak memory"], rows), ""]
    out += ["## Recipe", "", "```yaml", found["recipe"].strip(), "```", ""]
    out += ["## Environment", "", *(f"- {k}: {v}" for k, v in (*found["environment"], *found["identity"]))]
    return "\n".join(out) + "\n"
