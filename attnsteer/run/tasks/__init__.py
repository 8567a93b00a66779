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
class Request:
    """One batch for one arm.

    Attributes:
        samples: of the batch. data: where their images are. decoding: arguments of the model's call. seed: of the recipe.
        run: the steering, or None for the baseline. score_pictures: of pictures, see `attnsteer.run.scorers`.
        folder: of the run. images: the folder in it for this arm's pictures.
        shared_prefix: read what prompts begin with (all of them; or those about one image) once.
    """

    samples: Sequence[Sample]
    data: Data
    decoding: Mapping[str, Any]
    seed: int
    run: Any = None
    score_pictures: Any = None
    folder: Path = field(default=Path())
    images: str = ""
    shared_prefix: bool = False


class Task(Protocol):
    """A module of this package.

    Attributes:
        RECORD_KEYS: the keys of a record that come from the model. SAMPLE_KEYS: keys of a sample that a record repeats for metrics.
        UNIT: what the throughput counts.
        DECODING: arguments of the model's call that the recipe may leave out.
    """

    RECORD_KEYS: tuple[str, ...]
    SAMPLE_KEYS: tuple[str, ...]
    UNIT: str
    DECODING: dict[str, Any]

    def answer(self, loaded: Loaded, request: Request) -> tuple[list[dict[str, Any]], list[int]]:
        """The records of a batch (without arm, seed and id), and how many units were made for each."""


def get_task(name: str) -> Task:
    """The module of a task."""
    return importlib.import_module(f".{name}", __name__)  # type: ignore[return-value]


def sample_fields(sample: Sample, keys: Sequence[str]) -> dict[str, Any]:
    """What a record repeats of its sample."""
    return {k: sample[k] for k in keys if k in sample}
