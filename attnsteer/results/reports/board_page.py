"""The page of a board: blocks of comparable runs, with filters that a script adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..figures import Figure
from . import plots
from .pages import render

if TYPE_CHECKING:
    from ..boards import Board

ROLES = {"better": "gain", "worse": "loss"}


def board_page(found: Board, json_name: str) -> str:
    """The HTML. json_name: of the file beside the page."""
    return render(
        "board",
        blocks=[_block(b) for b in found.blocks],
        left_out=found.left_out,
        json_name=json_name,
        count=len(found.rows),
        filters={
            "method": sorted({r["method"] for r in found.rows}),
            "model": sorted({b["model"] for b in found.blocks}),
            "task": sorted({b["task"] for b in found.blocks}),
            "verdict": sorted({r["verdict"] for r in found.rows}),
        },
    )


def _block(block: dict[str, Any]) -> dict[str, Any]:
    share = block["share"]
    rows = [
        {
            **r,
            "change": Figure.of(r["difference"], share, signed=True),
            "from": Figure.of(r["baseline"], share),
            "to": Figure.of(r["value"], share),
            "time_text": "–" if r["time"] is None else f"×{r['time']:.2f}",
            "memory_text": "–" if r["memory_mb"] is None else f"{r['memory_mb']:,.0f} MB".replace(",", " "),
        }
        for r in block["rows"]
    ]
    axis = plots.Axis([v for r in rows for v in (r["change"].value, r["change"].low, r["change"].high)], zero=True)
    for row in rows:
        row["svg"] = plots.track(row["change"], axis, ROLES.get(row["verdict"], "none"), zero=True)
    return {**block, "rows": rows, "scale": plots.scale(axis, rows[0]["change"])}
