"""What a run will take: time, memory and disk, from one measured batch of every arm; nothing of it is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipe.checks import STAND_IN
from ..recipe.schema import Recipe
from ..recipe.search_specs import calibration_key, search_of
from ..recipe.sweep import points
from . import store
from .build import plan
from .cost import measured_cost
from .job import prepare
from .progress import span
from .ranks import Ranks
from .runs import Work, loaded_for

# Beside records: samples, figures, reports, and a part of the last merge.
SPARE = 2.2


@dataclass(frozen=True)
class Estimate:
    """What a run of a recipe takes on this machine.

    Attributes:
        arms, samples, seeds: how many. seconds: of one process. memory: bytes, the largest of a process, or of the GPU's allocator.
        disk: bytes of the folder. searches: there is a search before it, which is not counted.
    """

    arms: int
    samples: int
    seeds: int
    seconds: float
    memory: int
    disk: int
    searches: bool

    @property
    def answers(self) -> int:
        return self.arms * self.samples * self.seeds

    def lines(self) -> list[str]:
        """For a terminal."""
        seeds = f" under {self.seeds} seeds" if self.seeds > 1 else ""
        found = [f"answers: {self.answers} ({self.arms} arms to {self.samples} samples{seeds})"]
        found += [
            f"time: {span(self.seconds)} in one process on this machine, {span(self.seconds / 4)} in four (--join)"
        ]
        found += [
            f"memory: {self.memory / 2**20:,.0f} MB in each process",
            f"disk: {max(1, round(self.disk / 2**20))} MB",
        ]
        return found + ["the search before it is not counted"] * self.searches


def estimate(recipe: Recipe, *, tiny: bool = False, limit: int | None = None) -> Estimate:
    """Measure one batch of every arm (a second one, where there is, since the first warms up), and reckon from it.

    Args:
        recipe, tiny, limit: see `attnsteer.run.run`.

    Raises:
        RecipeError: the recipe cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="attnsteer-estimate-") as scratch:
        folder = Path(scratch)
        job = prepare(recipe, folder, tiny, limit)
        loaded = loaded_for(job)
        arms = plan(job.recipe, loaded.sites(), _stand_ins(job.recipe)).arms
        work = Work(job, loaded, arms, Ranks(), None, progress=False)
        parts = [part for _, part in work.batches()][:2]
        seconds, memory = 0.0, 0
        for part in parts:
            with measured_cost(loaded.device) as reading:
                records = work.again(job.recipe.seeds[0], part)
            # The last one counts.
            seconds, memory = reading.seconds / len(part), max(memory, reading.peak_memory)
        lines = sum(len(store.to_json(r)) + 1 for own in records.values() for r in own) / len(parts[-1])
        pictures = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / sum(map(len, parts))
    count = len(job.data.samples) * len(job.recipe.seeds)
    disk = round(count * (SPARE * lines + pictures))
    return Estimate(
        len(arms),
        len(job.data.samples),
        len(job.recipe.seeds),
        seconds * count,
        memory,
        disk,
        recipe.calibration is not None,
    )


def _stand_ins(recipe: Recipe) -> dict[str, Any] | None:
    """In place of what a search would find: what arms cost depends on it little."""
    if recipe.calibration is None:
        return None
    return dict(_found(recipe))


def _found(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    for point in points(recipe):
        search = search_of(point.recipe)
        yield calibration_key(point.recipe), STAND_IN if search.heads else (0,)
