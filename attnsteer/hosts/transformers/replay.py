"""A causal language model recomputed from one block on, for many variants of one prompt at once."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedHost
from ...site import Site
from .forward import Forward
from .outer_calls import CURRENT, KEY


@dataclass
class Pass:
    """What one forward left behind.

    Attributes:
        hidden: the output of each block, [B, n, D]. logits: of the rows asked for, [B, r, V].
        keys_values: (k, v) [B, Hkv, m, d] of each block, the cached ones included.
        cache: the cache that was filled.
    """

    hidden: list[Tensor]
    logits: Tensor
    keys_values: list[tuple[Tensor, Tensor]]
    cache: Any


class Decoder:
    """The blocks of a causal language model of transformers, and forwards that start at one of them.

    A recomputation runs the model's own forward with the blocks before the first edited one exchanged for what they gave in
    the plain pass: embeddings, masks, rotary tables, norms and head are the model's own code.

    Args:
        model: the module. sites: its attention sites.

    Raises:
        UnsupportedHost: it is not a stack of blocks with one causal self-attention each, or it is compiled.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]):
        self.model = model
        own = [s for s in sites if s.modality == "text" and s.kind == "self"]
        names = [re.match(r"(.*\.\d+)(\.|$)", s.name) for s in own]
        if not own or not all(names) or not all(s.causal for s in own):
            raise UnsupportedHost(
                f"{type(model).__name__} is not a causal language model made of numbered blocks; heads are scored one by one "
                "on those only."
            )
        paths = [match[1] for match in names]
        parent = model.get_submodule(paths[0].rpartition(".")[0])
        self.blocks = list(parent)
        if [id(model.get_submodule(p)) for p in paths] != [id(b) for b in self.blocks]:
            raise UnsupportedHost(
                f"{type(model).__name__} has {len(self.blocks)} blocks of which not each holds one causal self-attention "
                "(encoder-decoders and hybrids with other mixers): its blocks cannot be recomputed one by one."
            )
        # Site path -> number of its block.
        self.position = {s.path: i for i, s in enumerate(own)}
        if any(m._compiled_call_impl is not None for m in model.modules()):
            raise UnsupportedHost("a compiled model runs no block of its own; give the model before torch.compile.")
        self._keep = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self._tuples = False

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.model.parameters()).device

    def run(self, ids: Tensor, cache: Any = None, last: bool = False) -> Pass:
        """A forward of all blocks on `ids` [B, n] over `cache` (None: a new one); `last`: logits of the last row only."""
        hidden: list[Tensor] = []

        def took(_: nn.Module, __: Any, output: Any) -> None:
            self._tuples = isinstance(output, tuple)
            hidden.append(output[0] if self._tuples else output)

        hooks = [block.register_forward_hook(took) for block in self.blocks]
        try:
            cache = self._empty() if cache is None else cache
            logits = self._logits(ids, cache, last)
        finally:
            for hook in hooks:
                hook.remove()
        return Pass(hidden, logits, [(k, v) for k, v, *_ in cache], cache)

    def resume(self, ids: Tensor, block: int, hidden: Tensor | None, cache: Any, last: bool = False) -> Tensor:
        """Logits of a forward that computes the blocks from `block` on.

        Args:
            ids: [R, n]. hidden: what the block before `block` gave for these rows, [R, n, D]; None for block 0.
            cache: from `cache`.
        """
        changes = {i: _passed for i in range(block - 1)}
        if block:
            changes[block - 1] = lambda *_, **__: hidden
        top = len(self.blocks) - 1
        if last and block < top and ids.shape[1] > 1:
            changes[top] = functools.partial(_last_row, self.blocks[top].forward, cache)
        with self._exchanged(changes):
            return self._logits(ids, cache, last)

    def cache(self, layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """A cache that holds these keys and values; blocks that are skipped need one row of the right length only."""
        new = self._empty()
        for i, (k, v) in enumerate(layers):
            if k.shape[2]:
                new.update(k, v, i)
        return new

    @staticmethod
    def _empty() -> Any:
        from transformers import DynamicCache

        # Without the config: a sliding-window layer would drop keys that a variant has to see (the mask hides the others).
        return DynamicCache()

    def _logits(self, ids: Tensor, cache: Any, last: bool) -> Tensor:
        options = {"logits_to_keep": 1} if last and self._keep else {}
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits
        return logits[:, -1:] if last else logits

    @contextlib.contextmanager
    def _exchanged(self, changes: dict[int, Callable[..., Any]]) -> Iterator[None]:
        """These blocks run other functions, which may give the bare hidden state."""
        undo = []
        try:
            for i, change in changes.items():
                own = vars(self.blocks[i])
                undo.append((own, own.get("forward")))
                own["forward"] = self._shaped(change)
            yield
        finally:
            for own, old in undo:
                if old is None:
                    del own["forward"]
                else:
                    own["forward"] = old

    def _shaped(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = change(*args, **kwargs)
            return (output,) if self._tuples and isinstance(output, Tensor) else output

        return forward


def _passed(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


class _Filled(Exception):
    """The keys and values of the last block are in the cache."""


def _last_row(original: Callable[..., Any], cache: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The last block for its last row; of the other rows only their keys and values are computed."""
    n = hidden_states.shape[1]
    parts = [_rows(kwargs, n, slice(0, n - 1)), _rows(kwargs, n, slice(n - 1, n))]
    if args or None in parts or (KEY not in kwargs and CURRENT.get()):
        # Nor where the account of the rows does not come with the arguments, to be cut with them.
        return original(hidden_states, *args, **kwargs)
    update = cache.update

    def fill(*given: Any, **options: Any) -> None:
        update(*given, **options)
        raise _Filled

    cache.update = fill
    try:
        original(hidden_states[:, :-1], **parts[0])
    except _Filled:
        pass
    finally:
        del cache.update
    if KEY in kwargs:
        parts[1][KEY] = {run: f.last_row() if isinstance(f, Forward) else f for run, f in kwargs[KEY].items()}
    return original(hidden_states[:, -1:], **parts[1])


# Axis of the rows in the tensors that a block is given; a block with others is computed whole.
_ROW_AXIS = {"attention_mask": -2, "position_embeddings": -2, "position_ids": -1}


def _rows(kwargs: dict[str, Any], n: int, rows: slice) -> dict[str, Any] | None:
    """A block's arguments for some of its `n` rows; None where that is not known."""

    def cut(value: Any, axis: int) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(cut(v, axis) for v in value)
        return value[(..., rows) + (slice(None),) * (-axis - 1)]

    found = {}
    for name, value in kwargs.items():
        tensors = value if isinstance(value, (tuple, list)) else [value]
        if any(isinstance(t, Tensor) for t in tensors):
            axis = _ROW_AXIS.get(name)
            if axis is None or not all(
                isinstance(t, Tensor) and t.ndim >= -axis and t.shape[axis] == n for t in tensors
            ):
                return None
            value = cut(value, axis)
        found[name] = value
    return found
