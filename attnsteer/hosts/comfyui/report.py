"""What a steering did in one sampling run, in words: how many sites, how many steps, how much of the prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Report:
    """Filled during a run, read after it. One for each steered clone of a model; it never holds tensors of the model.

    Attributes:
        publish: called with the text at the end of each run (a badge on the node). text: that of the last run.
    """

    def __init__(self, names: Sequence[str], publish: Callable[[str], None] | None = None):
        self.names, self.publish, self.text = list(names), publish, "not run yet"
        self.images: dict[str, Any] = {}
        self.begin()

    def __deepcopy__(self, memo: Any) -> Report:
        return self

    def begin(self) -> None:
        """A run starts."""
        self.steps: set[int] = set()
        self.terms: dict[int, list[Tensor]] = {}
        self._attended: list[Tensor] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Something that the reader should know, said once."""
        if text not in self.notes:
            self.notes.append(text)

    def attended(self, branch: str | None, out: Tensor, before: Tensor) -> None:
        """How far the outputs of one plain attention call moved; read when the run is over."""
        if branch is None and out is not before:
            self._attended.append(relative(out, before))

    def guided(self, index: int, after: Tensor, before: Tensor) -> None:
        """How far a method moved one prediction."""
        self.terms.setdefault(index, []).append(relative(after, before))

    def finish(self, run: Any) -> str:
        """The text of this run; `run`: the steering."""
        lines = [self._line(run, i, name) for i, name in enumerate(self.names)]
        self.text = "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
        if self.publish is not None:
            self.publish(self.text)
        return self.text

    def _line(self, run: Any, index: int, name: str) -> str:
        records = [r for (i, _), r in _records(run.audit).items() if i == index]
        wanted = sum(any(b.index == index for b, _ in runtime.entries) for runtime in run.runtimes.values())
        if not any(r.calls for r in records):
            return f"{name} did nothing: none of its {wanted} sites ran in a step in which it acts"
        if run.bounds[index].method.observes:
            return f"{name} read {sum(r.calls for r in records)} maps at {len(records)} of {wanted} sites, {len(self.steps)} steps"
        changed = run.audit.changed(index)
        moved = self.terms.get(index) or (self._attended if not self.terms else [])
        mean = float(torch.stack([m.float().cpu() for m in moved]).mean()) if moved else 0.0
        if not changed and not mean:
            return f"{name} did nothing: asked at {len(records)} sites, it changed no number (neutral strength?)"
        what = "of the prediction" if index in self.terms else "of its attention outputs"
        size = f", mean change {mean:.1%} {what}" if moved else ""
        return f"{name} fired: {len(records)} of {wanted} sites, {len(self.steps)} steps{size}"


def relative(after: Tensor, before: Tensor) -> Tensor:
    """||after - before|| / ||before||, 0-d, not read."""
    before = before.detach().float()
    return (after.detach().float() - before).norm() / before.norm().clamp_min(1e-12)


def _records(audit: Any) -> dict[tuple[int, str], Any]:
    return dict(audit.records)
