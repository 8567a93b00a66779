"""The recipes that come with the package: all of them loaded, and one copied."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import RecipeError
from .loading import load_recipe
from .locate import ENDING, folder, locate, names
from .schema import Recipe


def shipped() -> Iterator[Recipe]:
    """All of them, loaded, by name."""
    for name in names():
        yield load_recipe(folder() / f"{name}{ENDING}")


def copy(name: str | Path, to: str | Path, force: bool = False) -> list[Path]:
    """Copy a recipe and the files beside it that it names.

    Args:
        to: a folder, or the path of the new recipe (with its ending). force: whether files there may be replaced.

    Returns:
        what was written, the recipe first.

    Raises:
        RecipeError: no such recipe, or a file is there already.
    """
    source, target = locate(name), Path(to)
    recipe = load_recipe(source)
    target = target if target.suffix in (ENDING, ".yml") else target / source.name
    pairs = [(source, target)]
    for relative in _files(recipe):
        inside = (source.parent / relative).resolve()
        if inside.is_file() and inside.is_relative_to(source.parent.resolve()):
            # Not `relative`, in which .. may lead out and in again here, but not there.
            pairs.append((inside, target.parent / inside.relative_to(source.parent.resolve())))
    taken = [str(t) for _, t in pairs if t.exists()]
    if taken and not force:
        raise RecipeError(f"{', '.join(taken)} is there already; give another place, or --force.")
    try:
        for old, new in pairs:
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(old, new)
    except OSError as error:
        raise RecipeError(f"{error.filename}: cannot be written ({error.strerror}).") from error
    return [new for _, new in pairs]


def _files(recipe: Recipe) -> list[str]:
    """Relative files that a recipe names."""
    sections = [recipe.data, *([recipe.calibration.data] if recipe.calibration else [])]
    found = [d.file for d in sections if d.file is not None]
    found += [s.heads for s in recipe.interventions if isinstance(s.heads, str) and ":" not in s.heads]
    found += recipe.imports
    return [f for f in dict.fromkeys(found) if not Path(f).is_absolute()]
