"""Small recipes for the tests of runs, and how their folders are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attnsteer.runner import load_recipe

READING: dict[str, Any] = {
    "schema": 1,
    "name": "test/reading",
    "model": {"zoo": "shapes-lm", "kind": "lm", "device": "cpu"},
    "data": {"zoo": "reading", "limit": 12, "options": {"task": "lookup"}},
    "task": "choice",
    "interventions": [{"method": "ACT", "params": {"beta": 0.4}, "heads": "zoo:act"}],
    "controls": {"zero": True, "random_heads": 1},
    "metrics": ["choice"],
    "primary": "choice.accuracy",
    "batch_size": 4,
}


def written(folder: Path, **changes: Any) -> Path:
    """The file of the recipe of reading passages, with fields changed."""
    path = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    # JSON is YAML too.
    path.write_text(json.dumps({**READING, **changes}), encoding="utf-8")
    return path


def recipe(folder: Path, **changes: Any) -> Any:
    """That recipe."""
    return load_recipe(written(folder, **changes))


def records(folder: Path) -> list[dict[str, Any]]:
    """The merged records of a run."""
    return [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def load(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def figures(folder: Path) -> str:
    """metrics.json without the cost, which is measured time: all that two equal runs have in common."""
    return json.dumps({k: v for k, v in load(folder / "metrics.json").items() if k != "cost"})
