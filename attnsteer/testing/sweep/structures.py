"""`python -m attnsteer.testing.sweep.structures`: adds what the probe found to the table of the diffusers host.

Run it after the sweep of diffusers: it reads that one's stored rows. Configs of one class that differ leave the pattern out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...hosts.diffusers import streams
from .rows import Table

PATH = Path(streams.__file__).with_name("structures.json")


def collected(table: Table) -> dict[str, dict[str, list[Any]]]:
    """Class -> pattern of a site's name -> what the probe says in all configs of the class."""
    found: dict[str, dict[str, list[Any]]] = {}
    for row in table.rows.values():
        for pattern, entry in row.measured.get("structure", {}).items():
            own = found.setdefault(row.model, {})
            if own.setdefault(pattern, entry) != entry:
                own[pattern] = ["?", [], ""]
    kept = {cls: {p: e for p, e in entries.items() if e[0] != "?"} for cls, entries in found.items()}
    return {cls: entries for cls, entries in kept.items() if entries}


def main() -> None:
    found = json.loads(PATH.read_text(encoding="utf-8")) | collected(Table.load("diffusers"))
    lines = [f"{json.dumps(cls)}: {json.dumps(entries, sort_keys=True)}" for cls, entries in sorted(found.items())]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
