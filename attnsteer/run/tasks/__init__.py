"""Tasks: what the model is asked for a batch of samples, and the records of its answers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..data.sample import Data, Sample
    from ..loaded import Loaded

TASKS = ("choice", "answer", "caption", "image")


@dataclass(frozen=True)
class Ask:
    """One batch for one arm.

    Attributes:
        samples: of the batch. data: where their images are. decoding: arguments of the model's call. seed: of the recipe.
        run: the steering, or None for the baseline. judge: of pictures, see `attnsteer.run.scorers`.
        folder: of the run. images: the folder in it for this arm's pictures.
    """

    samples: Sequence[Sample]
    data: Data
    decoding: Mapping[str, Any]
    seed: int
    run: Any = None
    judge: Any = None
    folder: Path = field(default=Path())
    images: str = ""


class Task(Protocol):
    """A module of this package.

    Attributes:
        WRITES: the keys of a record that come from the model. KEEPS: keys of a sample that a record repeats for metrics.
        UNIT: what the throughput counts.
        DECODING: arguments of the model's call that the recipe may leave out. RESERVED: those that it may not give.
    """

    WRITES: tuple[str, ...]
    KEEPS: tuple[str, ...]
    UNIT: str
    DECODING: dict[str, Any]
    RESERVED: tuple[str, ...]

    def ask(self, loaded: Loaded, ask: Ask) -> tuple[list[dict[str, Any]], int]:
        """The records of a batch (without arm, seed and id), and how many units were made."""


def get_task(name: str) -> Task:
    """The module of a task."""
    return importlib.import_module(f".{name}", __name__)  # type: ignore[return-value]


def kept(sample: Sample, keys: Sequence[str]) -> dict[str, Any]:
    """What a record repeats of its sample."""
    return {k: sample[k] for k in keys if k in sample}
