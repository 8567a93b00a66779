"""Public names of a package that are imported on first use, so that asking for one of them loads no other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        names: public name -> submodule that defines it; the submodule itself where they are the same. No other submodule may
            have the name of a public name: once imported, it would stand in its place.
    """
    public = sorted(names)

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; public names: {', '.join(public)}")
        module = importlib.import_module(f".{names[name]}", package)
        value = module if names[name] == name else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return getattr_, lambda: list(public), public
