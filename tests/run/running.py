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


# Choices of several tokens, spans, and a strength of each sample.
PROMPTS = ["a red circle is above a blue star .", "two blue stars .", "a square is red . is it blue ?", "one star ."]
FORCES = [0.1, None, 4.0, 1.0]
ROWS = [
    {"id": f"r{i}", "prompt": p, "choices": ["yes it is", "no"], "answer": i % 2, "marks": [[0, 2 + i % 2]], "force": f}
    for i, (p, f) in enumerate(zip(PROMPTS, FORCES, strict=True))
]
MARKED = {
    "method": "PASTA",
    "params": {"spans": {"sample": "marks"}, "alpha": {"sample": "force"}},
    "heads": {"0": [1]},
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


def tiny(folder: Path) -> dict[str, Any]:
    """The fields of a recipe for a random model in a folder, with the rows above."""
    import torch

    from attnsteer.recipe.schema import ModelSpec
    from attnsteer.run.data.sample import Data
    from attnsteer.run.tiny import tiny_model

    stand_in = ModelSpec(hub="owner/name", kind="lm", architecture="llama")
    loaded = tiny_model(stand_in, Data(ROWS, lambda s: None), torch.float32, "cpu")
    loaded.target.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    model = {"path": "model", "kind": "lm", "architecture": "llama", "device": "cpu"}
    data = {"file": "rows.jsonl", "format": "choices"}
    return {"data": data, "model": model, "interventions": [MARKED], "batch_size": 2}


def records(folder: Path) -> list[dict[str, Any]]:
    """The merged records of a run."""
    return [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def load(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def figures(folder: Path) -> str:
    """metrics.json without the cost, which is measured time: all that two equal runs have in common."""
    return json.dumps({k: v for k, v in load(folder / "metrics.json").items() if k != "cost"})
