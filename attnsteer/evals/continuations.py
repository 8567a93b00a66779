"""Log-likelihoods of continuations, in batches of contexts of any length; a continuation never moves the statistics."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedHost
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
) -> list[list[Score]]:
    """Scores of several continuations of each of several contexts, as one at a time would give them.

    The contexts are one batch, padded on the left under a mask; the statistics are frozen; the continuations are scored over
    copies of the cache. `attnsteer.search.candidate_log_likelihoods` is the same for a single context.

    Args:
        model: a causal language model of transformers, steered or not. contexts: token ids, none of them empty.
        continuations: for each context, token ids of its continuations, none of them empty.
        run: the `Steering` of the model. rows: continuations scored at once, as many as contexts unless given.
        dtype: of the log-softmax.

    Raises:
        UnsupportedHost: the model hands out no cache that continuations can be scored over.
    """
    device, takes = next(model.parameters()).device, _takes(model)
    width = max(len(c) for c in contexts)
    lengths = torch.tensor([len(c) for c in contexts], device=device)
    ids = torch.tensor([[c[0]] * (width - len(c)) + list(c) for c in contexts], device=device)
    valid = (torch.arange(width, device=device) >= width - lengths[:, None]) if bool((lengths < width).any()) else None
    longer = [_Row(b, i, c) for b, own in enumerate(continuations) for i, c in enumerate(own) if len(c) > 1]
    options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    output = model(input_ids=ids, use_cache=bool(longer), **options, **_places(takes, valid, None, 0))
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


def _takes(model: Any) -> set[str]:
    """Names of the arguments of the model's forward; those of the model inside where it is wrapped (peft)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(type(inner).forward).parameters)


def _places(takes: set[str], valid: Tensor | None, lengths: Tensor | None, new: int) -> dict[str, Tensor]:
    """Mask and positions of a call over padded contexts; nothing where none is padded.

    Args:
        valid: bool [B, n] of the contexts. lengths: of the contexts [B], where they are cached and `new` tokens follow.
    """
    if valid is None:
        return {}
    if lengths is None:
        position = valid.cumsum(-1).sub(1).clamp_min(0)
    else:
        position = lengths[:, None] + torch.arange(new, device=valid.device)
        valid = torch.cat([valid, valid.new_ones(len(valid), new)], dim=1)
    return {"attention_mask": valid.long()} | ({"position_ids": position} if "position_ids" in takes else {})
