"""Boards: which runs share a block, what a cell says, ties, filters, and that nothing of a run acts in the page."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from attnsteer import cli
from attnsteer.errors import RunError
from attnsteer.manifest import problems_of, read_manifest
from attnsteer.recipe.loading import load_recipe
from attnsteer.recipe.locate import locate
from attnsteer.recipe.validate import with_values
from attnsteer.results.boards import board, letter_groups, runs_in, write_board
from attnsteer.results.reports import report
from tests.results import browser, folders
from tests.results.test_verdict import changed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Path:
    """Readings by two methods, one of which random heads equal; others by other tasks."""
    base = tmp_path_factory.mktemp("runs")
    folders.text_run(base / "act/strong")
    weak = folders.text_run(base / "made", seed=3, gain=0.2, changes={"name": "act/weak"})
    near = {"value": 0.01, "low": -0.02, "high": 0.04}
    changed(base / "act/strong", base / "act/lucky", random=near)
    shutil.move(weak, base / "act/weak")
    folders.existence_run(base / "vhr/existence")
    folders.caption_run(base / "var/captions")
    report(base / "act/strong")
    return base


def test_blocks_hold_comparable_runs_only(runs: Path, tmp_path: Path) -> None:
    found = board([runs])
    assert [(b["model"], b["task"], len(b["rows"])) for b in found.blocks] == [
        ("shapes-lvlm", "captions, test", 1),
        ("shapes-lvlm", "existence, test", 1),
        ("shapes-lm", "reading, test", 3),
    ]
    # Other samples under the same name are another block.
    other = Path(shutil.copytree(runs / "act/strong", tmp_path / "other"))
    identity = json.loads((other / "identity.json").read_text())
    (other / "identity.json").write_text(json.dumps({**identity, "samples": "1" * 64}))
    assert len(board([runs / "act", other]).blocks) == 2
    (other / "identity.json").write_text(json.dumps({**identity, "model": {"model.safetensors": "other"}}))
    assert len(board([runs / "act", other]).blocks) == 2


def test_no_cell_is_better_whose_random_control_is_as_good(runs: Path) -> None:
    rows = {r["path"].rpartition("/")[2]: r for r in board([runs / "act"]).rows}
    assert rows["strong"]["words"] == "Better" and rows["lucky"]["words"] == "No better than random"
    for row in board([runs]).rows:
        if row["verdict"] == "better":
            assert all(c["state"] == "pass" for c in row["controls"])
    metrics = json.loads((runs / "act/strong/metrics.json").read_text())
    assert rows["strong"]["difference"] in [d["estimates"]["accuracy"] for d in metrics["differences"]]
    assert rows["strong"]["time"] == metrics["cost"]["method"]["relative"] and rows["strong"]["memory_mb"] == 412.0
    assert rows["strong"]["verified"] == "not verified"


def test_the_runs_that_come_with_the_project_are_what_they_say() -> None:
    """Each is whole, what was verified of them is as it was then, and they hold nothing of the machine that made them."""
    base = Path(__file__).parents[2] / "docs" / "board" / "runs"
    found = board([base])
    assert not found.left_out and {b["model"] for b in found.blocks} >= {"shapes-lm", "shapes-sd", "smollm2-135m"}
    for row in found.rows:
        path = Path(row["path"])
        assert not problems_of(path, read_manifest(path)) and row["verified"] in ("verified", "not verified"), path
        assert row["verdict"] != "better" or all(c["state"] == "pass" for c in row["controls"]), path
        assert not re.search(r"\s['\"]?/\w+/", (path / "recipe.yaml").read_text()), path


def test_runs_of_earlier_versions_go_on() -> None:
    """A field that a recipe gets later does not make its old runs those of another recipe."""
    base = Path(__file__).parents[2] / "docs" / "board" / "runs"
    # Those of the embedded models are older than the first release of the schema.
    for path in sorted(p.parent for p in base.glob("*/smollm-*/recipe.yaml")):
        run = yaml.safe_load((path / "recipe.yaml").read_text())
        # What each run was started with, besides its name.
        chosen = {"data.limit": run["data"]["limit"], "data.options": run["data"]["options"], "seeds": run["seeds"]}
        recipe = with_values(load_recipe(locate(f"{path.parent.name}/{path.name}")), chosen)
        assert recipe.digest() == json.loads((path / "identity.json").read_text())["recipe"], path


def test_ties_are_letters() -> None:
    apart = {(0, 2), (0, 3), (1, 3)}
    found = letter_groups([0, 1, 2, 3], lambda i, j: (i, j) in apart or (j, i) in apart)
    assert found == {0: "a", 1: "ab", 2: "bc", 3: "c"}
    for i in range(4):
        for j in range(i):
            assert bool(set(found[i]) & set(found[j])) == ((j, i) not in apart)
    assert letter_groups([5, 7], lambda i, j: False) == {5: "a", 7: "a"}
    assert letter_groups([5, 7], lambda i, j: True) == {5: "a", 7: "b"}


def test_equal_answers_are_a_tie(runs: Path) -> None:
    (block,) = board([runs / "act"]).blocks
    rows = {r["path"].rpartition("/")[2]: r["ties"] for r in block["rows"]}
    assert set(rows["strong"]) & set(rows["lucky"]) and rows["strong"] == rows["lucky"]


def test_what_is_left_out_says_why(runs: Path, tmp_path: Path) -> None:
    folders.text_run(tmp_path / "tiny", tiny=True)
    folders.text_run(tmp_path / "half", state="interrupted")
    newer = Path(shutil.copytree(runs / "act/strong", tmp_path / "newer"))
    (newer / "metrics.json").write_text(json.dumps({**json.loads((newer / "metrics.json").read_text()), "schema": 4}))
    found = board([runs / "act/strong", tmp_path])
    assert len(found.rows) == 1
    why = {Path(p).name: w for p, w in found.left_out}
    assert "tiny stand-in" in why["tiny"] and "interrupted" in why["half"] and "upgrade attnsteer" in why["newer"]
    with pytest.raises(RunError, match=r"none of .* has a finished run for a board"):
        board([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no run folder and has none below"):
        runs_in([tmp_path / "empty"])


def test_the_page_and_its_figures(runs: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    done = CliRunner().invoke(cli.app, ["board", str(runs), "--out", str(tmp_path / "board.html")])
    assert done.exit_code == 0 and "5 runs in 3 blocks" in done.output and time.monotonic() - begun < 30
    page, found = (tmp_path / "board.html").read_text(), json.loads((tmp_path / "board.json").read_text())
    assert found["blocks"] == json.loads(json.dumps(board([runs], out=tmp_path / "board.html").blocks))
    for words in ("No better than random", "reading, test", "board.json", "not verified"):
        assert words in page
    assert 'href="../' in page and "report.html" in page and "url(" not in page


HOSTILE = "</script><script>document.title='owned'</script>"


@pytest.mark.skipif(browser.program() is None, reason="no Chromium")
def test_it_opens_without_an_error_and_filters(runs: Path, tmp_path: Path) -> None:
    samples = folders.text_run(tmp_path / "hostile")
    plan = (samples / "recipe.yaml").read_text().replace("method: ACT", f'method: "{HOSTILE}"')
    (samples / "recipe.yaml").write_text(plan)
    write_board([runs, samples], tmp_path / "board.html")
    shown = "[...document.querySelectorAll('tr[data-method]')].filter(n => n.offsetParent).length"
    with browser.Browser() as page:
        for width in (1280, 420):
            page.open(tmp_path / "board.html", width)
            assert page.errors == [] and len(page.requests) == 1
            assert page.js("document.documentElement.scrollWidth") <= width
            assert page.js(shown) == 6 and "owned" not in page.js("document.title")
        choose = "(f => {{ f.value = {!r}; f.dispatchEvent(new Event('change')) }})(document.querySelector('[data-filter={}]'))"
        page.js(choose.format("random", "verdict"))
        assert page.js(shown) == 1
        page.js(choose.format("", "verdict"))
        page.js(choose.format("captions, test", "task"))
        assert page.js(shown) == 1 and "1 of 6" in page.js("document.getElementById('shown').textContent")
