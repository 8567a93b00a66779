"""Values set by path, and the points of a sweep: every combination of its values, each a recipe of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError, did_you_mean, listing
from .parse import parse_recipe
from .schema import Recipe

# One run folder has one model and one list of samples, so only what makes an arm can be swept.
SWEPT = ("interventions", "calibration", "baseline", "decoding", "controls")
MOST = 1000


@dataclass(frozen=True)
class Point:
    """One combination. index: from 0. values: by path. recipe: with the values set, and without a sweep."""

    index: int
    values: dict[str, Any]
    recipe: Recipe


def points(recipe: Recipe) -> list[Point]:
    """The points of a recipe's sweep in the order of the product, the last path running fastest; one without a sweep.

    Raises:
        RecipeError: a path that does not exist or cannot be swept, no values, values twice, too many points, or a value
            that does not fit.
    """
    if not recipe.sweep:
        return [Point(0, {}, recipe)]
    total = 1
    for path, values in recipe.sweep.items():
        if path.partition(".")[0] not in SWEPT:
            raise RecipeError(
                f"sweep: {path!r} cannot be swept; {', '.join(SWEPT)} can. A run has one model and one list of samples: "
                "use a run for each (--set)."
            )
        if not values or any(v in values[:i] for i, v in enumerate(values)):
            raise RecipeError(f"sweep: {path!r} has {values!r}; give at least one value, none of them twice.")
        total *= len(values)
    if total > MOST:
        raise RecipeError(f"sweep: {total} points; at most {MOST} are run.")
    found = []
    for index, combination in enumerate(itertools.product(*recipe.sweep.values())):
        values = dict(zip(recipe.sweep, combination, strict=True))
        found.append(Point(index, values, replaced(recipe, {**values, "sweep": {}}, "sweep", parse_recipe)))
    return found


def field_of(recipe: Any, dotted: str) -> Any:
    """A field of a recipe as plain data by its dotted path, or None."""
    for part in dotted.split("."):
        if isinstance(recipe, list) and part.isdecimal() and int(part) < len(recipe):
            recipe = recipe[int(part)]
        elif isinstance(recipe, Mapping):
            recipe = recipe.get(part)
        else:
            return None
    return recipe


def own_point(points: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> Any:
    """The point of arms.json or metrics.json whose values are those of the recipe without its sweep, or None.

    It was chosen before the run, so it is what headlines, claims and tables of results are about; the first point stands in
    for it where there is none.
    """
    return next((p for p in points if all(field_of(recipe, k) == v for k, v in p["values"].items())), None)


def replaced(recipe: Recipe, values: Mapping[str, Any], what: str, parse: Callable[[Any], Recipe]) -> Recipe:
    """The recipe with values set by path.

    Args:
        what: is done, for messages: "sweep" or "set". parse: makes a recipe of plain data, and checks it.

    Raises:
        RecipeError: a path that does not exist, or a value that does not fit.
    """
    data = recipe.dump()
    for path, value in values.items():
        _put(data, path, value, what)
    try:
        made = parse(data)
    except RecipeError as error:
        raise RecipeError(f"{what}: with {_assignments(values)}: {error}") from None
    made._source = recipe.source
    return made


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in values.items() if k != "sweep")


def _put(data: Any, path: str, value: Any, what: str) -> None:
    """Set one value; the last key of a mapping may be new (a parameter left at its default)."""
    keys = path.split(".")
    here = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        before = ".".join(keys[:depth]) or "the recipe"
        if isinstance(here, list):
            if not (key.isascii() and key.isdigit() and len(key) < 7 and int(key) < len(here)):
                raise RecipeError(f"{what}: {path!r} is not in the recipe: {before} has {len(here)} items, from 0.")
            key = int(key)
        elif not isinstance(here, dict) or (not last and key not in here):
            there = listing(here) if isinstance(here, dict) else f"is {here!r}"
            hint = did_you_mean(key, here) if isinstance(here, dict) else ""
            raise RecipeError(f"{what}: {path!r} is not in the recipe: {before} has no {key!r}; {there}.{hint}")
        if last:
            here[key] = value
        else:
            here = here[key]
