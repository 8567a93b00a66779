"""Small recipes for the tests of runs, and how their folders are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attnsteer.recipe import load_recipe

LVLM: dict[str, Any] = {"zoo": "shapes-lvlm", "kind": "vlm", "device": "cpu"}
EXISTENCE: dict[str, Any] = {
    "model": LVLM,
    "data": {"zoo": "existence", "limit": 8, "options": {"kind": "adversarial"}},
    "task": "answer",
    "interventions": [{"method": "VHR", "params": {"alpha": 1.3}}],
    "controls": {"zero": True},
    "decoding": {"max_new_tokens": 1},
    "metrics": ["pope"],
    "primary": "pope.accuracy",
}
CAPTIONS: dict[str, Any] = {
    **EXISTENCE,
    "data": {"zoo": "captions", "limit": 4},
    "task": "caption",
    "decoding": {"max_new_tokens": 24},
    "metrics": ["chair", "fluency"],
    "primary": "chair.chair_i",
    "batch_size": 2,
}
LAYOUTS: dict[str, Any] = {
    "model": {"zoo": "shapes-sd", "kind": "image", "device": "cpu"},
    "data": {"zoo": "layouts", "limit": 3},
    "task": "image",
    "interventions": [{"method": "PAG", "params": {"scale": 2.0}, "where": {"layers": [5, 6], "kinds": "self"}}],
    "controls": {"zero": True},
    "decoding": {"num_inference_steps": 2},
    "metrics": ["layout"],
    "primary": "layout.right",
    "batch_size": 2,
}


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
