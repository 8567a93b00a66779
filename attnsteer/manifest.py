"""MANIFEST.json: what a shared folder holds, each file with its size and SHA-256, and what it was made with.

It is checked before anything in the folder is read. A client of the hub does not hash what it downloads, so that this is what tells
a changed file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ._version import __version__
from .errors import SerializationError, listing

MANIFEST = "MANIFEST.json"
FORMAT, SCHEMA_VERSION = "attnsteer.manifest", 1
KINDS = ("method", "heads", "run")
# What a manifest itself may have in bytes, and how many files.
MOST_BYTES, MOST_FILES = 1 << 25, 100_000


def manifest_of(folder: Path, names: Iterable[str], kind: str, **about: Any) -> dict[str, Any]:
    """The manifest of these files of a folder. kind: of `KINDS`. about: other entries, such as model."""
    files = {
        name: {"sha256": file_hash(folder / name), "size": (folder / name).stat().st_size} for name in sorted(names)
    }
    head = {"format": FORMAT, "schema": SCHEMA_VERSION, "kind": kind, "attnsteer": __version__}
    return {**head, **about, "files": files}


def write_manifest(folder: Path, names: Iterable[str], kind: str, **about: Any) -> Path:
    """Write MANIFEST.json beside these files."""
    path = folder / MANIFEST
    found = manifest_of(folder, names, kind, **about)
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read_manifest(folder: Path, links: bool = False) -> dict[str, Any]:
    """The manifest of a folder, its form checked. links: whether it may be a link, as in the hub's cache.

    Raises:
        SerializationError: there is none, it is damaged, or of a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file() or (path.is_symlink() and not links):
        raise SerializationError(f"{folder} has no {MANIFEST}, so that nothing in it can be checked.")
    if path.stat().st_size > MOST_BYTES:
        raise SerializationError(f"{path} has {path.stat().st_size:,} bytes, which no manifest has.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, OSError, RecursionError) as error:
        raise SerializationError(f"{path} is damaged: {error}.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("kind") not in KINDS:
        raise SerializationError(f"{path} is no manifest of attnsteer.")
    schema = found.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA_VERSION:
        raise SerializationError(
            f"{path} has schema {schema!r}, this version reads up to {SCHEMA_VERSION}; upgrade attnsteer."
        )
    files = found.get("files")
    if not isinstance(files, dict) or len(files) > MOST_FILES or not all(map(_entry, files.items())):
        raise SerializationError(f"{path}: files must be names with size and sha256, inside the folder.")
    return found


def problems_of(folder: Path, found: Mapping[str, Any], links: bool = False) -> list[str]:
    """What is not as the manifest says: missing files, other sizes, other contents, and links unless they are let through."""
    out = []
    for name, entry in found["files"].items():
        path = folder / name
        if (path.is_symlink() and not links) or not path.is_file():
            out.append(f"{name} is {'a link' if path.is_symlink() else 'missing'}")
        elif path.stat().st_size != entry["size"]:
            out.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
        elif file_hash(path) != entry["sha256"]:
            out.append(f"{name} was changed")
    return out


def checked_manifest(folder: Path, kind: str, known: Iterable[str], links: bool = False) -> dict[str, Any]:
    """The manifest of a folder of one kind, after everything in it was checked.

    Args:
        known: the names that a folder of this kind may have. links: whether files may be links, as in the hub's cache.

    Raises:
        SerializationError: another kind, names that are not known, or files that are not as it says.
    """
    found = read_manifest(folder, links)
    if found["kind"] != kind:
        raise SerializationError(f"{folder} holds a {found['kind']}, not a {kind}.")
    strange = sorted(set(found["files"]) - set(known))
    if strange:
        raise SerializationError(f"{folder} has {listing(strange, 4)}, which no {kind} has; nothing of it was read.")
    problems = problems_of(folder, found, links)
    if problems:
        raise SerializationError(f"{folder} is not what its {MANIFEST} says: {listing(problems, 4)}. Get it again.")
    return found


def inside(name: Any) -> bool:
    """Whether a name is a plain relative path that stays in its folder on every system."""
    if not isinstance(name, str) or not name or len(name) > 500 or any(c in name for c in "\\:\0") or name[0] == "/":
        return False
    return all(p not in ("", ".", "..") for p in name.split("/")) and not PurePosixPath(name).is_absolute()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(item: tuple[str, Any]) -> bool:
    name, value = item
    return (
        inside(name)
        and isinstance(value, dict)
        and isinstance(value.get("size"), int)
        and isinstance(value.get("sha256"), str)
    )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
