"""Timing of several arms side by side, peak memory of one arm in a process of its own, and what machine this is."""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


# A round counts when other processes took at most this share of the machine during each of its calls, besides the cores
# that our threads leave free. With as many threads as cores, one foreign process stalls every parallel region, and code of
# many small regions most.
FOREIGN = 0.1


@dataclass
class Times:
    """Seconds per call, by arm, one per round in the same order, and the share of the machine that others took
    beyond the cores that our threads leave free.

    Attributes:
        rounds: arm -> seconds. foreign: per round, the largest share seen during one of its calls; None: not known.
        wanted: rounds that were asked for.
    """

    rounds: dict[str, list[float]]
    foreign: list[float | None]
    wanted: int

    @property
    def quiet(self) -> bool:
        """Whether the undisturbed rounds are enough to go by: half of what was asked for, and two at least."""
        return sum(_undisturbed(f) for f in self.foreign) >= max(2, self.wanted // 2)

    def kept(self, arm: str) -> list[float]:
        """The seconds that count: of undisturbed rounds, or of all where there are too few."""
        pairs = zip(self.rounds[arm], self.foreign, strict=True)
        return [t for t, f in pairs if not self.quiet or _undisturbed(f)]

    def median(self, arm: str) -> float:
        """Median seconds of one call."""
        return statistics.median(self.kept(arm))

    def ratio(self, of: str, to: str) -> float:
        """Median of `of` over median of `to`."""
        return self.median(of) / self.median(to)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "medians_s": {arm: round(self.median(arm), 6) for arm in self.rounds},
            "samples_s": {arm: [round(t, 6) for t in times] for arm, times in self.rounds.items()},
            "foreign_share": [None if f is None else round(f, 3) for f in self.foreign],
            "rounds": len(self.foreign),
            "rounds_kept": len(self.kept(next(iter(self.rounds)))),
            "quiet": self.quiet,
        }


def _undisturbed(foreign: float | None) -> bool:
    return foreign is None or foreign <= FOREIGN


def interleaved(
    arms: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1, calls: int = 1, patience: float = 0.0
) -> Times:
    """Time the arms in turns; each round starts with another one.

    Args:
        repeats: undisturbed rounds wanted. warmup: rounds before them. calls: calls per sample, for short ones.
        patience: seconds to go on for while rounds are disturbed by other processes; otherwise `repeats` are all.
    """
    names, times, foreign = list(arms), {name: [] for name in arms}, []
    for _ in range(warmup):
        for arm in arms.values():
            arm()
    start = time.perf_counter()
    while True:
        missing = repeats - sum(_undisturbed(f) for f in foreign)
        late = time.perf_counter() - start > patience
        if missing <= 0 or (late and len(foreign) >= repeats):
            break
        if not late:
            _wait_for_quiet(start + patience)
        shift, shares = len(foreign) % len(names), []
        gc.collect()
        gc.disable()
        try:
            for name in names[shift:] + names[:shift]:
                seconds, share = timed(arms[name], calls)
                times[name].append(seconds)
                shares.append(share)
        finally:
            gc.enable()
        foreign.append(None if None in shares else max(shares))
    return Times(times, foreign, repeats)


def timed(call: Callable[[], Any], calls: int = 1) -> tuple[float, float | None]:
    """(seconds per call, share of the machine that other processes took meanwhile, less the cores that we leave free)."""
    busy, own, begin = _busy(), time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    took = time.perf_counter() - begin
    own, after = time.process_time() - own, _busy()
    if busy is None or after is None:
        return took / calls, None
    return took / calls, max(0.0, (after - busy - own) / took - _free()) / (os.cpu_count() or 1)


def _free() -> int:
    """Cores that torch's threads leave to others."""
    import torch

    return max(0, (os.cpu_count() or 1) - torch.get_num_threads())


def _wait_for_quiet(until: float) -> None:
    """Sleep while other processes are at work, until then at the latest."""
    calm = 0
    while calm < 3 and time.perf_counter() < until:
        busy = _busy()
        if busy is None:
            return
        time.sleep(0.2)
        others = max(0.0, (_busy() - busy) / 0.2 - _free())
        calm = calm + 1 if others / (os.cpu_count() or 1) <= FOREIGN else 0


def _busy() -> float | None:
    """Processor seconds that the whole machine has spent so far; None where the system does not tell (not Linux)."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    # user nice system idle iowait irq softirq steal: all but the two idle ones.
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def peak_memory(arm: str, request: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Run one arm of `benchmarks.peak` in a fresh process.

    Returns:
        `bytes`: peak resident memory above what the process held once model and inputs were built. `baseline`: that.
        `seconds`: of the measured call. `foreign`: what others took of the machine meanwhile. `finite`: the output is.
    """
    line = json.dumps({**request, "arm": arm, "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak", line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"benchmarks.peak {line} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def reset_peak() -> int:
    """Forget the peak so far; the resident bytes now.

    Linux only; elsewhere the peak of the set-up stays in, and the arms differ by less than they should.
    """
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return peak()


def peak() -> int:
    """Peak resident bytes of this process.

    The high-water mark of the address space rather than `ru_maxrss`: a child starts with the `ru_maxrss` of the process
    that spawned it, because the kernel carries it across `exec`.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024
    except (OSError, TypeError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def machine(threads: int) -> dict[str, Any]:
    """What a figure depends on besides the code: processor, threads, versions, commit, load."""
    import torch

    from attnsteer.versions import library_versions

    return {
        "machine": machine_name(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "versions": library_versions(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "attnsteer")),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def machine_name() -> str:
    """A name for a results file: processor and cores."""
    return re.sub(r"[^a-z0-9]+", "-", f"{_cpu()} {os.cpu_count()}c".lower()).strip("-")


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()
