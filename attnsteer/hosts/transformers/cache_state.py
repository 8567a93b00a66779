"""What a sequence has to remember between forwards: kept on its cache, so that it follows the cache wherever that goes."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...tokens import Tokens

STATE = "_attnsteer_states"
FOLLOWED = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "reset")
# States at the ends of the last prompt calls are kept, so that a cache may be cut back to one of them.
KEPT = 8

States = dict[Any, dict[str, Any]]


@dataclass
class Sequence:
    """The memory of one cache under one steering.

    Attributes:
        tokens: roles of the tokens so far. prompt: slots of the prompt so far.
        states: of each method at each site. ends: length -> states, at the end of each of the last prompt calls.
    """

    tokens: Tokens | None = None
    prompt: int | None = None
    states: States = field(default_factory=dict)
    ends: dict[int, States] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Slots so far."""
        return 0 if self.tokens is None else self.tokens.length

    def remember(self) -> None:
        """The states as they are at the end of a prompt call."""
        self.ends[self.length] = {key: dict(state) for key, state in self.states.items()}
        while len(self.ends) > KEPT:
            del self.ends[min(self.ends)]

    def cut(self, length: int) -> bool:
        """The cache was cut back to `length` slots; False where the states cannot be those of that prefix."""
        within = self.prompt is not None and length < self.prompt
        known = self.ends.get(length)
        self.ends = {end: states for end, states in self.ends.items() if end <= length}
        if not within:
            return True
        self.prompt = length
        if known is None:
            return False
        self.states = {key: dict(state) for key, state in known.items()}
        return True

    def batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Batch rows were reordered, repeated or dropped; `change` does so to a tensor with the batch first."""
        if self.tokens is not None:
            self.tokens.take(change(torch.arange(self.tokens.batch)))
        for states in (self.states, *self.ends.values()):
            for state in states.values():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.ndim:
                        state[name] = change(value)


class Memory:
    """Finds the `Sequence` of a cache for one steering."""

    def __init__(self, run: Any):
        self._key = id(run)
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def of(self, cache: Any, fresh: bool) -> Sequence:
        """The memory of a cache; `fresh`: the cache is empty, so what was there is of another sequence."""
        if cache is None:
            return Sequence()
        store = vars(cache).get(STATE)
        if store is None:
            store = {}
            setattr(cache, STATE, store)
            for name in FOLLOWED:
                if hasattr(type(cache), name):
                    # A bound method, because deepcopy rebinds those to the copied cache.
                    setattr(cache, name, types.MethodType(_FOLLOWERS[name], cache))
            self._seen.add(cache)
        if fresh or self._key not in store:
            store[self._key] = Sequence()
        return store[self._key]

    def put(self, cache: Any, sequence: Sequence) -> None:
        """A forward made its own cache: the memory of this sequence moves onto it."""
        self.of(cache, fresh=True)
        vars(cache)[STATE][self._key] = sequence

    def forget(self) -> None:
        """Take what is ours off the caches that were seen."""
        for cache in list(self._seen):
            store = vars(cache).get(STATE)
            if store is not None:
                store.pop(self._key, None)
                if not store:
                    for name in (STATE, *FOLLOWED):
                        vars(cache).pop(name, None)


def _each(cache: Any, change: Callable[[Tensor], Tensor]) -> None:
    for sequence in vars(cache).get(STATE, {}).values():
        sequence.batch(change)


def _reorder(self: Any, beam_idx: Tensor) -> Any:
    result = type(self).reorder_cache(self, beam_idx)
    _each(self, lambda t: t.index_select(0, beam_idx.to(t.device)))
    return result


def _repeat(self: Any, repeats: int) -> Any:
    result = type(self).batch_repeat_interleave(self, repeats)
    _each(self, lambda t: t.repeat_interleave(repeats, dim=0))
    return result


def _select(self: Any, indices: Tensor) -> Any:
    result = type(self).batch_select_indices(self, indices)
    _each(self, lambda t: t[indices.to(t.device)])
    return result


def _reset(self: Any) -> Any:
    vars(self).get(STATE, {}).clear()
    return type(self).reset(self)


_FOLLOWERS = {
    "reorder_cache": _reorder,
    "batch_repeat_interleave": _repeat,
    "batch_select_indices": _select,
    "reset": _reset,
}
