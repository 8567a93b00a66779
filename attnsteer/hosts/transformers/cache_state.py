"""What a sequence has to remember between forwards: kept on its cache, so that it follows the cache wherever that goes."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...steady import Step
from ...tokens import Tokens

STATE = "_attnsteer_states"
FOLLOWED = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "reset")
# The states at the ends of the last prompt calls are kept, so that a cache may be cut back to one of them.
KEPT = 8

States = dict[Any, dict[str, Any]]


@dataclass(frozen=True)
class Turn:
    """One call over a part of a prompt: slots `start` to `stop`, and the states at its end (None: no longer kept)."""

    start: int
    stop: int
    states: States | None


@dataclass
class Sequence:
    """The memory of one cache under one steering. A forward works on a draft, which takes its place when it has run to its end.

    Attributes:
        tokens: roles of the tokens so far. prompt: slots of the prompt so far.
        request: int [B, T] of the requests packed into its rows, or None. states: of each method at each site.
        turns: the calls over parts of the prompt, in order. compiled: compiled calls went on with it, of which it knows nothing.
        left: slots that a cut of the cache has left, of those in `tokens`; None: all.
        steps: by the path of the site (a cache may outlive its model), what does the last decode step again. A copy makes its own.
    """

    tokens: Tokens | None = None
    prompt: int | None = None
    request: Tensor | None = None
    states: States = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    compiled: bool = False
    left: int | None = None
    steps: dict[str, Step] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "steps": {}}

    @property
    def length(self) -> int:
        """Slots so far."""
        if self.left is not None:
            return self.left
        return 0 if self.tokens is None else self.tokens.length

    def draft(self) -> Sequence:
        """A copy that a forward may change."""
        return replace(self, states=_copied(self.states), turns=list(self.turns), steps=dict(self.steps))

    def remember(self, start: int) -> None:
        """A call over the prompt from slot `start` on has ended."""
        self.turns.append(Turn(start, self.length if self.prompt is None else self.prompt, _copied(self.states)))
        for i, turn in enumerate(self.turns[:-KEPT]):
            self.turns[i] = replace(turn, states=None)

    def cut(self, length: int) -> bool:
        """The cache was cut back to `length` slots; False where the states cannot be those of that prefix."""
        # Rows that come again may be some that a source has.
        self.steps = {}
        kept = [turn for turn in self.turns if turn.start < length]
        gone, self.turns = len(self.turns) > len(kept), kept
        if not kept:
            self.prompt = None
            return False
        last = kept[-1]
        if length < last.stop:
            self.prompt, kept[-1] = length, Turn(last.start, length, None)
            return False
        self.prompt = last.stop
        if not gone:
            # Generated tokens alone were cut off.
            return True
        if last.states is None:
            return False
        self.states = _copied(last.states)
        return True

    def batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Batch rows were reordered, repeated or dropped; `change` does so to a tensor with the batch first."""
        self.steps = {}
        if self.tokens is not None:
            self.tokens.take(change(torch.arange(self.tokens.batch)))
        if self.request is not None:
            self.request = change(self.request)
        for states in (self.states, *(turn.states or {} for turn in self.turns)):
            for state in states.values():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.ndim:
                        state[name] = change(value)


def _copied(states: States) -> States:
    """Dicts of their own; tensors are shared, since a state is changed by putting another tensor in its place."""
    return {key: dict(state) for key, state in states.items()}


class Memory:
    """The `Sequence` of each cache for one steering: `vars(cache)[STATE][memory.key]`."""

    def __init__(self) -> None:
        # A copy of a cache may outlive this steering, or be loaded into another process: no number comes twice.
        self.key = uuid.uuid4().hex
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def put(self, cache: Any, sequence: Sequence) -> None:
        """From here on this is the memory of the cache."""
        store = vars(cache).get(STATE)
        if store is None:
            store = {}
            setattr(cache, STATE, store)
            for name in FOLLOWED:
                if hasattr(type(cache), name):
                    setattr(cache, name, Follower(cache, name))
        self._seen.add(cache)
        store[self.key] = sequence

    def forget(self) -> None:
        """Take what is ours off the caches that were seen."""
        for cache in list(self._seen):
            store = vars(cache).get(STATE)
            if store is not None:
                store.pop(self.key, None)
                if not store:
                    for name in (STATE, *FOLLOWED):
                        vars(cache).pop(name, None)


class Follower:
    """A method of a cache that does to our memory what it does to the keys; a copy of the cache has its own."""

    def __init__(self, cache: Any, name: str):
        self.cache, self.name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        store = vars(self.cache).get(STATE, {})
        if self.name == "reset":
            store.clear()
            return result
        change = _CHANGES[self.name](*args, **kwargs)
        for sequence in store.values():
            sequence.batch(change)
        return result


_CHANGES: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "reorder_cache": lambda beam_idx: lambda t: t.index_select(0, beam_idx.to(t.device)),
    "batch_repeat_interleave": lambda repeats: lambda t: t.repeat_interleave(repeats, dim=0),
    "batch_select_indices": lambda indices: lambda t: t[indices.to(t.device)],
}
