"""`docs/compatibility.md`, written from the stored tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .rows import VERDICTS, Row, Table

# Measurements of a model type that have a column of their own.
ASKED = ("cache", "packed")
DOCS = Path(__file__).parents[3] / "docs" / "compatibility.md"

HEAD = """# Compatibility

Every model type of the host libraries, built small and random from its config, and what was measured of it. Written by
`python -m attnsteer.testing.sweep PART`; do not edit it by hand. `tests/testing/test_sweep.py` measures a sample again, and fails
where the installed version of a library is not the one of its table.

| verdict | what it says |
| --- | --- |
| exact | everything that was measured holds (see below), and every attention that ran is a site |
| exact but | so, for the sites that there are; the reason says what is missing |
| refused | attnsteer raises its own error before any result, for the reason that is given |
| no softmax attention | nothing ran that is softmax(QK)V |
| not built | the sweep could not build or run the type; nothing is known of it |
| wrong | a fault of attnsteer's |

Measured are: open gates at all sites change no bit of the output, in evaluation and in training mode; a closed head at a site of
each kind equals the same edit made from outside, by a torch function mode that knows nothing of attnsteer (2e-5 of the largest
output); it moves the output; what was there before is there after; a reweighting (first key times three) equals the one computed
from explicit maps; greedy decoding with a cache equals decoding without; two sequences packed into one row, told by positions that
start again, equal each alone; and each softmax or SDPA that ran belongs to a site. The columns "cache" and "packed" say where the
last but one could be asked: "yes"; "refused", by attnsteer; "not so unsteered", where the library's own outputs differ or it takes
no such call; empty, where the type does not generate, or has no causal text with positions of its own.

Of pipelines, classic and modular: the latents after two steps with SoftPAG (half of the identity in one self-attention; half of
nothing where there is cross-attention only), and with one head closed on the conditional rows, equal those of a loop made by hand
that finds the conditional rows by changing the prompt (5e-4 of the largest number). "no softmax attention" is also said of a
pipeline that calls no denoiser.
"""


def write(parts: tuple[str, ...], path: Path = DOCS) -> Path:
    """Write the page from the tables of these parts."""
    tables = [table for table in map(Table.load, parts) if table.rows]
    path.write_text("\n".join([HEAD, *map(_section, tables)]), encoding="utf-8")
    return path


def _section(table: Table) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(table.versions.items()))
    counts = table.counts()
    said = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if v in counts)
    lines = [f"## {table.part}", "", f"{versions}; {len(table.rows)} types: {said}.", ""]
    asked = ASKED if table.part == "transformers" else ()
    lines += ["| " + " | ".join(["type", "class", "sites", "heads", *asked, "verdict"]) + " |"]
    lines += ["|" + " --- |" * (5 + len(asked))]
    lines += [_line(row, asked) for _, row in sorted(table.rows.items())]
    return "\n".join([*lines, ""])


def _line(row: Row, asked: tuple[str, ...]) -> str:
    verdict = row.verdict if not row.reason else f"{row.verdict}: {row.reason}"
    heads = ", ".join(map(str, row.heads))
    cells = [row.name, row.model, str(row.sites or ""), heads, *(_answer(row.measured.get(k)) for k in asked)]
    return "| " + " | ".join([*cells, _cell(verdict)]) + " |"


def _answer(found: Any) -> str:
    """What a measurement says in a word: a number is a difference, and one that is too large makes the whole row wrong."""
    if isinstance(found, str):
        return "not so unsteered" if found.startswith("unsteered") else "refused"
    return "" if found is None else "yes"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
