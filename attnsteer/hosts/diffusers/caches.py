"""Feature caches beside passes of our own: each kind of pass keeps a cache state of its own.

The hooks of diffusers (first-block, pyramid attention broadcast, TaylorSeer, MagCache, FasterCache, SEA, text keys) remember
outputs from call to call. A weak pass that shared their state would be answered from the strong one, and leave its own outputs
for it. So for the length of such a pass the state itself is exchanged, not the cache context: some hooks know no contexts, and
`cache_context` leaves none behind where another one was.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

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


def _remembers(value: Any) -> bool:
    """Whether a hook's attribute is where it keeps its state."""
    if hasattr(value, "_state_cache"):
        return True
    return type(value).__module__.startswith("diffusers.hooks") and callable(getattr(value, "reset", None))


def _fill(held: Any, content: dict[str, Any]) -> None:
    vars(held).clear()
    vars(held).update(content)
