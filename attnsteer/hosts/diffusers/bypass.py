"""Blocks of a denoiser that a weak pass leaves out: what enters them comes out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedHost
from .prefix import layered

# The number of a layer counts these.
BLOCK = re.compile(r"(.*\.\d+)(\.|$)")


def blocks_of(names: Sequence[str]) -> list[str]:
    """Names of the blocks that hold these sites, each once."""
    found = {name: BLOCK.match(name) for name in names}
    alone = [name for name, match in found.items() if match is None]
    if alone:
        raise UnsupportedHost(f"{alone[0]} lies in no numbered block, so there is none to leave out.")
    return list(dict.fromkeys(match[1] for match in found.values()))


class Bypass:
    """Leaves blocks out of a pass.

    Which argument of a block comes out as which of its results is found by the shapes of one call that is not left out; where
    two arguments have the same, diffusers' own table of blocks says it.

    Args:
        model: the denoiser. names: of the blocks.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self._blocks = [(name, model.get_submodule(name)) for name in names]
        self._sources: dict[str, Any] = {}

    def on(self) -> contextlib.AbstractContextManager[None]:
        """In this block of code, calls of the blocks give back their arguments."""
        return layered([(block, functools.partial(self._pass, name, block)) for name, block in self._blocks])

    def _pass(self, name: str, block: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        sources = self._sources.get(name)
        if sources is None:
            sources = self._sources[name] = _sources(name, block, given, inner(*args, **kwargs))
        if isinstance(sources, tuple):
            return tuple(None if source is None else given[source] for source in sources)
        return given[sources]


def _sources(name: str, block: nn.Module, given: dict[str, Any], output: Any) -> Any:
    """The argument for each output; None for an output that is none."""
    if isinstance(output, Tensor):
        return _source(name, block, given, output, None)
    if not isinstance(output, tuple) or not all(o is None or isinstance(o, Tensor) for o in output):
        raise UnsupportedHost(f"{name} ({type(block).__name__}) returns no tensors, so it cannot be left out exactly.")
    found = tuple(None if o is None else _source(name, block, given, o, i) for i, o in enumerate(output))
    streams = [source for source in found if source is not None]
    if len(set(streams)) < len(streams):
        raise _unknown(name, block)
    return found


def _source(name: str, block: nn.Module, given: dict[str, Any], output: Tensor, place: int | None) -> str:
    same = [key for key, value in given.items() if isinstance(value, Tensor) and value.shape == output.shape]
    if len(same) == 1:
        return same[0]
    known = _table(block).get(place or 0)
    if known in same:
        return known
    raise _unknown(name, block)


def _table(block: nn.Module) -> dict[int, str]:
    """Place of an output -> argument, as diffusers' own hooks know it."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        known = TransformerBlockRegistry.get(type(block))
    except ValueError:
        return {}
    places = {known.return_encoder_hidden_states_index: "encoder_hidden_states"}
    return places | {known.return_hidden_states_index: "hidden_states"}


def _unknown(name: str, block: nn.Module) -> UnsupportedHost:
    return UnsupportedHost(
        f"{name} ({type(block).__name__}): which of its results belongs to which of its arguments is not known, so it cannot be "
        "left out exactly. Give heads= to switch heads off instead."
    )
