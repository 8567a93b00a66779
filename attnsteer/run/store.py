"""The run folder: files that are whole or absent, lines that survive a kill, and one writer at a time."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..manifest import MANIFEST
from ..manifest import file_hash as file_hash

RECIPE, IDENTITY, STATUS, SAMPLES, ARMS = "recipe.yaml", "identity.json", "status.json", "samples.jsonl", "arms.json"
RECORDS, TIMINGS, METRICS, AUDIT = "records.jsonl", "timings.jsonl", "metrics.json", "audit.json"
ENVIRONMENT, IMAGES, LOCK, ALONE = "environment.json", "images", ".lock", ".alone"
# What a run writes; and with what its searches find, and what is made from it later.
WRITTEN = (RECIPE, STATUS, SAMPLES, ARMS, RECORDS, TIMINGS, METRICS, AUDIT, ENVIRONMENT)
OWN = (*WRITTEN, IMAGES, "calibration", MANIFEST, "attention.json", "report.html", "report.md", "verified.json")
AGAIN = "start the run again with the same command, and it goes on where it stopped"
Line = dict[str, Any]


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON in ASCII: any text that a model writes can be stored, and no number that is none."""
    return json.dumps(value, indent=indent, allow_nan=False)


def write_atomic(path: Path, data: bytes) -> None:
    """A file that is there whole or, after a crash, as it was before.

    Raises:
        RunError: the disk is full, or the folder cannot be written; no partial file is left.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        # mkstemp makes files for the owner alone.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise failed(path, error) from error
    finally:
        if temporary is not None:
            try:
                os.unlink(temporary)
            except OSError:
                pass


def remove_partial_files(folder: Path) -> None:
    """Remove what a kill left of files that a run was writing (`write_atomic`)."""
    names = "|".join(map(re.escape, (IDENTITY, *WRITTEN)))
    left = [p for p in folder.glob(".*.part") if re.fullmatch(rf"\.({names})\.\w+\.part", p.name)]
    for path in (*left, *(folder / IMAGES).rglob(".*.part")):
        path.unlink()


def write_json(path: Path, value: Any) -> None:
    """A JSON file, atomically."""
    write_atomic(path, (to_json(value, indent=1) + "\n").encode())


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """A JSON Lines file, atomically."""
    write_atomic(path, "".join(to_json(line) + "\n" for line in lines).encode())


def write_all(handle: int, data: bytes) -> None:
    """Write all bytes to an open file; `os.write` may take fewer."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def failed(path: Path, error: OSError) -> RunError:
    """What to say of a write that did not work."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    cause = "the disk is full" if full else f"{error.strerror or error}"
    return RunError(f"{path} could not be written: {cause}. Make room or rights, then {AGAIN}.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Lines:
    """A JSON Lines file that is appended to: each `append` is on the disk when it returns, or leaves no trace."""

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise failed(path, error) from error

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines.

        Raises:
            RunError: the disk is full, or the like; the file is as it was before.
        """
        if not lines:
            return
        before = os.fstat(self._handle).st_size
        try:
            write_all(self._handle, "".join(to_json(line) + "\n" for line in lines).encode())
            os.fsync(self._handle)
        except BaseException as error:
            os.ftruncate(self._handle, before)
            if isinstance(error, OSError):
                raise failed(self.path, error) from error
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def cut_torn_line(path: Path) -> None:
    """Cut a last line that a crash left unfinished."""
    if not path.is_file():
        return
    data = path.read_bytes()
    keep = data.rfind(b"\n") + 1
    # A block that was never written reads as zeros after a power failure.
    while keep and not _whole(data[:keep].rsplit(b"\n", 2)[-2]):
        keep = data.rfind(b"\n", 0, keep - 1) + 1
        if len(data) - keep > 1 << 20:
            break
    if keep < len(data):
        with path.open("r+b") as file:
            file.truncate(keep)
            os.fsync(file.fileno())


def _whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_lines(path: Path) -> Iterator[Line]:
    """The objects of a JSON Lines file; one that is not there has none. A last line without an end is being written.

    Raises:
        RunError: a line is no object.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise RunError(
                    f"{path}, line {number} is damaged: it is no JSON object. Delete the line (its sample is then computed "
                    f"again), and {AGAIN}."
                )
            yield found


def inside(folder: Path, name: str) -> Path | None:
    """The path of a file that data or a record names, or None where the name leads out of the folder.

    Names are not trusted; links that lie in the folder are.
    """
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir or "\0" in name:
        return None
    return folder / path


def own_file(folder: Path, name: Any) -> Path:
    """The path of a picture that a record of a run names; neither the name nor a link leads out of the folder.

    Raises:
        RunError: it does, or there is no such file.
    """
    path = inside(folder, name) if isinstance(name, str) else None
    if path is None or not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{folder}: a record's picture {name!r} is not in the folder; it was not written by a run.")
    if not path.is_file():
        raise RunError(f"{path} is missing; start the run again with the same command.")
    return path


def read_json(path: Path) -> Any:
    """A JSON file of a run, or None where it is not there.

    Raises:
        RunError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged ({error}). It was not written by a run; give another folder with --out."
        ) from error


class Lock:
    """One run at a time writes a folder: shared by the processes of a run, and gone with the last of them.

    The first process takes it alone, so that it fails while any process of another run is left, then shares it.
    """

    def __init__(self, folder: Path, name: str = LOCK):
        self.path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise failed(self.path, error) from error

    def take(self, alone: bool) -> None:
        """Take the lock, or change how it is held. alone: nobody else may have it.

        Raises:
            RunError: another run has it.
        """
        import fcntl

        try:
            fcntl.flock(self._handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{self.path.parent} is being written by another run. Wait for it, stop it, or give another folder "
                "with --out."
            ) from None
        except OSError as error:
            raise failed(self.path, error) from error

    def release(self) -> None:
        """Give it back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def parts(folder: Path, name: str) -> list[Path]:
    """The parts that the processes of a run wrote of a file: "records.jsonl" -> records-0.jsonl, records-1.jsonl, ..."""
    stem = name.partition(".")[0]
    return sorted(p for p in folder.glob(f"{stem}-*.jsonl") if re.fullmatch(rf"{stem}-\d+\.jsonl", p.name))


def part(folder: Path, name: str, rank: int) -> Path:
    """The part of one process."""
    return folder / f"{name.partition('.')[0]}-{rank}.jsonl"
