"""`HeadSet`: an immutable set of (layer, head) with scores and provenance."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import SelectionError, SerializationError, brief
from .parameters import Named, PerSample, declared, parsed, plain, whole

SCHEMA_VERSION = 1
# The file of a shared set.
FILE = "heads.safetensors"


class HeadSet(Named):
    """An immutable, ordered set of attention heads.

    Args:
        heads: `{layer: [head, ...]}` or an iterable of `(layer, head)`; indices are 0-based query heads,
            global over tensor-parallel shards. NumPy integers, 0-d tensors, and integer arrays and tensors are
            taken too.
        scores: `{(layer, head): score}` for some or all of the heads, e.g. from a calibration.
        shape: `(layers, heads per layer)` of the model that the set was found on; checked when it is used.
        provenance: JSON-able facts about where the set comes from (method, data hash, versions).

    Raises:
        SelectionError: an index is negative or not an integer, or outside `shape`; a score is not a number; a parameter does not
            exist or is missing.
    """

    __slots__ = ("_heads", "_provenance", "_scores", "_shape")

    def __init__(
        self,
        heads: Mapping[int, Iterable[int]] | Iterable[tuple[int, int]],
        *,
        scores: Mapping[tuple[int, int], float] | None = None,
        shape: tuple[int, int] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        if isinstance(heads, HeadSet):
            pairs = list(heads)
            scores = dict(heads.scores) if scores is None else scores
            shape = heads.shape if shape is None else shape
            provenance = heads.provenance if provenance is None else provenance
        elif isinstance(heads, Mapping):
            pairs = [(plain(layer), head) for layer, row in heads.items() for head in _row(layer, row)]
        else:
            pairs = _pairs(heads)
        _check_shape(shape)
        for pair in pairs:
            if len(pair) != 2 or any(whole(i) is None or i < 0 for i in pair):
                raise SelectionError(
                    f"HeadSet got {brief(pair)}; give (layer, head) pairs of non-negative integers, "
                    "or {layer: [head, ...]}."
                )
            if shape is not None and (pair[0] >= shape[0] or pair[1] >= shape[1]):
                raise SelectionError(
                    f"HeadSet has head {pair} but its shape is {tuple(shape)} (layers, heads per layer); "
                    "use indices from 0 up to those sizes minus one."
                )
        self._heads = tuple(sorted(set(pairs)))
        members = set(self._heads)
        try:
            self._scores = {tuple(k): float(v) for k, v in (scores or {}).items() if tuple(k) in members}
        except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError):
            raise SelectionError(f"HeadSet(scores={brief(scores)}): give {{(layer, head): score}}.") from None
        if any(math.isnan(score) for score in self._scores.values()):
            raise SelectionError("HeadSet got a score that is not a number; leave out heads without a score.")
        self._shape = None if shape is None else (int(shape[0]), int(shape[1]))
        self._provenance = json.loads(json.dumps(dict(provenance or {})))

    @property
    def scores(self) -> dict[tuple[int, int], float]:
        """A copy of the scores, for the heads that have one."""
        return dict(self._scores)

    @property
    def shape(self) -> tuple[int, int] | None:
        """`(layers, heads per layer)` of the model the set was found on, or None."""
        return self._shape

    @property
    def provenance(self) -> dict[str, Any]:
        """A copy of the provenance record."""
        return json.loads(json.dumps(self._provenance))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have at least one head, ascending."""
        return tuple(sorted({layer for layer, _ in self._heads}))

    def __getitem__(self, layer: int) -> tuple[int, ...]:
        return tuple(head for at, head in self._heads if at == layer)

    def __iter__(self) -> Iterator[tuple[int, int]]:
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

    def _common_shape(self, other: HeadSet) -> tuple[int, int] | None:
        if self._shape is not None and other._shape is not None and self._shape != other._shape:
            raise SelectionError(
                f"these HeadSets are of models with shapes {self._shape} and {other._shape} (layers, heads per layer); "
                "combine sets of one model."
            )
        return self._shape or other._shape

    def __repr__(self) -> str:
        rows = {layer: list(self[layer]) for layer in self.layers}
        text = repr(rows) if len(self) <= 24 else f"{len(self)} heads in {len(rows)} layers"
        return f"HeadSet({text})"

    def to_dict(self) -> dict[int, list[int]]:
        """`{layer: [head, ...]}`."""
        return {layer: list(self[layer]) for layer in self.layers}

    def top(self, k: int) -> HeadSet:
        """The `k` best-scored heads (ties: lower layer, then lower head)."""
        if k < 0:
            raise SelectionError(f"top({k}): give a number of heads, 0 or more.")
        if len(self._scores) < len(self):
            raise SelectionError(f"top({k}) needs a score for each head; {len(self._scores)}/{len(self)} have one.")
        best = sorted(self._heads, key=lambda p: (-self._scores[p], p))[:k]
        return HeadSet(best, scores=self._scores, shape=self._shape, provenance=self._provenance)

    def save(self, path: str | Path) -> Path:
        """Write `heads` [N, 2] int64, `scores` [N] float64 (NaN: none) and the provenance as safetensors.

        Raises:
            SerializationError: `path` is none.
        """
        from safetensors.torch import save_file

        path = checked_path("HeadSet.save", path)
        heads = torch.tensor(self._heads, dtype=torch.int64).reshape(-1, 2)
        scores = torch.tensor([self._scores.get(p, float("nan")) for p in self._heads], dtype=torch.float64)
        meta = {
            "format": "attnsteer.headset",
            "schema": str(SCHEMA_VERSION),
            "shape": json.dumps(self._shape),
            "provenance": json.dumps(self._provenance, sort_keys=True),
        }
        save_file({"heads": heads, "scores": scores}, str(path), metadata=meta)
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
        if meta.get("format") != "attnsteer.headset" or names != {"heads", "scores"}:
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
        pairs = [tuple(row) for row in heads.tolist()]
        known = {p: s for p, s in zip(pairs, scores.tolist(), strict=True) if not math.isnan(s)}
        try:
            shape = json.loads(meta.get("shape", "null"))
            provenance = json.loads(meta.get("provenance", "{}"))
            shape = None if shape is None else tuple(shape)
            return cls(pairs, scores=known, shape=shape, provenance=provenance)
        except (ValueError, TypeError) as error:
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
        shape = "not said" if self._shape is None else f"{self._shape[0]} layers of {self._shape[1]} heads"
        scored = lambda p: f"{p[1]} ({self._scores[p]:.4g})" if p in self._scores else str(p[1])  # noqa: E731
        rows = [f"| {layer} | {', '.join(scored((layer, h)) for h in self[layer])} |" for layer in self.layers]
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


def _check_shape(shape: Any) -> None:
    sizes = shape if isinstance(shape, (tuple, list)) else ()
    fits = shape is None or (len(sizes) == 2 and all((whole(n) or 0) > 0 for n in sizes))
    if not fits:
        raise SelectionError(f"HeadSet(shape={brief(shape)}): give (layers, heads per layer), both above 0.")


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
