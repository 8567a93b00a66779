"""Verifying a run: each way in which it can be another one than it says is found, also by who writes a new manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnsteer import HeadSet, cli
from attnsteer.errors import RunError
from attnsteer.manifest import MANIFEST, manifest_of, read_manifest
from attnsteer.recipe import load_recipe
from attnsteer.results.verification import VERIFIED, Verification, verified, verify
from attnsteer.run import models, store
from attnsteer.run import run as start
from attnsteer.run.merging import files_of, read_timings
from attnsteer.run.score import Scores
from tests.run.running import READING, load, records


@pytest.fixture(scope="module")
def model() -> Any:
    """The model, loaded once."""
    from attnsteer.recipe.schema import ModelSpec

    return models.load(ModelSpec(zoo="shapes-lm", kind="lm", device="cpu"))


@pytest.fixture
def run(whole: Path, tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(models, "load", lambda *_, **__: model)
    return Path(shutil.copytree(whole, tmp_path / "run"))


def reseal(run: Path) -> None:
    """Write the manifest anew, as a forger would."""
    store.write_json(run / MANIFEST, manifest_of(run, files_of(run), "run"))


def failed(found: Verification) -> list[str]:
    return [c.name for c in found.checks if c.state == "fail"]


def rewrite(run: Path, change: Callable[[dict[str, Any]], None], arm: str = "method") -> None:
    rows = records(run)
    change(next(r for r in rows if r["arm"] == arm))
    store.write_lines(run / store.RECORDS, rows)


def flip(record: dict[str, Any]) -> None:
    """Another answer than the one that was given."""
    scores = record["scores"]
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    scores[best], scores[worst] = scores[worst], scores[best]


def rescore(run: Path) -> None:
    """Figures that follow from the records again."""
    from attnsteer.recipe.loading import load_recipe
    from attnsteer.run.folder import read_run

    found, plan = read_run(run), load(run / store.ARMS)
    made = Scores(
        load_recipe(run / store.RECIPE),
        plan,
        list(found.samples.values()),
        found.records,
        read_timings(run),
        found.audit["arms"],
    )
    store.write_json(run / store.METRICS, made.to_dict())


def test_a_run_is_what_it_says(run: Path) -> None:
    assert set(files_of(run)) == set(read_manifest(run)["files"]) >= {"records.jsonl", "metrics.json", "recipe.yaml"}
    found = verify(run)
    assert found.ok, found.checks
    assert [c.name for c in found.checks] == ["files", "records", "recipe", "metrics", "weights", "arms", "answers"]
    assert "48 answers to 12 samples given again" in found.checks[-1].text
    assert verified(run) == ("verified", found.when) and load(run / VERIFIED)["ok"] is True
    # A mark is of the folder as it was then.
    rewrite(run, flip)
    reseal(run)
    assert verified(run)[0] == "outdated"


def test_a_changed_record_is_found(run: Path) -> None:
    rewrite(run, flip)
    assert failed(verify(run, samples=0)) == ["files", "metrics"]
    reseal(run)
    assert failed(verify(run, samples=0)) == ["metrics"]
    # With figures to match and a new manifest, the answers give it away.
    rescore(run)
    reseal(run)
    found = verify(run)
    assert failed(found) == ["answers"] and "scores differs by" in found.checks[-1].text
    assert verified(run)[0] == "failed"


def test_a_missing_sample_is_found(run: Path) -> None:
    rows = records(run)
    store.write_lines(run / store.RECORDS, rows[:-1])
    reseal(run)
    found = verify(run, samples=0)
    assert "records" in failed(found) and "random-1 lacks 1 of 12 records" in found.checks[1].text
    # Of all arms, and of the samples as well.
    last = rows[-1]["id"]
    store.write_lines(run / store.RECORDS, [r for r in rows if r["id"] != last])
    lines = [json.loads(line) for line in (run / store.SAMPLES).read_text().splitlines()]
    store.write_lines(run / store.SAMPLES, [s for s in lines if s["id"] != last])
    reseal(run)
    assert "samples.jsonl is not what identity.json has the hash of" in verify(run, samples=0).checks[1].text


def test_another_recipe_is_found(run: Path) -> None:
    text = (run / store.RECIPE).read_text()
    assert "beta: 0.4" in text
    (run / store.RECIPE).write_text(text.replace("beta: 0.4", "beta: 0.9"))
    assert "files" in failed(verify(run, samples=0))
    reseal(run)
    found = verify(run)
    assert failed(found) == ["arms"] and "arms.2.interventions.0.params.beta" in found.checks[5].text
    # With arms to match, the answers are of another strength.
    (run / store.ARMS).write_text((run / store.ARMS).read_text().replace('"beta": 0.4', '"beta": 0.9'))
    reseal(run)
    assert failed(verify(run)) == ["answers"]


def test_other_weights_are_found(run: Path) -> None:
    identity = load(run / store.IDENTITY)
    identity["model"]["model.safetensors"] = "0" * 64
    store.write_json(run / store.IDENTITY, identity)
    reseal(run)
    found = verify(run)
    assert failed(found) == ["weights"] and "the model is another one: model.safetensors" in found.checks[4].text
    assert [c.state for c in found.checks[5:]] == ["not done", "not done"] and not found.ok


def test_figures_that_do_not_follow_are_found(run: Path) -> None:
    metrics = load(run / store.METRICS)
    metrics["arms"]["method"]["choice"]["accuracy"]["value"] += 0.01
    store.write_json(run / store.METRICS, metrics)
    reseal(run)
    found = verify(run, samples=0)
    assert failed(found) == ["metrics"] and "arms.method.choice.accuracy.value" in found.checks[3].text


def test_a_run_over_a_file_is_answered_again_from_its_own_samples(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a stranger's machine: neither the data nor the file of heads are there."""
    monkeypatch.setattr(models, "load", lambda *_, **__: model)
    made = tmp_path / "here"
    made.mkdir()
    rows = [
        {
            "question": f"a red star . a blue circle . what colour is the {s} ? answer",
            "choices": ["red", "blue"],
            "answer": n,
        }
        for n, s in enumerate(("star", "circle"))
    ]
    (made / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    HeadSet({1: [0, 2]}).save(made / "heads.safetensors")
    given = {**READING, "data": {"file": "data.jsonl", "format": "choices"}}
    given["interventions"] = [{"method": "ACT", "params": {"beta": 0.4}, "heads": "heads.safetensors"}]
    (made / "r.yaml").write_text(json.dumps(given))
    out = start(load_recipe(made / "r.yaml"), tmp_path / "run", progress=False)
    shutil.rmtree(made)
    found = verify(out)
    assert found.ok and "data.jsonl is not here" in found.checks[4].text, found.checks
    assert "8 answers to 2 samples given again" in found.checks[-1].text


def test_what_cannot_be_verified_says_what_to_do(run: Path, tmp_path: Path) -> None:
    (run / MANIFEST).unlink()
    found = verify(run, samples=0)
    assert "start the run again with the same command, which writes it" in found.checks[0].text
    status = load(run / store.STATUS)
    store.write_json(run / store.STATUS, {**status, "state": "interrupted"})
    with pytest.raises(RunError, match=r"interrupted.*finish it, then verify it"):
        verify(run)
    store.write_json(run / store.STATUS, status)
    (run / store.RECIPE).write_text((run / store.RECIPE).read_text().replace("schema: 1", "schema: 9", 1))
    with pytest.raises(
        RunError, match=r"another version: recipe.yaml has schema 9, this one reads 1; upgrade attnsteer\."
    ):
        verify(run)


def test_a_folder_that_cannot_be_written_is_verified_without_a_mark(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, value: Any) -> None:
        raise RunError(f"{path} could not be written: Permission denied.")

    monkeypatch.setattr(store, "write_json", refuse)
    found = verify(run, samples=0)
    assert found.checks[-1].name == "mark" and "Permission denied" in found.checks[-1].text


def test_the_command(run: Path) -> None:
    done = CliRunner().invoke(cli.app, ["verify", str(run)])
    assert done.exit_code == 0 and "\nverified at " in done.output, done.output
    assert "missing for a board: the recipe does not say where its settings were chosen" in done.output
    rewrite(run, flip)
    done = CliRunner().invoke(cli.app, ["verify", str(run), "--samples", "0"])
    assert done.exit_code == 1 and "NOT verified" in done.output and "FAIL" in done.output
    done = CliRunner().invoke(cli.app, ["verify", str(run.parent)])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
