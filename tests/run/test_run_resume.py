"""Runs that are killed, interrupted, or out of disk, and go on."""

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

from attnsteer.errors import RunError
from attnsteer.run import run, store
from tests.run.running import READING, figures, load, recipe, written

ROOT = Path(__file__).parents[2]


KILLS = 20
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers
transformers.AutoTokenizer, transformers.LlamaForCausalLM
from attnsteer.recipe import load_recipe
from attnsteer.run import run, runs, score, build, recipe_calibration
from attnsteer.evals.metrics import multiple_choice

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


@pytest.mark.long
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    path = written(tmp_path, data={**READING["data"], "limit": 20}, batch_size=2, controls={"zero": True})
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(path), str(tmp_path), str(KILLS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
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
    from attnsteer.run.tasks import choice

    real, count = choice.answer, [0]

    def ask(*args: Any) -> Any:
        count[0] += 1
        if count[0] > after:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    choice.answer = ask
    # A shell that starts the tests in the background lets them ignore Ctrl-C.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(base, out, progress=False)
    finally:
        choice.answer = real
        signal.signal(signal.SIGINT, kept)


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


@pytest.mark.parametrize("error", [KeyError("colour"), RunError("too few"), ValueError("nan")])
def test_what_cannot_be_scored_yet_does_not_hide_the_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from attnsteer.run import runs

    def score(*args: Any) -> None:
        assert load(tmp_path / "run" / "status.json")["state"] == "interrupted"
        raise error

    monkeypatch.setattr(runs, "score", score)
    stopped(recipe(tmp_path), tmp_path / "run", after=6)
    status = load(tmp_path / "run" / "status.json")
    assert status["state"] == "interrupted" and type(error).__name__ in status["message"] and status["done"] == 24


def test_sigterm_stops_a_run_as_ctrl_c_does(tmp_path: Path) -> None:
    from attnsteer.run.runs import stoppable

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


def test_a_disk_that_was_full_for_a_moment_is_in_the_status(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = recipe(tmp_path), tmp_path / "run"
    real = store.write_all

    def write(handle: int, data: bytes) -> None:
        if data.startswith(b'{"arm": "method", "seed": 0, "id": "reading-lookup-test-4"'):
            real(handle, data[:50])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_all", write)
        with pytest.raises(RunError, match=r"records-0.jsonl could not be written: the disk is full"):
            run(base, out, progress=False)
    status = load(out / "status.json")
    assert status["state"] == "failed" and "the disk is full" in status["message"] and status["done"] == 24
    assert (out / "records-0.jsonl").read_bytes().count(b"\n") == 24
    run(base, out, progress=False)
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_ctrl_c_amid_a_line_leaves_none_of_it(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = recipe(tmp_path), tmp_path / "run"
    real, count = store.write_all, [0]

    def write(handle: int, data: bytes) -> None:
        count[0] += 1
        if count[0] == 14:
            real(handle, data[: len(data) // 2])
            raise KeyboardInterrupt
        real(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_all", write)
        with pytest.raises(KeyboardInterrupt):
            run(base, out, progress=False)
    assert load(out / "status.json")["state"] == "interrupted"
    run(base, out, progress=False)
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_a_run_does_not_go_on_with_other_heads(tmp_path: Path) -> None:
    from attnsteer import HeadSet

    heads = tmp_path / "heads.safetensors"
    HeadSet({5: [0, 7]}).save(heads)
    base = recipe(tmp_path, interventions=[{"method": "ACT", "params": {"beta": 0.4}, "heads": heads.name}])
    out = tmp_path / "run"
    stopped(base, out, after=6)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    HeadSet({3: [1]}).save(heads)
    with pytest.raises(RunError, match=r"other arms .heads or parameters., and stays as it is"):
        run(base, out, progress=False)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    HeadSet({5: [0, 7]}).save(heads)
    run(base, out, progress=False)
    assert load(out / "status.json")["state"] == "complete"


def test_heads_may_change_while_nothing_was_answered(tmp_path: Path) -> None:
    from attnsteer import HeadSet

    heads = tmp_path / "heads.safetensors"
    HeadSet({5: [0, 7]}).save(heads)
    base = recipe(tmp_path, interventions=[{"method": "ACT", "params": {"beta": 0.4}, "heads": heads.name}])
    out = tmp_path / "run"
    stopped(base, out, after=0)
    HeadSet({3: [1]}).save(heads)
    run(base, out, progress=False)
    assert load(out / "arms.json")["arms"][2]["interventions"][0]["heads"] == {"3": [1]}


def test_a_run_that_goes_on_elsewhere_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnsteer.run import runs

    base, out, real = recipe(tmp_path), tmp_path / "run", runs.environment
    stopped(base, out, after=6)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "environment", lambda *a: {**real(*a), "threads": 99})
        stopped(base, out, after=2)
    run(base, out, progress=False)
    found = load(out / "environment.json")
    assert found["threads"] != 99 and [e["threads"] == 99 for e in found["earlier"]] == [False, True]
    assert [w for w in load(out / "metrics.json")["warnings"] if "differ in threads" in w]
    run(base, out, progress=False)
    assert load(out / "environment.json") == found


@pytest.mark.parametrize("writes", range(2))
@pytest.mark.parametrize("name", ["records", "timings", "audit"])
def test_a_batch_has_one_line_in_each_file_wherever_it_was_stopped(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, name: str, writes: int
) -> None:
    base, out, real, count = recipe(tmp_path), tmp_path / "run", store.Lines.append, [0]

    def append(self: store.Lines, lines: Any) -> None:
        count[0] += self.path.name == f"{name}-0.jsonl"
        if count[0] == 6 and writes:
            real(self, lines)
        if count[0] == 6:
            raise KeyboardInterrupt
        real(self, lines)

    with monkeypatch.context() as patch:
        patch.setattr(store.Lines, "append", append)
        with pytest.raises(KeyboardInterrupt):
            run(base, out, progress=False)
    run(base, out, progress=False)
    same_batches(out, whole)


def same_batches(out: Path, whole: Path) -> None:
    """Compare all that does not measure time."""
    for file in ("records.jsonl", "audit.json"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    lines = [[json.loads(s) for s in (f / "timings.jsonl").read_text().splitlines()] for f in (out, whole)]
    one, two = ([(t["arm"], t["seed"], t["batch"], t["edits"]) for t in own] for own in lines)
    assert one == two and not list(out.glob("*-*.jsonl"))


@pytest.mark.parametrize("gone", range(6))
def test_a_stop_while_files_are_merged_loses_and_doubles_nothing(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    base, out, real, count = recipe(tmp_path), tmp_path / "run", Path.unlink, [0]
    stopped(base, out, after=7)
    # As if two processes had written.
    for name in ("records", "timings", "audit"):
        lines = (out / f"{name}-0.jsonl").read_bytes().splitlines(keepends=True)
        (out / f"{name}-0.jsonl").write_bytes(b"".join(lines[:4]))
        (out / f"{name}-1.jsonl").write_bytes(b"".join(lines[4:]))

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".jsonl":
            count[0] += 1
            if count[0] > gone:
                raise KeyboardInterrupt
        real(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            run(base, out, progress=False)
    run(base, out, progress=False)
    same_batches(out, whole)


def test_what_a_kill_left_of_a_file_goes_and_other_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out, kept = recipe(tmp_path), tmp_path / "run", []

    class Killed(BaseException):
        pass

    def killed(old: Any, new: Any) -> None:
        raise Killed

    for name in ("identity.json", "images/a/b.png"):
        with monkeypatch.context() as patch:
            patch.setattr(store.os, "replace", killed)
            patch.setattr(store.os, "unlink", lambda path: kept.append(path))
            with pytest.raises(Killed):
                store.write_atomic(out / name, b"half")
    (out / "images").rename(out / "kept")
    (out / ".notes.json.abc.part").write_text("mine")
    assert len(kept) == 2
    stopped(base, out, after=2)
    (out / "kept").rename(out / "images")
    run(base, out, progress=False)
    assert [p.name for p in out.rglob("*.part")] == [".notes.json.abc.part"]


def test_a_failure_is_in_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnsteer.run.tasks import choice

    def broken(*args: Any) -> Any:
        raise ValueError("no luck")

    monkeypatch.setattr(choice, "answer", broken)
    with pytest.raises(ValueError, match="no luck"):
        run(recipe(tmp_path), tmp_path / "run", progress=False)
    status = load(tmp_path / "run" / "status.json")
    assert status["state"] == "failed" and "no luck" in status["message"]


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
