"""The audit: what each intervention saw and edited, per site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Record:
    """Counts of one intervention at one site.

    Attributes:
        calls: attention calls seen while the selection held. edits: calls in which an edit was applied.
        rows: query rows of those calls (batch times rows). heads: heads selected at this site.
        path: "output", "inputs", "bias", "fused", "rows" or "dense": how the last edit was computed; joined by "+"
            where head groups went different ways. "read": the map was taken for a loss, and nothing edited.
        distance: mean total-variation distance between the map before and after, when measured.
        compiled: the site runs in compiled code, where calls are not counted (a count that is read would compile anew
            at every call).
    """

    calls: int = 0
    edits: int = 0
    rows: int = 0
    heads: int = 0
    path: str = ""
    compiled: bool = False
    _moved: float = 0.0
    _measured: int = 0

    @property
    def distance(self) -> float | None:
        """Mean total-variation distance, or None when it was not measured."""
        return self._moved / self._measured if self._measured else None

    def see(self, heads: int) -> None:
        """Count one call with this many selected heads."""
        if torch.compiler.is_compiling():
            self.compiled, self.heads = True, heads
            return
        self.calls += 1
        self.heads = max(self.heads, heads)

    def measure(self, mean: float) -> None:
        """Add one call's mean distance."""
        self._moved += mean
        self._measured += 1


@dataclass
class Mark:
    """One intervention in one attention call: its head groups report here, the record counts the call once."""

    record: Record
    rows: int
    paths: tuple[str, ...] = ()

    def edited(self, path: str) -> None:
        """A head group was edited by `path`."""
        if not self.paths and not torch.compiler.is_compiling():
            self.record.edits += 1
            self.record.rows += self.rows
        if path not in self.paths:
            self.paths += (path,)
        self.record.path = "+".join(self.paths)


@dataclass
class Audit:
    """Per intervention and site: what was seen and edited. Prints as a table."""

    names: list[str]
    records: dict[tuple[int, str], Record] = field(default_factory=dict)
    extra: dict[int, dict[str, int]] = field(default_factory=dict)

    def record(self, index: int, path: str) -> Record:
        """The record of intervention number `index` at the site `path`."""
        return self.records.setdefault((index, path), Record())

    def count(self, index: int, what: str, by: int = 1) -> None:
        """Count an event that belongs to no site, such as weak-branch passes."""
        counts = self.extra.setdefault(index, {})
        counts[what] = counts.get(what, 0) + by

    def fired(self, index: int) -> bool:
        """Whether intervention number `index` acted: at a site, or, where it ran no weak pass, around the model."""
        if any(r.calls or r.compiled for (i, _), r in self.records.items() if i == index):
            return True
        extra = self.extra.get(index, {})
        return bool(extra.get("guided calls")) and not extra.get("inside passes")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: a list of interventions with their sites."""
        out = []
        for index, name in enumerate(self.names):
            sites = {
                path: {
                    "calls": r.calls,
                    "edits": r.edits,
                    "rows": r.rows,
                    "heads": r.heads,
                    "path": r.path,
                    "distance": r.distance,
                    **({"compiled": True} if r.compiled else {}),
                }
                for (i, path), r in self.records.items()
                if i == index
            }
            out.append({"intervention": name, "sites": sites, **self.extra.get(index, {})})
        return {"interventions": out}

    def __str__(self) -> str:
        lines = []
        for index, name in enumerate(self.names):
            own = {path: r for (i, path), r in self.records.items() if i == index}
            calls, edits = sum(r.calls for r in own.values()), sum(r.edits for r in own.values())
            extra = "".join(f", {n} {what}" for what, n in self.extra.get(index, {}).items())
            lines.append(f"{name}: {calls} calls at {len(own)} sites, {edits} edited{extra}")
            for path, r in own.items():
                moved = "" if r.distance is None else f", moved {r.distance:.4f}"
                moved += ", compiled: calls not counted" if r.compiled else ""
                lines.append(
                    f"  {path}: {r.edits}/{r.calls} calls, {r.rows} rows x {r.heads} heads, {r.path or '-'}{moved}"
                )
        return "\n".join(lines)
