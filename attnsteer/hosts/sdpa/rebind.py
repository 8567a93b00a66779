"""Copies of functions whose globals differ in the attention primitive that they call; nothing global changes."""

from __future__ import annotations

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
    names = {SDPA, DISPATCH} & set(code.co_names)
    return names | {SDPA} if _aliases(plain) else names


def _aliases(function: types.FunctionType) -> list[str]:
    """Global names of F.scaled_dot_product_attention in a function's code, its own name included."""
    known = function.__globals__
    return [n for n in function.__code__.co_names if known.get(n) is F.scaled_dot_product_attention]


def primitive_count(function: Callable[..., Any]) -> int:
    """How many times the function's code names a primitive."""
    import dis

    code = inspect.unwrap(function).__code__
    return sum(1 for i in dis.get_instructions(code) if i.argval in (SDPA, DISPATCH) and "STORE" not in i.opname)


def rebind(function: Callable[..., Any], primitives: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A copy of `function` that calls `primitives[name]` wherever its code says `name`, `F.name` or `torch...name`.

    The copy keeps defaults, closure and signature; all other globals are the original objects.
    """
    plain = inspect.unwrap(function)
    scope = dict(plain.__globals__)
    for name, replacement in primitives.items():
        if name in scope:
            scope[name] = replacement
    if SDPA in primitives:
        scope.update(_shims(plain, primitives[SDPA]))
        scope.update(dict.fromkeys(_aliases(plain), primitives[SDPA]))
    # torch.compile looks globals up in the module of this name, and keeps what it compiled with the code object: without
    # the name it reads this scope, and a code object of its own never meets code compiled for the original.
    scope.pop("__name__", None)
    code = plain.__code__.replace()
    copy = types.FunctionType(code, scope, plain.__name__, plain.__defaults__, plain.__closure__)
    copy.__kwdefaults__ = plain.__kwdefaults__
    copy.__qualname__ = plain.__qualname__
    copy.__module__ = plain.__module__
    return copy


def _shims(function: types.FunctionType, sdpa: Callable[..., Any]) -> dict[str, Any]:
    """Stand-ins for the module names through which the code reaches F.scaled_dot_product_attention."""
    functional = _module_copy(F, {SDPA: sdpa})
    nn = torch.nn
    replaced: dict[str, Any] = {}
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if value is F:
            replaced[name] = functional
        elif value is nn:
            replaced[name] = _module_copy(nn, {"functional": functional})
        elif value is torch:
            replaced[name] = _module_copy(torch, {"nn": _module_copy(nn, {"functional": functional})})
    return replaced


def _module_copy(module: types.ModuleType, changes: dict[str, Any]) -> types.ModuleType:
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update(changes)
    return copy
