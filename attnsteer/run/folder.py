"""Reading a run folder back: every file checked, and what a person can do about a damaged or unfinished one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import RecipeError, RunError, listing
from ..evals.metrics import Metric, get_metric
from ..recipe import yaml
from . import store
from .score import SCHEMA_VERSION
from .store import AGAIN

# (seed, id) of a record.
Key = tuple[int, str]


@dataclass(frozen=True)
class RunFolder:
    """What a run wrote.

    Attributes:
        path: the folder. recipe: resolved. identity: hashes of recipe, samples and model. environment: versions and machine.
        status: state and times. arms: id -> entry of arms.json, in its order. samples: id -> sample, in order.
        records: arm -> (seed, id) -> record. metrics: metrics.json, or None where the run did not come so far.
        audit, attention: the files of these names, or None.
    """

    path: Path
    recipe: dict[str, Any]
    identity: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    samples: dict[str, dict[str, Any]]
    records: dict[str, dict[Key, dict[str, Any]]] = field(repr=False)
    metrics: dict[str, Any] | None = None
    audit: Any = None
    attention: Any = None

    @property
    def name(self) -> str:
        """Of the recipe."""
        return str(self.recipe.get("name", self.path.name))

    @property
    def complete(self) -> bool:
        """The run came to its end, with all samples."""
        return self.status.get("state") == "complete" and not (self.metrics or {}).get("partial", False)

    @property
    def tiny(self) -> bool:
        """A random model stood in for the recipe's own."""
        return bool(self.identity.get("tiny"))

    @property
    def unchanged(self) -> set[str]:
        """The arms whose interventions changed nothing, although they should have."""
        return set((self.metrics or {}).get("unchanged") or ())

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the records, ascending."""
        return tuple(sorted({seed for rows in self.records.values() for seed, _ in rows}))

    @property
    def points(self) -> list[dict[str, Any]]:
        """Of the sweep: {"point", "values", "arms": {role: arm id}}; one without values where nothing is swept."""
        found = (self.metrics or {}).get("points")
        if found:
            return found
        roles = {a: a for a in self.arms}
        return [{"point": 0, "values": {}, "arms": roles}]

    def base(self, arm: str) -> str:
        """The baseline that an arm is compared with: that of its point (settings of decoding move the baseline too)."""
        point = next((p for p in self.points if arm in p["arms"].values()), self.points[0])
        return point["arms"].get("baseline", "baseline")

    def primary(self) -> tuple[str, str]:
        """(metric, estimate) of the headline.

        Raises:
            RunError: the recipe names none of its own metrics.
        """
        whole = str((self.metrics or {}).get("primary") or self.recipe.get("primary", ""))
        name, _, estimate = whole.partition(".")
        if name not in self.measures or not estimate:
            raise RunError(f"{self.path}: the primary figure {whole!r} is none of {listing(self.measures)}.")
        return name, estimate

    @cached_property
    def measures(self) -> dict[str, Metric]:
        """The recipe's metrics by name, with their options."""
        return {name: get_metric(name, **options) for name, options in self.metric_options().items()}

    def metric_options(self) -> dict[str, dict[str, Any]]:
        """Name -> options, as the recipe states them."""
        return dict(_metric(entry) for entry in self.recipe.get("metrics", ()))

    def groups(self, keys: list[Key]) -> list[str] | None:
        """What was drawn together, one label per key; None where every record is a draw of its own."""
        labels = [str(self.samples.get(i, {}).get("group", i)) for _, i in keys]
        return None if len(set(labels)) == len(labels) else labels


def _metric(entry: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    return str(entry["name"]), {k: v for k, v in entry.items() if k != "name"}


def read_run(path: str | Path) -> RunFolder:
    """Read and check a run folder.

    Raises:
        RunError: it is no run folder, or a file is missing or damaged; the message says which line, and what to do.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"{path} is not a folder; give the folder that `attnsteer run --out` wrote.")
    if not (path / "recipe.yaml").is_file():
        raise RunError(
            f"{path} has no recipe.yaml, so it is no run folder; there are {listing(_names(path)) or 'no files'}. "
            "Give the folder that `attnsteer run --out` wrote."
        )
    _check_version(path)
    status = _object(path, "status.json")
    if status.get("state") not in ("running", "complete", "interrupted", "failed"):
        raise RunError(f"{path / 'status.json'}: the state is {status.get('state')!r}; {AGAIN}.")
    arms = _object(path, "arms.json")
    entries = arms.get("arms", [])
    if not isinstance(entries, list) or not entries or not all(isinstance(a, dict) and "id" in a for a in entries):
        raise RunError(f'{path / "arms.json"} has no list "arms" of objects with an id; {AGAIN}.')
    samples = {s["id"]: s for s in _lines(path / "samples.jsonl", ("id",))}
    found = RunFolder(
        path,
        recipe=_recipe(path / "recipe.yaml"),
        identity=_object(path, "identity.json"),
        environment=_object(path, "environment.json"),
        status=status,
        arms={str(a["id"]): a for a in entries},
        samples=samples,
        records=_records(path, status["state"] == "complete"),
        metrics=_object(path, "metrics.json", needed=status["state"] == "complete"),
        audit=_json(path / "audit.json", needed=False),
        attention=_object(path, "attention.json", needed=False),
    )
    strangers = sorted({i for rows in found.records.values() for _, i in rows} - set(samples))
    if strangers:
        raise RunError(f"{path}: records of {listing(strangers, 4)}, which samples.jsonl does not have; {_new()}.")
    unknown = sorted(set(found.records) - set(found.arms))
    if unknown:
        raise RunError(f"{path}: records of the arms {listing(unknown, 4)}, which arms.json does not have; {_new()}.")
    return found


def _check_version(path: Path) -> None:
    """Raise a RunError for a folder that another version wrote in another form."""
    written = {"recipe.yaml": _recipe(path / "recipe.yaml").get("schema"), "metrics.json": SCHEMA_VERSION}
    if (path / "metrics.json").is_file():
        written["metrics.json"] = _object(path, "metrics.json").get("schema")
    for name, schema in written.items():
        if schema != SCHEMA_VERSION:
            newer = isinstance(schema, int) and schema > SCHEMA_VERSION
            do = "upgrade attnsteer" if newer else "run its recipe again with this version, into a new folder"
            raise RunError(
                f"{path} is a run folder of another version: {name} has schema {schema!r}, this one reads {SCHEMA_VERSION}; {do}."
            )


def _new() -> str:
    return "its files are of different runs: run the recipe into a new folder"


def _names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def _recipe(path: Path) -> dict[str, Any]:
    try:
        found = yaml.read(path).value
    except RecipeError as error:
        raise RunError(f"{path} is damaged: {error} {_new()}.") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} is no recipe: it holds {type(found).__name__}; {_new()}.")
    return found


def _json(path: Path, needed: bool = True) -> Any:
    if not path.is_file():
        if not needed:
            return None
        raise RunError(f"{path} is missing; {AGAIN}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it and {AGAIN}.") from error


def _object(path: Path, name: str, needed: bool = True) -> Any:
    found = _json(path / name, needed)
    if found is None and not needed:
        return None
    if not isinstance(found, dict):
        raise RunError(f"{path / name} holds no JSON object; delete it and {AGAIN}.")
    return found


def _records(path: Path, complete: bool) -> dict[str, dict[Key, dict[str, Any]]]:
    """From records.jsonl, or of an unfinished run from the parts of its ranks."""
    whole = path / "records.jsonl"
    if complete or whole.is_file():
        files = [whole]
    else:
        files = store.parts(path, store.RECORDS)
    found: dict[str, dict[Key, dict[str, Any]]] = {}
    for file in files:
        for record in _lines(file, ("arm", "seed", "id"), torn=file != whole):
            rows = found.setdefault(str(record["arm"]), {})
            key = (record["seed"], record["id"])
            if key in rows:
                raise RunError(f"{file}: two records of arm {record['arm']}, seed {key[0]}, sample {key[1]}; {_new()}.")
            rows[key] = record
    return found


def _lines(path: Path, keys: tuple[str, ...], torn: bool = False) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSONL file. torn: a last line that was cut off in the middle is passed over."""
    if not path.is_file():
        raise RunError(f"{path} is missing; {AGAIN}.")
    text = path.read_bytes()
    lines = text.split(b"\n")
    if lines[-1] and torn:
        lines[-1] = b""
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path}, line {number} is damaged ({error}); {AGAIN}.") from error
        missing = [k for k in keys if not isinstance(found, dict) or k not in found]
        if missing:
            raise RunError(f"{path}, line {number} has no {listing(missing)}; {_new()}.")
        yield found
