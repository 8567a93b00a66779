"""The attention of a real run of an embedded model, from the run folder to the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from attnsteer import cli
from attnsteer.errors import RunError
from attnsteer.recipe import load_recipe
from attnsteer.recipe.validate import with_values
from attnsteer.results import drawings
from attnsteer.results.reports.headline import headline
from attnsteer.results.reports.sample_browser import states
from attnsteer.results.viewing import view_run
from attnsteer.run import run
from attnsteer.run.folder import read_run

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def reading(tmp_path_factory: Any) -> Path:
    recipe = with_values(load_recipe(RECIPES / "act/shapes-reading.yaml"), {"controls.random_heads": 0})
    return run(recipe, tmp_path_factory.mktemp("runs") / "reading", limit=30, progress=False)


def test_from_a_run_to_its_page(reading: Path) -> None:
    done = CliRunner().invoke(cli.app, ["report", str(reading), "--attention", "2"])
    assert done.exit_code == 0, done.output
    found = json.loads((reading / "attention.json").read_text())
    assert [list(s["arms"]) for s in found["samples"]] == [["baseline", "method"]] * 2
    assert "steered heads" in found["note"] and '<p class="heat">' in (reading / "report.html").read_text()
    done = CliRunner().invoke(
        cli.app, ["view", str(reading), "-o", str(reading / "heads.html"), "--sample", found["samples"][1]["id"]]
    )
    assert done.exit_code == 0, done.output
    data = re.search(r'id="data">(.*?)</script>', (reading / "heads.html").read_text(encoding="utf-8"))
    page = json.loads(data[1])
    assert page["arms"] == ["baseline", "method"] and len(page["sites"]) == 6
    assert ["sample", found["samples"][1]["id"]] in page["facts"] and page["planes"]
    assert {r["group"] for r in page["readings"]} == {"these maps", "head_profile"}
    assert page["axes"][0]["words"][-1].strip() == "answer"
    done = CliRunner().invoke(cli.app, ["view", str(reading), "--sample", "r99"])
    assert done.exit_code == 2 and "no sample" in done.output
    # What changed is looked at first.
    whole = read_run(reading)
    state = states(whole, headline(whole, set()))
    changed = [k for k, v in state.items() if v != "same"]
    assert {(0, s["id"]) for s in found["samples"]} >= set(changed[:1])


def test_pictures_are_those_of_the_run(tmp_path: Path) -> None:
    recipe = with_values(
        load_recipe(RECIPES / "attention-refocusing/shapes-layouts.yaml"),
        {"decoding.num_inference_steps": 2, "controls.zero": False, "batch_size": 2},
    )
    folder = run(recipe, tmp_path / "run", limit=2, progress=False)
    drawings.record_attention(folder, 1)
    (entry,) = json.loads((folder / "attention.json").read_text())["samples"]
    for arm, part in entry["arms"].items():
        assert part["image"] == read_run(folder).records[arm][0, entry["id"]]["image"]
        assert part["labels"] and len(part["maps"]) == len(part["labels"])
    page = json.loads(re.search(r'id="data">(.*?)</script>', view_run(folder).read_text(encoding="utf-8"))[1])
    assert page["frames"] == ["step 0", "step 1"] and len(page["images"]) == 2
    assert {s["kind"] for s in page["sites"]} == {"self", "cross"}
    # A picture elsewhere on this machine is in no page of a folder that may be somebody else's.
    records = folder / "records.jsonl"
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    Image.new("RGB", (8, 8)).save(tmp_path / "own.png")
    for name in ("../own.png", str(tmp_path / "own.png")):
        records.write_text("".join(json.dumps({**row, "image": name}) + "\n" for row in rows))
        with pytest.raises(RunError, match="is not in the folder"):
            view_run(folder)


def test_another_model_by_now(reading: Path, tmp_path: Path) -> None:
    identity = json.loads((reading / "identity.json").read_text())
    (reading / "identity.json").write_text(json.dumps({**identity, "model": {"model.safetensors": "0"}}))
    with pytest.raises(RunError, match="not those of the run"):
        drawings.record_attention(reading)
