"""Feature caches beside passes of our own: each kind of pass keeps a cache state of its own.

The hooks of diffusers (first-block, pyramid attention broadcast, TaylorSeer, MagCache, FasterCache, SEA, text keys) remember
outputs from call to call. A weak pass that shared their state would be answered from the strong one, and leave its own outputs
for it. So for the length of such a pass the state itself is exchanged, not the cache context: some hooks know no contexts, and
`cache_context` leaves none behind where another one was.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedHost


def stateful_hooks(model: nn.Module) -> list[Any]:
    """The hooks below a model that keep something from call to call; `apply_...` functions put them on without a flag."""
    registries = [vars(m).get("_diffusers_hook") for m in model.modules()]
    hooks = [hook for r in registries if r is not None for hook in r.hooks.values()]
    return [hook for hook in hooks if getattr(hook, "_is_stateful", False)]


class Bank:
    """What the hooks of a model remember of each kind of pass that is not the pipeline's own.

    Attributes:
        caching: whether there is anything that remembers. whole: whether a hook takes its batch apart into guidance rows, so that
            every pass must have all of them. counts: whether a hook looks its ratios up by the number of its passes.
    """

    def __init__(self, model: nn.Module):
        hooks = stateful_hooks(model)
        self._managers: list[Any] = []
        self._objects: list[Any] = []
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._path: tuple[Any, ...] = ()
        self._ran: dict[tuple[Any, ...], set[int | None]] = {}
        self.caching = bool(hooks)
        self.whole = any(getattr(hook, "is_guidance_distilled", True) is False for hook in hooks)
        self.counts = any("Mag" in type(hook).__name__ for hook in hooks)
        for hook in hooks:
            held = [v for v in vars(hook).values() if _remembers(v)]
            if not held:
                raise UnsupportedHost(
                    f"{type(model).__name__} has the hook {type(hook).__name__}, which keeps outputs from call to call, and where "
                    "it keeps them is not known; guidance would be answered from it. Take the hook off first."
                )
            for value in held:
                place = self._managers if hasattr(value, "_state_cache") else self._objects
                if not any(value is other for other in place):
                    place.append(value)

    @contextlib.contextmanager
    def branch(self, key: Any, step: int | None = None) -> Iterator[None]:
        """One pass of the kind `key`, with the state that the earlier ones of this kind left.

        Args:
            step: of the run, from 0.

        Raises:
            UnsupportedHost: the cache counts its passes, and this kind was left out of some steps.
        """
        outer = self._path
        self._path = path = (*outer, key)
        ran = self._ran.setdefault(path, set())
        if self.counts and step is not None and len(ran | {step}) != step + 1:
            raise UnsupportedHost(
                "MagCache looks its ratios up by counting passes, and the weak pass was switched off in some steps, so that it "
                "would take those of other steps. Let it run in all steps (no Where(steps=...), adaptive=0), or use another cache."
            )
        ran.add(step)
        managers = [(m, m._state_cache) for m in self._managers]
        objects = [(o, dict(vars(o))) for o in self._objects]
        for manager, _ in managers:
            manager._state_cache = self._kept.setdefault((*path, id(manager)), {})
        for held, _ in objects:
            own = self._kept.get((*path, id(held)))
            if own is None:
                fresh = copy.copy(held)
                fresh.reset()
                own = dict(vars(fresh))
            # The object stays, because others hold it too; what is in it is exchanged.
            _fill(held, own)
        try:
            yield
        finally:
            self._path = outer
            for manager, old in managers:
                manager._state_cache = old
            for held, old in objects:
                self._kept[(*path, id(held))] = dict(vars(held))
                _fill(held, old)

    def own(self, value: Any) -> Any:
        """An argument of a pass: in passes that are not the pipeline's own, a copy of what the model keeps keys and values in.

        It is made behind the first pass of the pipeline itself, so that blocks that are not run again have what they left there.
        """
        if not self._path or isinstance(value, nn.Module) or not type(value).__module__.startswith("diffusers"):
            return value
        key = (*self._path, "argument", id(value))
        if key not in self._kept:
            self._kept[key] = (value, copy.deepcopy(value))
        return self._kept[key][1]


@contextlib.contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """A pass that only we ask for: what the model counts, keeps and draws stands after it as before.

    Restored are buffers, attributes of the modules and of their processors (counters, lists, tensors), generators among them, and
    the state of all random numbers. Where parameters and buffers lie is left to what moves them (offloading).
    """
    modules = list(model.modules())
    owners = [*modules, *(p for m in modules if hasattr(p := vars(m).get("processor"), "__dict__"))]
    kept = [(vars(owner), _contents(vars(owner))) for owner in owners]
    buffers = [(m._buffers, _contents(m._buffers)) for m in modules if m._buffers]
    devices = {t.device.index for t in model.parameters() if t.is_cuda}
    # What is not imported draws nothing.
    numpy = sys.modules.get("numpy")
    drawn = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(drawn[0])
        if numpy is not None and drawn[1] is not None:
            numpy.random.set_state(drawn[1])
        with torch.no_grad():
            for now, old in buffers:
                for name, (value, content, mark) in old.items():
                    # One that was exchanged may lie elsewhere now.
                    _restore(now.get(name), content, mark if now.get(name) is value else None)
            for now, old in kept:
                for name in now.keys() - old.keys() - OF_TORCH:
                    del now[name]
                for name, (value, content, mark) in old.items():
                    if now.get(name) is not value:
                        now[name] = value
                    _restore(value, content, mark)


# What `nn.Module` itself keeps among a module's attributes.
OF_TORCH = frozenset(vars(nn.Module())) - {"training"}


def _contents(owner: dict[str, Any]) -> dict[str, tuple[Any, Any, int | None]]:
    """Name -> (an attribute, a copy of what is in it, its version)."""
    return {n: (v, _content(v), _version(v)) for n, v in owner.items() if n not in OF_TORCH}


def _content(value: Any) -> Any:
    """What is in an attribute that can be changed in place; None for any other."""
    if isinstance(value, Tensor):
        return None if isinstance(value, nn.Parameter) else value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    return copy.copy(value) if type(value) in (list, dict, set) else None


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _restore(value: Any, content: Any, mark: int | None) -> None:
    """Put what was in an attribute back; a tensor only where it was written into, because a graph may hold it."""
    if content is None or (mark is not None and _version(value) == mark):
        return
    if isinstance(value, Tensor):
        if value.shape == content.shape and not value.is_meta:
            value.detach().copy_(content)
    elif isinstance(value, torch.Generator):
        value.set_state(content)
    elif isinstance(value, list):
        value[:] = content
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(content)


def _remembers(value: Any) -> bool:
    """Whether a hook's attribute is where it keeps its state."""
    if hasattr(value, "_state_cache"):
        return True
    return type(value).__module__.startswith("diffusers.hooks") and callable(getattr(value, "reset", None))


def _fill(held: Any, content: dict[str, Any]) -> None:
    vars(held).clear()
    vars(held).update(content)
