"""Several processes make the same files as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnsteer.run import run
from tests.run.running import READING, figures, load, recipe, written

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("share", ["off", pytest.param("auto", marks=pytest.mark.long)])
def test_two_processes_make_the_files_of_one(tmp_path: Path, share: str) -> None:
    changes = {"data": {**READING["data"], "limit": 22}, "share": share}
    path = written(tmp_path, **changes)
    # What `accelerate launch` starts on several devices; on CPUs it starts one process.
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, "-m", "attnsteer", "run", str(path), "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run folder:") == 1
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run(recipe(tmp_path, **changes), tmp_path / "one", progress=False)
    finally:
        torch.set_num_threads(threads)
    assert load(tmp_path / "two" / "environment.json")["processes"] == 2
    for name in ("records.jsonl", "samples.jsonl", "arms.json", "identity.json", "recipe.yaml", "audit.json"):
        assert (tmp_path / "two" / name).read_bytes() == (one / name).read_bytes(), name
    assert figures(tmp_path / "two") == figures(one)
    assert not list((tmp_path / "two").glob("*-*.jsonl"))
    assert ('"shared": 3' in (tmp_path / "two" / "timings.jsonl").read_text()) == (share == "auto")
