"""What was measured of one model type, and the table of a whole library."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERDICTS = ("exact", "exact but", "refused", "no softmax attention", "not built", "wrong")
TABLES = Path(__file__).with_name("tables")


@dataclass
class Row:
    """One model type.

    Attributes:
        name: the type, as the library names it. model: the class that was built.
        verdict: one of `VERDICTS`. "exact": everything that was measured holds. "exact but": so, and `reason` says what is missing.
            "refused": an error of ours before any result. "wrong": a fault of ours.
        reason: in a sentence; "" where the verdict says all.
        sites, heads: how many attention sites there are, and the numbers of heads that they have.
        measured: measurement -> what was found ("yes", a difference, ...).
    """

    name: str
    model: str = ""
    verdict: str = "not built"
    reason: str = ""
    sites: int = 0
    heads: list[int] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass
class Table:
    """The rows of one part of the sweep, with the versions on which they were measured."""

    part: str
    versions: dict[str, str]
    rows: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def path(cls, part: str) -> Path:
        """The file of a part's table, in the package."""
        return TABLES / f"{part}.json"

    @classmethod
    def load(cls, part: str) -> Table:
        """The stored table of a part; an empty one where there is none."""
        path = cls.path(part)
        if not path.is_file():
            return cls(part, {})
        stored = json.loads(path.read_text(encoding="utf-8"))
        return cls(part, stored["versions"], {r["name"]: Row(**r) for r in stored["rows"]})

    def save(self) -> Path:
        """Write the table, one line a row, so that a change of one shows as one."""
        path = self.path(self.part)
        path.parent.mkdir(exist_ok=True)
        for row in self.rows.values():
            # Rounding differs from machine to machine.
            row.measured = {k: float(f"{v:.0e}") if isinstance(v, float) else v for k, v in row.measured.items()}
        rows = ",\n".join(json.dumps(asdict(row), sort_keys=True) for _, row in sorted(self.rows.items()))
        text = f'{{"versions": {json.dumps(self.versions, sort_keys=True)}, "rows": [\n{rows}\n]}}\n'
        path.write_text(text, encoding="utf-8")
        return path

    def counts(self) -> dict[str, int]:
        """Verdict -> how many rows have it."""
        found = {verdict: sum(r.verdict == verdict for r in self.rows.values()) for verdict in VERDICTS}
        return {verdict: count for verdict, count in found.items() if count}
