"""How many files and functions of the package a call crosses: the stops on the way of somebody who reads along."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attnsteer

PACKAGE = str(Path(attnsteer.__file__).parent)


def stops(call: Callable[[], Any]) -> tuple[set[str], set[tuple[str, str]]]:
    """(files of the package, (file, function) pairs) that `call` enters; generated code is no file."""
    files: set[str] = set()
    functions: set[tuple[str, str]] = set()

    def watch(frame: Any, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE):
            files.add(name[len(PACKAGE) + 1 :])
            functions.add((name[len(PACKAGE) + 1 :], frame.f_code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return files, functions
