"""A recipe from plain data, checked field by field against the schema; every problem is told with its line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import RecipeError, did_you_mean
from . import yaml
from .schema import Recipe

SHOWN = 5


def parse_recipe(value: Any, document: yaml.Document | None = None) -> Recipe:
    """A recipe from plain data; the points of its sweep are not made (`validate` makes them).

    Args:
        value: as YAML or JSON give it. document: where it was read, for lines in messages.

    Raises:
        RecipeError: it is not a recipe; the message names up to five fields.
    """
    source = document.source if document else "recipe"
    if not isinstance(value, Mapping):
        raise RecipeError(f"{source}: is {_short(value)}; a recipe is a mapping of fields.")
    try:
        # As JSON, so that lists are lists and no value is taken for another type.
        return Recipe.model_validate_json(json.dumps(value, allow_nan=False))
    except ValidationError as error:
        problems = [_problem(e, document) for e in _innermost(error.errors(include_url=False, include_context=True))]
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: is not plain data ({error}).") from error
    problems = list(dict.fromkeys(problems))
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise RecipeError(f"{source}: {'; '.join(problems[:SHOWN])}{more}.")


def _innermost(errors: list[Any]) -> list[Any]:
    """Errors without those about the other types that a value could have had."""
    paths = [_path(e) for e in errors]
    deeper = lambda p: any(len(q) > len(p) and q[: len(p)] == p for q in paths)  # noqa: E731
    return [e for e, p in zip(errors, paths, strict=True) if e["type"] == "extra_forbidden" or not p or not deeper(p)]


def _path(error: Any) -> tuple[str | int, ...]:
    """Where an error is; names of the types that a value can have stand there too, and are no keys of the recipe."""
    return tuple(k for k in error["loc"] if not (k in ("str", "constrained-str") or "[" in str(k)))


def _problem(error: Any, document: yaml.Document | None) -> str:
    loc = _path(error)
    path = ".".join(map(str, loc)) or "recipe"
    where = f"{path} (line {document.line(loc)})" if document else path
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = _fields(loc[:-1])
        return f"{where}: unknown field; there are {', '.join(known)}.{did_you_mean(str(loc[-1]), known)}".rstrip(".?")
    if kind == "missing":
        return f"{where}: is missing"
    if kind == "value_error":
        return f"{where}: {error['ctx']['error']}"
    return f"{where}: {error['msg'][:1].lower()}{error['msg'][1:]}, not {_short(value)}"


def _fields(loc: tuple[str | int, ...]) -> list[str]:
    """The fields of the section at a path."""
    section: Any = Recipe
    for key in loc:
        if isinstance(key, int):
            continue
        fields = {f.alias or n: f for n, f in section.model_fields.items()}
        section = _section(fields[key].annotation) if key in fields else None
        if section is None:
            return []
    return [f.alias or n for n, f in section.model_fields.items()]


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section(inner)
        if found is not None:
            return found
    return None


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."
