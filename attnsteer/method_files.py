"""Methods and hosts from files of Python that a user names. Such a file is run, so nothing but a user's word imports one."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from .errors import RegistrationError, UnknownName, listing
from .registry import all_or_nothing, hosts, methods


@dataclass(frozen=True)
class MethodFile:
    """A file that was imported.

    Attributes:
        path: absolute. sha256: of its bytes, in hex. methods, hosts: the names that it registered.
    """

    path: Path
    sha256: str
    methods: tuple[str, ...]
    hosts: tuple[str, ...]


_IMPORTED: dict[Path, MethodFile] = {}


def imported() -> tuple[MethodFile, ...]:
    """The files that this process has imported, in order."""
    return tuple(_IMPORTED.values())


def import_methods(path: str | Path) -> MethodFile:
    """Run a file of Python that registers methods or hosts (`register_method`, `register_host`). A second time does nothing.

    Raises:
        UnknownName: there is no such file.
        RegistrationError: it fails, registers nothing, takes a name that is taken, or has changed since it was imported.
    """
    path = Path(path).expanduser().resolve()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UnknownName(f"--import {path}: cannot be read ({error.strerror}); give a file of Python.") from error
    digest = hashlib.sha256(source).hexdigest()
    if path in _IMPORTED:
        if _IMPORTED[path].sha256 != digest:
            raise RegistrationError(f"{path} has changed since this process imported it; start a new process.")
        return _IMPORTED[path]
    before = {*methods()}, {*hosts()}
    name = f"attnsteer_method_file_{path.stem}_{digest[:12]}"
    _run(name, path, source)
    new = [tuple(n for n in names if n not in old) for names, old in zip((methods(), hosts()), before, strict=True)]
    if not any(new):
        del sys.modules[name]
        raise RegistrationError(
            f"{path} registers neither a method nor a host; decorate its class with attnsteer.register_method."
        )
    _IMPORTED[path] = MethodFile(path, digest, *new)
    return _IMPORTED[path]


def _run(name: str, path: Path, source: bytes) -> None:
    """Run the bytes that were hashed, as a module of this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise RegistrationError(f"{path} is no file of Python; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks for the module of its class there.
    sys.modules[name] = module
    try:
        with all_or_nothing():
            exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, (Exception, SystemExit)):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        where = f"{path}, line {line}" if line else str(path)
        raise RegistrationError(
            f"{where}: {type(error).__name__}: {str(error).rstrip('.')}. The file could not be imported."
        ) from error


def require(paths: list[Path]) -> None:
    """Raise unless these files were imported in this process.

    Raises:
        RegistrationError: one was not.
    """
    missing = [p for p in paths if p.expanduser().resolve() not in _IMPORTED]
    if missing:
        raise RegistrationError(
            f"the recipe asks to run the code of {listing(missing)}, and a recipe alone may not. Read it; then allow it with "
            f"--import {missing[0]}, or with --allow-imports for all files that the recipe names."
        )
