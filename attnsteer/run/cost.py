"""What a run reads off the machine: time, memory, versions."""

from __future__ import annotations

import platform
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERVAL = 0.02


@dataclass
class Reading:
    """seconds: wall time. peak_memory: bytes: of the process on the CPU (sampled), of the allocator on a GPU."""

    seconds: float = 0.0
    peak_memory: int = 0


@contextmanager
def measured_cost(device: Any) -> Iterator[Reading]:
    """Measure a block; the reading is filled in at its end."""
    import torch

    reading = Reading()
    cuda = torch.device(device).type == "cuda"
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(INTERVAL):
            reading.peak_memory = max(reading.peak_memory, resident())

    watcher = None
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reading.peak_memory = resident()
        watcher = threading.Thread(target=sample, daemon=True)
        watcher.start()
    begun = time.perf_counter()
    try:
        yield reading
        if cuda:
            torch.cuda.synchronize(device)
    finally:
        reading.seconds = time.perf_counter() - begun
        if watcher is not None:
            stop.set()
            watcher.join()
            reading.peak_memory = max(reading.peak_memory, resident())
        else:
            reading.peak_memory = torch.cuda.max_memory_allocated(device)


def resident() -> int:
    """Bytes of this process in memory now; where the system does not tell, the most it ever had."""
    import resource

    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # In bytes on macOS, in kilobytes elsewhere.
        return most if platform.system() == "Darwin" else most * 1024


def environment(device: Any, world: int) -> dict[str, Any]:
    """Versions, machine, and the commit of the project's checkout where there is one."""
    import os

    import torch

    from ..versions import library_versions

    where = torch.device(device)
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else None
    return {
        "versions": library_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "device": str(device),
        "processes": world,
        "git": _commit(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> dict[str, Any] | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
