"""`HeadSet`: an immutable set of (layer, head), or (tower, layer, head), with scores and provenance."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import SelectionError, SerializationError, brief, did_you_mean, listing
from .parameters import Named, PerSample, declared, parsed, plain, whole
from .site import Site

# Files of sets without towers stay at 1, which earlier versions read; 2 adds the towers.
SCHEMA_VERSION = 2
# The file of a shared set.
FILE = "heads.safetensors"


class HeadSet(Named):
    """An immutable, ordered set of attention heads, of one stack of layers or of several towers.

    Args:
        heads: `{layer: [head, ...]}` or an iterable of `(layer, head)`; indices are 0-based query heads,
            global over tensor-parallel shards. NumPy integers, 0-d tensors, and integer arrays and tensors are
            taken too. Of several towers: `{tower: {layer: [head, ...]}}`, or `(tower, layer, head)`; a tower is named as
            `Site.in_tower` says, by modality, stack or component ("vision", "encoder", "text_encoder.text"), or by a part of the
            path of its modules ("vision_tower"). A set names towers for all of its heads or for none.
        scores: `{(layer, head): score}` for some or all of the heads, e.g. from a calibration; with the tower in front where
            there are towers.
        shape: `(layers, heads per layer)` of the model that the set was found on; checked when it is used. Of towers: `{tower:
            (layers, heads per layer)}`, for some or all.
        provenance: JSON-able facts about where the set comes from (method, data hash, versions).

    Raises:
        SelectionError: an index is negative or not an integer, or outside `shape`; a score is not a number; a parameter does not
            exist or is missing; some heads are of a named tower and others are not.
    """

    __slots__ = ("_heads", "_provenance", "_scores", "_shape")

    def __init__(
        self,
        heads: Mapping[Any, Any] | Iterable[tuple[Any, ...]],
        *,
        scores: Mapping[tuple[Any, ...], float] | None = None,
        shape: tuple[int, int] | Mapping[str, tuple[int, int]] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        if isinstance(heads, HeadSet):
            entries = list(heads)
            scores = dict(heads.scores) if scores is None else scores
            shape = heads.shape if shape is None else shape
            provenance = heads.provenance if provenance is None else provenance
        elif isinstance(heads, Mapping):
            entries = [entry for key, row in heads.items() for entry in _entries(key, row)]
        else:
            entries = _pairs(heads)
        for entry in entries:
            if not _is_entry(entry):
                raise SelectionError(
                    f"HeadSet got {brief(entry)}; give (layer, head) pairs of non-negative integers, or {{layer: [head, ...]}}; of "
                    "several towers {tower: {layer: [head, ...]}}."
                )
        if len({len(entry) for entry in entries}) > 1:
            bare = next(e for e in entries if len(e) == 2)
            raise SelectionError(
                f"HeadSet got {bare} beside heads of the towers {listing(_towers_of(entries))}; name the tower of all heads, or of "
                "none."
            )
        self._shape = _checked_shape(shape, _towers_of(entries))
        for entry in entries:
            size = self._shape.get(entry[0]) if isinstance(self._shape, dict) else self._shape
            if size is not None and (entry[-2] >= size[0] or entry[-1] >= size[1]):
                raise SelectionError(
                    f"HeadSet has head {entry} but its shape is {size} (layers, heads per layer); "
                    "use indices from 0 up to those sizes minus one."
                )
        self._heads = tuple(sorted(set(entries)))
        members = set(self._heads)
        try:
            self._scores = {tuple(k): float(v) for k, v in (scores or {}).items() if tuple(k) in members}
        except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError):
            raise SelectionError(f"HeadSet(scores={brief(scores)}): give {{(layer, head): score}}.") from None
        if any(math.isnan(score) for score in self._scores.values()):
            raise SelectionError("HeadSet got a score that is not a number; leave out heads without a score.")
        self._provenance = json.loads(json.dumps(dict(provenance or {})))

    @property
    def scores(self) -> dict[tuple[int, int], float]:
        """A copy of the scores, for the heads that have one."""
        return dict(self._scores)

    @property
    def shape(self) -> Any:
        """`(layers, heads per layer)` of the model the set was found on, or None; of towers `{tower: (layers, heads)}`."""
        return dict(self._shape) if isinstance(self._shape, dict) else self._shape

    @property
    def provenance(self) -> dict[str, Any]:
        """A copy of the provenance record."""
        return json.loads(json.dumps(self._provenance))

    @property
    def towers(self) -> tuple[str, ...]:
        """The names of the towers, sorted; empty where the set names none."""
        return _towers_of(self._heads)

    def tower(self, name: str) -> HeadSet:
        """The heads of one tower, as a set that names none.

        Raises:
            SelectionError: the set has no such tower.
        """
        if name not in self.towers:
            have = listing(self.towers) if self.towers else "no towers, only layers"
            raise SelectionError(f"the HeadSet has no tower {name!r}; it has {have}.{did_you_mean(name, self.towers)}")
        shape = self._shape.get(name) if isinstance(self._shape, dict) else None
        scores = {entry[1:]: score for entry, score in self._scores.items() if entry[0] == name}
        return HeadSet(
            [entry[1:] for entry in self._heads if entry[0] == name],
            scores=scores,
            shape=shape,
            provenance={**self._provenance, "tower": name},
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have at least one head, ascending.

        Raises:
            SelectionError: the set names towers, each of which has layers of its own.
        """
        self._one_stack("layers")
        return tuple(sorted({layer for layer, _ in self._heads}))

    def __getitem__(self, layer: int) -> tuple[int, ...]:
        self._one_stack(f"heads[{layer!r}]")
        return tuple(head for at, head in self._heads if at == layer)

    def of(self, site: Site) -> tuple[int, ...]:
        """The heads that the set has at a site, by its layer, and its tower where the set names any."""
        return tuple(
            entry[-1]
            for entry in self._heads
            if entry[-2] == site.layer and (len(entry) == 2 or site.in_tower(entry[0]))
        )

    def _one_stack(self, what: str) -> None:
        if self.towers:
            raise SelectionError(
                f"{what}: this HeadSet is of the towers {listing(self.towers)}, and layers of each have numbers of their own. Take "
                f"one: heads.tower({self.towers[0]!r})."
            )

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __contains__(self, pair: object) -> bool:
        return pair in self._heads

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadSet) and self._heads == other._heads and self._scores == other._scores

    def __hash__(self) -> int:
        return hash(self._heads)

    def __or__(self, other: HeadSet) -> HeadSet:
        return HeadSet([*self, *other], scores={**other._scores, **self._scores}, shape=self._common_shape(other))

    def __and__(self, other: HeadSet) -> HeadSet:
        return HeadSet([p for p in self if p in other], scores=self._scores, shape=self._common_shape(other))

    def __sub__(self, other: HeadSet) -> HeadSet:
        return HeadSet([p for p in self if p not in other], scores=self._scores, shape=self._common_shape(other))

    def _common_shape(self, other: HeadSet) -> Any:
        if isinstance(self._shape, dict) and isinstance(other._shape, dict):
            clash = [name for name, size in self._shape.items() if other._shape.get(name, size) != size]
            if not clash:
                return {**self._shape, **other._shape}
        elif isinstance(self._shape, dict) or isinstance(other._shape, dict):
            return self._shape or other._shape
        if self._shape is not None and other._shape is not None and self._shape != other._shape:
            raise SelectionError(
                f"these HeadSets are of models with shapes {self._shape} and {other._shape} (layers, heads per layer); "
                "combine sets of one model."
            )
        return self._shape or other._shape

    def __repr__(self) -> str:
        rows = self.to_dict()
        places = len({entry[:-1] for entry in self._heads})
        text = repr(rows) if len(self) <= 24 else f"{len(self)} heads in {places} layers"
        return f"HeadSet({text})"

    def to_dict(self) -> dict[Any, Any]:
        """`{layer: [head, ...]}`, or `{tower: {layer: [head, ...]}}`; what the constructor takes."""
        if self.towers:
            return {name: self.tower(name).to_dict() for name in self.towers}
        return {layer: list(self[layer]) for layer in self.layers}

    def to_json(self) -> dict[str, Any]:
        """`to_dict` with layers as strings, as JSON has them; `from_json` reads it."""
        if self.towers:
            return {name: self.tower(name).to_json() for name in self.towers}
        return {str(layer): heads for layer, heads in self.to_dict().items()}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> HeadSet:
        """A set of what `to_json` wrote, or a person by hand in a recipe."""
        rows: dict[Any, Any] = {}
        for key, row in given.items():
            if isinstance(row, Mapping):
                rows[key] = {int(layer): heads for layer, heads in row.items()}
            else:
                rows[int(key)] = row
        return cls(rows)

    def top(self, k: int) -> HeadSet:
        """The `k` best-scored heads (ties: lower layer, then lower head; towers by name)."""
        if k < 0:
            raise SelectionError(f"top({k}): give a number of heads, 0 or more.")
        if len(self._scores) < len(self):
            raise SelectionError(f"top({k}) needs a score for each head; {len(self._scores)}/{len(self)} have one.")
        best = sorted(self._heads, key=lambda p: (-self._scores[p], p))[:k]
        return HeadSet(best, scores=self._scores, shape=self._shape, provenance=self._provenance)

    def save(self, path: str | Path) -> Path:
        """Write `heads` [N, 2] int64, `scores` [N] float64 (NaN: none) and the provenance as safetensors.

        Where there are towers, also `towers` [N] int64, places in the list of names among the metadata.

        Raises:
            SerializationError: `path` is none.
        """
        from safetensors.torch import save_file

        path = checked_path("HeadSet.save", path)
        heads = torch.tensor([entry[-2:] for entry in self._heads], dtype=torch.int64).reshape(-1, 2)
        scores = torch.tensor([self._scores.get(p, float("nan")) for p in self._heads], dtype=torch.float64)
        meta = {
            "format": "attnsteer.headset",
            "schema": str(SCHEMA_VERSION if self.towers else 1),
            "shape": json.dumps(self._shape),
            "provenance": json.dumps(self._provenance, sort_keys=True),
        }
        tensors = {"heads": heads, "scores": scores}
        if self.towers:
            meta["towers"] = json.dumps(self.towers)
            tensors["towers"] = torch.tensor([self.towers.index(entry[0]) for entry in self._heads], dtype=torch.int64)
        save_file(tensors, str(path), metadata=meta)
        return path

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """Read a set written by `save`.

        Raises:
            SerializationError: the file is missing, truncated, of another kind, or of a newer schema.
        """
        from safetensors import SafetensorError, safe_open

        path = checked_path("HeadSet.load", path)
        if not path.is_file():
            raise SerializationError(f"HeadSet.load: there is no file {path}.")
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                names = set(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise SerializationError(f"HeadSet.load: {path} is not a whole safetensors file ({error}).") from error
        if meta.get("format") != "attnsteer.headset" or names - {"towers"} != {"heads", "scores"}:
            raise SerializationError(
                f"HeadSet.load: {path} holds {sorted(names)} and format {meta.get('format')!r}; "
                "expected 'heads' and 'scores' written by HeadSet.save."
            )
        schema = meta.get("schema", "")
        if not schema.isdecimal() or int(schema) > SCHEMA_VERSION:
            raise SerializationError(
                f"HeadSet.load: {path} has schema {schema or None}, this version reads up to {SCHEMA_VERSION}; "
                "upgrade attnsteer."
            )
        heads, scores = tensors["heads"], tensors["scores"]
        fits = heads.dtype == torch.int64 and heads.ndim == 2 and heads.shape[1] == 2
        if not fits or scores.dtype != torch.float64 or scores.shape != heads.shape[:1]:
            raise SerializationError(
                f"HeadSet.load: {path} has heads {tuple(heads.shape)} {heads.dtype} and scores "
                f"{tuple(scores.shape)} {scores.dtype}; expected int64 [N, 2] and float64 [N]."
            )
        entries: list[tuple[Any, ...]] = [tuple(row) for row in heads.tolist()]
        try:
            if "towers" in names:
                known, at = json.loads(meta["towers"]), tensors["towers"]
                if at.dtype != torch.int64 or at.shape != heads.shape[:1] or (at < 0).any():
                    raise ValueError(f"towers {tuple(at.shape)} {at.dtype}; expected int64 [N]")
                entries = [(known[place], *entry) for place, entry in zip(at.tolist(), entries, strict=True)]
            scored = {p: s for p, s in zip(entries, scores.tolist(), strict=True) if not math.isnan(s)}
            shape = json.loads(meta.get("shape", "null"))
            provenance = json.loads(meta.get("provenance", "{}"))
            return cls(entries, scores=scored, shape=shape, provenance=provenance)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise SerializationError(f"HeadSet.load: {path} does not hold a head set: {error}") from error

    def push_to_hub(
        self,
        repo: str,
        *,
        model: Any = None,
        evidence: str = "",
        private: bool | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Share the set as a repository of the hub, with a card and a manifest; returns the address of the commit.

        Args:
            repo: owner/name; made where there is none. model: the model that the heads are of, or its id; others are refused
                when it is loaded for them. evidence: what a run says of it, for the card (`attnsteer.results.hub_runs.evidence`).
            private, token, endpoint: of the hub.

        Raises:
            HubError: the hub refuses or cannot be reached.
        """
        from .hub import card, model_facts, origin, upload

        facts = model_facts(model)
        sizes = self._shape if isinstance(self._shape, dict) else {"": self._shape} if self._shape else {}
        shape = ", ".join(f"{name} {n} layers of {h} heads".strip() for name, (n, h) in sizes.items()) or "not said"
        scored = lambda p: f"{p[-1]} ({self._scores[p]:.4g})" if p in self._scores else str(p[-1])  # noqa: E731
        places = dict.fromkeys(p[:-1] for p in self._heads)
        rows = [
            f"| {' '.join(map(str, at))} | {', '.join(scored(p) for p in self._heads if p[:-1] == at)} |"
            for at in places
        ]
        body = [
            f"{len(self)} attention heads, found by attnsteer.",
            "",
            origin(facts),
            f"- heads of the model: {shape}",
        ]
        body += [f"- {key}: {value}" for key, value in self._provenance.items()]
        body += ["", f"| layer | heads{' (score)' if self._scores else ''} |", "| --- | --- |", *rows, "", "```python"]
        body += ["from attnsteer import HeadSet", f'heads = HeadSet.from_pretrained("{repo}", model=model)', "```"]
        body += ["", evidence] if evidence else []
        base = (facts or {}).get("id")
        with tempfile.TemporaryDirectory(prefix="attnsteer-") as scratch:
            self.save(Path(scratch) / FILE)
            text = card(repo, "heads", "\n".join(body), base_model=base)
            return upload(
                Path(scratch),
                [FILE],
                repo,
                "heads",
                about={"model": facts},
                card=text,
                private=private,
                token=token,
                endpoint=endpoint,
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        model: Any = None,
        revision: str | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> HeadSet:
        """A set of a hub repository that `push_to_hub` made, or of a file of `save`.

        Args:
            model: the model that they shall act in, or its id: heads of another one are refused.

        Raises:
            HubError, SerializationError: it cannot be had, or is not what its manifest says.
            SelectionError: they are another model's heads.
        """
        from .hub import check_model, download
        from .manifest import read_manifest

        path = checked_path("HeadSet.from_pretrained", source)
        if path.is_file():
            return cls.load(path)
        folder = path
        if not path.is_dir():
            folder = download(
                str(source), "heads", lambda name: name == FILE, revision=revision, token=token, endpoint=endpoint
            )
            check_model(read_manifest(folder, links=True), model, f"the head set {source}")
        return cls.load(folder / FILE)

    def digest(self) -> str:
        """A short content hash over heads and scores, stable across runs."""
        text = json.dumps([[*p, self._scores.get(p)] for p in self._heads])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def checked_path(function: str, path: Any) -> Path:
    """`path` as a Path; a SerializationError that names the `function` where it is none."""
    if not isinstance(path, (str, os.PathLike)):
        raise SerializationError(f"{function}({brief(path)}): give a path, as a string or a Path.")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SerializationError(f"{function}({brief(path)}): this system has no such paths ({why}).") from error
    return Path(path)


def _pairs(heads: Iterable[Any]) -> list[tuple[Any, ...]]:
    try:
        return [tuple(plain(i) for i in plain(pair)) for pair in plain(heads)]
    except (TypeError, RuntimeError):
        raise SelectionError(
            f"HeadSet got {brief(heads)}; give (layer, head) pairs, or {{layer: [head, ...]}}."
        ) from None


def _row(layer: Any, row: Any) -> list[Any]:
    row = plain(row)
    # What is a tensor still has no plain numbers.
    if isinstance(row, (str, bytes, torch.Tensor)) or not isinstance(row, Iterable):
        raise SelectionError(f"HeadSet got {brief(row)} for layer {brief(layer)}; give a list of heads.")
    return [plain(head) for head in row]


def _entries(key: Any, row: Any) -> list[tuple[Any, ...]]:
    """The entries of one item of a mapping: of a layer, or of a tower."""
    if isinstance(row, Mapping) and isinstance(key, str):
        return [(key, plain(layer), head) for layer, heads in row.items() for head in _row(layer, heads)]
    return [(plain(key), head) for head in _row(key, row)]


def _is_entry(entry: tuple[Any, ...]) -> bool:
    named = len(entry) == 3 and isinstance(entry[0], str) and re.fullmatch(r"[^\W\d][\w.-]*", entry[0]) is not None
    return (len(entry) == 2 or named) and not any(whole(i) is None or i < 0 for i in entry[-2:])


def _towers_of(entries: Iterable[tuple[Any, ...]]) -> tuple[str, ...]:
    return tuple(sorted({entry[0] for entry in entries if len(entry) == 3}))


def _checked_shape(shape: Any, towers: tuple[str, ...]) -> Any:
    """None, (layers, heads), or a dict of these by tower."""
    fits = lambda one: (  # noqa: E731
        isinstance(one, (tuple, list)) and len(one) == 2 and all((whole(n) or 0) > 0 for n in one)
    )
    if shape is None:
        return None
    if isinstance(shape, Mapping) and all(map(fits, shape.values())) and (towers or not shape):
        return {str(name): (int(one[0]), int(one[1])) for name, one in shape.items() if name in towers} or None
    if not fits(shape) or towers:
        form = "{tower: (layers, heads per layer)}" if towers else "(layers, heads per layer)"
        raise SelectionError(f"HeadSet(shape={brief(shape)}): give {form}, both above 0.")
    return int(shape[0]), int(shape[1])


def at_head(values: Mapping[tuple[Any, ...], Any], site: Site, head: int) -> Any:
    """What a mapping by (layer, head), or (tower, layer, head), has for a head of a site.

    Raises:
        KeyError: nothing.
    """
    pair = site.layer, head
    if pair in values:
        return values[pair]
    for entry, value in values.items():
        if entry[-2:] == pair and len(entry) == 3 and site.in_tower(entry[0]):
            return value
    raise KeyError(pair)


def head_set(*, kw_only: bool = False) -> Any:
    """The field of a method's own heads, or a list of such sets, one for each sample; None: all that `where` selects."""
    return parsed(_one_or_each, "HeadSet or {layer: [head, ...]}", None, kw_only=kw_only)


def takes_sets(cls: type) -> bool:
    """Whether a method's own `heads` may be a list of sets, one for each sample (see `head_set`)."""
    return getattr(declared(cls, "heads"), "parse", None) is _one_or_each


def _one_or_each(given: Any) -> HeadSet | PerSample:
    """A head set, or one for each sample (None: it is left alone): a list of sets or mappings, which no set is made of."""
    if isinstance(given, PerSample):
        given = given.given
    form = (HeadSet, Mapping)
    if isinstance(given, (list, tuple)) and any(isinstance(h, form) for h in given):
        if not all(h is None or isinstance(h, form) for h in given):
            raise SelectionError(
                "give one HeadSet or {layer: [head, ...]} for each sample, or None for one that is left alone."
            )
        return PerSample([None if h is None else HeadSet(h) for h in given])
    return HeadSet(given)


def union(heads: HeadSet | PerSample) -> HeadSet:
    """The heads of a set, or of all samples' sets."""
    if isinstance(heads, HeadSet):
        return heads
    given = [own for own in heads.values if own is not None]
    return HeadSet(
        [pair for own in given for pair in own], shape=next((own.shape for own in given if own.shape is not None), None)
    )
