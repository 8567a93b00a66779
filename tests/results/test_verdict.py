"""The verdict: controls decide, settings that were chosen on the test are marked, and the words are the same everywhere."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnsteer import cli
from attnsteer.errors import RunError
from attnsteer.results.comparison import compare
from attnsteer.results.reports import report
from attnsteer.results.reports.headline import headline
from attnsteer.results.reports.sample_browser import states
from attnsteer.results.verdict import WORDS, Verdict, verdict
from attnsteer.run.folder import read_run
from attnsteer.run.progress import Progress, span
from tests.results import folders


@pytest.fixture(scope="module")
def strong(tmp_path_factory: Any) -> Path:
    return folders.text_run(tmp_path_factory.mktemp("runs") / "strong")


def changed(source: Path, target: Path, **values: Any) -> Path:
    """A copy with other fields of metrics.json; `random`: of the method's difference from random heads."""
    shutil.copytree(source, target)
    found = json.loads((target / "metrics.json").read_text())
    for d in found["differences"]:
        if d["against"] == "random-1" and "random" in values:
            d["estimates"]["accuracy"] = values["random"]
    (target / "metrics.json").write_text(json.dumps({**found, **{k: v for k, v in values.items() if k != "random"}}))
    return target


def of(path: Path) -> Verdict:
    return verdict(read_run(path))


def test_a_gain_stands_only_against_its_controls(strong: Path, tmp_path: Path) -> None:
    assert of(strong).key == "better" and [c.state for c in of(strong).controls] == ["pass", "pass"]
    # As large against the baseline, but random heads have it too.
    near = changed(strong, tmp_path / "near", random={"value": 0.01, "low": -0.02, "high": 0.04})
    found = of(near)
    assert found.words == "No better than random" and "method minus random heads: +1.0 points" in found.reason
    worse = changed(strong, tmp_path / "worse", random={"value": -0.1, "low": -0.2, "high": -0.02})
    assert of(worse).key == "random" and of(worse).controls[1].state == "fail"
    moved = changed(strong, tmp_path / "moved", zero_equals_baseline=False)
    assert of(moved).words == "Invalid run" and "something else than the method differs" in of(moved).reason
    idle = changed(strong, tmp_path / "idle", unchanged=["method"])
    assert of(idle).words == "The method did nothing"
    # A zero that moved says that nothing of the run can be believed.
    both = changed(strong, tmp_path / "both", unchanged=["method"], zero_equals_baseline=False)
    assert of(both).key == "invalid"


def test_no_loss_is_excused_by_random_heads(strong: Path, tmp_path: Path) -> None:
    run = changed(strong, tmp_path / "run", random={"value": 0.0, "low": -0.1, "high": 0.1})
    found = json.loads((run / "metrics.json").read_text())
    for d in found["differences"]:
        if d["against"] == "baseline" and d["arm"] == "method":
            d["estimates"]["accuracy"] = {"value": -0.2, "low": -0.3, "high": -0.1}
    (run / "metrics.json").write_text(json.dumps(found))
    assert of(run).key == "worse"


@pytest.mark.parametrize(
    ("changes", "tuned", "words"),
    [
        ({"chosen": None}, True, "does not say on which split"),
        ({"chosen": "calibration"}, False, "chosen on the split calibration"),
        ({"chosen": "published"}, False, "as published"),
        ({"chosen": "unsearched"}, False, "without a search"),
        ({"chosen": "partly"}, False, "chosen in part on another split"),
    ],
)
def test_where_settings_were_chosen(tmp_path: Path, changes: dict[str, Any], tuned: bool, words: str) -> None:
    found = of(folders.text_run(tmp_path / "run", changes=changes))
    assert found.tuned is tuned and words in found.chosen
    assert found.words == ("Better (tuned on the test)" if tuned else "Better")


def test_the_best_of_a_sweep_is_tuned_whatever_the_recipe_says(tmp_path: Path) -> None:
    own = [{"method": "ACT", "params": {"beta": 0.5}, "zero": {"beta": 1.0}, "heads": "zoo:act"}]
    found = of(folders.text_run(tmp_path / "run", sweep=True, changes={"interventions": own}))
    assert found.best and found.tuned and found.chosen.startswith("best of 4 settings")


def test_shares_of_parsed_answers_and_guards_stand_beside(tmp_path: Path) -> None:
    run = folders.existence_run(tmp_path / "run")
    found = json.loads((run / "metrics.json").read_text())
    before, after = (found["arms"][a]["pope"]["unparsed"]["value"] for a in ("baseline", "method"))
    assert of(run).parsed == f"{100 * (1 - before):.1f} % → {100 * (1 - after):.1f} %"
    found["differences"][0]["guards"] = ["texts that loop rose from 0.0% to 40.0%"]
    (run / "metrics.json").write_text(json.dumps(found))
    lines = of(run).lines()
    assert any(line.startswith("parsed answers: ") for line in lines)
    assert "watch: texts that loop rose from 0.0% to 40.0%" in lines


def test_the_words_are_the_same_everywhere(strong: Path, tmp_path: Path) -> None:
    run = changed(strong, tmp_path / "run", random={"value": 0.01, "low": -0.02, "high": 0.04})
    words = WORDS["random"]
    page = report(run).read_text()
    assert f"<title>{words}: act/reading</title>" in page and f"**{words}: " in (run / "report.md").read_text()
    found = compare([strong, run], draws=200)
    assert [r.said.words for r in found.rows if r.said] == ["Better", words]
    assert words in found.markdown() and found.to_dict()["rows"][3]["said"]["verdict"] == "random"
    done = CliRunner().invoke(cli.app, ["compare", str(strong), str(run), "--page", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    shown = (tmp_path / "page.html").read_text()
    assert words in shown and "Against the run&#39;s own baseline" in shown and "<script" not in shown


def test_each_method_is_compared_with_its_own_baseline(strong: Path, tmp_path: Path) -> None:
    weak = folders.text_run(tmp_path / "weak", seed=3, gain=0.2, changes={"name": "act/weak"})
    found = compare([strong, weak], draws=200)
    for row, path in zip([r for r in found.rows if r.kind == "method"], (strong, weak), strict=True):
        metrics = json.loads((path / "metrics.json").read_text())
        wanted = next(d for d in metrics["differences"] if d["arm"] == "method")["estimates"]["accuracy"]["value"]
        assert row.own["choice.accuracy"].value == pytest.approx(wanted)


def test_a_clean_picture_of_something_else_is_no_gain(tmp_path: Path) -> None:
    run = folders.image_run(tmp_path / "run", changes={"primary": "layout.valid"})
    rows = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    for row in rows:
        row["valid"] = row["arm"] == "method"
    folders.lines(run / "records.jsonl", rows)
    found = read_run(run)
    metric = found.measures["layout"]
    right = {k: metric.sample(r)["right"] for k, r in found.records["method"].items()}
    assert {0, 1} == set(right.values())
    said = states(found, headline(found, set()))
    assert said == {k: "gained" if right[k] else "changed" for k in right}


def test_a_run_of_another_version_is_told_in_one_line(strong: Path, tmp_path: Path) -> None:
    newer = changed(strong, tmp_path / "newer", schema=7)
    with pytest.raises(
        RunError, match=r"another version: metrics.json has schema 7, this one reads 1; upgrade attnsteer"
    ):
        read_run(newer)
    older = changed(strong, tmp_path / "older", schema=0)
    with pytest.raises(RunError, match="run its recipe again with this version"):
        read_run(older)


def test_progress_without_a_terminal_is_lines() -> None:
    now, stream = [0.0], io.StringIO()
    shown = Progress(300, "act/reading", True, stream, clock=lambda: now[0])
    # Those of an earlier part of the run say nothing of the time.
    shown.update(50, new=False)
    for second in (10.0, 40.0, 50.0):
        now[0] = second
        shown.update(50)
    shown.update(100)
    assert stream.getvalue().splitlines() == [
        "act/reading: 150 of 300 answers (50 %), 0.4 s each, 60 s left",
        "act/reading: 300 of 300 answers (100 %), 0.2 s each",
    ]
    assert [span(s) for s in (0.2, 80, 900, 12_000)] == ["1 s", "80 s", "15 min", "3 h 20 min"]
    quiet = Progress(3, "x", False, io.StringIO())
    quiet.update(3)
    assert quiet.stream.getvalue() == ""
