"""Copies of functions whose globals differ in the attention primitive that they call; nothing global changes."""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

SDPA = "scaled_dot_product_attention"
DISPATCH = "dispatch_attention_fn"


def names_called(function: Callable[..., Any]) -> set[str]:
    """Which of the two attention primitives a function's own code names, perhaps by another name."""
    plain = inspect.unwrap(function)
    code = getattr(plain, "__code__", None)
    if code is None:
        return set()
    held = [*map(plain.__globals__.get, code.co_names), *_closed_over(plain)]
    names = {SDPA, DISPATCH} & set(code.co_names)
    return names | {SDPA} if any(value is F.scaled_dot_product_attention for value in held) else names


def _closed_over(function: types.FunctionType) -> list[Any]:
    """What the cells of a function's closure hold."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # an empty one
            continue
    return found


def primitive_count(function: Callable[..., Any]) -> int:
    """How many times the function's code names a primitive."""
    return _primitives_in(inspect.unwrap(function).__code__)


# Reading instructions takes milliseconds, and a model has hundreds of modules with the same code.
@functools.lru_cache(maxsize=1024)
def _primitives_in(code: types.CodeType) -> int:
    return sum(1 for i in dis.get_instructions(code) if i.argval in (SDPA, DISPATCH) and "STORE" not in i.opname)


def rebind(function: Callable[..., Any], primitives: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A copy of `function` that calls `primitives[name]` wherever its code says `name`, `F.name` or `torch...name`.

    The copy keeps defaults, closure and signature; all other globals are the original objects.
    """
    plain = inspect.unwrap(function)
    scope, closure = dict(plain.__globals__), plain.__closure__
    for name, replacement in primitives.items():
        if name in scope:
            scope[name] = replacement
    if SDPA in primitives:
        swap = _Exchange(primitives[SDPA])
        scope = {name: swap(value) for name, value in scope.items()}
        closure = None if closure is None else tuple(map(swap.cell, closure))
        if _imports_torch(plain.__code__):
            known = scope.get("__builtins__", builtins)
            known = known if isinstance(known, dict) else vars(known)
            scope["__builtins__"] = {**known, "__import__": swap.importing(known["__import__"])}
    # torch.compile looks globals up in the module of this name, and keeps what it compiled with the code object: without
    # the name it reads this scope, and a code object of its own never meets code compiled for the original.
    scope.pop("__name__", None)
    code = plain.__code__.replace()
    copy = types.FunctionType(code, scope, plain.__name__, plain.__defaults__, closure)
    copy.__kwdefaults__ = plain.__kwdefaults__
    copy.__qualname__ = plain.__qualname__
    copy.__module__ = plain.__module__
    return copy


class _Exchange:
    """Exchanges F.scaled_dot_product_attention, and the modules through which code reaches it, for stand-ins."""

    def __init__(self, sdpa: Callable[..., Any]):
        nn = torch.nn
        functional = _module_copy(F, {SDPA: sdpa})
        nn_copy = _module_copy(nn, {"functional": functional})
        found = ((F.scaled_dot_product_attention, sdpa), (F, functional), (nn, nn_copy))
        pairs = (*found, (torch, _module_copy(torch, {"nn": nn_copy})))
        self._standing_in = {id(original): stand_in for original, stand_in in pairs}

    def __call__(self, value: Any) -> Any:
        return self._standing_in.get(id(value), value)

    def cell(self, cell: types.CellType) -> types.CellType:
        """The cell of a closure; another one where what it holds is exchanged."""
        try:
            held = cell.cell_contents
        except ValueError:  # an empty one
            return cell
        return cell if self(held) is held else types.CellType(self(held))

    def importing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """`__import__` for statements inside a function."""
        return lambda *args, **kwargs: self(real(*args, **kwargs))


@functools.lru_cache(maxsize=1024)
def _imports_torch(code: types.CodeType) -> bool:
    """Whether a function imports torch, or a part of it, by itself."""
    return any(
        i.opname == "IMPORT_NAME" and str(i.argval).partition(".")[0] == "torch" for i in dis.get_instructions(code)
    )


def _module_copy(module: types.ModuleType, changes: dict[str, Any]) -> types.ModuleType:
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update(changes)
    return copy
