"""Runs that processes join one by one: each takes the next batch that nobody has, so that a scheduler's array jobs share a run.

Nobody talks to anybody: a batch that is being answered is a locked file, which the system opens again when its process dies,
however it dies. Whoever finds all batches answered merges them. The files are those of one process. All must see one folder, whose
file system has locks (local ones, NFS 4, Lustre with flock).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..recipe.schema import Recipe
from . import store
from .build import Plan
from .job import Job, prepare
from .merging import PARTS, finish, read_records
from .progress import Progress
from .ranks import Ranks
from .runs import Status, Work, begin, identity_of, loaded_for, plan_arms, refuse_other_run, settle, stoppable

CLAIMS = ".claims"
# Seconds between two looks at batches that others have.
PATIENCE = 1.0
# Processes that may join one run.
MOST = 10_000


class Claim:
    """A file that one process holds: exclusively, or with others. Gone with the process."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise store.failed(path, error) from error

    def take(self, *, alone: bool = True, wait: bool = False) -> bool:
        """Hold it; False where another process does and `wait` is not set."""
        import fcntl

        how = (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(self._handle, how)
        except BlockingIOError:
            return False
        except OSError as error:
            raise store.failed(self.path, error) from error
        return True

    def release(self) -> None:
        """Give it back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def join(
    recipe: Recipe, out: str | Path, *, tiny: bool = False, limit: int | None = None, progress: bool = True
) -> Path:
    """Take part in a run, or begin it; returns when all of it is answered and merged.

    Start as many of these as there are processors, at any time, on any machine that sees the folder; stop any of them at any time.

    Args:
        recipe, out, tiny, limit, progress: see `attnsteer.run.run`. Every process gets the same.

    Raises:
        RecipeError, RunError: as `run`; also where the folder is being written by a run that nobody can join.
        KeyboardInterrupt: stopped by hand; the others go on.
    """
    job = prepare(recipe, Path(out), tiny, limit)
    # A run that nobody can join holds the second alone while it lasts, and does not begin while anybody has the first.
    locks = [store.Lock(job.folder), store.Lock(job.folder, store.ALONE)]
    claims = job.folder / CLAIMS
    own: list[Claim] = []
    try:
        for lock in locks:
            lock.take(alone=False)
        with stoppable():
            _join(job, claims, own, progress)
    finally:
        for claim in own:
            claim.release()
        for lock in locks:
            lock.release()
    return job.folder


def _join(job: Job, claims: Path, own: list[Claim], progress: bool) -> None:
    ranks = Ranks()
    loaded = loaded_for(job)
    with _held(claims / "setup"):
        identity = identity_of(job, loaded)
        refuse_other_run(job.folder, identity)
        if store.read_json(job.folder / store.IDENTITY) is None:
            begin(job, identity)
        if _complete(job.folder):
            return
        place = _place(job.folder, claims, own)
        status = Status(job.folder, 0, sum(map(len, read_records(job.folder).values())), True)
        arms = plan_arms(job, loaded, ranks, progress)
        status.total = len(arms.arms) * len(job.recipe.seeds) * len(job.data.samples)
        settle(job, loaded, arms, status, 1)
    work = Work(job, loaded, arms.arms, ranks, status, progress)
    work.ranks.rank = place
    try:
        _answer(job, work, claims, progress)
        _merge(job, arms, claims, status)
    except KeyboardInterrupt:
        _left(status, job, "interrupted", f"a process was stopped by hand; {store.AGAIN}")
        raise
    except BaseException as error:
        _left(status, job, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise


def _answer(job: Job, work: Work, claims: Path, progress: bool) -> None:
    """Batches that nobody answers, until all are answered."""
    files = {name: store.Lines(store.part(job.folder, name, work.ranks.rank)) for name in PARTS}
    every = [(seed, number, part) for seed in job.recipe.seeds for number, part in work.batches()]
    bar = Progress(work.status.total, job.recipe.name, progress)
    ready: set[tuple[int, int]] = set()
    try:
        while len(ready) < len(every):
            begun = len(ready)
            for seed, number, part in every:
                if (seed, number) in ready:
                    continue
                with _claimed(claims, seed, number) as mine:
                    if not mine:
                        continue
                    # Whoever had it before may have answered all of it.
                    done = read_records(job.folder)
                    work.status.done = sum(map(len, done.values()))
                    work.batch(seed, number, part, done, files, bar)
                    ready.add((seed, number))
            if len(ready) == begun:
                time.sleep(PATIENCE)
    finally:
        bar.close()
        for file in files.values():
            file.close()


@contextlib.contextmanager
def _claimed(claims: Path, seed: int, number: int) -> Iterator[bool]:
    """Whether this process has a batch to itself for the block."""
    claim = Claim(claims / f"batch-{seed}-{number}")
    try:
        yield claim.take()
    finally:
        claim.release()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """One process at a time."""
    claim = Claim(path)
    try:
        claim.take(wait=True)
        yield
    finally:
        claim.release()


def _place(folder: Path, claims: Path, own: list[Claim]) -> int:
    """The number of this process's parts: the first that no living process has. A line that a dead one left torn is cut."""
    for number in range(MOST):
        claim = Claim(claims / f"process-{number}")
        if claim.take():
            own.append(claim)
            for name in PARTS:
                path = store.part(folder, name, number)
                if path.is_file():
                    store.cut_torn_line(path)
            return number
        claim.release()
    raise RunError(f"{folder} is joined by {MOST} processes already.")


def _merge(job: Job, arms: Plan, claims: Path, status: Status) -> None:
    """Merge once, by whoever comes first; the others wait and find it done."""
    with _held(claims / "merge"):
        if _complete(job.folder):
            status.writes = False
            return
        missing = _missing(job, arms)
        if missing:
            raise RunError(f"{job.folder} lacks {missing} records although every batch was answered; {store.AGAIN}.")
        finish(job, arms)
        status.done = status.total
        status.put("complete", ended=True)
        # Whoever waits for a file in it has it open, and finds the run complete.
        shutil.rmtree(claims, ignore_errors=True)


def _complete(folder: Path) -> bool:
    """Whether somebody has merged the run."""
    found = store.read_json(folder / store.STATUS)
    return isinstance(found, dict) and found.get("state") == "complete"


def _missing(job: Job, arms: Plan) -> int:
    done = read_records(job.folder)
    wanted: set[Any] = {(seed, s["id"]) for seed in job.recipe.seeds for s in job.data.samples}
    return sum(len(wanted - set(done.get(arm.id, {}))) for arm in arms.arms)


def _left(status: Status, job: Job, state: str, message: str) -> None:
    """Say that the run stopped, where nobody else goes on with it."""
    others = 0
    for path in (job.folder / CLAIMS).glob("process-*"):
        claim = Claim(path)
        others += not claim.take()
        claim.release()
    # This process still holds its own place.
    if others <= 1:
        with contextlib.suppress(RunError):
            status.put(state, message, ended=True)
