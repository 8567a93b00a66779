"""`python -m attnsteer.testing.sweep PART [NAME ...]`: measures, stores the table of the part, and writes docs/compatibility.md."""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from collections.abc import Sequence

import torch

from . import PARTS, report, runner
from .rows import Row, Table


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a row is wrong."""
    parser = argparse.ArgumentParser(prog="python -m attnsteer.testing.sweep", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("names", nargs="*", help="these only; their rows take the place of the stored ones")
    parser.add_argument("--timeout", type=int, default=120, help="seconds of processor time for each")
    parser.add_argument("--verdict", help="those only whose stored row has this verdict")
    parser.add_argument("--missing", action="store_true", help="those only that have no stored row")
    parser.add_argument("--dry", action="store_true", help="print, and store nothing")
    given = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    part = importlib.import_module(f"{__package__}.{given.part}")
    every = list(part.names())
    table = _stored(given.part, part.versions(), every)
    chosen = given.names or every
    if given.verdict:
        chosen = [n for n in chosen if n in table.rows and table.rows[n].verdict == given.verdict]
    if given.missing:
        chosen = [n for n in chosen if n not in table.rows]
    start = time.perf_counter()
    new: dict[str, Row] = {}
    for row in runner.rows(part.measure, chosen, given.timeout, prepare=getattr(part, "prepare", None)):
        print(f"{row.name}\t{row.model}\t{row.sites}\t{row.verdict}\t{row.reason}\t{row.measured}", flush=True)
        new[row.name] = row
        if len(new) % 5 == 0 or len(new) == len(chosen):
            # Read again, so that two runs may measure at the same time.
            table = _stored(given.part, part.versions(), every)
            table.rows |= new
            if not given.dry:
                table.save()
    print(f"{len(chosen)} in {time.perf_counter() - start:.0f} s; the table: {table.counts()}")
    if not given.dry:
        report.write(PARTS)
    return 1 if table.counts().get("wrong") else 0


def _stored(part: str, versions: dict[str, str], every: list[str]) -> Table:
    """The stored rows of these versions, of what there is."""
    table = Table.load(part)
    if table.versions != versions:
        # Rows of another version say nothing of this one.
        table = Table(part, versions)
    table.rows = {name: row for name, row in table.rows.items() if name in set(every)}
    return table


if __name__ == "__main__":
    raise SystemExit(main())
