"""Runs named checks of a test module in several processes that talk over gloo, on CPU."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# Where a check fails in one process, the others wait for it no longer than this.
PATIENCE = datetime.timedelta(seconds=60)


def start(module: str, count: int, folder: Path) -> dict[str, list[str]]:
    """Run `module` as `count` processes; what each check said in each process: "" is success."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", module]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(count), str(folder)], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    said: dict[str, list[str]] = {}
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    for rank, worker in enumerate(workers):
        found = folder / f"{rank}.json"
        assert worker.returncode == 0 and found.exists(), errors[rank][-3000:]
        for name, text in json.loads(found.read_text()).items():
            said.setdefault(name, []).append(text)
    return said


def work(checks: Mapping[str, Callable[[], None]]) -> None:
    """The part of one process: all checks in order, up to the first that fails."""
    rank, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count, timeout=PATIENCE
    )
    said = dict.fromkeys(checks, "not run: a check before it failed")
    for name, check in checks.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                check()
        except Exception:
            said[name] = traceback.format_exc()
            break
        said[name] = ""
    (folder / f"{rank}.json").write_text(json.dumps(said))
    # After a failure the others may be gone.
    os._exit(0)
