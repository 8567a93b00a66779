"""Checks a recipe as a whole: its fields, and every point of its sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from . import yaml
from .parse import parse_recipe
from .schema import Recipe
from .sweep import points, replaced


def validate(value: Any, document: yaml.Document | None = None) -> Recipe:
    """A recipe from plain data.

    Args:
        value: as YAML or JSON give it. document: where it was read, for lines in messages.

    Raises:
        RecipeError: it is not a recipe; the message names up to five fields.
    """
    recipe = parse_recipe(value, document)
    try:
        # A sweep is checked by making its points.
        points(recipe)
    except RecipeError as error:
        raise RecipeError(f"{document.source if document else 'recipe'}: {error}") from None
    return recipe


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with values set by path, such as {"data.limit": 10}; checked as a whole.

    Raises:
        RecipeError: a path that does not exist, or a value that does not fit.
    """
    return replaced(recipe, values, "set", validate)
