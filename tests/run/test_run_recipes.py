"""Every shipped recipe runs from end to end in its tiny form."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnsteer.recipe import load_recipe
from attnsteer.recipe.shipped import names
from attnsteer.run import run
from tests.run.running import load

# Pipelines take seconds each; of those one of the embedded models and one of the hub are in every run.
PICTURES = {n for n in names() if load_recipe(n).model.kind == "image"}
SHORT = {"pag/shapes-prompts", "attend-and-excite/sd14-animals"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in PICTURES - SHORT else n for n in names()]
)
def test_a_shipped_recipe_runs_tiny(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    out = run(recipe, tmp_path / "run", tiny=True, progress=False)
    found = load(out / "metrics.json")
    metric, _, estimate = recipe.primary.partition(".")
    for arm in found["arms"].values():
        assert arm[metric][estimate]["value"] is not None
    assert found["zero_equals_baseline"] is (True if recipe.controls.zero else None)
    assert load(out / "status.json")["state"] == "complete" and load(out / "identity.json")["tiny"] is True
    # The method was there: a random model may have nothing that it edits, such as a sink.
    audit = load(out / "audit.json")["arms"]
    for arm in (a for a in found["arms"] if a.startswith("method")):
        # At its sites, or around the model's calls.
        seen = sum(s["calls"] for entry in audit[arm] for s in entry["sites"].values())
        seen += sum(v for entry in audit[arm] for v in entry.values() if isinstance(v, int))
        assert seen > 0 and len(audit[arm]) == len(recipe.interventions)
