"""Samples: flat dictionaries that can be written as JSON, with a unique `id`, what the model is asked, and what metrics need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RecipeError, listing
from .sample import Data, Sample

if TYPE_CHECKING:
    from ...recipe.schema import DataSpec


def load(spec: DataSpec, task: str, *, prompt: str | None = None, folder: str | Path = ".") -> Data:
    """The samples of a section of a recipe.

    Args:
        task: what they are for. prompt: template of the recipe, for files and hub data. folder: of the recipe.

    Raises:
        RecipeError: an option, file, line or column that is not what the source needs; no samples; an id twice.
        MissingExtra: hub data without the library for it.
    """
    if spec.zoo is not None:
        from . import zoo

        data = zoo.load(spec)
    elif spec.hub is not None:
        from . import hub

        data = hub.load(spec, task, prompt)
    else:
        from . import files

        data = files.load(spec, task, prompt, Path(folder))
    source = spec.zoo or spec.hub or spec.file
    if not data.samples:
        raise RecipeError(f"data: {source} has no samples from number {spec.start} on.")
    twice = [i for i, n in Counter(s["id"] for s in data.samples).items() if n > 1]
    if twice:
        raise RecipeError(f"data: {source} has the id {listing(twice, 3)} more than once; ids must be unique.")
    return data
