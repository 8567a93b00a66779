"""Comparing runs: pairing, tests over the family, refusals, and damaged folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from attnsteer.errors import RunError
from attnsteer.evals.metrics import Metric, get_metric
from attnsteer.evals.significance import holm
from attnsteer.results.comparison import compare, recipe_differences
from attnsteer.run.folder import read_run
from tests.results import folders

WEAK = {"name": "act/weak", "interventions": [{"method": "ACT", "params": {"beta": 0.9}}]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    return {
        "strong": folders.text_run(base / "strong"),
        "weak": folders.text_run(base / "weak", seed=3, gain=0.2, changes=WEAK),
        "sweep": folders.text_run(base / "sweep", sweep=True),
        "existence": folders.existence_run(base / "existence"),
        "image": folders.image_run(base / "image"),
    }


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_differences_are_paired_and_tested(runs: dict[str, Path]) -> None:
    found = compare([runs["strong"], runs["weak"]], draws=500)
    assert found.paired == folders.COUNT and found.primary == "choice.accuracy" and not found.notes
    assert [(r.run, r.arm) for r in found.rows] == [
        ("act/reading", "baseline"),
        ("act/reading", "method"),
        ("act/weak", "baseline"),
        ("act/weak", "method"),
    ]
    (one,) = found.differences
    assert (one.row, one.against, one.metric) == (3, 1, "choice")
    # The same by hand.
    metric, read = get_metric("choice"), []
    for name in ("strong", "weak"):
        records = read_run(runs[name]).records["method"]
        read.append([metric.sample(records[0, f"r{i}"]) for i in range(folders.COUNT)])
    assert one.mcnemar == metric.mcnemar(*read) and one.p_holm == one.mcnemar.p
    change = sum(b["right"] - a["right"] for a, b in zip(*read, strict=True)) / folders.COUNT
    assert one.estimates["accuracy"].value == pytest.approx(change) and change < 0
    assert one.estimates["accuracy"].low <= change <= one.estimates["accuracy"].high
    assert found.recipes["interventions.0.params.beta"] == [0.4, 0.9]
    assert "name" not in found.recipes


def test_a_sweep_is_one_family(runs: dict[str, Path]) -> None:
    found = compare([runs["strong"], runs["sweep"]], draws=200)
    assert [r.values for r in found.rows if r.run == "sweep" and r.kind == "method"] == [
        {"interventions.0.params.beta": b} for b in (0.2, 0.4, 0.6, 0.8)
    ]
    tests = [d for d in found.differences if d.mcnemar is not None]
    assert len(tests) == 4
    assert [d.p_holm for d in tests] == holm([d.mcnemar.p for d in tests])


def test_questions_about_one_picture_are_one_answer_of_the_test(runs: dict[str, Path], tmp_path: Path) -> None:
    other = copy(runs["existence"], tmp_path / "other")
    plan = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(plan.replace("name: vhr/", "name: other/"))
    rows = [json.loads(line) for line in (other / "records.jsonl").read_text().splitlines()]
    right = read_run(runs["existence"]).records["method"]
    known = {i for (_, i), r in right.items() if r["generated"] == r["label"]}
    # Both answers about one picture are lost.
    chosen = next({f"p{i}-0", f"p{i}-1"} for i in range(20) if {f"p{i}-0", f"p{i}-1"} <= known)
    for row in rows:
        if row["arm"] == "method" and row["id"] in chosen:
            row["generated"] = "maybe"
    folders.lines(other / "records.jsonl", rows)
    found = compare([runs["existence"], other], draws=200)
    assert [d.mcnemar[:2] for d in found.differences if d.metric == "pope"] == [(0, 1)]
    assert any("groups (one picture, one sample under several seeds)" in n for n in found.notes)


def test_an_estimate_without_an_interval_has_none(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set of fewer than ten samples has a figure, of which nothing more can be said: not an interval of no width."""

    def bare(function: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> dict[str, float]:
            return {k: v.value for k, v in function(*args, **options).items()}

        return wrapped

    for name in ("aggregate", "compare"):
        monkeypatch.setattr(Metric, name, bare(getattr(Metric, name)))
    found = compare([runs["strong"], runs["weak"]], draws=200)
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    for part in ("rows", "differences"):
        for one in written[part]:
            assert {(e["low"], e["high"]) for e in one["estimates"].values()} == {(None, None)}
    value = found.differences[0].estimates["accuracy"]
    text = found.markdown()
    assert f"| {value:+.3f} " in text and "| 0.550 " in text and "0.550 [" not in text


def test_what_is_printed(runs: dict[str, Path]) -> None:
    found = compare([runs["strong"], runs["weak"]], draws=200)
    text = found.markdown()
    for part in ("40 paired records", "act/weak: method", "gained", "| interventions.0.params.beta", "0.0243"):
        assert part in text
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["rows"][0]["estimates"]["choice.accuracy"]["value"] == pytest.approx(0.55)
    assert set(written["differences"][0]["mcnemar"]) == {"gained", "lost", "p"}


def test_a_baseline_that_is_not_the_same_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    other = copy(runs["weak"], tmp_path / "other")
    rows = [json.loads(line) for line in (other / "records.jsonl").read_text().splitlines()]
    for row in rows:
        if row["arm"] == "baseline" and row["id"] in ("r0", "r1", "r2"):
            row["scores"] = row["scores"][::-1]
    folders.lines(other / "records.jsonl", rows)
    found = compare([runs["strong"], other], draws=200)
    assert any("the baseline of act/weak gives other numbers" in n for n in found.notes)
    assert [found.rows[d.row].kind for d in found.differences] == ["baseline", "method"]
    assert found.differences[0].p_holm is None and found.differences[1].p_holm is not None


def test_other_samples_only_when_told(runs: dict[str, Path], tmp_path: Path) -> None:
    other = copy(runs["weak"], tmp_path / "other")
    samples = [json.loads(line) for line in (other / "samples.jsonl").read_text().splitlines()]
    for s in samples[:10]:
        s["prompt"] += " ?"
    folders.lines(other / "samples.jsonl", samples)
    edit(other / "identity.json", samples="1" * 64)
    with pytest.raises(RunError, match=r"different samples \(40 and 40; 30 are equal\).*--other-samples"):
        compare([runs["strong"], other])
    found = compare([runs["strong"], other], other_samples=True, draws=200)
    assert found.paired == 30 and "compared on the equal ones" in found.notes[0]
    samples = [{**s, "id": f"x{s['id']}"} for s in samples]
    folders.lines(other / "samples.jsonl", samples)
    rows = [json.loads(line) for line in (other / "records.jsonl").read_text().splitlines()]
    folders.lines(other / "records.jsonl", [{**r, "id": f"x{r['id']}"} for r in rows])
    with pytest.raises(RunError, match="no sample in common"):
        compare([runs["strong"], other], other_samples=True)


def test_other_models_only_when_told(runs: dict[str, Path], tmp_path: Path) -> None:
    other = copy(runs["weak"], tmp_path / "other")
    edit(other / "identity.json", model={"model.safetensors": "another"})
    with pytest.raises(RunError, match=r"different models .*--other-model"):
        compare([runs["strong"], other])
    assert "different models" in compare([runs["strong"], other], other_model=True, draws=200).notes[0]
    edit(other / "identity.json", model={"model.safetensors": "shapes-lm"}, tiny=True)
    with pytest.raises(RunError, match="a tiny stand-in"):
        compare([runs["strong"], other])


def test_unfinished_runs_only_when_told(runs: dict[str, Path], tmp_path: Path) -> None:
    other = folders.text_run(tmp_path / "other", seed=3, state="interrupted", changes=WEAK)
    part = other / "records-0.jsonl"
    # Cut off in the middle of a line, as a kill does.
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(RunError, match=r"act/weak is interrupted.*--partial"):
        compare([runs["strong"], other])
    found = compare([runs["strong"], other], partial=True, draws=200)
    assert "interrupted" in found.notes[0] and found.paired == folders.COUNT


def test_runs_that_cannot_be_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="two runs or more"):
        compare([runs["strong"]])
    with pytest.raises(RunError, match="more than once"):
        compare([runs["strong"], runs["strong"]])
    with pytest.raises(RunError, match="different samples"):
        compare([runs["strong"], runs["existence"]])
    other = copy(runs["weak"], tmp_path / "other")
    plan = (
        (other / "recipe.yaml")
        .read_text()
        .replace("- choice\n", "- fluency\n")
        .replace("choice.accuracy", "fluency.length")
    )
    (other / "recipe.yaml").write_text(plan)
    edit(other / "metrics.json", primary="fluency.length")
    with pytest.raises(RunError, match=r"primary metric choice .* is not computed by every run"):
        compare([runs["strong"], other])


DAMAGE = {
    "recipe.yaml": (b"a: [", r"recipe\.yaml is damaged"),
    "status.json": (b'{"state": "odd"}', "the state is 'odd'"),
    "arms.json": (b"{}", 'no list "arms"'),
    "metrics.json": (b"[" * 100_000, "is damaged"),
    "identity.json": (b"[]", "holds no JSON object"),
    "samples.jsonl": (b'{"id": "r0"}\n{"id', "line 2 is damaged"),
    "records.jsonl": (b'{"arm": "baseline", "id": "r0"}\n', "line 1 has no seed"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_missing_file(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    other = copy(runs["weak"], tmp_path / "other")
    content, message = DAMAGE[name]
    (other / name).write_bytes(content)
    with pytest.raises(RunError, match=message):
        compare([runs["strong"], other])
    (other / name).unlink()
    with pytest.raises(RunError, match=r"is missing; start the run again|has no recipe\.yaml"):
        compare([runs["strong"], other])


def test_records_that_do_not_belong(runs: dict[str, Path], tmp_path: Path) -> None:
    other = copy(runs["weak"], tmp_path / "other")
    line = (other / "records.jsonl").read_text().splitlines()[0]
    for more, message in (
        (line, "two records of arm baseline, seed 0, sample r0"),
        (json.dumps({**json.loads(line), "id": "r999"}), "records of r999"),
        (json.dumps({**json.loads(line), "arm": "other"}), "records of the arms other"),
    ):
        records = copy(runs["weak"], tmp_path / f"{len(message)}")
        with (records / "records.jsonl").open("a") as file:
            file.write(more + "\n")
        with pytest.raises(RunError, match=message):
            read_run(records)
    with pytest.raises(RunError, match="is not a folder"):
        read_run(tmp_path / "nowhere")


def test_differences_of_nested_recipes() -> None:
    one = {"a": {"b": [1, 2]}, "c": [{"d": 1}, {"d": 2}], "name": "x", "e": {}}
    two = {"a": {"b": [1, 3]}, "c": [{"d": 1}], "name": "y", "e": {"f": 1}}
    assert recipe_differences([one, two]) == {"a.b": [[1, 2], [1, 3]], "c.1.d": [2, None], "e.f": [None, 1]}
