"""A board over runs: methods by models by tasks, every cell computed from its run folder, with its controls, cost and verdict.

Runs of unlike samples, weights or figures are in blocks of their own and never in one ranking. Within a block there are no ranks
but tie groups: methods that share a letter cannot be told apart on these samples. There is no average over tasks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .._version import __version__
from ..errors import RunError, listing
from ..evals.significance import holm
from ..recipe.schema import digest
from ..run import store
from ..run.folder import RunFolder, read_run
from .figures import is_share, values_text
from .verdict import LEVEL, difference, verdict
from .verification import verified

SCHEMA_VERSION = 1
# Resamples of the comparisons within a block.
DRAWS = 2000


@dataclass(frozen=True)
class Board:
    """What `board` found: blocks of comparable rows, as plain data; `left_out`: (folder, why)."""

    blocks: list[dict[str, Any]]
    left_out: list[tuple[str, str]] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of all blocks."""
        return [row for block in self.blocks for row in block["rows"]]

    def to_dict(self) -> dict[str, Any]:
        """What the JSON beside the page holds, in full precision."""
        left = [{"run": run, "why": why} for run, why in self.left_out]
        return {"schema": SCHEMA_VERSION, "attnsteer": __version__, "blocks": self.blocks, "left_out": left}


def board(folders: Sequence[str | Path], *, out: str | Path | None = None) -> Board:
    """The board of run folders, or of folders that have run folders anywhere below.

    Args:
        out: the page that it will be, which links to runs are relative to; None: links are absolute.

    Raises:
        RunError: there is no run that can be shown.
    """
    found = runs_in(folders)
    left_out: list[tuple[str, str]] = []
    shown: list[RunFolder] = []
    for path in found:
        try:
            run = read_run(path)
            why = _unfit(run)
            if why:
                left_out.append((str(path), why))
                continue
            verdict(run)
            shown.append(run)
        except RunError as error:
            left_out.append((str(path), str(error)))
    if not shown:
        told = "; ".join(f"{run}: {why}" for run, why in left_out[:3])
        raise RunError(f"none of {listing(folders, 4)} has a finished run for a board. {told}".strip())
    groups: dict[str, list[RunFolder]] = {}
    for run in shown:
        groups.setdefault(digest(_key(run)), []).append(run)
    blocks = [_block(runs, None if out is None else Path(out)) for runs in groups.values()]
    blocks.sort(key=lambda b: (b["task"], b["model"], b["samples_hash"]))
    return Board(blocks, left_out)


def write_board(folders: Sequence[str | Path], out: str | Path) -> Board:
    """Write the page, and the JSON beside it under the same name.

    Raises:
        RunError: there is no run to show, or the files cannot be written.
    """
    from .reports.board_page import board_page

    out = Path(out)
    found = board(folders, out=out)
    store.write_json(out.with_suffix(".json"), found.to_dict())
    store.write_atomic(out, board_page(found, out.with_suffix(".json").name).encode("utf-8", "backslashreplace"))
    return found


def runs_in(folders: Iterable[str | Path]) -> list[Path]:
    """Run folders: those given, and those below folders that are none.

    Raises:
        RunError: a folder is not there, or has none.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if (folder / store.RECIPE).is_file():
            found[folder] = None
            continue
        below = sorted(p.parent for p in folder.rglob(store.STATUS) if (p.parent / store.RECIPE).is_file())
        if not below:
            raise RunError(
                f"{folder} is no run folder and has none below; give folders that `attnsteer run --out` wrote."
            )
        found.update(dict.fromkeys(below))
    return list(found)


def _unfit(run: RunFolder) -> str:
    if run.tiny:
        return "a tiny stand-in model, whose figures say nothing"
    if not run.complete or run.metrics is None:
        return f"{run.status['state']}, {run.status.get('done')} of {run.status.get('total')} records"
    return ""


def _key(run: RunFolder) -> dict[str, Any]:
    """What must be equal for two runs to be in one block: weights, samples, seeds, and how answers are made and scored."""
    metric, _ = run.primary()
    baseline = next((a for a in run.arms.values() if a.get("kind") == "baseline"), {})
    return {
        "model": run.identity.get("model"),
        "dtype": (run.recipe.get("model") or {}).get("dtype"),
        "samples": run.identity.get("samples"),
        "seeds": list(run.seeds),
        "task": run.recipe.get("task"),
        "primary": run.metrics["primary"],
        "options": run.metric_options()[metric],
        "decoding": baseline.get("decoding"),
    }


def _block(runs: Sequence[RunFolder], out: Path | None) -> dict[str, Any]:
    first = runs[0]
    metric, estimate = first.primary()
    rows = [_row(run, out) for run in runs]
    better = first.measures[metric].better.get(estimate, 0)
    rows.sort(key=lambda r: -(better or 1) * (r["difference"]["value"] or 0.0))
    of = {str(run.path): run for run in runs}
    for row, letters in zip(rows, _ties(rows, [of[r["path"]] for r in rows], better), strict=True):
        row["ties"] = letters
    data = first.recipe.get("data") or {}
    model = first.recipe.get("model") or {}
    return {
        "model": str(model.get("zoo") or model.get("hub") or Path(str(model.get("path"))).name),
        "revision": first.environment.get("model_revision") or model.get("revision"),
        "model_hash": digest(first.identity.get("model"))[:12],
        "task": _task(data),
        "samples_hash": str(first.identity.get("samples"))[:12],
        "samples": len(first.samples),
        "seeds": list(first.seeds),
        "primary": first.metrics["primary"],
        "better": better,
        "share": is_share(first, metric, estimate),
        "rows": rows,
    }


def _task(data: Mapping[str, Any]) -> str:
    """ "reading (one-shot), test"."""
    name = data.get("zoo") or data.get("hub") or Path(str(data.get("file"))).stem
    options = ", ".join(str(v) for v in (data.get("options") or {}).values())
    return f"{name}{f' ({options})' if options else ''}, {data.get('split', 'test')}"


def _row(run: RunFolder, out: Path | None) -> dict[str, Any]:
    said = verdict(run)
    metric, estimate = run.primary()
    arm = said.point["arms"]["method"]
    base = run.base(arm)
    arms, cost = run.metrics["arms"], run.metrics.get("cost") or {}
    entry = difference(run, said.point, metric) or {}
    state, when = verified(run.path)
    own, before = cost.get(arm) or {}, cost.get(base) or {}
    return {
        "run": run.name,
        "path": str(run.path),
        "link": _link(run.path, out),
        "method": _method(run, said.point),
        "verdict": said.key,
        "words": said.words,
        "reason": said.reason,
        "baseline": arms[base][metric][estimate],
        "value": arms[arm][metric][estimate],
        "difference": entry["estimates"][estimate],
        "p": entry.get("p"),
        "p_holm": entry.get("p_holm"),
        "settings": len(run.points),
        "controls": [{"name": c.name, "state": c.state, "text": c.text} for c in said.controls],
        "guards": list(said.guards),
        "parsed": said.parsed,
        "chosen": said.chosen,
        "tuned": said.tuned,
        "time": own.get("relative"),
        "seconds_per_sample": own.get("seconds_per_sample"),
        "memory_mb": own.get("peak_memory_mb"),
        "baseline_memory_mb": before.get("peak_memory_mb"),
        "verified": state,
        "verified_when": when,
        "versions": run.environment.get("versions"),
        "recipe_hash": run.identity.get("recipe"),
    }


def _method(run: RunFolder, point: Mapping[str, Any]) -> str:
    names = " with ".join(str(i.get("method", "?")) for i in run.recipe.get("interventions", ()))
    values = values_text(point["values"])
    return names + (f", {values}" if values else "")


def _link(path: Path, out: Path | None) -> str:
    """To the run's report where it has one, else to its folder."""
    target = path / "report.html" if (path / "report.html").is_file() else path
    if out is None:
        return target.resolve().as_uri()
    return quote(os.path.relpath(target.resolve(), out.resolve().parent).replace(os.sep, "/"))


def _ties(rows: Sequence[Mapping[str, Any]], runs: Sequence[RunFolder], better: int) -> list[str]:
    """Letters for each row: two rows without a letter in common differ on these samples, all pairs accounted for (Holm)."""
    usable = [i for i, r in enumerate(rows) if r["verdict"] not in ("invalid", "unchanged")]
    found = [""] * len(rows)
    if len(usable) < 2 or not better:
        return found
    metric, estimate = runs[0].primary()
    measure = runs[0].measures[metric]
    arms = [verdict(run).point["arms"]["method"] for run in runs]
    keys = sorted(set.intersection(*(set(runs[i].records[arms[i]]) for i in usable)), key=str)
    numbers = {i: [measure.sample(runs[i].records[arms[i]][k]) for k in keys] for i in usable}
    groups = runs[0].groups(keys)
    pairs = list(combinations(usable, 2))
    tests = [measure.p_value(estimate, numbers[i], numbers[j], groups=groups, draws=DRAWS) for i, j in pairs]
    known = [n for n, p in enumerate(tests) if p is not None]
    adjusted = dict(zip(known, holm([tests[n] for n in known]), strict=True))
    apart = {pair for n, pair in enumerate(pairs) if adjusted.get(n, 1.0) <= LEVEL}
    for index, letters in letter_groups(usable, lambda i, j: (i, j) in apart or (j, i) in apart).items():
        found[index] = letters
    return found


def letter_groups(order: Sequence[int], apart: Callable[[int, int], bool]) -> dict[int, str]:
    """Letters so that two items share one exactly where they are not apart (the insert-and-absorb algorithm of Piepho 2004).

    Args:
        order: items, the best first. apart: whether two of them differ.
    """
    columns = [set(order)]
    for i, j in combinations(order, 2):
        if not apart(i, j):
            continue
        split = [c for c in columns if i in c and j in c]
        columns = [c for c in columns if c not in split]
        for c in (c - {k} for c in split for k in (i, j)):
            if not any(c <= other for other in columns):
                columns = [other for other in columns if not other <= c] + [c]
    place = {item: n for n, item in enumerate(order)}
    columns.sort(key=lambda c: sorted(place[i] for i in c))
    names = [_letter(n) for n in range(len(columns))]
    return {i: "".join(name for name, c in zip(names, columns, strict=True) if i in c) for i in order}


def _letter(number: int) -> str:
    return chr(ord("a") + number % 26) + (str(number // 26) if number >= 26 else "")


def missing(path: str | Path) -> list[str]:
    """What a stranger's run lacks to be on a board, a line each; none where nothing does."""
    path = Path(path)
    run = read_run(path)
    out = [_unfit(run)] if _unfit(run) else []
    if verified(path)[0] != "verified":
        out.append(f"no verification of it as it is: attnsteer verify {path}")
    if run.recipe.get("chosen") is None:
        out.append("the recipe does not say where its settings were chosen (chosen: SPLIT)")
    controls = run.recipe.get("controls") or {}
    if not controls.get("zero"):
        out.append("no control at zero strength (controls: {zero: true})")
    return out
