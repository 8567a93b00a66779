"""How many stops a call makes in the package: the files and functions of attnsteer that it enters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import attnsteer

PACKAGE = Path(attnsteer.__file__).parent


def stops(call: Callable[[], Any]) -> tuple[set[str], set[str]]:
    """(files, functions) of the package entered while `call` runs in this thread.

    Files are named by their path below the package; functions by file and qualified name, "engine.py:SiteRuntime.__call__".
    Lambdas and comprehensions count as functions of their own.
    """
    entered: set[Any] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    ours = [(Path(code.co_filename), code.co_qualname) for code in entered]
    named = [(path.relative_to(PACKAGE).as_posix(), name) for path, name in ours if path.is_relative_to(PACKAGE)]
    return {path for path, _ in named}, {f"{path}:{name}" for path, name in named}
