"""How far a run is: a bar in a terminal, else a line now and then that a log can keep."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

# Seconds between two lines.
EVERY = 30.0


class Progress:
    """Of the answers of one process.

    Args:
        total: answers, those that are there already counted as well. name: of the recipe. shown: whether anything is.
        stream: stderr unless given. clock: seconds.
    """

    def __init__(
        self,
        total: int,
        name: str,
        shown: bool,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.name, self.clock = total, name, clock
        self.stream = sys.stderr if stream is None else stream
        self.bar: Any = None
        self.lines = shown and not self.stream.isatty()
        if shown and not self.lines:
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="answer", desc=name, file=self.stream)
        self.count, self.worked = 0, 0
        self.begun = self.last = clock()

    def update(self, answers: int, new: bool = True) -> None:
        """Answers are there. new: they were given now, and were not there before."""
        self.count += answers
        self.worked += answers if new else 0
        if self.bar is not None:
            self.bar.update(answers)
        elif self.lines and new and (self.clock() - self.last >= EVERY or self.count >= self.total):
            self.last = self.clock()
            print(self.line(), file=self.stream, flush=True)

    def line(self) -> str:
        """ "act/reading: 120 of 3000 answers (4 %), 0.31 s each, 15 min left"."""
        share = 100 * self.count / self.total if self.total else 100
        each = (self.clock() - self.begun) / self.worked if self.worked else 0.0
        left = "" if self.count >= self.total else f", {span(each * (self.total - self.count))} left"
        return f"{self.name}: {self.count} of {self.total} answers ({share:.0f} %), {each:.2g} s each{left}"

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


def span(seconds: float) -> str:
    """ "40 s", "15 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
