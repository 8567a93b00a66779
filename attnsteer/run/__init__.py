"""Doing what a recipe asks: models, data, tasks, searches, and records that survive a kill."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__, {"Plan": "build", "calibrate": "recipe_calibration", "plan": "build", "run": "runs"}
)
