"""Evaluations of lm-evaluation-harness as run folders: what its samples say is what report, board and verify get."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from attnsteer import ACT, HeadSet
from attnsteer.errors import RecordError, RunError
from attnsteer.results.boards import board
from attnsteer.results.lm_eval_runs import write_lm_eval_run
from attnsteer.results.reports import report
from attnsteer.results.verification import verify
from attnsteer.run.folder import read_run

CHOICES = [" red", " blue", " green"]


def logged(right: float, seed: int, as_file: bool = False, count: int = 40) -> list[dict[str, Any]]:
    """Samples as the harness logs them: in its results a list of pairs, in the file a mapping of mappings."""
    draw, found = random.Random(seed), []
    for i in range(count):
        target = i % 3
        best = target if draw.random() < right else (target + 1) % 3
        pairs = [(f"question {i} answer", c) for c in CHOICES]
        arguments: Any = pairs
        if as_file:
            arguments = {f"gen_args_{n}": {"arg_0": a, "arg_1": b} for n, (a, b) in enumerate(pairs)}
        resps = [[-1.0 if k == best else -3.0, k == best] for k in range(3)]
        line = {"doc_id": i, "doc_hash": f"h{i}", "target": str(target) if as_file else target, "arguments": arguments}
        found.append({**line, "filtered_resps": resps, "acc": float(best == target)})
    return found


def write(out: Path, **changes: Any) -> Path:
    given: dict[str, Any] = {
        "baseline": logged(0.4, 1),
        "method": logged(0.9, 2),
        "interventions": [ACT(HeadSet({1: [2]}))],
    }
    return write_lm_eval_run(out, task="arc_easy", model="owner/model", **{**given, **changes})


def test_figures_are_the_harnesss(tmp_path: Path) -> None:
    lines = logged(0.9, 2, as_file=True)
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = write(tmp_path / "run", method=tmp_path / "samples.jsonl", chosen="validation")
    found = read_run(run)
    for arm, given in (("baseline", logged(0.4, 1)), ("method", lines)):
        wanted = sum(line["acc"] for line in given) / len(given)
        assert found.metrics["arms"][arm]["choice"]["accuracy"]["value"] == pytest.approx(wanted)
    assert found.arms["method"]["interventions"][0]["heads"] == {"1": [2]} and found.complete
    assert "Better" in report(run).read_text()
    (row,) = board([run]).rows
    assert row["words"] == "Better" and row["chosen"] == "chosen on the split validation" and row["controls"] == []
    checks = {c.name: c.state for c in verify(run, samples=0).checks}
    assert {k: checks[k] for k in ("files", "records", "recipe", "metrics")} == dict.fromkeys(
        ("files", "records", "recipe", "metrics"), "pass"
    )


def generated(right: float, seed: int, lmms: bool = False) -> list[dict[str, Any]]:
    """Samples of a task that generates: lmms-eval gives its figure inside a mapping, and keeps the prompt under `input`."""
    out = []
    for line in logged(right, seed):
        asked, value = line.pop("arguments")[0][0], line.pop("acc")
        figure = {"question_id": line["doc_id"], "score": value, "prediction": "yes"} if lmms else value
        given = {"input": asked} if lmms else {"arguments": [(asked, {"until": ["."]})]}
        out.append({**line, **given, "filtered_resps": "yes" if lmms else ["yes"], "exact_match": figure})
    return out


@pytest.mark.parametrize("lmms", [False, True], ids=["lm-eval", "lmms-eval"])
def test_other_tasks_keep_the_harnesss_own_figure(tmp_path: Path, lmms: bool) -> None:
    before, after = generated(0.4, 1, lmms), generated(0.9, 2, lmms)
    run = write(
        tmp_path / "run",
        baseline=before,
        method=after,
        metric="exact_match",
        kind="vlm" if lmms else "lm",
        chosen="validation",
    )
    found = read_run(run)
    wanted = sum(line["acc"] for line in logged(0.9, 2)) / 40
    assert found.metrics["arms"]["method"]["given"]["mean"]["value"] == pytest.approx(wanted)
    assert found.metrics["primary"] == "given.mean" and found.records["method"][0, "arc_easy-0"]["generated"] == "yes"
    (row,) = board([run]).rows
    assert row["words"] == "Better" and "yes" in report(run).read_text()
    checks = {c.name: (c.state, c.text) for c in verify(run, seal=False).checks}
    assert checks["metrics"][0] == "pass" and checks["answers"][0] == "not done"
    assert ("lmms-eval" if lmms else "lm-eval") + " asked the questions" in checks["answers"][1]


def test_what_does_not_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="over other documents"):
        write(tmp_path / "a", method=logged(0.9, 2, count=39))
    other = logged(0.9, 2)
    other[3]["arguments"] = [("another question", c) for c in CHOICES]
    with pytest.raises(RecordError, match="document 3 was asked in other words"):
        write(tmp_path / "b", method=other)
    with pytest.raises(RecordError, match=r"no number 'f1'; its numbers are acc"):
        write(tmp_path / "c", metric="f1")
    with pytest.raises(RecordError, match="is no question with choices"):
        write(tmp_path / "c", baseline=[{**line, "target": "a text"} for line in logged(0.4, 1)])
    with pytest.raises(RecordError, match="has no samples"):
        write(tmp_path / "d", baseline=[])
    run = write(tmp_path / "run")
    with pytest.raises(RunError, match="new or empty"):
        write(run)
