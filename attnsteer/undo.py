"""The undo journal: what a steering changed, and how it is put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Journal:
    """Undo steps, run in reverse; each runs even when another fails."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def add(self, step: Callable[[], None]) -> None:
        """Remember one undo step."""
        self._steps.append(step)

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute and remember how to restore it (or to delete it)."""
        own = vars(owner)
        had, old = name in own, own.get(name)
        own[name] = value

        def undo() -> None:
            if had:
                vars(owner)[name] = old
            else:
                vars(owner).pop(name, None)

        self.add(undo)

    def undo(self) -> None:
        """Run all steps; the first error is raised after the last step."""
        first: BaseException | None = None
        while self._steps:
            try:
                self._steps.pop()()
            except Exception as error:  # every step must run, whatever another did
                first = first or error
        if first is not None:
            raise first
