"""Whether a run folder is what it says: its files, its records, its figures, its model, and some of its answers given again."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import AttnSteerError, RecipeError, RunError, SerializationError, listing
from ..manifest import MANIFEST, file_hash, problems_of, read_manifest
from ..recipe.loading import load_recipe
from ..recipe.schema import Recipe, digest
from ..run import store
from ..run.data.sample import Data
from ..run.folder import RunFolder, read_run
from ..run.merging import EQUAL, files_of, read_timings
from ..run.score import Scores

VERIFIED = "verified.json"
SCHEMA_VERSION = 1
SAMPLES = 20
# By how much log-likelihoods and similarities (in nats, or of the score's unit) may differ on equal machines, on others in
# fp32, and on others in half precision; which share of texts and pictures may differ on other machines; mean absolute
# difference of two pictures' values (of 255).
SAME, OTHER, HALF = 1e-5, 1e-3, 0.1
TEXTS, PIXELS = 0.1, 3.0
# Of an environment, what decides about last digits.
MACHINE = tuple(k for k in EQUAL if k not in ("git", "python", "platform"))
# Keys of records that say which one it is, and where its picture lies.
OWN = ("arm", "seed", "id", "image")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. state: "pass", "fail" or "not done"."""

    name: str
    state: str
    text: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found: checks in order. ok: all of them passed. when: in UTC. manifest: SHA-256 of the run's MANIFEST.json."""

    run: str
    when: str
    manifest: str | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(c.state == "pass" for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """What verified.json holds."""
        return {"schema": SCHEMA_VERSION, "ok": self.ok, **asdict(self)}


def verify(folder: str | Path, *, samples: int = SAMPLES, seal: bool = True) -> Verification:
    """Check a run folder, and write verified.json into it.

    Files against MANIFEST.json, the form of everything, one record for each arm, seed and sample, metrics.json computed again
    from the records, the arms again from the recipe, the weights of the model, and the answers to whole batches of at least
    `samples` samples given again: equal on the machine of the run, within the tolerances above on another one.

    Args:
        samples: to answer again; 0: the model is not loaded, so neither arms nor weights are checked.
        seal: write verified.json, where the folder can be written.

    Raises:
        RunError: it is no finished run that this version reads; the message says what to do.
    """
    run = read_run(folder)
    if run.metrics is None or not run.complete:
        raise RunError(
            f"{run.path} is {run.status['state']}, {run.status.get('done')} of {run.status.get('total')} records; start the run "
            "again with the same command to finish it, then verify it."
        )
    checks = [_files(run), _records(run)]
    recipe, of_recipe = _recipe(run)
    checks.append(of_recipe)
    if recipe is not None:
        checks.append(_metrics(run, recipe))
        checks += _again(run, recipe, samples)
    path = run.path / MANIFEST
    from ..run.runs import now

    found = Verification(run.name, now(), file_hash(path) if path.is_file() else None, tuple(checks))
    if seal:
        try:
            store.write_json(run.path / VERIFIED, found.to_dict())
        except RunError as error:
            checks.append(Check("mark", "not done", f"{VERIFIED} could not be written: {error}"))
            found = Verification(found.run, found.when, found.manifest, tuple(checks))
    return found


def verified(path: Path) -> tuple[str, str]:
    """What verified.json says of the folder as it is: "verified", "failed", "outdated" or "not verified"; and when."""
    try:
        found = json.loads((path / VERIFIED).read_text(encoding="utf-8"))
        when, ok, manifest = str(found["when"]), found["ok"] is True, found["manifest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "not verified", ""
    if manifest is None or not (path / MANIFEST).is_file() or manifest != file_hash(path / MANIFEST):
        return "outdated", when
    return ("verified" if ok else "failed"), when


def _files(run: RunFolder) -> Check:
    try:
        manifest = read_manifest(run.path)
    except SerializationError as error:
        told = (
            f"{error} Runs of earlier versions have none: start the run again with the same command, which writes it."
        )
        return Check("files", "fail", told)
    problems = problems_of(run.path, manifest)
    missing = sorted(set(files_of(run.path)) - set(manifest["files"]))
    problems += [f"{name} is not in {MANIFEST}" for name in missing]
    if manifest["kind"] != "run":
        problems.append(f"it is the manifest of a {manifest['kind']}")
    count = len(manifest["files"])
    return Check(
        "files", "fail" if problems else "pass", listing(problems, 4) or f"{count} files are as {MANIFEST} says"
    )


def _records(run: RunFolder) -> Check:
    """One record for each arm, seed and sample, and the samples that the run says."""
    seeds = run.recipe.get("seeds") or [0]
    wanted = {(seed, i) for seed in seeds for i in run.samples}
    problems = []
    for arm in run.arms:
        lacking = wanted - set(run.records.get(arm, {}))
        if lacking:
            seed, name = min(lacking)
            problems.append(f"{arm} lacks {len(lacking)} of {len(wanted)} records, {name} (seed {seed}) the first")
    limit = (run.recipe.get("data") or {}).get("limit")
    if limit is not None and len(run.samples) > limit:
        problems.append(f"there are {len(run.samples)} samples, and the recipe has a limit of {limit}")
    pictures = any(isinstance(s.get("image"), str) for s in run.samples.values())
    # With pictures from files, the hash is of them as well; the answers given again have them.
    if not pictures and digest(list(run.samples.values())) != run.identity.get("samples"):
        problems.append("samples.jsonl is not what identity.json has the hash of")
    total = sum(map(len, run.records.values()))
    text = f"{total} records: every arm has answered every one of {len(run.samples)} samples"
    return Check("records", "fail" if problems else "pass", listing(problems, 4) or text)


def _recipe(run: RunFolder) -> tuple[Recipe | None, Check]:
    try:
        recipe = load_recipe(run.path / store.RECIPE)
    except RecipeError as error:
        return None, Check("recipe", "fail", f"{store.RECIPE} is none that this version reads: {error}")
    if recipe.primary != (run.metrics or {}).get("primary"):
        told = f"its primary figure is {recipe.primary}, that of {store.METRICS} {run.metrics.get('primary')}"
        return recipe, Check("recipe", "fail", told)
    return recipe, Check("recipe", "pass", f"{recipe.name}, read and complete")


def _metrics(run: RunFolder, recipe: Recipe) -> Check:
    """metrics.json from the records."""
    plan = {"arms": list(run.arms.values()), "points": json.loads((run.path / store.ARMS).read_text())["points"]}
    audits = {a: v for a, v in ((run.audit or {}).get("arms") or {}).items() if a in run.arms}
    try:
        made = Scores(recipe, plan, list(run.samples.values()), run.records, read_timings(run.path), audits).to_dict()
    except (AttnSteerError, KeyError, TypeError, ValueError) as error:
        return Check("metrics", "fail", f"they cannot be computed from the records ({type(error).__name__}: {error})")
    made = json.loads(store.to_json(made))
    # Of warnings, those about parts that ran elsewhere are made from environment.json.
    differ = [path for path in _differing(made, run.metrics) if not path.startswith("warnings")]
    if differ:
        return Check(
            "metrics", "fail", f"{store.METRICS} does not follow from the records: {listing(differ, 4)} differ"
        )
    return Check("metrics", "pass", f"{store.METRICS} follows from the records")


def _differing(one: Any, two: Any, path: str = "") -> Iterator[str]:
    """Dotted paths at which two values differ by more than rounding."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        for key in dict.fromkeys([*one, *two]):
            here = f"{path}.{key}" if path else str(key)
            if key not in one or key not in two:
                yield here
            else:
                yield from _differing(one[key], two[key], here)
    elif isinstance(one, list) and isinstance(two, list):
        if len(one) != len(two):
            yield path
        for index, (a, b) in enumerate(zip(one, two, strict=False)):
            yield from _differing(a, b, f"{path}.{index}")
    elif isinstance(one, int | float) and isinstance(two, int | float) and not isinstance(one, bool):
        if not math.isclose(one, two, rel_tol=1e-9, abs_tol=1e-9):
            yield path
    elif one != two:
        yield path


def _again(run: RunFolder, recipe: Recipe, samples: int) -> list[Check]:
    """Arms, weights and some answers, from the recipe."""
    names = ("weights", "arms", "answers")
    harness = run.environment.get("harness")
    if harness:
        told = (
            f"{harness} asked the questions, which is not done here; evaluate again with it, and compare the two runs"
        )
        return [Check(n, "not done", told) for n in names]
    if samples < 1:
        return [Check(n, "not done", "the model was not asked to be loaded") for n in names]
    from ..run.job import prepare
    from ..run.models import load

    with tempfile.TemporaryDirectory(prefix="attnsteer-verify-") as scratch:
        folder = Path(scratch)
        if (run.path / "calibration").is_dir():
            shutil.copytree(run.path / "calibration", folder / "calibration")
        try:
            job = prepare(recipe, folder, tiny=run.tiny, given=_kept(run, recipe))
            loaded = load(job.recipe.model, tiny=job.data if run.tiny else None, folder=job.source.folder)
        except AttnSteerError as error:
            return [Check(n, "not done", f"the run cannot be set up here: {error}") for n in names]
        checks = [_weights(run, job, loaded)]
        if checks[0].state == "fail":
            # Answers of another model say nothing.
            return [
                *checks,
                *(Check(n, "not done", "the run is of other weights, samples or files") for n in names[1:]),
            ]
        return [*checks, *_answers(run, job, loaded, samples)]


def _kept(run: RunFolder, recipe: Recipe) -> Data | None:
    """The samples of the folder, where the recipe's file of them is not on this machine; they have no pictures then."""
    file = recipe.data.file
    if file is None or run.tiny or (recipe.folder / file).exists():
        return None
    samples = list(run.samples.values())
    return None if any("image" in s for s in samples) else Data(samples, lambda s: None)


def _weights(run: RunFolder, job: Any, loaded: Any) -> Check:
    """Model, samples and method files against identity.json."""
    problems = []
    if loaded.files != run.identity.get("model"):
        said = run.identity.get("model") or {}
        other = sorted(n for n in {*said, *loaded.files} if said.get(n) != loaded.files.get(n))
        problems.append(f"the model is another one: {listing(other, 3)}")
    if job.data.digest() != run.identity.get("samples"):
        problems.append("the data give other samples or pictures now")
    if {f.path.name: f.sha256 for f in job.method_files()} != run.identity.get("imports", {}):
        problems.append("the imported files are other ones")
    text = f"the hashes of {len(loaded.files)} files of the model are those of the run"
    if _kept(run, job.recipe) is not None:
        text += (
            f"; {job.recipe.data.file} is not here: the samples are those of {store.SAMPLES}, which have the run's hash"
        )
    return Check("weights", "fail" if problems else "pass", "; ".join(problems) or text)


def _answers(run: RunFolder, job: Any, loaded: Any, samples: int) -> list[Check]:
    from ..run.cost import environment
    from ..run.ranks import Ranks
    from ..run.runs import Work, plan_arms

    try:
        plan = plan_arms(job, loaded, Ranks(), progress=False)
    except AttnSteerError as error:
        return [Check("arms", "fail", f"the recipe makes no arms ({error})"), Check("answers", "not done", "no arms")]
    made, said = json.loads(store.to_json(plan.to_dict())), json.loads((run.path / store.ARMS).read_text())
    differ = list(_differing(made, said))
    if differ:
        told = f"{store.ARMS} is not what {store.RECIPE} makes: {listing(differ, 4)} differ"
        return [Check("arms", "fail", told), Check("answers", "not done", "the arms are of another recipe")]
    checks = [Check("arms", "pass", f"{len(plan.arms)} arms follow from the recipe")]
    here = json.loads(store.to_json(environment(loaded.device, 1)))
    earlier = run.environment.get("earlier") or ()
    equal = not earlier and all(here.get(k) == run.environment.get(k) for k in MACHINE)
    work = Work(job, loaded, plan.arms, Ranks(), None, progress=False)
    found = Found(run, SAME if equal else OTHER if job.recipe.model.dtype == "float32" else HALF, equal)
    done = 0
    for seed, part in _chosen(run, job, samples):
        for arm, records in work.again(seed, part).items():
            for record in records:
                found.compare(arm, seed, record, job.folder)
        done += len(part)
    state, text = found.verdict(done)
    return [*checks, Check("answers", state, text)]


def _chosen(run: RunFolder, job: Any, samples: int) -> list[tuple[int, list[dict[str, Any]]]]:
    """Whole batches, as the run had them: drawn by a hash of the records, so that who writes these cannot choose them."""
    size, every = job.recipe.batch_size, job.data.samples
    key = file_hash(run.path / store.RECORDS)
    batches = [(seed, start) for seed in job.recipe.seeds for start in range(0, len(every), size)]
    batches.sort(key=lambda b: hashlib.sha256(f"{key}:{b[0]}:{b[1]}".encode()).digest())
    out, count = [], 0
    for seed, start in batches:
        if count >= samples:
            break
        out.append((seed, every[start : start + size]))
        count += len(out[-1][1])
    return out


class Found:
    """What comparing answers found. tolerance: of numbers. equal: the machine is that of the run."""

    def __init__(self, run: RunFolder, tolerance: float, equal: bool):
        self.run, self.tolerance, self.equal = run, tolerance, equal
        self.count = self.texts = 0
        self.largest = 0.0
        self.wrong: list[str] = []

    def compare(self, arm: str, seed: int, new: Mapping[str, Any], folder: Path) -> None:
        """A stored record with the one given again."""
        name = f"{arm} {new['id']}"
        old = self.run.records[arm][seed, new["id"]]
        self.count += 1
        free = self._picture(old, new, folder) if "pixels" in new else set()
        for key in dict.fromkeys([*old, *new]):
            if key in OWN or key in free:
                continue
            one, two = old.get(key), new.get(key)
            if _numbers(one) and _numbers(two) and len(one) == len(two):
                gap = max((abs(a - b) for a, b in zip(one, two, strict=True)), default=0.0)
                self.largest = max(self.largest, gap)
                if gap > self.tolerance:
                    self.wrong.append(f"{name}: {key} differs by {gap:.2g}")
            elif one != two:
                if self.equal or key not in ("generated", "finished"):
                    self.wrong.append(f"{name}: {key} is {_short(two)} instead of {_short(one)}")
                elif key == "generated":
                    self.texts += 1

    def _picture(self, old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> set[str]:
        """Keys that need not be equal: a picture of another machine may differ in few values, and what is read off it too."""
        if old["pixels"] == new["pixels"]:
            return set()
        gap = _difference(store.own_file(self.run.path, old["image"]), folder / new["image"])
        self.largest = max(self.largest, gap)
        if self.equal or gap > PIXELS:
            self.wrong.append(f"{old['arm']} {old['id']}: the picture differs by {gap:.2g} of 255 on average")
        else:
            self.texts += 1
        return {"pixels", "detected", "valid", "similarity", "features"}

    def verdict(self, samples: int) -> tuple[str, str]:
        """("pass" or "fail", what was found)."""
        on = "this machine is the run's" if self.equal else "another machine than the run's"
        said = f"{self.count} answers to {samples} samples given again ({on})"
        if self.wrong:
            return "fail", f"{said}: {len(self.wrong)} differ, {listing(self.wrong, 2)}"
        if self.texts > TEXTS * self.count:
            return "fail", f"{said}: {self.texts} texts or pictures differ, more than {TEXTS:.0%}"
        more = f"; {self.texts} texts or pictures differ" if self.texts else ""
        return "pass", f"{said}: equal, numbers within {self.tolerance:g} (at most {self.largest:.2g}){more}"


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)


def _difference(one: Path, two: Path) -> float:
    import numpy as np
    from PIL import Image

    arrays = []
    for path in (one, two):
        with Image.open(path) as opened:
            arrays.append(np.asarray(opened.convert("RGB"), dtype=np.float32))
    return math.inf if arrays[0].shape != arrays[1].shape else float(abs(arrays[0] - arrays[1]).mean())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
