"""Recipes from files: YAML, schema and sweep, with messages that name the file, the field and its line."""

from __future__ import annotations

from pathlib import Path

from . import yaml
from .locate import locate
from .schema import Recipe
from .validate import validate


def load_recipe(path: str | Path) -> Recipe:
    """A recipe from its file, or a shipped one by its name; all that can be seen in the text alone is checked.

    Raises:
        RecipeError: it cannot be read, is not YAML, or is not a recipe; the message names line and field.
    """
    path = locate(path)
    document = yaml.read(path)
    recipe = validate(document.value, document)
    recipe._source = Path(path).absolute()
    return recipe
