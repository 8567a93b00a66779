"""State of a search that survives a kill: tensors and JSON-able data in one file that is replaced atomically."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SelectionError, SerializationError, listing

FORMAT, SCHEMA_VERSION = "attnsteer.search", 1


class SearchState:
    """What a search has found so far; use it as a context manager, which saves on every way out.

    Args:
        path: the file (safetensors); None keeps the state in memory only.
        settings: JSON-able facts that a result depends on (model, samples, method). A file with other settings is
            refused, because its results would be mixed with different ones.
        every: seconds between two writes of `tick`; 0 writes at each.

    Attributes:
        data: JSON-able values by name. tensors: tensors by name.

    Raises:
        SerializationError: the file is broken, of another kind, of a newer schema, or of a search with other settings.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any], every: float = 5.0):
        self.path = None if path is None else Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.every = every
        self.data: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._written = time.monotonic()
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def tick(self) -> None:
        """Save if the last write is `every` seconds ago."""
        if time.monotonic() - self._written >= self.every:
            self.save()

    def save(self) -> None:
        """Write the file: a reader, and a search that is killed here, sees the old or the new one whole."""
        if self.path is None:
            return
        from safetensors.torch import save_file

        meta = {
            "format": FORMAT,
            "schema": str(SCHEMA_VERSION),
            "settings": json.dumps(self.settings, sort_keys=True),
            "data": json.dumps(self.data, sort_keys=True),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, since only a rename within one file system is atomic.
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            save_file({k: v.contiguous() for k, v in self.tensors.items()}, str(part), metadata=meta)
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
        self._written = time.monotonic()

    def _load(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise SerializationError(
                f"{path} is not a whole state file of a search ({error}). Delete it to start the search anew."
            ) from error
        if meta.get("format") != FORMAT:
            raise SerializationError(f"{path} has format {meta.get('format')!r}, not {FORMAT!r}; give another path.")
        if not meta.get("schema", "").isdecimal() or int(meta["schema"]) > SCHEMA_VERSION:
            raise SerializationError(
                f"{path} has schema {meta.get('schema')}, this version reads up to {SCHEMA_VERSION}."
            )
        try:
            settings, data = json.loads(meta["settings"]), json.loads(meta["data"])
        except (KeyError, ValueError, RecursionError) as error:
            raise SerializationError(f"{path} does not hold the state of a search: {error}.") from error
        if settings != self.settings:
            names = sorted(k for k in {*settings, *self.settings} if settings.get(k) != self.settings.get(k))
            shown = listing(f"{k}: {settings.get(k)!r} there, {self.settings.get(k)!r} here" for k in names)
            raise SerializationError(
                f"{path} belongs to a search with other settings ({shown}). Give another path, or delete the file."
            )
        self.data, self.tensors = data, tensors

    def __enter__(self) -> SearchState:
        return self

    def __exit__(self, *_: Any) -> None:
        self.save()


def digest(value: Any) -> str:
    """A short content hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def model_digest(*modules: nn.Module) -> str:
    """A short hash over the names, shapes and first values of all parameters: tells models apart, also after training."""
    text = hashlib.sha256()
    for module in modules:
        for name, p in module.named_parameters():
            head = p.detach().flatten()[:8].to("cpu", torch.float32)
            text.update(f"{name}{tuple(p.shape)}{head.tolist()}".encode())
    return text.hexdigest()[:16]


def refuse_overlap(search: Iterable[str], test: Iterable[str], what: str) -> None:
    """Raise if a sample that chooses heads is also in the split that they are to be tested on.

    Args:
        search, test: hashes of the samples. what: how a sample is called in the message.

    Raises:
        SelectionError: the splits overlap.
    """
    both = sorted(set(search) & set(test))
    if both:
        raise SelectionError(
            f"{len(both)} {what} of the test split are also used to choose heads ({listing(both, 4)}): the test would report "
            "what was selected for. Take them out of one of the two splits."
        )
