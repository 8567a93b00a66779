"""The row of a sweep in a table of results."""

from __future__ import annotations

import json
from pathlib import Path

from attnsteer.results.readme_tables import results_table
from tests.results import folders
from tests.run.running import written


def test_a_sweep_is_shown_at_the_point_of_the_recipe(tmp_path: Path) -> None:
    """Of the settings 0.2, 0.4, 0.6 and 0.8 the recipe's own is 0.4, the second; without one, the first is shown."""
    recipes = tmp_path / "act"
    written(recipes, name="act/reading")
    run = folders.text_run(tmp_path / "runs" / "sweep", sweep=True)
    metrics = json.loads((run / "metrics.json").read_text())

    def row() -> list[str]:
        return [c.strip() for c in results_table(recipes, tmp_path / "runs").splitlines()[2].split("|")]

    def value(point: int, kind: str) -> str:
        if kind == "difference":
            found = [d for d in metrics["differences"] if (d["point"], d["arm"]) == (point, "method")]
            entry = next(d for d in found if d["against"] == "baseline")["estimates"]["accuracy"]
            return f"{entry['value']:+.3f}"
        return f"{metrics['arms'][metrics['points'][point]['arms'][kind]]['choice']['accuracy']['value']:.3f}"

    for own, point in (("0.4", 1), ("0.5", 0)):
        plan = (run / "recipe.yaml").read_text()
        (run / "recipe.yaml").write_text(plan.replace("beta: 0.4\n  zero", f"beta: {own}\n  zero"))
        cells = row()
        assert cells[4].startswith(value(point, "baseline")) and cells[5].startswith(value(point, "method"))
        assert cells[6].startswith(value(point, "difference")) and cells[7] == "40"
    assert value(0, "method") != value(1, "method")
