"""The undo journal: what a steering changed, and how it is put back, in whatever order steerings leave."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

MISSING = object()


class Journal:
    """Undo steps, run in reverse; each runs even when another fails."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def add(self, step: Callable[[], None]) -> None:
        """Remember one undo step."""
        self._steps.append(step)

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute and remember how to restore it (or to delete it)."""
        own = vars(owner)
        had, old = name in own, own.get(name)
        own[name] = value

        def undo() -> None:
            if had:
                vars(owner)[name] = old
            else:
                vars(owner).pop(name, None)

        self.add(undo)

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Put `around(inner, *args, **kwargs)` in front of a method of `owner`, until undone."""
        self.add(Layer(owner, name, around).remove)

    def undo(self) -> None:
        """Run all steps; the first error is raised after the last step."""
        first: BaseException | None = None
        while self._steps:
            try:
                self._steps.pop()()
            except Exception as error:  # every step must run, whatever another did
                first = first or error
        if first is not None:
            raise first


def below_layers(owner: Any, name: str) -> Any:
    """What stands on an instance under `name` below our layers, or `MISSING`: then it is the class's own."""
    here = vars(owner).get(name, MISSING)
    while (layer := getattr(getattr(here, "__func__", None), "layer", None)) is not None:
        # On a copy of a steered owner the layer is there, but calls the class's own.
        here = layer.before if layer.owner() is owner else MISSING
    return here


class Layer:
    """One layer around a method of an instance; layers may be taken off in any order.

    It is a bound method of its owner, so that a copy of the owner has one too, which finds that it is not at home and calls the
    class's own method: copies and pickles are plain objects.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]):
        # accelerate keeps the forward that its hook wraps under this name; a layer goes below the hook.
        self.name = "_old_forward" if name == "forward" and "_old_forward" in vars(owner) else name
        self.method, self.around = name, around
        self.owner = weakref.ref(owner)
        self.before = vars(owner).get(self.name, MISSING)
        self.inner = getattr(owner, self.name)
        home, layer = weakref.ref(owner), self

        @functools.wraps(getattr(type(owner), name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self is not home():
                return getattr(type(self), name)(self, *args, **kwargs)
            return layer.around(layer.inner, *args, **kwargs)

        method.layer = self
        self.bound = types.MethodType(method, owner)
        vars(owner)[self.name] = self.bound

    def remove(self) -> None:
        """Take this layer off, wherever it now is among those around the method."""
        owner = self.owner()
        if owner is None:
            return
        self.around = lambda inner, *args, **kwargs: inner(*args, **kwargs)
        for place in (self.method, "_old_forward"):
            above: Layer | None = None
            here = vars(owner).get(place)
            while (layer := getattr(getattr(here, "__func__", None), "layer", None)) is not None:
                if layer is self:
                    self._splice(owner, place, above)
                    return
                above, here = layer, layer.inner

    def _splice(self, owner: Any, place: str, above: Layer | None) -> None:
        if above is not None:
            above.inner, above.before = self.inner, self.before
        elif self.before is not MISSING:
            vars(owner)[place] = self.before
        elif place == self.method:
            del vars(owner)[place]
        else:
            # A hook that was put around us meanwhile calls what is here.
            vars(owner)[place] = self.inner
