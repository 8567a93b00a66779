"""The hashes of a model's folder: written when it is whole, checked whenever it is loaded."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from ..errors import ZooError

HASHES = "sha256.json"
SEALED = (".safetensors", ".json", ".jinja")


def checked(path: Path, remedy: str) -> Path:
    """A folder whose files have the hashes that it records.

    Raises:
        ZooError: a file is missing, cut short or changed; the message names it, and the remedy.
    """
    try:
        wanted = json.loads((path / HASHES).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ZooError(f"{path / HASHES} is not JSON ({error}); {remedy}.") from error
    if not isinstance(wanted, dict) or not wanted:
        raise ZooError(f"{path / HASHES} names no files; {remedy}.")
    for file, digest in wanted.items():
        whole = path / file
        if not whole.is_file():
            raise ZooError(f"{whole} is missing; {remedy}.")
        if _digest(whole, whole.stat().st_mtime_ns, whole.stat().st_size) != digest:
            raise ZooError(f"{whole} is cut short or changed (its hash is not the recorded one); {remedy}.")
    return path


@functools.lru_cache(maxsize=256)
def _digest(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(path: Path) -> None:
    """Write the hashes of a model folder; `checked` reads them."""
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in SEALED and f.name != HASHES)
    found = {f.relative_to(path).as_posix(): _digest(f, f.stat().st_mtime_ns, f.stat().st_size) for f in files}
    (path / HASHES).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
