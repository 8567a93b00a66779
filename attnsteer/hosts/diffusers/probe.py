"""What each attention call of a denoiser is, found by looking at a computation: whose rows are its queries and its keys.

Two ideas make it readable at any depth. Attention is cut: a call gives its values back (or zeros, where it has other keys than
rows), so that no row sees another and each is a function of its own token. And what is changed is the order of one input's tokens:
a vector that is pooled over them stays as it is, so that only rows that *are* these tokens move, and modulation by the text does
not look like text. Inputs that still move every row alike are told apart by changing a single token.
"""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import UnsupportedHost
from .caches import unseen
from .variants import UnlikeError, Variants

SDPA = F.scaled_dot_product_attention
# Arguments that hold positions or masks, no tokens.
NO_TOKENS = ("ids", "rotary", "rope", "mask", "freqs", "coords", "pos")
# A row moved if it changed by more than this, relative to its own size.
MOVED = 1e-4
# The change that a source has in the order of its tokens; the others are those of one token, by its axis.
ORDER = "order"
# A stream is what the denoiser calls its latent, or its text.
LATENTS = ("sample", "hidden_states", "x", "latents")
TEXTS = re.compile(r"encoder|text|prompt|cap|llama|t5|input_ids")


@dataclass(frozen=True)
class Structure:
    """One attention call.

    Attributes:
        site: name of the module. number: of this call among those of the module, from 0.
        queries, keys: the segments in order, (names of the inputs whose tokens they are, length); no names: constants (registers,
            padding). heads, kv_heads: as the primitive gets them. ragged: the samples' rows lie differently.
    """

    site: str
    number: int
    queries: tuple[tuple[tuple[str, ...], int], ...]
    keys: tuple[tuple[tuple[str, ...], int], ...]
    heads: int
    kv_heads: int
    ragged: bool

    @property
    def kind(self) -> str:
        """ "self", "joint", "cross"; "own" where a row's own stream is among further keys; "?" where the rows contradict."""
        own = [set(names) for names, _ in self.queries if names]
        seen = [set(names) for names, _ in self.keys if names]
        rows, keys = (sum(size for _, size in side) for side in (self.queries, self.keys))
        if self.queries == self.keys and rows == keys:
            return "self" if len(own) <= 1 or set.intersection(*own) else "joint"
        if own and seen and not set.union(*own) & set.union(*seen):
            return "cross"
        if not (own and seen) and rows == keys:
            return "?"
        return (
            "own"
            if rows != keys and own and set.union(*own) & set.union(*(seen or [set()]))
            else "cross"
            if not own or not seen
            else "?"
        )

    @property
    def order(self) -> tuple[str, ...]:
        """The streams of the rows in order, by `role_of`; what is constant counts with nothing."""
        found: list[str] = []
        for names, _ in self.queries:
            if names:
                role = role_of(names)
                if not found or found[-1] != role:
                    found.append(role)
        return tuple(found)

    @property
    def own_keys(self) -> slice | None:
        """Where the rows' own keys are, in the order of the rows; None where they are not one run."""
        rows = sum(size for _, size in self.queries)
        places, start = [], 0
        wanted = {name for names, _ in self.queries for name in names}
        for names, size in self.keys:
            if set(names) & wanted:
                places.append(slice(start, start + size))
            start += size
        return places[0] if len(places) == 1 and places[0].stop - places[0].start == rows else None


def role_of(names: tuple[str, ...]) -> str:
    """ "image" for the latent's tokens, "audio" or "text" by what the denoiser calls its inputs, else "other"."""
    if set(names) & set(LATENTS):
        return "image"
    joined = " ".join(names)
    if "audio" in joined:
        return "audio"
    return "text" if TEXTS.search(joined) and "image" not in joined else "other"


class _Tape(TorchFunctionMode):
    """Records how q and k of each attention call change with the inputs, and cuts it."""

    def __init__(self, variants: Variants) -> None:
        super().__init__()
        self.variants = variants
        self.calls: list[_Call] = []
        self.inside: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not SDPA and getattr(func, "__name__", "") != "flex_attention":
            return func(*args, **kwargs)
        q, k, v = [*args, *(kwargs.get(n) for n in ("query", "key", "value")[len(args) :])][:3]
        sides = tuple(
            (tuple(x.shape[::2]), {name: _change(other, x) for name, other in self.variants.of(x).items()})
            for x in (q, k)
        )
        self.calls.append(_Call(self.inside[-1] if self.inside else "", q.shape[1], v.shape[1], sides))
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1) if v.shape[1] != q.shape[1] else v
        if q.shape[2] == k.shape[2] and q.shape[0] == v.shape[0]:
            return v.clone()
        return q.new_zeros(*q.shape[:-1], v.shape[-1])


@dataclass(frozen=True)
class _Call:
    """An attention call: where it is, its heads, and for queries and keys their (B, n) and what moved, by variant."""

    site: str
    heads: int
    kv_heads: int
    sides: tuple[tuple[tuple[int, ...], dict[Hashable, Tensor]], ...]

    def moved(self, side: int, variant: Hashable) -> Tensor:
        """How much each row [B, n] changed, relative to its size."""
        shape, changes = self.sides[side]
        return changes[variant] if variant in changes else torch.zeros(shape)


def probe(
    model: nn.Module, inputs: dict[str, Any], run: Callable[[dict[str, Any]], Any] | None = None
) -> list[Structure]:
    """The attention calls of one forward, in order.

    The model is left as it was: no hook, no state, no random number of it is used up.

    Args:
        inputs: keyword arguments of one forward, with at least four tokens in each stream. run: makes the forward of such
            arguments; None: the model does.

    Raises:
        UnsupportedHost: the model is in training mode, or its calls depend on the order of tokens.
    """
    if model.training:
        raise UnsupportedHost(f"{type(model).__name__} is in training mode; call eval() before it is looked at.")
    sources: dict[str, list[str]] = {}
    for path, tensor in _leaves(inputs):
        if _has_tokens(path, tensor):
            sources.setdefault(path.split("[")[0], []).append(path)
    calls = _calls(model, run or (lambda given: model(**given)), inputs, list(sources))
    modulating = _modulating(calls, list(sources))
    counts: dict[str, int] = {}
    found = []
    for i, call in enumerate(calls):
        rows = {side: _labels(call, side, [s for s in sources if (s, i, side) not in modulating]) for side in (0, 1)}
        number = counts[call.site] = counts.get(call.site, -1) + 1
        apart = len({_runs(one) for one in rows[0]}) > 1
        queries, keys = (
            _runs([frozenset().union(*cells) for cells in zip(*rows[side], strict=True)]) for side in (0, 1)
        )
        found.append(Structure(call.site, number, queries, keys, call.heads, call.kv_heads, apart))
    return found


def _labels(call: _Call, side: int, sources: list[str]) -> list[list[frozenset[str]]]:
    """Per sample, per row, the sources that own it."""
    batch, size = call.sides[side][0]
    labels: list[list[set[str]]] = [[set() for _ in range(size)] for _ in range(batch)]
    for source in sources:
        for b, r in (call.moved(side, (source, ORDER)) > MOVED).nonzero().tolist():
            labels[b][r].add(source)
    return [[frozenset(cell) for cell in one] for one in labels]


def _modulating(calls: list[_Call], sources: list[str]) -> set[tuple[str, int, int]]:
    """(source, call, side) where a source moves rows that are another's, all of them alike: it owns none there."""
    doubtful: set[str] = set()
    for call, side in itertools.product(calls, (0, 1)):
        marks = {s: (call.moved(side, (s, ORDER)) > MOVED).any(0) for s in sources}
        doubtful |= {a for a, b in itertools.permutations(marks, 2) if bool((marks[a] & marks[b]).any())}
    found = set()
    for source, i, side in itertools.product(doubtful, range(len(calls)), (0, 1)):
        hit = (calls[i].moved(side, (source, ORDER)) > MOVED).any(0)
        if not bool(hit.any()):
            continue
        alone = [calls[i].moved(side, (source, axis))[..., hit].amax(0) for axis in (-2, -1)]
        if not any(float(c.max()) > 5 * float(c.median()) for c in alone):
            found.add((source, i, side))
    return found


def _calls(
    model: nn.Module, run: Callable[[dict[str, Any]], Any], inputs: dict[str, Any], sources: list[str]
) -> list[_Call]:
    """The attention calls of one forward, which is made for all changes of the inputs at once."""
    variants = Variants()
    tape, handles = _Tape(variants), []
    for name, module in model.named_modules():
        if callable(getattr(module, "processor", None)) or "Attention" in type(module).__name__:
            handles.append(module.register_forward_pre_hook(lambda m, a, n=name: tape.inside.append(n)))
            handles.append(module.register_forward_hook(lambda m, a, o: (tape.inside.pop(), None)[1], always_call=True))

    def varied(path: str, tensor: Tensor) -> Tensor:
        source = path.split("[")[0]
        if source not in sources or not _has_tokens(path, tensor):
            return tensor.clone()
        others: dict[Hashable, Tensor] = {(source, ORDER): _rolled(tensor)}
        if len(sources) > 1:
            # Asked for where two sources move one row.
            others |= {(source, axis): _one_token(tensor, axis) for axis in (-2, -1)}
        return variants.vary(tensor, others)

    given = _put(inputs, varied)
    if "return_dict" in inspect.signature(type(model).forward).parameters:
        given["return_dict"] = False
    try:
        # What is compiled in this pass would stay so, and what fails to be compiled as well.
        eager = torch.compiler.set_stance("force_eager")
        with unseen(model), warnings.catch_warnings(), torch.no_grad(), eager, tape, variants:
            warnings.simplefilter("ignore")
            run(given)
    except UnlikeError as error:
        raise UnsupportedHost(f"{type(model).__name__} cannot be looked at in one forward: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    return tape.calls


def _change(other: Tensor, base: Tensor) -> Tensor:
    """How much each row [B, n] changed, relative to its size."""
    return (other.float() - base.float()).abs().amax((1, 3)) / (base.float().abs().amax((1, 3)) + 1e-12)


def _runs(labels: list[frozenset[str]]) -> tuple[tuple[tuple[str, ...], int], ...]:
    return tuple((tuple(sorted(names)), len(list(run))) for names, run in itertools.groupby(labels))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from _leaves(v, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from _leaves(v, f"{path}[{i}]")


def _put(value: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """The same arguments with changed tensors."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, dict):
        return {k: _put(v, change, f"{path}.{k}" if path else str(k)) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_put(v, change, f"{path}[{i}]") for i, v in enumerate(value))
    return value


def _has_tokens(path: str, tensor: Tensor) -> bool:
    leaf = path.split("[")[0].split(".")[-1]
    if not tensor.numel() or any(word in leaf.replace("input_ids", "") for word in NO_TOKENS):
        return False
    if tensor.is_floating_point():
        return tensor.ndim >= (2 if "[" in path else 3)
    return not tensor.is_complex() and tensor.ndim == 2 and tensor.shape[1] > 1 and "input_ids" in path


def _rolled(tensor: Tensor) -> Tensor:
    """Another order of the tokens; of a grid, along its last two axes."""
    if not tensor.is_floating_point():
        return tensor.roll(1, 1)
    if tensor.shape[-2] == 1 and tensor.ndim == 3:
        return -tensor
    return tensor.roll(1, -1).roll(1, -2) if tensor.ndim in (4, 5) else tensor.roll(1, -2)


def _one_token(tensor: Tensor, axis: int) -> Tensor:
    """Another value of the first token."""
    new = tensor.clone()
    part = new.narrow(new.ndim + axis if new.is_floating_point() else 1, 0, 1)
    part.copy_(-part if new.is_floating_point() else (part + 1) % 2)
    return new
