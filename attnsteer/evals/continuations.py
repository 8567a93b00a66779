"""Log-likelihoods of continuations, in batches of contexts of any length; a continuation never moves the statistics."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SelectionError, UnsupportedHost, listing
from ..search.samples import padded


class Score(NamedTuple):
    """log p(continuation | context) in nats, and whether each of its tokens is the likeliest."""

    log_likelihood: float
    greedy: bool


class _Row(NamedTuple):
    """A continuation of more than one token: the row of its context, its place among that context's, its tokens."""

    context: int
    place: int
    ids: Sequence[int]


@torch.no_grad()
def score_continuations(
    model: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    run: Any = None,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    shared: int = 0,
) -> list[list[Score]]:
    """Scores of several continuations of each of several contexts, as one at a time would give them.

    The contexts are one batch, padded on the left under a mask; the statistics are frozen; the continuations are scored over
    copies of the cache. `attnsteer.search.candidate_log_likelihoods` is the same for a single context.

    Args:
        model: a causal language model of transformers, steered or not. contexts: token ids, none of them empty.
        continuations: for each context, token ids of its continuations, none of them empty.
        run: the `Steering` of the model. rows: continuations scored at once, as many as contexts unless given.
        dtype: of the log-softmax.
        shared: tokens that all contexts begin with and that are read once (`common_prefix`), with the methods of `run` among those
            that give rows what depends on nothing behind them and on no sample: `row_local`, without spans or values per sample.

    Raises:
        UnsupportedHost: the model hands out no cache that continuations can be scored over, or none that a shared beginning can
            stand in.
        SelectionError: the contexts do not begin with so many tokens alike, and go on behind them.
    """
    device, takes = next(model.parameters()).device, _takes(model)
    if shared and not 0 < shared <= common_prefix(contexts):
        raise SelectionError(
            f"shared={shared}: the contexts begin with {common_prefix(contexts)} tokens alike, each with one more behind them."
        )
    lengths = torch.tensor([len(c) for c in contexts], device=device)
    rest = [c[shared:] for c in contexts]
    width = max(len(c) for c in rest)
    ids = torch.tensor([[c[0]] * (width - len(c)) + list(c) for c in rest], device=device)
    column, start = torch.arange(shared + width, device=device), shared + width - (lengths - shared)
    # What is shared, padding, the rest of each.
    valid = (column < shared) | (column >= start[:, None])
    valid = None if bool(valid.all()) else valid
    longer = [_Row(b, i, c) for b, own in enumerate(continuations) for i, c in enumerate(own) if len(c) > 1]
    options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    with contextlib.nullcontext() if run is None or not shared else run.chunked_prefill(shared + width):
        begun = _begin(model, contexts[0][:shared], len(contexts), takes, valid, options) if shared else {}
        places = _places(takes, valid, None, width)
        output = model(input_ids=ids, use_cache=bool(longer or shared), **options, **places, **begun)
    first = output.logits[:, -1].log_softmax(-1, dtype=dtype)
    best = first.argmax(-1).tolist()
    found = [[Score(float(first[b, c[0]]), best[b] == c[0]) for c in own] for b, own in enumerate(continuations)]
    if not longer:
        return found
    cache = getattr(output, "past_key_values", None)
    if not hasattr(cache, "batch_select_indices"):
        raise UnsupportedHost(
            f"{type(model).__name__} gives {type(cache).__name__} for a cache: continuations are scored over the cache of their "
            "context, so that they cannot move its statistics, and this one cannot be repeated for several of them."
        )
    longer.sort(key=lambda r: len(r.ids))
    rows = len(contexts) if rows is None else rows
    parts = [longer[k : k + rows] for k in range(0, len(longer), rows)]
    for part in parts:
        own = cache if part is parts[-1] else copy.deepcopy(cache)
        which = torch.tensor([r.context for r in part], device=device)
        own.batch_select_indices(which)
        fed = padded([r.ids[:-1] for r in part], device)
        places = _places(takes, None if valid is None else valid[which], lengths[which], fed.shape[1])
        with contextlib.nullcontext() if run is None else run.freeze():
            logits = model(input_ids=fed, past_key_values=own, use_cache=True, **places).logits
        for row, r in zip(logits, part, strict=True):
            wanted = torch.tensor(r.ids[1:], device=device)
            p = row[: len(wanted)].log_softmax(-1, dtype=dtype)
            more = float(p.gather(-1, wanted[:, None]).sum())
            before = found[r.context][r.place]
            greedy = before.greedy and bool((p.argmax(-1) == wanted).all())
            found[r.context][r.place] = Score(before.log_likelihood + more, greedy)
    return found


def common_prefix(contexts: Sequence[Sequence[int]]) -> int:
    """How many tokens all contexts begin with, less what leaves none of them empty; 0 for a single one."""
    if len(contexts) < 2:
        return 0
    first, most = contexts[0], min(len(c) for c in contexts) - 1
    return next((i for i in range(most) if any(c[i] != first[i] for c in contexts)), most)


def _begin(
    model: Any, prefix: Sequence[int], rows: int, takes: set[str], valid: Tensor | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments with which a batch goes on behind what all of it begins with."""
    ids = torch.tensor([list(prefix)], device=next(model.parameters()).device)
    cache = getattr(model(input_ids=ids, use_cache=True, **options), "past_key_values", None)
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])} or {type(cache).__name__}
    if kinds != {"DynamicLayer"} or (valid is not None and "position_ids" not in takes):
        # A window and a bias by distance count the padding between the beginning and the rest; a recurrent state meets it.
        raise UnsupportedHost(
            f"{type(model).__name__}: a beginning is shared by prompts of any length where the cache is of plain layers and the "
            f"forward takes position_ids; this one has {listing(sorted(kinds))}. Read every prompt whole (prefix: off)."
        )
    cache.batch_repeat_interleave(rows)
    return {"past_key_values": cache}


def _takes(model: Any) -> set[str]:
    """Names of the arguments of the model's forward; those of the model inside where it is wrapped (peft)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(type(inner).forward).parameters)


def _places(takes: set[str], valid: Tensor | None, lengths: Tensor | None, new: int) -> dict[str, Tensor]:
    """Mask and positions of a call over padded contexts; nothing where none is padded.

    Args:
        valid: bool [B, n] of the contexts. lengths: of the contexts [B], where they are cached and `new` tokens follow; None: the
            last `new` of `valid` are read now.
    """
    if valid is None:
        return {}
    if lengths is None:
        position = valid.cumsum(-1).sub(1).clamp_min(0)[:, -new:]
    else:
        position = lengths[:, None] + torch.arange(new, device=valid.device)
        valid = torch.cat([valid, valid.new_ones(len(valid), new)], dim=1)
    return {"attention_mask": valid.long()} | ({"position_ids": position} if "position_ids" in takes else {})
