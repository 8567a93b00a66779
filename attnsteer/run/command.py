"""What `attnsteer run` makes of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..method_files import import_methods
from ..recipe import yaml
from ..recipe.loading import load_recipe
from ..recipe.schema import Recipe
from ..recipe.validate import with_values

RUNS = Path("runs")


def recipe_from_arguments(
    recipe: str, settings: Sequence[str] = (), batch_size: int | None = None, seed: int | None = None
) -> Recipe:
    """The recipe of a file, with fields set.

    Args:
        settings: "path=value"; the value is read as in a recipe. seed: 0 or more; of the samples, where their source is drawn
            from one, and of what is sampled (`seeds`).

    Raises:
        RecipeError: no such recipe, a setting that is none, or a seed on which nothing of the recipe depends.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        path, sign, text = setting.partition("=")
        if not sign or not path:
            raise RecipeError(f"--set {setting}: give PATH=VALUE, such as data.limit=100.")
        values[path.strip()] = yaml.parse(text, f"--set {path}").value if text.strip() else None
    if batch_size is not None:
        values["batch_size"] = batch_size
    found = load_recipe(recipe)
    if seed is not None:
        values = {**_seeded(found, seed), **values}
    return with_values(found, values) if values else found


def _seeded(recipe: Recipe, seed: int) -> dict[str, Any]:
    """The fields that a seed sets."""
    from .data.zoo import takes_seed

    drawn = takes_seed(recipe.data.zoo)
    if not drawn and recipe.task != "image" and not recipe.decoding.get("do_sample"):
        raise RecipeError(
            f"--seed {seed}: {recipe.name} draws neither its samples nor its answers from a seed. "
            f"For other samples: --set data.start={recipe.data.start + (recipe.data.limit or 0)}."
        )
    return {"seeds": [seed], **({"data.options.seed": seed} if drawn else {})}


def import_files(files: Sequence[Path], recipe: Recipe | None = None, allow: bool = False) -> None:
    """Import what the user named; with `allow`, also the files that a recipe names.

    Raises:
        UnknownName, RegistrationError: see `attnsteer.method_files.import_methods`.
    """
    named = recipe.import_paths() if recipe is not None and allow else []
    for path in (*files, *named):
        import_methods(path)


def run_folder(recipe: Recipe, tiny: bool) -> Path:
    """Where a run goes that is not told where to go."""
    return RUNS / (recipe.name + ("-tiny" if tiny else ""))
