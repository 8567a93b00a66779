"""A recipe as plain data, to be changed by tests."""

from __future__ import annotations

import copy
from typing import Any

from attnsteer.recipe.schema import Recipe
from attnsteer.recipe.validate import validate

BASE: dict[str, Any] = {
    "schema": 1,
    "name": "act/test",
    "model": {"zoo": "shapes-lm", "kind": "lm"},
    "data": {"zoo": "reading", "options": {"task": "one-shot"}, "limit": 10},
    "task": "choice",
    "interventions": [{"method": "ACT", "params": {"beta": 0.4}, "heads": {"5": [0, 7], "3": [1]}}],
    "metrics": ["choice"],
    "primary": "choice.accuracy",
}
CALIBRATION: dict[str, Any] = {
    "search": "calibrate_act",
    "data": {"zoo": "reading", "split": "calibration", "options": {"task": "one-shot"}, "limit": 12},
}
REMOVED = object()


def changed(changes: dict[str, Any], base: dict[str, Any] = BASE) -> dict[str, Any]:
    """A copy with values put in by path ("data.limit"); REMOVED takes one out."""
    data = copy.deepcopy(base)
    for path, value in changes.items():
        *before, last = path.split(".")
        here: Any = data
        for key in before:
            here = here[int(key)] if isinstance(here, list) else here.setdefault(key, {})
        if value is REMOVED:
            del here[last]
        else:
            here[int(last) if isinstance(here, list) else last] = copy.deepcopy(value)
    return data


def recipe(**changes: Any) -> Recipe:
    """The recipe with values by path, "__" for the dot."""
    return validate(changed({k.replace("__", "."): v for k, v in changes.items()}))
