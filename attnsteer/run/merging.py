"""From the parts that the processes of a run wrote to its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RunError, listing
from ..manifest import MANIFEST, manifest_of
from ..recipe.schema import Recipe
from . import store
from .build import Plan
from .job import Job
from .score import Scores

# What has to be equal for numbers to be equal.
EQUAL = ("versions", "python", "platform", "cpu", "threads", "gpu", "device", "git")
PARTS = (store.RECORDS, store.TIMINGS, store.AUDIT)


def read_records(folder: Path) -> dict[str, dict[tuple[int, str], dict[str, Any]]]:
    """What is done: arm -> (seed, id) -> record, from the merged file and the parts."""
    found: dict[str, dict[tuple[int, str], dict[str, Any]]] = {}
    for path in (folder / store.RECORDS, *store.parts(folder, store.RECORDS)):
        for record in store.read_lines(path):
            try:
                key = record["seed"], record["id"]
                found.setdefault(record["arm"], {}).setdefault(key, record)
            except KeyError as error:
                raise RunError(f"{path} has a record without {error}; give another folder with --out.") from error
    return found


def read_timings(folder: Path) -> list[dict[str, Any]]:
    """Lines of timings, merged and not."""
    return _batches([folder / store.TIMINGS, *store.parts(folder, store.TIMINGS)])


def _batches(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One line for each batch of an arm, the last: a batch may have been computed again, or merged already."""
    found = {(s["arm"], s["seed"], s["batch"]): s for path in paths for s in store.read_lines(path)}
    return list(found.values())


def read_audits(folder: Path, arms: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The audit of each arm: of the whole run where it is merged, else of the batches that there are."""
    merged = store.read_json(folder / store.AUDIT)
    # Where it is there, it was made of all batches, and the parts may be gone.
    if merged is not None:
        return merged["arms"]
    batches = _batches(store.parts(folder, store.AUDIT))
    return {arm["id"]: sum_audits(arm["id"], batches) for arm in arms["arms"]}


def score(job: Job, arms: dict[str, Any]) -> None:
    """Write metrics.json from the records that there are."""
    records, timings, audits = read_records(job.folder), read_timings(job.folder), read_audits(job.folder, arms)
    found = Scores(job.recipe, arms, job.data.samples, records, timings, audits)
    out = found.to_dict()
    out["warnings"] += environment_warnings(store.read_json(job.folder / store.ENVIRONMENT))
    store.write_json(job.folder / store.METRICS, out)


def environment_warnings(environment: Any) -> list[str]:
    """What to say of a run whose parts ran on different machines or versions; see `EQUAL`."""
    if not isinstance(environment, dict):
        return []
    differ = [k for k in EQUAL if any(e.get(k) != environment.get(k) for e in environment.get("earlier", ()))]
    return [f"parts of the run differ in {listing(differ)} (environment.json); numbers may too"] if differ else []


def finish(job: Job, arms: Plan) -> None:
    """Merge the parts in canonical order, score, and remove the parts."""
    folder, recipe, samples = job.folder, job.recipe, job.data.samples
    records, size = read_records(folder), job.recipe.batch_size
    ordered = []
    for seed in recipe.seeds:
        for start in range(0, len(samples), size):
            for arm in arms.arms:
                ordered += [records[arm.id][seed, s["id"]] for s in samples[start : start + size]]
    store.write_lines(folder / store.RECORDS, ordered)
    place = {arm.id: i for i, arm in enumerate(arms.arms)}
    seeds = {seed: i for i, seed in enumerate(recipe.seeds)}
    lines = read_timings(folder)
    lines.sort(key=lambda t: (seeds[t["seed"]], t["batch"], place[t["arm"]]))
    score(job, arms.to_dict())
    if not (folder / store.AUDIT).is_file():
        store.write_json(folder / store.AUDIT, {"arms": read_audits(folder, arms.to_dict())})
    store.write_lines(folder / store.TIMINGS, lines)
    for name in PARTS:
        for path in store.parts(folder, name):
            path.unlink()
    store.write_json(folder / MANIFEST, manifest_of(folder, files_of(folder), "run", model=model_of(recipe)))


def model_of(recipe: Recipe) -> dict[str, Any]:
    """What a manifest says of the model of a run."""
    spec = recipe.model
    return {"id": Path(spec.path).name if spec.path else spec.name, "revision": spec.revision, "kind": spec.kind}


def files_of(folder: Path) -> Sequence[str]:
    """The files of a finished run that a manifest has: what it wrote and its searches found; no reports, no status."""
    names = [n for n in (*store.WRITTEN, store.IDENTITY) if n != store.STATUS and (folder / n).is_file()]
    for part in (store.IMAGES, "calibration"):
        names += [p.relative_to(folder).as_posix() for p in sorted((folder / part).rglob("*")) if p.is_file()]
    return [n for n in names if not n.endswith(".part")]


def sum_audits(arm: str, audits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The audit of an arm over its batches, by intervention: what `Audit.to_dict` has, counts added up."""
    out: list[dict[str, Any]] = []
    for line in audits:
        if line["arm"] != arm:
            continue
        for index, entry in enumerate(line["interventions"]):
            if index == len(out):
                out.append({"intervention": entry["intervention"].partition("(")[0], "sites": {}})
            for key, value in entry.items():
                if isinstance(value, int):
                    out[index][key] = out[index].get(key, 0) + value
            for path, site in entry["sites"].items():
                own = out[index]["sites"].setdefault(path, {"calls": 0, "edits": 0, "rows": 0, "heads": 0, "path": ""})
                for key in ("calls", "edits", "rows"):
                    own[key] += site[key]
                if "changed" in site:
                    own["changed"] = own.get("changed", 0) + site["changed"]
                if site.get("compiled"):
                    own["compiled"] = True
                own["heads"] = max(own["heads"], site["heads"])
                own["path"] = own["path"] or site["path"]
    return out
