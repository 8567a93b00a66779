"""A method that changed nothing: it is found by the audit, and said wherever figures of the run are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnsteer import cli
from attnsteer.results import compare, report
from attnsteer.results.readme_tables import results_table
from attnsteer.run import run
from attnsteer.run.changes import changed_calls
from attnsteer.run.merging import sum_audits
from attnsteer.run.score import Scores
from tests.run.running import load, recipe, written
from tests.run.test_score import choices, samples

# A share that every row reaches, so that nothing is ever lifted.
IDLE: dict[str, Any] = {
    "interventions": [{"method": "SpotLight", "params": {"spans": {"sample": "spans"}, "target": 0.0}}],
    "controls": {"zero": False, "random_heads": 0},
    "data": {"zoo": "reading", "limit": 4, "options": {"task": "lookup"}},
}


def site(**counts: Any) -> dict[str, Any]:
    return {"sites": {"layers.0": {"calls": 4, "edits": 3, **counts}}}


@pytest.mark.parametrize(
    ("audit", "expected"),
    [
        ([site()], 3),
        ([site(changed=0)], 0),
        ([site(changed=2), site(changed=1)], 3),
        ([site(edits=0), {"sites": {}, "latent updates": 5}], 5),
        ([{"sites": {}, "guided calls": 8}], None),
        ([{"sites": {}, "guided calls": 8, "inside passes": 8}], 0),
        # A block left out of the weak pass: no attention is edited, the prediction is another.
        ([{**site(edits=0, changed=0), "guided calls": 8, "inside passes": 5, "changed": 5}], 5),
        ([{**site(edits=0, changed=0), "guided calls": 8, "inside passes": 5, "changed": 0}], 0),
        ([site(edits=0, compiled=True)], None),
        ([], None),
    ],
)
def test_changes_are_read_from_the_audit(audit: list[dict[str, Any]], expected: int | None) -> None:
    assert changed_calls(audit) == expected


def test_changes_of_batches_add_up() -> None:
    one = {**site(changed=1, rows=8, heads=2, path="bias"), "intervention": "ACT(beta=0.4)"}
    lines = [{"arm": "method", "interventions": [one]}] * 3 + [{"arm": "random-1", "interventions": [one]}]
    (found,) = sum_audits("method", lines)
    assert found["sites"]["layers.0"]["changed"] == 3 and found["sites"]["layers.0"]["edits"] == 9
    assert changed_calls([found]) == 3


@pytest.fixture(scope="module")
def idle(tmp_path_factory: Any) -> Path:
    base = tmp_path_factory.mktemp("idle")
    return run(recipe(base, **IDLE), base / "run", progress=False)


def test_metrics_name_the_arms_that_changed_nothing(idle: Path, whole: Path) -> None:
    found = load(idle / "metrics.json")
    assert found["unchanged"] == ["method"] and found["changed_calls"] == {"method": 0}
    assert any("changed nothing" in w for w in found["warnings"])
    acting = load(whole / "metrics.json")
    assert acting["unchanged"] == [] and acting["changed_calls"]["method"] > 0 == acting["changed_calls"]["zero"]


def test_the_report_begins_with_it(idle: Path) -> None:
    page = report(idle).read_text()
    text = (idle / "report.md").read_text()
    for shown in (page, text):
        assert "The method did nothing" in shown and "No difference" not in shown
        assert "no difference seen" not in shown.partition("Every figure with its 95 % interval")[0].lower()
    lines = [line for line in text.splitlines() if line]
    assert lines[1].startswith("> **The method did nothing.**")


def test_the_command_says_so_and_exits_with_1(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["run", str(written(tmp_path, **IDLE)), "--out", str(tmp_path / "run")])
    assert done.exit_code == 1 and "verdict: The method did nothing" in done.output
    # A tiny run tests the recipe, not the method.
    tiny = [
        "run",
        str(written(tmp_path, **IDLE)),
        "--out",
        str(tmp_path / "tiny"),
        "--tiny",
    ]
    assert CliRunner().invoke(cli.app, tiny).exit_code == 0


def test_a_control_that_differs_has_a_status_of_its_own(tmp_path: Path) -> None:
    """Here the user's zero is none."""
    acting = {
        **IDLE["interventions"][0],
        "params": {"spans": {"sample": "spans"}, "target": 0.9},
        "zero": {"target": 0.5},
    }
    path = written(tmp_path, **{**IDLE, "interventions": [acting], "controls": {"zero": True}})
    done = CliRunner().invoke(cli.app, ["run", str(path), "--out", str(tmp_path / "run")])
    assert done.exit_code == 3 and "verdict: Invalid run" in done.output, done.output


def test_comparisons_and_tables_say_so(idle: Path, tmp_path: Path) -> None:
    acting = {**IDLE["interventions"][0], "params": {"spans": {"sample": "spans"}, "target": 0.9}}
    other = run(
        recipe(tmp_path / "recipes", **{**IDLE, "interventions": [acting], "name": "test/acting"}),
        tmp_path / "other",
        progress=False,
    )
    found = compare([other, idle])
    assert [r.unchanged for r in found.rows] == [False, False, False, True]
    assert "method, changed nothing" in found.markdown() and found.to_dict()["rows"][3]["unchanged"] is True
    assert any("in test/reading" in note for note in found.notes)
    (tmp_path / "table").mkdir()
    written(tmp_path / "table", **IDLE)
    row = results_table(tmp_path / "table", idle.parent).splitlines()[-1]
    assert "changed nothing" in row


def metrics(
    folder: Path, kinds: tuple[str, ...], audits: dict[str, Any], right: dict[str, list[int]]
) -> dict[str, Any]:
    """metrics.json of one point over the samples of `right`."""
    arms = [{"id": k, "kind": k, "decoding": {}} for k in kinds]
    plan = {"arms": arms, "points": [{"point": 0, "values": {}, "arms": {k: k for k in kinds}}]}
    own = recipe(folder, controls={})
    count = len(right["baseline"])
    return Scores(own, plan, samples(count), choices({a: [r] for a, r in right.items()}), [], audits).to_dict()


def test_where_the_audit_cannot_tell_the_answers_do(tmp_path: Path) -> None:
    around = {"method": [{"intervention": "X", "sites": {}, "guided calls": 2}]}
    equal = metrics(tmp_path, ("baseline", "method"), around, {"baseline": [1, 0], "method": [1, 0]})
    assert equal["unchanged"] == ["method"] and equal["changed_calls"] == {"method": None}
    other = metrics(tmp_path, ("baseline", "method"), around, {"baseline": [1, 0], "method": [1, 1]})
    assert other["unchanged"] == []
    # Equal answers alone are no sign: the calls were changed.
    acted = metrics(tmp_path, ("baseline", "method"), {"method": [site()]}, {"baseline": [1, 0], "method": [1, 0]})
    assert acted["unchanged"] == []


def test_one_of_two_methods_that_did_nothing_is_named(tmp_path: Path) -> None:
    audits = {"method": [{"intervention": "ACT", **site()}, {"intervention": "PASTA", **site(changed=0)}]}
    found = metrics(tmp_path, ("baseline", "method"), audits, {"baseline": [1, 0], "method": [1, 1]})
    assert found["unchanged"] == [] and "PASTA of the arm method changed nothing" in found["warnings"]


@pytest.mark.parametrize(("counts", "alert"), [({"changed": 0}, False), ({"changed": 2}, True), ({}, False)])
def test_a_zero_control_that_acts_is_an_alert(tmp_path: Path, whole: Path, counts: dict[str, int], alert: bool) -> None:
    """Edits that left everything as it was are no change; where changes are not counted, nothing is claimed."""
    right = {"baseline": [1, 0], "zero": [1, 0], "method": [1, 1]}
    audits = {"zero": [site(**counts)], "method": [site()]}
    found = metrics(tmp_path, ("baseline", "zero", "method"), audits, right)
    assert found["unchanged"] == []
    assert any("zero strength changed something in 2 calls" in w for w in found["warnings"]) == alert

    own = tmp_path / "run"
    shutil.copytree(whole, own)
    audit, figures = load(own / "audit.json"), load(own / "metrics.json")
    audit["arms"]["zero"] = audits["zero"]
    figures["changed_calls"]["zero"] = changed_calls(audits["zero"])
    for name, value in (("audit.json", audit), ("metrics.json", figures)):
        (own / name).write_text(json.dumps(value))
    assert (
        "<strong>Invalid run</strong> At zero strength the method changed something" in report(own).read_text()
    ) == alert
