"""Streams of a language model that differ in the base of their rotary embedding: one pass and one cache for each."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...bound import Bound
from ...errors import ContractError, UnsupportedHost
from .cache_state import STATE, Memory
from .outer_calls import CURRENT, GENERATION, KEY, UNTRACED, Prepared, entry, refuse_tracing

# The base of the stream that runs, by steering; each thread and task has its own.
BASE: ContextVar[Mapping[int, float]] = ContextVar("attnsteer_base", default={})  # noqa: B039  never mutated


@dataclass(frozen=True)
class StreamInputs:
    """One call of the model, for one stream; see `AttentionBuckets.around`."""

    base: float | None = None

    def with_base(self, base: float) -> StreamInputs:
        """The call with another base of the rotary embedding."""
        return replace(self, base=base)


@dataclass(frozen=True)
class StreamOutput:
    """What the model gave; `logits` [B, n, V] stands in place of its own."""

    raw: Any
    logits: Tensor

    def with_logits(self, logits: Tensor) -> StreamOutput:
        """The same with other logits."""
        return replace(self, logits=logits)

    def output(self) -> Any:
        """In the form in which the model gives it."""
        if isinstance(self.raw, tuple):
            return (self.logits, *self.raw[1:])
        if self.raw.logits is not self.logits:
            self.raw.logits = self.logits
        return self.raw


class Shadows:
    """The caches of the streams behind the first, by number: kept on the first one's, so that they follow it."""

    def __init__(self, caches: dict[int, Any]):
        self.caches = caches

    def batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Batch rows of the cache were reordered, repeated or dropped."""
        for cache in self.caches.values():
            held = (getattr(layer, "keys", None) for layer in cache.layers)
            size = next((len(keys) for keys in held if isinstance(keys, Tensor)), 0)
            if size:
                cache.batch_select_indices(change(torch.arange(size)))


class Rotary:
    """The rotary embedding of a model under other bases."""

    def __init__(self, run: Any, module: nn.Module):
        self.run, self.module = run, module
        self.made: dict[float, nn.Module] = {}
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
        self.own = parameters.get("rope_theta") if isinstance(parameters, Mapping) else None

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        base = BASE.get().get(id(self.run))
        if base is None or base == self.own:
            return inner(*args, **kwargs)
        return self.of(base)(*args, **kwargs)

    def of(self, base: float) -> nn.Module:
        """The module with another base, its scaling rule applied to it."""
        found = self.made.get(base)
        if found is None:
            found = self.made[base] = self._build(base)
        device = self.module.inv_freq.device
        return found if found.inv_freq.device == device else found.to(device)

    def _build(self, base: float) -> nn.Module:
        config = copy.deepcopy(self.module.config)
        config.rope_parameters = {**config.rope_parameters, "rope_theta": base}
        # A model that was cast to half precision has its frequencies in it too.
        return type(self.module)(config).to(self.module.inv_freq.device, self.module.inv_freq.dtype).eval()

    def check(self, name: str) -> None:
        """Raise where the frequencies do not follow from one base."""
        plain = isinstance(self.own, (int, float)) and isinstance(getattr(self.module, "inv_freq", None), Tensor)
        if plain:
            initial = getattr(self.module, "original_inv_freq", self.module.inv_freq)
            try:
                again, other = self._build(float(self.own)).inv_freq, self._build(2.0 * self.own).inv_freq
            except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
                raise UnsupportedHost(
                    f"{name}: {type(self.module).__name__} cannot be made with another base ({error})."
                ) from error
            plain = again.shape == initial.shape and torch.equal(again, initial) and not torch.equal(other, again)
        if not plain:
            raise UnsupportedHost(
                f"{name}: the frequencies of {type(self.module).__name__} do not follow from one rope_theta of its config (several "
                "bases by layer, or frequencies of their own), so that a stream with another base is not defined."
            )


class Streams:
    """Around the forward of a language model with a head: the passes that methods on streams ask for."""

    def __init__(self, run: Any, bound: Bound, module: nn.Module, own: float):
        """`own`: the base of the model itself."""
        self.run, self.bound, self.module, self.own = run, bound, module, own
        self.names = list(inspect.signature(module.forward).parameters)
        self.memory = Memory()

    @classmethod
    def attach(cls, run: Any, outer: list[nn.Module], stacks: list[nn.Module], journal: Any) -> None:
        """Put the layers on, where a method asks for streams.

        Raises:
            UnsupportedHost: the model has no head, or no rotary embedding of one base.
        """
        bounds = [b for b in run.bounds if "bases" in b.method.needs]
        if not bounds:
            return
        if len(bounds) > 1:
            raise UnsupportedHost(f"{bounds[0].name} and {bounds[1].name} both run the model in streams; attach one.")
        model = outer[0] if outer else stacks[0]
        head = next((m for m in outer if getattr(m, "get_output_embeddings", lambda: None)() is not None), None)
        if head is None:
            raise UnsupportedHost(
                f"{bounds[0].name} mixes logits, and a {type(model).__name__} has none. Steer the model with its language head."
            )
        every = [pair for stack in stacks for pair in stack.named_modules()]
        found = {n: m for n, m in every if "rotary" in type(m).__name__.lower()}
        if not found:
            raise UnsupportedHost(
                f"{bounds[0].name} changes the base of the rotary embedding, and this {type(head).__name__} has no such module."
            )
        own = set()
        for name, module in found.items():
            rotary = Rotary(run, module)
            rotary.check(name)
            own.add(float(rotary.own))
            journal.wrap(module, "forward", rotary)
        if len(own) > 1:
            raise UnsupportedHost(f"{bounds[0].name}: the layers of this model have several bases, {sorted(own)}.")
        streams = cls(run, bounds[0], head, own.pop())
        journal.wrap(head, "forward", streams)
        journal.add(streams.memory.forget)

    @torch.compiler.disable(reason=UNTRACED)
    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_tracing()
        if id(self.run) in BASE.get() or getattr(CURRENT.get().get(id(self.run)), "passes", False):
            return inner(*args, **kwargs)
        values = dict(zip(self.names, args, strict=False)) | kwargs
        prepared = kwargs.get(KEY, {}).get(id(self.run))
        if values.get("cache") is not None or isinstance(prepared, Prepared):
            raise UnsupportedHost(
                f"{self.bound.name}: requests of continuous batching share one paged cache, and each stream needs its own. "
                "Use generate."
            )
        if values.get("labels") is not None:
            raise UnsupportedHost(
                f"{self.bound.name} mixes logits after the model has taken its loss; compute the loss from the logits."
            )
        passes = _Passes(self, inner, values)
        self.run.audit.count(self.bound.index, "guided calls")
        try:
            result = self.bound.method.around(passes.forward, StreamInputs(), self.run)
        except Exception as error:
            error.add_note(f"attnsteer: raised in {self.bound.name}.around of {type(self.module).__name__}.")
            raise
        passes.check(result)
        passes.remember(result)
        changed = torch.tensor(any(base != self.own for base in passes.bases))
        self.run.audit.moved(self.bound.index, changed)
        return result.output()


class _Passes:
    """The passes of one call of the model, each over the cache of its stream."""

    def __init__(self, streams: Streams, inner: Any, values: dict[str, Any]):
        self.streams, self.inner, self.values = streams, inner, values
        self.bases: list[float] = []
        self.made: list[StreamOutput] = []
        cache = values.get("past_key_values")
        self.cache = cache if hasattr(cache, "get_seq_length") else None
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())
        self.shadows = None if self.cache is None else self._shadows()
        self.running = GENERATION.get().get(id(streams.run))
        self.pending = [] if self.running is None else list(self.running.pending)

    def _shadows(self) -> Shadows:
        """Those of the cache that was given; of an empty one, none yet."""
        memory, name = self.streams.memory, self.streams.bound.name
        if self.past == 0:
            # Copied before the first pass fills it.
            self.empty = copy.deepcopy(self.cache)
            vars(self.empty).get(STATE, {}).pop(memory.key, None)
            found = Shadows({})
            memory.put(self.cache, found)
            return found
        found = vars(self.cache).get(STATE, {}).get(memory.key)
        if found is None:
            raise UnsupportedHost(
                f"{name}: the cache holds {self.past} tokens of one stream, and each stream needs its own. Run the prefill "
                "inside the steering context."
            )
        for number, cache in found.caches.items():
            length = int(cache.get_seq_length())
            if length > self.past and hasattr(cache, "crop"):
                cache.crop(self.past - length)
            elif length != self.past:
                raise UnsupportedHost(
                    f"{name}: the cache holds {self.past} tokens, that of stream {number} {length}; something else has changed "
                    "it. Start a new cache."
                )
        return found

    def forward(self, inputs: StreamInputs) -> StreamOutput:
        """One pass."""
        streams = self.streams
        if not isinstance(inputs, StreamInputs) or inputs.base is None:
            raise ContractError(
                f"{streams.bound.name}.around called forward without a base; give it inputs.with_base(base)."
            )
        number, own = len(self.made), dict(self.values)
        if number and self.cache is not None:
            if number not in self.shadows.caches:
                if self.past:
                    raise ContractError(
                        f"{streams.bound.name}.around runs more streams than it did in this cache's prefill."
                    )
                self.shadows.caches[number] = copy.deepcopy(self.empty)
            own["past_key_values"] = self.shadows.caches[number]
        if self.running is not None:
            self.running.pending[:] = self.pending
        with entry(BASE, streams.run, inputs.base):
            raw = self.inner(**own)
        self.bases.append(inputs.base)
        self.made.append(StreamOutput(raw, raw[0] if isinstance(raw, tuple) else raw.logits))
        return self.made[-1]

    def check(self, result: Any) -> None:
        """Raise where `around` gave no prediction of the model's form."""
        name = self.streams.bound.name
        if not isinstance(result, StreamOutput):
            raise ContractError(
                f"{name}.around returned a {type(result).__name__}; return a stream's output, with_logits(...)."
            )
        if self.made[0].raw is not result.raw:
            raise ContractError(
                f"{name}.around returned another stream than the first, whose cache goes on; use with_logits."
            )
        if result.logits.shape != self.made[0].logits.shape or result.logits.dtype != self.made[0].logits.dtype:
            raise ContractError(
                f"{name}.around returned logits {list(result.logits.shape)} in {result.logits.dtype}; expected "
                f"{list(self.made[0].logits.shape)} in {self.made[0].logits.dtype}."
            )

    def remember(self, result: StreamOutput) -> None:
        """Of caches that the model made itself, the others are kept on the first."""
        if self.cache is None:
            caches = [_cache_of(m.raw) for m in self.made]
            if hasattr(caches[0], "get_seq_length"):
                self.streams.memory.put(caches[0], Shadows(dict(enumerate(caches[1:], start=1))))


def _cache_of(raw: Any) -> Any:
    if isinstance(raw, tuple):
        return next((part for part in raw if hasattr(part, "get_seq_length")), None)
    return getattr(raw, "past_key_values", None)
