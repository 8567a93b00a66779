"""Recipes whose method is in a file: run with the user's word, refused without it, recorded, resumed and shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnsteer.errors import RecipeError
from attnsteer.recipe import check, load_recipe
from attnsteer.run import run
from tests.run.running import figures, load, records, written
from tests.test_method_files import SOURCE

ROOT = Path(__file__).parents[2]
HUSH: dict[str, Any] = {
    "imports": ["hush.py"],
    "interventions": [{"method": "Hush", "params": {"factor": 0.5}, "zero": {"factor": 1.0}, "where": {"layers": [1]}}],
    "controls": {"zero": True},
    "data": {"zoo": "reading", "limit": 8, "options": {"task": "lookup"}},
}


def command(*args: Any, module: str = "attnsteer", before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *before, "-m", module, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def recipe_file(folder: Path, **changes: Any) -> Path:
    path = written(folder, **{**HUSH, **changes})
    (folder / "hush.py").write_text(SOURCE)
    return path


def test_a_recipe_alone_runs_no_code(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    (tmp_path / "hush.py").write_text("raise SystemExit('was run')")
    (problem,) = check(load_recipe(path))
    assert "a recipe alone may not" in problem and "--import" in problem and "--allow-imports" in problem
    with pytest.raises(RecipeError, match="a recipe alone may not"):
        run(load_recipe(path), tmp_path / "run", progress=False)
    for args in (["run", path, "--out", tmp_path / "run"], ["run", path, "--check"], ["run", path, "--tiny"]):
        done = command(*args)
        assert done.returncode == 2 and "--allow-imports" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_an_import_is_recorded_and_a_run_goes_on_with_it(tmp_path: Path) -> None:
    path, out = recipe_file(tmp_path), tmp_path / "run"
    done = command("run", path, "--out", out, "--allow-imports")
    assert done.returncode == 0, done.stderr
    whole, numbers = records(out), figures(out)
    assert load(out / "metrics.json")["zero_equals_baseline"] is True
    digest = load(out / "identity.json")["imports"]["hush.py"]
    assert load(out / "environment.json")["imports"] == [{"path": str(tmp_path / "hush.py"), "sha256": digest}]

    # As a kill leaves it: some of the records of the first process.
    lines = (out / "records.jsonl").read_text().splitlines(keepends=True)
    (out / "records-0.jsonl").write_text("".join(lines[:13]))
    for name in ("records.jsonl", "metrics.json", "audit.json", "timings.jsonl"):
        (out / name).unlink()
    (out / "status.json").write_text(json.dumps({**load(out / "status.json"), "state": "interrupted"}))
    done = command("run", path, "--out", out, "--import", tmp_path / "hush.py")
    assert done.returncode == 0, done.stderr
    assert records(out) == whole and load(out / "metrics.json")["arms"] == json.loads(numbers)["arms"]

    (tmp_path / "hush.py").write_text(SOURCE + "# another version\n")
    done = command("run", path, "--out", out, "--allow-imports")
    assert done.returncode == 2 and "other imported files" in done.stderr
    done = command("report", out, "--attention", "1", "--allow-imports")
    assert done.returncode == 2 and "the imported files are not those of the run" in done.stderr
    (tmp_path / "hush.py").write_text(SOURCE)
    assert command("report", out, "--attention", "1").returncode == 2
    assert command("report", out, "--attention", "1", "--allow-imports").returncode == 0


@pytest.mark.long
def test_a_method_file_needs_no_field_of_the_recipe(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, imports=[])
    done = command("run", path, "--out", tmp_path / "run")
    assert done.returncode == 2 and "there is no method 'Hush'" in done.stderr
    done = command("run", path, "--out", tmp_path / "run", "--import", tmp_path / "hush.py")
    assert done.returncode == 0, done.stderr
    assert set(load(tmp_path / "run" / "identity.json")["imports"]) == {"hush.py"}


@pytest.mark.long
def test_several_processes_import(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    alone = command("run", path, "--out", tmp_path / "alone", "--allow-imports")
    assert alone.returncode == 0, alone.stderr
    args = [
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "attnsteer",
        "run",
        path,
        "--out",
        tmp_path / "both",
        "--allow-imports",
    ]
    both = command(*args, module="torch.distributed.run")
    assert both.returncode == 0, both.stderr[-2000:]
    assert records(tmp_path / "both") == records(tmp_path / "alone")
