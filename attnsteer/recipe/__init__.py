"""Recipes: what they say, the arms they make, and running them. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module that defines it. No module has the name of a function: once imported, it would stand in its place.
_WHERE = {
    "Arm": "build",
    "Comparison": "comparison",
    "Plan": "build",
    "Point": "points",
    "Recipe": "schema",
    "calibrate": "calibration",
    "check": "checks",
    "compare": "comparison",
    "json_schema": "schema",
    "load_recipe": "loading",
    "plan": "build",
    "report": "reports",
    "resolve": "checks",
    "run": "runs",
    "with_values": "points",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
