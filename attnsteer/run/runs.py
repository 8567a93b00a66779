"""Running a recipe: every arm answers every batch, each answer is on the disk before the next, and a run goes on after a kill."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RecipeError, RunError, listing
from ..recipe.arms import Arm
from ..recipe.checks import check_call
from ..recipe.resolved import self_contained
from ..recipe.schema import Recipe
from . import scorers, sharing, store
from .build import Plan, plan
from .cost import Reading, environment, measured_cost
from .data.sample import Sample
from .job import Job, prepare
from .loaded import Loaded
from .merging import PARTS, finish, read_records, score
from .models import load as load_model
from .progress import Progress
from .ranks import Ranks
from .tasks import Request, get_task

# How often status.json is brought up to date, in seconds.
PULSE = 1.0


def run(
    recipe: Recipe, out: str | Path, *, tiny: bool = False, limit: int | None = None, progress: bool = True
) -> Path:
    """Evaluate a recipe, or go on with a run of it that was stopped.

    Args:
        recipe: see `load_recipe`. out: the run folder. tiny: few samples and steps on a random model of the recipe's
            architecture: a test of the recipe. limit: samples, in place of the recipe's. progress: show a bar.

    Returns:
        the folder.

    Raises:
        RecipeError: the recipe, its data or its model are not what they should be; nothing was computed.
        RunError: the folder is of another recipe, in use, damaged, or cannot be written.
        KeyboardInterrupt: stopped by hand; what was done is kept and scored.
    """
    job = prepare(recipe, Path(out), tiny, limit)
    ranks = Ranks()
    lock, alone = store.Lock(job.folder), store.Lock(job.folder, store.ALONE)
    try:
        if ranks.first:
            lock.take(alone=True)
            # Nobody joins this run (`attnsteer.run.joining`).
            alone.take(alone=True)
            lock.take(alone=False)
        ranks.wait()
        if not ranks.first:
            lock.take(alone=False)
        with stoppable():
            _run(job, ranks, progress)
    finally:
        lock.release()
        alone.release()
        ranks.close()
    return job.folder


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM, as schedulers send it before they kill, stops a run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Status:
    """status.json: written by the first process at the start, now and then, and at the end."""

    def __init__(self, folder: Path, total: int, done: int, writes: bool):
        self.path, self.total, self.done, self.writes = folder / store.STATUS, total, done, writes
        self._before = before = store.read_json(self.path) if writes else None
        again = isinstance(before, dict) and before.get("started")
        self.started = before["started"] if again else now()
        # Of a run that is complete, nothing is new: it took what it took.
        self.ended = before.get("ended") if again and before.get("state") == "complete" else None
        self._last = -PULSE
        self.put("running")

    def put(self, state: str, message: str = "", ended: bool = False) -> None:
        """Write it."""
        if self.writes:
            self._last = time.monotonic()
            value = {
                "state": state,
                "message": message,
                "started": self.started,
                "ended": (self.ended or now()) if ended else None,
            }
            store.write_json(self.path, {**value, "done": self.done, "total": self.total})

    def undo(self) -> None:
        """Put back what was there before, for good: the run in the folder is another one."""
        if self._before is not None:
            store.write_json(self.path, self._before)
        self.writes = False

    def more(self, records: int) -> None:
        """Records were added."""
        self.done += records
        self.ended = None
        if time.monotonic() - self._last >= PULSE:
            self.put("running")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _run(job: Job, ranks: Ranks, progress: bool) -> None:
    recipe, folder = job.recipe, job.folder
    loaded = loaded_for(job, ranks.device)
    if ranks.first:
        identity = identity_of(job, loaded)
        refuse_other_run(folder, identity)
        store.remove_partial_files(folder)
        for name in PARTS:
            for path in store.parts(folder, name):
                store.cut_torn_line(path)
        begin(job, identity)
    ranks.wait()
    done = read_records(folder)
    # Nobody appends while another one still reads.
    ranks.wait()
    status = Status(folder, 0, sum(map(len, done.values())), ranks.first)
    arms: Plan | None = None
    try:
        arms = plan_arms(job, loaded, ranks, progress)
        status.total = len(arms.arms) * len(recipe.seeds) * len(job.data.samples)
        if ranks.first:
            settle(job, loaded, arms, status, ranks.world)
        # Nobody answers for arms that were refused.
        ranks.wait()
        Work(job, loaded, arms.arms, ranks, status, progress).all(done)
        ranks.wait()
        if ranks.first:
            finish(job, arms)
            status.done = status.total
            status.put("complete", ended=True)
    except KeyboardInterrupt:
        _ended(status, "interrupted", f"stopped by hand; {store.AGAIN}")
        if ranks.first and arms is not None:
            _score_part(job, arms, status)
        raise
    except BaseException as error:
        _ended(status, "failed", _one_line(error))
        raise


def loaded_for(job: Job, device: str | None = None) -> Loaded:
    """The model of a run, after a look at what its call takes."""
    found = load_model(job.recipe.model, device=device, tiny=job.data if job.tiny else None, folder=job.source.folder)
    if found.kind == "image":
        check_call(job.recipe, found.target)
    return found


def identity_of(job: Job, loaded: Loaded) -> dict[str, Any]:
    """What identity.json holds."""
    found = {"recipe": job.source.digest(), "samples": job.data.digest(), "model": loaded.files, "tiny": job.tiny}
    files = job.method_files()
    return found | ({"imports": {f.path.name: f.sha256 for f in files}} if files else {})


def begin(job: Job, identity: dict[str, Any]) -> None:
    """Write what a run is; first of all identity.json, so that a folder with anything else in it is known."""
    store.write_json(job.folder / store.IDENTITY, identity)
    if not (job.folder / store.RECIPE).is_file():
        _write_recipe(job)
    store.write_lines(job.folder / store.SAMPLES, job.data.samples)


def _write_recipe(job: Job) -> None:
    store.write_atomic(job.folder / store.RECIPE, self_contained(job.recipe).canonical().encode())


def settle(job: Job, loaded: Loaded, arms: Plan, status: Status, world: int) -> None:
    """Refuse other arms than those of the folder, then write arms and environment; `status` has what is done.

    Raises:
        RunError: the arms differ.
    """
    refuse_other_arms(job.folder, arms, status)
    # Texts and claims of a recipe may have changed, and its heads have not.
    _write_recipe(job)
    if status.done < status.total:
        here = environment(loaded.device, world)
        if loaded.revision is not None:
            here["model_revision"] = loaded.revision
        files = job.method_files()
        if files:
            here["imports"] = [{"path": str(f.path), "sha256": f.sha256} for f in files]
        note_environment(job.folder, here, again=status.done > 0)
    store.write_json(job.folder / store.ARMS, arms.to_dict())
    status.put("running")


def _ended(status: Status, state: str, message: str) -> None:
    """Say so in status.json, if that can still be written; what happened first is what is raised."""
    with contextlib.suppress(RunError):
        status.put(state, message, ended=True)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _score_part(job: Job, arms: Plan, status: Status) -> None:
    """Score what there is. Where that is too little for a metric, the status says so: the records are what counts."""
    try:
        score(job, arms.to_dict())
    except Exception as error:
        _ended(status, "interrupted", f"stopped by hand; {store.AGAIN}. No figures yet ({_one_line(error)})")


def refuse_other_run(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder with a run of something else, or with files that a run would replace; nothing in it was touched.

    Raises:
        RunError: it is one; the message says what differs.
    """
    found = store.read_json(folder / store.IDENTITY)
    if found is None:
        others = [name for name in store.OWN if (folder / name).exists()]
        others += [path.name for name in PARTS for path in store.parts(folder, name)]
        if others:
            raise RunError(
                f"{folder} has {listing(others)} but no {store.IDENTITY}, so it is no run's, which would replace "
                f"{'it' if len(others) == 1 else 'them'}; give another folder with --out."
            )
        return
    if found == identity:
        return
    known = found if isinstance(found, dict) else {}
    names = {"recipe": "recipe", "samples": "samples", "model": "weights of the model", "tiny": "--tiny"}
    names["imports"] = "imported files"
    differ = [names[k] for k in names if known.get(k) != identity.get(k)]
    raise RunError(
        f"{folder} holds a run with other {' and '.join(differ)}, and stays as it is. Give another folder with --out, or "
        "the recipe that it was made with."
    )


def refuse_other_arms(folder: Path, arms: Plan, status: Status) -> None:
    """Refuse to go on with other arms than the records are of: files of heads can change under an equal recipe.

    Raises:
        RunError: they differ.
    """
    before = store.read_json(folder / store.ARMS)
    if before is None or before == json.loads(store.to_json(arms.to_dict())):
        return
    if status.done:
        status.undo()
        raise RunError(
            f"{folder} holds a run with other arms (heads or parameters), and stays as it is. Give another folder with "
            "--out, or the files of heads that it was made with."
        )
    # Nothing was answered, and what was measured of a batch on the way there is of no arm any more.
    for name in PARTS:
        for path in store.parts(folder, name):
            path.unlink()


def note_environment(folder: Path, found: dict[str, Any], again: bool) -> None:
    """Write environment.json; those of earlier parts of the run that differ are kept under `earlier`."""
    before = store.read_json(folder / store.ENVIRONMENT) if again else None
    earlier = []
    if isinstance(before, dict):
        earlier = before.pop("earlier", [])
        if before not in (found, *earlier):
            earlier.append(before)
    store.write_json(folder / store.ENVIRONMENT, {**found, **({"earlier": earlier} if earlier else {})})


def plan_arms(job: Job, loaded: Loaded, ranks: Ranks, progress: bool) -> Plan:
    """The arms, after the searches of the recipe; the first process searches, the others take its cache."""
    from .recipe_calibration import calibrate

    found = None
    if job.recipe.calibration is not None:
        if loaded.stream:
            raise RecipeError(
                "calibration: a search edits a model in this process, and this one is behind vLLM. Calibrate on model.path or "
                "model.hub first (attnsteer calibrate), and name the file of heads."
            )
        cache = job.folder / "calibration"
        subject = _subject(job, loaded)
        if ranks.first:
            found = calibrate(job.recipe, subject, job.samples, cache, progress=progress)
        ranks.wait()
        if found is None:
            found = calibrate(job.recipe, subject, job.samples, cache, progress=False)
    return plan(job.recipe, loaded.sites(), found)


def _subject(job: Job, loaded: Loaded) -> Any:
    from .recipe_calibration import Subject
    from .tasks.prompts import encode

    inputs = None
    if loaded.kind == "vlm":
        data = job.load(job.recipe.calibration.data)
        inputs = lambda samples: encode(loaded, Request(samples, data, {}, 0))  # noqa: E731
    return Subject(loaded.target, loaded.tokenizer, inputs)


class Answers(NamedTuple):
    """What one arm gave for a batch: the records, the units of each, and the audit of its interventions."""

    records: list[dict[str, Any]]
    units: list[int]
    audit: list[dict[str, Any]]


class Work:
    """The batches of one process. status: None where answers are only given again (`again`)."""

    def __init__(
        self, job: Job, loaded: Loaded, arms: Sequence[Arm], ranks: Ranks, status: Status | None, progress: bool
    ):
        self.job, self.loaded, self.arms, self.ranks, self.status = job, loaded, arms, ranks, status
        self.task = get_task(job.recipe.task)
        self.progress = progress and ranks.first
        self.score_pictures = scorers.load(job.recipe, tiny=job.tiny, device=loaded.device)
        self._begun: set[str] = set()
        self.groups = sharing.groups(job, loaded, arms)

    def all(self, done: dict[str, dict[tuple[int, str], Any]]) -> None:
        """Do what is not done: for each seed, for each batch, each arm, so that a stopped run has pairs."""
        recipe = self.job.recipe
        own = [(b, part) for b, part in self.batches() if b % self.ranks.world == self.ranks.rank]
        total = len(recipe.seeds) * len(self.arms) * sum(len(part) for _, part in own)
        files = {name: store.Lines(store.part(self.job.folder, name, self.ranks.rank)) for name in PARTS}
        bar = Progress(total, recipe.name, self.progress)
        try:
            for seed in recipe.seeds:
                for number, part in own:
                    self.batch(seed, number, part, done, files, bar)
        finally:
            bar.close()
            for file in files.values():
                file.close()

    def batches(self) -> list[tuple[int, list[Sample]]]:
        """Every batch with its number."""
        samples, size = self.job.data.samples, self.job.recipe.batch_size
        return [(b, samples[s : s + size]) for b, s in enumerate(range(0, len(samples), size))]

    def batch(
        self,
        seed: int,
        number: int,
        part: list[Sample],
        done: Mapping[str, Any],
        files: dict[str, store.Lines],
        bar: Progress,
    ) -> None:
        """What is not done of one batch, in every arm."""
        for group in sharing.of_batch(self.groups, part, self.loaded, self.task.DECODING):
            missing = {(arm.id, s["id"]) for arm in group for s in part if (seed, s["id"]) not in done.get(arm.id, {})}
            if missing:
                self._group(group, seed, number, part, missing, files)
            bar.update(len(part) * len(group), new=bool(missing))

    def _group(
        self,
        group: list[Arm],
        seed: int,
        number: int,
        part: list[Sample],
        missing: set[tuple[str, str]],
        files: dict[str, store.Lines],
    ) -> None:
        """One batch of the arms of a group: together, or where that fails each by itself from here on."""
        try:
            with measured_cost(self.loaded.device) as reading:
                answers = self._answers(group, seed, part)
        except Exception as error:
            if len(group) == 1:
                raise
            told = _one_line(error)
        else:
            self._write(group, seed, number, part, missing, answers, reading, files)
            return
        # By itself each arm says what is wrong with it, and the answers of the others are kept.
        self.groups = [g for own in self.groups for g in ([[a] for a in own] if group[0] in own else [own])]
        for arm in group:
            own = {(a, i) for a, i in missing if a == arm.id}
            if own:
                self._group([arm], seed, number, part, own, files)
        warnings.warn(
            f"{sharing.named(group)} did not answer in one batch ({told}), so each runs by itself.", stacklevel=2
        )

    def _write(
        self,
        group: list[Arm],
        seed: int,
        number: int,
        part: list[Sample],
        missing: set[tuple[str, str]],
        answers: list[Answers],
        reading: Reading,
        files: dict[str, store.Lines],
    ) -> None:
        """What a batch gave. It was computed whole, whatever is missing of it, so that a resumed run has the same numbers."""
        audits, timings, records = [], [], []
        for arm, own in zip(group, answers, strict=True):
            head = {"arm": arm.id, "seed": seed}
            audits.append({**head, "batch": number, "interventions": own.audit})
            timings.append(
                {
                    **head,
                    "batch": number,
                    "samples": len(part),
                    # Equal shares: what each arm took of a batch with others is not known.
                    "seconds": reading.seconds / len(group),
                    self.task.UNIT: sum(own.units),
                    "peak_memory": reading.peak_memory,
                    "edits": sum(site["edits"] for entry in own.audit for site in entry["sites"].values()),
                    "first": arm.id not in self._begun,
                    **({"shared": len(group)} if len(group) > 1 else {}),
                }
            )
            ids = [s["id"] for s in part]
            records += [{**head, "id": i, **r} for i, r in zip(ids, own.records, strict=True) if (arm.id, i) in missing]
        # Records come last: they say that a batch is done. What a stop leaves of the others is superseded.
        files[store.AUDIT].append(audits)
        files[store.TIMINGS].append(timings)
        files[store.RECORDS].append(records)
        self._begun |= {arm.id for arm in group}
        self.status.more(len(records))

    def again(self, seed: int, part: list[Sample]) -> dict[str, list[dict[str, Any]]]:
        """The records of one batch by arm, as the run gave them; nothing is written but pictures, into the job's folder."""
        found: dict[str, list[dict[str, Any]]] = {}
        for group in sharing.of_batch(self.groups, part, self.loaded, self.task.DECODING):
            for arm, own in zip(group, self._answers(group, seed, part), strict=True):
                found[arm.id] = [
                    {"arm": arm.id, "seed": seed, "id": s["id"], **r} for s, r in zip(part, own.records, strict=True)
                ]
        return found

    def _answers(self, group: list[Arm], seed: int, part: list[Sample]) -> list[Answers]:
        """The answers of each arm, from one batch that has the samples once for each."""
        from ..steering import steer

        if self.loaded.stream:
            from .served import answers

            return [Answers(*own) for own in answers(self.loaded, group, part, self.task, seed)]
        # Only arms by themselves make pictures.
        request = partial(
            Request,
            part * len(group),
            self.job.data,
            {**self.task.DECODING, **group[0].decoding},
            seed,
            score_pictures=self.score_pictures,
            folder=self.job.folder,
            images=f"{store.IMAGES}/{group[0].id}/{seed}",
            shared_prefix=self.job.recipe.prefix == "shared",
        )
        methods = sharing.make(group, part, self.loaded)
        if not methods:
            return [Answers(*self.task.answer(self.loaded, request(run=None)), [])]
        # What changes nothing is told by the report; a batch of it is no error.
        steering = steer(self.loaded.target, *methods, control=True)
        if len(group) > 1:
            steering.audit.divide(len(group))
        try:
            records, units = self.task.answer(self.loaded, request(run=steering))
        finally:
            steering.remove()
        # At zero strength a method may have nothing to do.
        if any(arm.kind not in ("zero", "baseline") for arm in group):
            steering.check_fired(changed=False)
        audits = sharing.audits(group, steering)
        size = len(part)
        return [
            Answers(records[i : i + size], units[i : i + size], audit)
            for i, audit in zip(range(0, len(records), size), audits, strict=True)
        ]
