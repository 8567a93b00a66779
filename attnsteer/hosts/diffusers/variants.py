"""One computation for several values of its inputs at once, operator by operator, so that code that makes it runs once.

A changed input has its other values beside it, by name, and whatever an operator makes of them is kept beside what it makes of the
input itself. They belong to the memory of a tensor, not to the tensor, so that views and writes in place are followed like the
rest; what depends on no changed input is computed once. Python sees the input's own values alone: where it would have seen others
(a number that is read, a shape), `UnlikeError` is raised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# So many tensors are remembered between two looks for those that are gone.
ROUND = 256


class UnlikeError(RuntimeError):
    """The computation itself depends on the values of its inputs, so it cannot be made for several of them at once."""


class Variants(TorchDispatchMode):
    """In this block operators on the tensors that `vary` gives are computed for all of their values."""

    def __init__(self) -> None:
        super().__init__()
        # Key of a storage -> (what keeps that key from being given again, name of a variant -> the storage of its values).
        self._known: dict[int, tuple[StorageWeakRef, dict[Hashable, torch.UntypedStorage]]] = {}
        self._new = 0

    def vary(self, tensor: Tensor, others: dict[Hashable, Tensor]) -> Tensor:
        """A copy of a tensor that has other values, of its shape and dtype, beside its own."""
        own = tensor.clone(memory_format=torch.contiguous_format)
        self._remember(own, {n: t.clone(memory_format=torch.contiguous_format) for n, t in others.items()})
        return own

    def of(self, tensor: Tensor) -> dict[Hashable, Tensor]:
        """The other values of a tensor, by name; those that are not there are its own."""
        return {name: _on(storage, tensor) for name, storage in self._storages(tensor).items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given: list[Tensor] = []
        _swapped((args, kwargs), lambda t: given.append(t) or t)
        known = {id(t): own for t in given if (own := self._storages(t))}
        if not known:
            return func(*args, **kwargs)
        names = list(dict.fromkeys(name for own in known.values() for name in own))
        returned = [value.alias_info for value in func._schema.returns]
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        if not written and returned and all(returned):
            # A view: its memory is known.
            return func(*args, **kwargs)
        for t in written:
            known[id(t)] = self._apart(t, names)
        found: dict[Hashable, list[Any]] = {}
        draws = torch.Tag.nondeterministic_seeded in func.tags
        for name in names:

            def other(t: Tensor, name: Hashable = name) -> Tensor:
                storage = known[id(t)].get(name) if id(t) in known else None
                return t if storage is None else _on(storage, t)

            with _drawn_again(given) if draws else contextlib.nullcontext():
                result = func(*_swapped(args, other), **_swapped(kwargs, other))
            found[name] = _leaves(result)
        out = func(*args, **kwargs)
        shared = {_key(t) for t in given}
        for i, value in enumerate(_leaves(out)):
            if not isinstance(value, Tensor):
                if any(not _same(leaves[i], value) for leaves in found.values()):
                    raise UnlikeError(f"{func} gives Python a number that depends on the inputs.")
            elif _key(value) not in shared:
                self._remember(value, {name: leaves[i] for name, leaves in found.items()})
        return out

    def _storages(self, tensor: Tensor) -> dict[Hashable, torch.UntypedStorage]:
        key = _key(tensor)
        return self._known[key][1] if key in self._known else {}

    def _apart(self, tensor: Tensor, names: list[Hashable]) -> dict[Hashable, torch.UntypedStorage]:
        """What is written into gets memory of its own for each variant."""
        storage, key = tensor.untyped_storage(), _key(tensor)
        own = self._known.setdefault(key, (StorageWeakRef(storage), {}))[1]
        for name in names:
            if name not in own:
                own[name] = storage.clone()
        return own

    def _remember(self, tensor: Tensor, others: dict[Hashable, Tensor]) -> None:
        for other in others.values():
            if (other.shape, other.stride(), other.dtype) != (tensor.shape, tensor.stride(), tensor.dtype) or (
                other.storage_offset() != tensor.storage_offset()
            ):
                raise UnlikeError("the shape of a tensor depends on the inputs.")
        storage = tensor.untyped_storage()
        self._known[_key(tensor)] = StorageWeakRef(storage), {n: t.untyped_storage() for n, t in others.items()}
        self._new += 1
        if self._new % ROUND == 0:
            self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}


def _key(tensor: Tensor) -> int:
    """Of the memory that a tensor lies in; 0 where it has none of its own."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def _on(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    """The tensor that lies in another memory as this one lies in its own."""
    if like.is_conj() or like.is_neg():
        raise UnlikeError("a conjugated view is not followed.")
    empty = torch.empty(0, dtype=like.dtype, device=like.device)
    return empty.set_(storage, like.storage_offset(), like.shape, like.stride())


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes into."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[i] if i < len(args) and not argument.kwarg_only else kwargs.get(argument.name))
    return [leaf for leaf in _leaves(found) if isinstance(leaf, Tensor)]


def _drawn_again(given: list[Tensor]) -> contextlib.AbstractContextManager[None]:
    """What is drawn in this block is drawn again after it."""
    return torch.random.fork_rng(devices=sorted({t.device.index for t in given if t.is_cuda}))


def _swapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments of an operator with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_swapped(v, change) for v in value])
    return {k: _swapped(v, change) for k, v in value.items()} if isinstance(value, dict) else value


def _leaves(value: Any) -> list[Any]:
    """What an operator gives, one after the other."""
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, (list, tuple)) else [value]


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)
