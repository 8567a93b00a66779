"""Runs: what lies in the folder, controls, resuming, interruption, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnsteer.errors import NeverFired, RecipeError, RunError
from attnsteer.runner import run, store
from attnsteer.runner.runs import prepare
from tests.runner.running import READING, figures, load, recipe, records, written

ROOT = Path(__file__).parents[2]
LVLM = {"zoo": "shapes-lvlm", "kind": "vlm", "device": "cpu"}
EXISTENCE = {
    "model": LVLM,
    "data": {"zoo": "existence", "limit": 8, "options": {"kind": "adversarial"}},
    "task": "answer",
    "interventions": [{"method": "VHR", "params": {"alpha": 1.3}}],
    "controls": {"zero": True},
    "decoding": {"max_new_tokens": 1},
    "metrics": ["pope"],
    "primary": "pope.accuracy",
}
CAPTIONS = {
    **EXISTENCE,
    "data": {"zoo": "captions", "limit": 4},
    "task": "caption",
    "decoding": {"max_new_tokens": 24},
    "metrics": ["chair", "fluency"],
    "primary": "chair.chair_i",
    "batch_size": 2,
}
LAYOUTS = {
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the recipe of passages."""
    base = tmp_path_factory.mktemp("whole")
    return run(recipe(base), base / "run", progress=False)


# ------------------------------------------------------------------------------------------------ the folder


def test_a_run_leaves_the_agreed_files_and_no_others(whole: Path) -> None:
    names = {p.name for p in whole.iterdir()}
    assert names == {
        ".lock",
        "recipe.yaml",
        "identity.json",
        "environment.json",
        "status.json",
        "arms.json",
        "samples.jsonl",
        "records.jsonl",
        "timings.jsonl",
        "audit.json",
        "metrics.json",
    }
    status = load(whole / "status.json")
    assert (status["state"], status["done"], status["total"]) == ("complete", 48, 48)


def test_records_are_in_the_order_seed_batch_arm_sample(whole: Path) -> None:
    found = [(r["arm"], r["id"]) for r in records(whole)]
    ids = [f"reading-lookup-test-{i}" for i in range(12)]
    arms = ["baseline", "zero", "method", "random-1"]
    assert found == [(a, i) for b in range(3) for a in arms for i in ids[4 * b : 4 * b + 4]]


def test_scores_are_the_log_likelihoods_of_the_letters(whole: Path) -> None:
    import torch

    from attnsteer import zoo
    from attnsteer.zoo.shapes.reading import reading

    model, tokenizer = zoo.load("shapes-lm")
    for index in (0, 7):
        item = reading("test", index)
        with torch.no_grad():
            logits = model(**tokenizer(item.prompt, return_tensors="pt")).logits[0, -1].log_softmax(-1)
        wanted = logits[tokenizer.convert_tokens_to_ids(list(item.choices))]
        record = next(r for r in records(whole) if r["arm"] == "baseline" and r["id"] == f"reading-lookup-test-{index}")
        torch.testing.assert_close(torch.tensor(record["scores"]), wanted, atol=2e-4, rtol=0)
        assert record["answer"] == item.answer


def test_metrics_say_what_the_records_say(whole: Path) -> None:
    found = load(whole / "metrics.json")
    right = [r["scores"].index(max(r["scores"])) == r["answer"] for r in records(whole) if r["arm"] == "method"]
    assert found["arms"]["method"]["choice"]["accuracy"]["value"] == sum(right) / 12
    assert found["zero_equals_baseline"] is True and not found["partial"]
    pairs = {(d["arm"], d["against"]) for d in found["differences"]}
    assert pairs == {("method", "baseline"), ("zero", "baseline"), ("random-1", "baseline"), ("method", "random-1")}
    assert {c["unit"] for c in found["cost"].values()} == {"samples"}
    assert found["cost"]["baseline"]["relative"] == 1.0


def test_the_first_batch_of_an_arm_does_not_count_in_the_cost(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "timings.jsonl").read_text().splitlines()]
    warm = [t for t in lines if t["arm"] == "method"][1:]
    cost = load(whole / "metrics.json")["cost"]["method"]["seconds_per_sample"]
    assert cost == pytest.approx(sum(t["seconds"] for t in warm) / 8)


def test_the_audit_counts_over_all_batches(whole: Path) -> None:
    arms = load(whole / "audit.json")["arms"]
    (site,) = arms["method"][0]["sites"].values()
    assert site["calls"] == site["edits"] == 3 and arms["baseline"] == []
    (idle,) = arms["zero"][0]["sites"].values()
    assert idle["calls"] == 3 and idle["edits"] == 0


def test_a_run_again_changes_nothing(whole: Path) -> None:
    before = (whole / "records.jsonl").stat().st_mtime_ns, figures(whole)
    base = recipe(whole.parent)
    run(base, whole, progress=False)
    assert figures(whole) == before[1] and len(records(whole)) == 48


# ------------------------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize("changes", [EXISTENCE, CAPTIONS, LAYOUTS], ids=["existence", "captions", "layouts"])
def test_at_zero_strength_every_embedded_model_answers_as_the_baseline(tmp_path: Path, changes: Any) -> None:
    out = run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    found = load(out / "metrics.json")
    assert found["zero_equals_baseline"] is True
    by_arm: dict[str, list[Any]] = {}
    for r in records(out):
        by_arm.setdefault(r["arm"], []).append({k: v for k, v in r.items() if k not in ("arm", "image")})
    assert by_arm["zero"] == by_arm["baseline"]
    if changes["task"] != "answer":
        assert by_arm["method"] != by_arm["baseline"]


def test_a_picture_does_not_depend_on_its_batch_and_is_on_the_disk(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    only = {**LAYOUTS, "controls": {"zero": False}}
    first = run(recipe(tmp_path, **only), tmp_path / "a", progress=False)
    second = run(recipe(tmp_path, **{**only, "batch_size": 1}), tmp_path / "b", progress=False)
    for one, two in zip(
        records(first), sorted(records(second), key=lambda r: (r["id"][-1] == "2", r["arm"])), strict=True
    ):
        pictures = [np.asarray(Image.open(f / r["image"])).astype(int) for f, r in ((first, one), (second, two))]
        assert one["image"] == two["image"] and pictures[0].shape == (64, 64, 3)
        # Convolutions over batches of other sizes round differently.
        assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_seeds_give_other_pictures_and_are_summarised(tmp_path: Path) -> None:
    out = run(
        recipe(tmp_path, **{**LAYOUTS, "seeds": [0, 5], "controls": {"zero": False}}), tmp_path / "run", progress=False
    )
    found = load(out / "metrics.json")
    pixels = {(r["seed"], r["id"]): r["pixels"] for r in records(out) if r["arm"] == "baseline"}
    assert len(set(pixels.values())) == 6
    assert len(found["seeds"]["baseline"]["layout.valid"]["values"]) == 2
    assert found["samples"] == 3


def test_choices_of_several_tokens_are_scored_exactly(tmp_path: Path) -> None:
    import torch

    from attnsteer import zoo

    rows = [
        {"id": "a", "question": "a red circle .", "choices": ["the circle is red", "no"], "answer": 0},
        {"id": "b", "question": "two blue stars .", "choices": ["yes", "the star is blue ."], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"file": "rows.jsonl", "format": "choices"}
    changes = {"data": data, "prompt": "{question}", "controls": {"zero": True}}
    out = run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    model, tokenizer = zoo.load("shapes-lm")
    for row in rows:
        record = next(r for r in records(out) if r["id"] == row["id"] and r["arm"] == "baseline")
        for choice, score in zip(row["choices"], record["scores"], strict=True):
            ids = tokenizer(f"{row['question']} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                p = model(input_ids=ids).logits[0].log_softmax(-1)
            count = len(choice.split())
            at = range(ids.shape[1] - count, ids.shape[1])
            assert score == pytest.approx(float(sum(p[i - 1, ids[0, i]] for i in at)), abs=1e-4)


def test_a_sweep_shares_what_its_points_have_in_common(tmp_path: Path) -> None:
    changes = {"sweep": {"interventions.0.params.beta": [0.2, 0.6]}, "controls": {"zero": True}}
    out = run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    found = load(out / "metrics.json")
    assert set(found["arms"]) == {"baseline", "zero", "method@1", "method@2"}
    tested = [d for d in found["differences"] if (d["arm"], d["against"]) == ("method", "baseline")]
    assert [d["point"] for d in tested] == [0, 1]
    assert all(d["p_holm"] >= d["mcnemar"]["p"] for d in tested)


# ------------------------------------------------------------------------------------------------ stops and starts

KILLS = 20
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers
transformers.AutoTokenizer, transformers.LlamaForCausalLM
from attnsteer.runner import load_recipe, run, runs, score, build, calibration
from attnsteer.evals.metrics import choice

def child(out):
    pid = os.fork()
    if pid == 0:
        try:
            run(load_recipe(sys.argv[1]), out, progress=False)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

def finished(pid):
    assert os.waitpid(pid, 0)[1] == 0, "a run failed"

base = Path(sys.argv[2])
begun = time.monotonic()
finished(child(base / "whole"))
length = time.monotonic() - begun
chance, killed, folders, states = random.Random(7), 0, [], []
while killed < int(sys.argv[3]):
    out = base / f"killed-{len(folders)}"
    folders.append(str(out))
    while killed < int(sys.argv[3]):
        pid = child(out)
        time.sleep(chance.uniform(0.0, 1.1) * length)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, "a run failed"
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
        states.append(sum(p.read_bytes().count(b"\\n") for p in out.glob("records*.jsonl")))
    finished(child(out))
print(json.dumps({"folders": folders, "records": states}))
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    path = written(tmp_path, data={**READING["data"], "limit": 20}, batch_size=2, controls={"zero": True})
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(path), str(tmp_path), str(KILLS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    # Moments before, amid and after the work; else the test would show little.
    assert len(set(told["records"])) >= 5 and any(0 < n < 60 for n in told["records"])
    for folder in map(Path, told["folders"]):
        for name in ("records.jsonl", "samples.jsonl", "arms.json", "recipe.yaml", "identity.json"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (folder, name)
        assert figures(folder) == figures(tmp_path / "whole")
        assert not list(folder.glob("*-*.jsonl")) and not list(folder.glob("**/*.part"))


@pytest.mark.parametrize("torn", [b'{"arm": "base', b"\x00" * 40 + b"\n", b'{"arm": 1}'])
def test_a_torn_last_line_is_cut_and_its_sample_computed_again(tmp_path: Path, whole: Path, torn: bytes) -> None:
    base, out = recipe(tmp_path), tmp_path / "run"
    stopped(base, out, after=5)
    part = out / "records-0.jsonl"
    kept = part.read_bytes()
    part.write_bytes(kept[: kept.rfind(b"\n", 0, -1) + 1] + torn)
    run(base, out, progress=False)
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    assert figures(out) == figures(whole)


def stopped(base: Any, out: Path, after: int) -> None:
    """A run stopped by Ctrl-C after some batches."""
    from attnsteer.runner.tasks import choice

    real, count = choice.ask, [0]

    def ask(*args: Any) -> Any:
        count[0] += 1
        if count[0] > after:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    choice.ask = ask
    try:
        with pytest.raises(KeyboardInterrupt):
            run(base, out, progress=False)
    finally:
        choice.ask = real


def test_ctrl_c_keeps_and_scores_what_is_complete(tmp_path: Path, whole: Path) -> None:
    base, out = recipe(tmp_path), tmp_path / "run"
    stopped(base, out, after=6)
    status, found = load(out / "status.json"), load(out / "metrics.json")
    assert status["state"] == "interrupted" and status["done"] == 24 and status["ended"]
    # Two batches were begun; one has all four arms.
    assert found["partial"] is True and found["samples"] == 4
    run(base, out, progress=False)
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    assert load(out / "status.json")["state"] == "complete"


def test_sigterm_stops_a_run_as_ctrl_c_does(tmp_path: Path) -> None:
    from attnsteer.runner.runs import stoppable

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("writes", [1, 4, 9, 14, 18, 22, 60])
def test_a_full_disk_is_an_error_and_leaves_no_half_file(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    base, out = recipe(tmp_path), tmp_path / "run"
    real, count = os.write, [0]

    def full(handle: int, data: Any) -> int:
        count[0] += 1
        if count[0] < writes:
            return real(handle, data)
        # Half of it still fits.
        if count[0] == writes and len(data) > 1:
            return real(handle, bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "write", full)
        if writes < 60:
            with pytest.raises(RunError, match="disk is full"):
                run(base, out, progress=False)
        else:
            run(base, out, progress=False)
    assert not list(out.glob("**/*.part"))
    for path in out.glob("*.json"):
        load(path)
    for path in out.glob("*.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())
    run(base, out, progress=False)
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_a_failure_is_in_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnsteer.runner.tasks import choice

    def broken(*args: Any) -> Any:
        raise ValueError("no luck")

    monkeypatch.setattr(choice, "ask", broken)
    with pytest.raises(ValueError, match="no luck"):
        run(recipe(tmp_path), tmp_path / "run", progress=False)
    status = load(tmp_path / "run" / "status.json")
    assert status["state"] == "failed" and "no luck" in status["message"]


# ------------------------------------------------------------------------------------------------ refused


def test_the_folder_of_another_recipe_is_left_alone(tmp_path: Path, whole: Path) -> None:
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    other = recipe(tmp_path, interventions=[{"method": "ACT", "params": {"beta": 0.5}, "heads": "zoo:act"}])
    with pytest.raises(RunError, match=r"other recipe, and stays as it is"):
        run(other, whole, progress=False)
    with pytest.raises(RunError, match=r"other recipe and samples"):
        run(recipe(tmp_path), whole, limit=3, progress=False)
    with pytest.raises(RunError, match=r"--tiny"):
        run(recipe(tmp_path), whole, tiny=True, progress=False)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before


def test_texts_about_a_recipe_may_change(tmp_path: Path, whole: Path) -> None:
    run(recipe(tmp_path, notes="another note", summary="another"), whole, progress=False)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    lock = store.Lock(out)
    lock.take(alone=False)
    try:
        with pytest.raises(RunError, match="being written by another run"):
            run(recipe(tmp_path), out, progress=False)
    finally:
        lock.release()
    assert {p.name for p in out.iterdir()} == {".lock"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"path": "nowhere", "kind": "lm", "architecture": "llama"}, "no folder"),
        ({"path": "empty", "kind": "lm", "architecture": "llama"}, "neither config.json nor model_index.json"),
        ({"path": "{lm}", "kind": "vlm", "architecture": "llava"}, r"is a llama model.*Its kind is lm"),
        ({"path": "{lm}", "kind": "image", "architecture": "sd"}, "is a transformers model"),
        ({"path": "{sd}", "kind": "lm", "architecture": "llama"}, "is a diffusion pipeline"),
        ({"path": "unsafe", "kind": "lm", "architecture": "llama"}, "no weights in safetensors"),
        ({"zoo": "shapes-lm", "kind": "lm", "device": "cuda:0"}, "no CUDA device"),
    ],
)
def test_a_model_that_is_not_there_or_of_another_kind(tmp_path: Path, model: Any, message: str) -> None:
    import torch

    from attnsteer import zoo

    if "cuda" in message.lower() and torch.cuda.is_available():
        model = {**model, "device": "cuda:9"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "unsafe").mkdir()
    (tmp_path / "unsafe" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "unsafe" / "pytorch_model.bin").write_bytes(b"")
    if "path" in model:
        path = model["path"].format(lm=zoo.folder("shapes-lm"), sd=zoo.folder("shapes-sd"))
        model = {**model, "path": path}
    parts = {"lm": {}, "vlm": EXISTENCE, "image": LAYOUTS}[model["kind"]]
    changes = {**parts, "model": model}
    if model["kind"] == "lm":
        changes |= {"interventions": [{"method": "ACT", "params": {"beta": 0.4}, "heads": {"1": [0]}}]}
    if model["kind"] == "image":
        changes |= {"metrics": [{"name": "clip_score", "model": "x"}], "primary": "clip_score.cosine"}
    with pytest.raises((RecipeError, RunError), match=message):
        run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)


def test_a_model_from_a_folder_answers_as_the_embedded_one(tmp_path: Path, whole: Path) -> None:
    from attnsteer import zoo

    heads = {"5": [0, 7]}
    changes = {
        "model": {"path": str(zoo.folder("shapes-lm")), "kind": "lm", "architecture": "llama", "device": "cpu"},
        "interventions": [{"method": "ACT", "params": {"beta": 0.4}, "heads": heads}],
    }
    out = run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    assert load(whole / "arms.json")["arms"][2]["interventions"][0]["heads"] == heads
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_a_metric_that_the_records_cannot_feed_is_found_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"letter needs .*no generated"):
        prepare(recipe(tmp_path, metrics=["letter"], primary="letter.accuracy"), tmp_path / "run")


def test_decoding_means_nothing_to_likelihoods(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no meaning for the task choice"):
        run(recipe(tmp_path, decoding={"max_new_tokens": 2}), tmp_path / "run", progress=False)


def test_a_method_that_never_acts_ends_the_run(tmp_path: Path) -> None:
    changes = {
        **LAYOUTS,
        "interventions": [
            {"method": "PAG", "params": {"scale": 2.0}, "where": {"layers": [5], "kinds": "self", "steps": [400, 401]}}
        ],
    }
    with pytest.raises((NeverFired, RecipeError, RunError)):
        run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    assert load(tmp_path / "run" / "status.json")["state"] == "failed"


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, whole: Path) -> None:
    base, out = recipe(tmp_path), tmp_path / "run"
    stopped(base, out, after=7)
    # As if two processes had written, the second of which was killed amid a line.
    lines = (out / "records-0.jsonl").read_bytes().splitlines(keepends=True)
    (out / "records-0.jsonl").write_bytes(b"".join(lines[:16]))
    (out / "records-1.jsonl").write_bytes(b"".join(lines[16:])[:-9])
    run(base, out, progress=False)
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    assert not list(out.glob("*-*.jsonl")) and figures(out) == figures(whole)


def test_the_command_prints_the_result_and_sets_fields(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from attnsteer import cli

    path, out = str(written(tmp_path)), str(tmp_path / "run")
    options = ["--set", "interventions.0.params.beta=0.1", "--set", "data.options.task=few-shot", "--limit", "6"]
    done = CliRunner().invoke(cli.app, ["run", path, "--out", out, "--batch-size", "3", *options])
    assert done.exit_code == 0, done.output
    assert "choice.accuracy" in done.output and f"run folder: {out}" in done.output
    assert "at zero strength the method equals the baseline" in done.output
    assert load(Path(out) / "arms.json")["arms"][2]["interventions"][0]["params"] == {"beta": 0.1}
    assert {r["id"] for r in records(Path(out))} == {f"reading-few-shot-test-{i}" for i in range(6)}
    checked = CliRunner().invoke(cli.app, ["run", path, "--check", "--out", str(tmp_path / "none")])
    assert checked.exit_code == 0 and "12 samples" in checked.output and not (tmp_path / "none").exists()
    wrong = CliRunner().invoke(cli.app, ["run", path, "--set", "data.limits=3"])
    assert wrong.exit_code == 2
