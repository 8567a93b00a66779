"""Processes that join a run: together, one after another killed one, and late; the files are those of one process."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from attnsteer import cli
from attnsteer.errors import RunError
from attnsteer.manifest import problems_of, read_manifest
from attnsteer.run import joining, run, runs, store
from attnsteer.run.estimate import estimate
from attnsteer.run.joining import CLAIMS, Claim, join
from tests.run.running import figures, load, recipe, written

FILES = ("records.jsonl", "arms.json", "samples.jsonl", "recipe.yaml", "identity.json", "audit.json")


def same(one: Path, two: Path) -> None:
    """Two run folders have the same answers and figures."""
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert figures(one) == figures(two)
    assert load(two / "status.json")["state"] == "complete" and not list(two.glob("records-*"))
    assert not problems_of(two, read_manifest(two))


class Killed(BaseException):
    """What nothing in a run catches."""


def dies_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """The process that answers a further batch is killed in the middle of it."""
    real, left = runs.Work._write, [batches]

    def write(self: Any, *args: Any) -> None:
        if left[0] <= 0:
            raise Killed
        left[0] -= 1
        real(self, *args)

    monkeypatch.setattr(runs.Work, "_write", write)


def test_two_at_once_are_as_one(whole: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "run", recipe(tmp_path / "recipe")
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(join(plan, out, progress=False))
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == [out, out]
    same(whole, out)


def test_a_killed_one_is_taken_over_and_a_third_joins_late(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = tmp_path / "run", recipe(tmp_path / "recipe")
    for batches in (1, 3):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dies_after(patch, batches)
            join(plan, out, progress=False)
    # A line that the last one left torn, and its batch, which the system has opened again.
    part = sorted(out.glob("records-*.jsonl"))[0]
    part.write_bytes(part.read_bytes() + b'{"arm": "meth')
    join(plan, out, progress=False)
    same(whole, out)
    # Whoever comes when all is done changes nothing.
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.is_file()}
    join(plan, out, progress=False)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.is_file() and p.name in before} == before


def test_a_batch_of_a_living_process_is_left_to_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = tmp_path / "run", recipe(tmp_path / "recipe")
    held = Claim(out / CLAIMS / "batch-0-0")
    assert held.take()
    waited: list[int] = []

    def sleep(_: float) -> None:
        # All but the held batch are answered by now.
        waited.append(sum(map(len, joining.read_records(out).values())))
        held.release()

    # Not the sleep of every thread.
    monkeypatch.setattr(joining, "time", SimpleNamespace(sleep=sleep))
    join(plan, out, progress=False)
    assert waited == [4 * 8]
    same(whole, out)


def test_a_run_goes_on_in_either_way(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, plan = tmp_path / "run", recipe(tmp_path / "recipe")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_after(patch, 2)
        join(plan, out, progress=False)
    run(plan, out, progress=False)
    same(whole, out)
    other = tmp_path / "other"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_after(patch, 2)
        run(plan, other, progress=False)
    join(plan, other, progress=False)
    same(whole, other)


def test_nobody_joins_a_run_that_is_alone_nor_another_recipe(whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    alone = store.Lock(out, store.ALONE)
    alone.take(alone=True)
    with pytest.raises(RunError, match="is being written by another run"):
        join(recipe(tmp_path / "recipe"), out, progress=False)
    alone.release()
    with pytest.raises(RunError, match="holds a run with other recipe"):
        join(recipe(tmp_path / "recipe", batch_size=2), out, progress=False)


def test_what_a_run_takes(tmp_path: Path, whole: Path) -> None:
    found = estimate(recipe(tmp_path / "recipe"))
    assert (found.arms, found.samples, found.seeds, found.answers) == (4, 12, 1, 48) and not found.searches
    assert found.seconds > 0 and found.memory > 2**26
    took = sum(p.stat().st_size for p in whole.rglob("*") if p.is_file())
    assert found.disk == pytest.approx(took, rel=0.9)
    done = CliRunner().invoke(cli.app, ["run", str(written(tmp_path / "r")), "--out", str(tmp_path / "o"), "--dry-run"])
    assert done.exit_code == 0 and not (tmp_path / "o").exists(), done.output
    assert [line.partition(":")[0] for line in done.output.splitlines()] == ["answers", "time", "memory", "disk"]
