"""Every softmax attention that runs in a model, seen and edited from outside: nothing of the library is in it.

A torch function mode notes each call of SDPA and of flex attention, and each softmax whose result, perhaps dropped out, cast or
reshaped, is multiplied with values. That product is a head output, whoever wrote the code.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = {"matmul", "bmm", "__matmul__", "einsum", "baddbmm", "mm"}
# What hands a map on as a map: functions of one tensor that leave it a map, or scale it.
CARRIES = {
    "dropout", "to", "type", "type_as", "float", "half", "bfloat16", "view", "reshape", "contiguous", "clone", "mul",
    "__mul__", "__rmul__", "masked_fill", "masked_fill_", "nan_to_num", "__getitem__", "unsqueeze", "squeeze", "transpose",
    "permute", "flatten", "unflatten", "where", "clamp", "div", "__truediv__", "sub", "__sub__", "add", "__add__", "detach",
    "expand", "view_as", "movedim", "swapaxes", "alpha_dropout", "cat", "chunk", "split", "repeat", "narrow",
    "requires_grad_", "mul_", "pad",
}  # fmt: skip


@dataclass
class Seen:
    """One attention that ran.

    Attributes:
        owner: path of the innermost module that was running. how: "sdpa", "flex" or "softmax".
        shape: of the head outputs, as the code has them.
    """

    owner: str
    how: str
    shape: tuple[int, ...]


@dataclass
class Watch(TorchFunctionMode):
    """The mode. `edits`: path of a module -> (number of heads, the head whose outputs become zero)."""

    edits: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.running: list[str] = []
        # Maps, kept so that no other tensor gets their identity.
        self._maps: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            # One function for a mode, until a copy of it asks no mode by itself.
            with self:
                return _seen_into(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._output(out, "sdpa")
        if name == "flex_attention":
            return self._output(out, "flex")
        if name in ("softmax", "_softmax") or name == "softmax_":
            self._note(out)
        elif name in PRODUCTS and self._carried(args):
            return self._output(out, "softmax")
        elif name in CARRIES and self._carried(args):
            for t in out if isinstance(out, (tuple, list)) else (out,):
                self._note(t)
        return out

    def _note(self, t: Any) -> None:
        if isinstance(t, Tensor) and t.ndim >= 3:
            self._maps[id(t)] = t

    def _carried(self, args: Any) -> bool:
        """Whether the first tensor among the arguments is a map: values multiplied with one from the left are no attention."""
        first = next((a for a in args if not isinstance(a, str)), None)
        if isinstance(first, (tuple, list)):
            first = next(iter(first), None)
        return isinstance(first, Tensor) and id(first) in self._maps

    def _output(self, out: Any, how: str) -> Any:
        owner = self.running[-1] if self.running else ""
        t = out[0] if isinstance(out, tuple) else out
        self.seen.append(Seen(owner, how, tuple(t.shape)))
        found = self._edit_of(owner)
        if found is None:
            return out
        edited = without_head(t, *found)
        return (edited, *out[1:]) if isinstance(out, tuple) else edited

    def _edit_of(self, owner: str) -> tuple[int, int] | None:
        while owner not in self.edits and owner:
            owner = owner.rpartition(".")[0]
        return self.edits.get(owner)


def _seen_into(func: Any) -> Any:
    code = func.__code__
    copied = FunctionType(code, {**func.__globals__, "has_torch_function": lambda _: False}, func.__name__)
    copied.__defaults__, copied.__kwdefaults__ = func.__defaults__, func.__kwdefaults__
    return copied


def without_head(out: Tensor, heads: int, head: int) -> Tensor:
    """Head outputs with one head zero; the axis of heads is the first whose size is theirs, or the batch is [B * heads]."""
    if out.ndim == 3 and out.shape[0] % heads == 0:
        edited = out.reshape(-1, heads, *out.shape[1:]).clone()
        edited[:, head] = 0
        return edited.reshape(out.shape)
    axis = next((i for i in (1, 2, 0, 3) if i < out.ndim and out.shape[i] == heads), None)
    if axis is None:
        raise LookupError(f"no axis of {tuple(out.shape)} has {heads} heads")
    edited = out.clone()
    edited.select(axis, head).zero_()
    return edited


def _enter(watch: Watch, name: str, module: nn.Module, args: Any) -> None:
    watch.running.append(name)


def _leave(watch: Watch, module: nn.Module, args: Any, output: Any) -> None:
    watch.running.pop()


@contextmanager
def watching(model: nn.Module, edits: Mapping[str, tuple[int, int]] | None = None) -> Iterator[Watch]:
    """Watch the attention of `model` in this block, and close the heads in `edits`."""
    watch = Watch(edits or {})
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(functools.partial(_enter, watch, name)))
        hooks.append(module.register_forward_hook(functools.partial(_leave, watch), always_call=True))
    try:
        with watch, torch.no_grad():
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def inside(module: nn.Module, mode: Any) -> Iterator[None]:
    """In this block a function mode acts while the module's forward runs (its `on` says so), and nowhere else."""
    handles = [
        module.register_forward_pre_hook(lambda *_: setattr(mode, "on", True)),
        module.register_forward_hook(lambda *_: setattr(mode, "on", False), always_call=True),
    ]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
