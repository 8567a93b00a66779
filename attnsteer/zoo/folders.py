"""Which models there are by name, and where they lie."""

from __future__ import annotations

from pathlib import Path

from ..errors import UnknownName, ZooError, did_you_mean
from . import fetched
from .fetched import NAMES as FETCHED
from .hashes import HASHES, checked

MODELS = Path(__file__).parent / "models"
NAMES = ("shapes-lm", "shapes-lvlm", "shapes-sd", "shapes-mmdit")
# Parts that were trained here for a fetched model, embedded; which one that is.
ASSEMBLED = {"smollm2-llava": "smollm2-135m"}
KNOWN = (*NAMES, *FETCHED, *ASSEMBLED)


def available() -> tuple[str, ...]:
    """The embedded models of this installation."""
    return tuple(n for n in NAMES if (MODELS / n / HASHES).is_file())


def present() -> tuple[str, ...]:
    """The fetched models of this machine, and those whose fetched part is there."""
    there = tuple(n for n in FETCHED if (fetched.place(n) / HASHES).is_file())
    return (*there, *(n for n, part in ASSEMBLED.items() if part in there and (MODELS / n / HASHES).is_file()))


def folder(name: str) -> Path:
    """The folder of a model (of an assembled one, of the parts that are embedded), its files checked against their hashes.

    Raises:
        UnknownName: no model of this name.
        ZooError: a file is missing, cut short or changed; the message names it.
    """
    if name in FETCHED:
        path = fetched.place(name)
        if not (path / HASHES).is_file():
            raise ZooError(f"{name} is not in {path.parent}; fetch it once: attnsteer zoo fetch {name}")
        return checked(path, f"remove {path} and fetch {name} again")
    if name not in NAMES and name not in ASSEMBLED:
        raise UnknownName(
            f"no model {name!r}; embedded: {', '.join((*NAMES, *ASSEMBLED))}; to be fetched: {', '.join(FETCHED)}."
            f"{did_you_mean(name, KNOWN)}"
        )
    path = MODELS / name
    if not (path / HASHES).is_file():
        raise ZooError(
            f"{path / HASHES} is missing, so {name} is not part of this installation. Install attnsteer again, or train "
            f"it: python -m attnsteer.zoo.train {name}"
        )
    return checked(path, "install attnsteer again")
