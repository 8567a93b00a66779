"""Log-likelihoods of continuations, in batches of contexts of any length; a continuation never moves the statistics."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedHost
from ..search.samples import padded
from .beginnings import Beginnings, arguments, common_prefix, laid_out, positions

__all__ = ["Score", "common_prefix", "score_continuations"]


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
    shared: int | Beginnings | None = None,
) -> list[list[Score]]:
    """Scores of several continuations of each of several contexts, as one at a time would give them.

    The contexts are one batch, padded on the left under a mask; the statistics are frozen; the continuations are scored over
    copies of the cache. `attnsteer.search.candidate_log_likelihoods` is the same for a single context.

    Args:
        model: a causal language model of transformers, steered or not. contexts: token ids, none of them empty.
        continuations: for each context, token ids of its continuations, none of them empty.
        run: the `Steering` of the model. rows: continuations scored at once, as many as contexts unless given.
        dtype: of the log-softmax.
        shared: what contexts begin with and is read once: `Beginnings`, or how many tokens all of them begin with
            (`common_prefix`). The methods of `run` are then those that say `prefix_local`.

    Raises:
        UnsupportedHost: the model hands out no cache that continuations can be scored over, or none that a shared beginning can
            stand in.
        SelectionError: the contexts do not begin with so many tokens alike, and go on behind them; or a method of `run` may act on
            a beginning by what follows it.
    """
    takes = arguments(model)
    if isinstance(shared, int):
        shared = Beginnings.text(contexts, shared) if shared else None
    laid = laid_out(model, contexts, shared, run)
    device = laid.ids.device
    # Nothing is said of masks and positions where the model finds the same by itself.
    plain = laid.ahead is None and bool(laid.valid.all())
    longer = [_Row(b, i, c) for b, own in enumerate(continuations) for i, c in enumerate(own) if len(c) > 1]
    options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    if shared is not None:
        options["past_key_values"] = laid.cache
    with contextlib.nullcontext() if run is None or shared is None else run.chunked_prefill(laid.ids.shape[1]):
        places = {} if plain else _places(takes, laid.valid, laid.ahead, laid.ids.shape[1] - laid.cached)
        output = model(input_ids=laid.ids[:, laid.cached :], use_cache=bool(longer or shared), **options, **places)
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
        # Padding behind a shorter one is seen by itself alone.
        seen = torch.nn.functional.pad(laid.valid[which], (0, fed.shape[1]), value=True)
        ahead = None if laid.ahead is None else laid.ahead[which]
        places = {} if plain else _places(takes, seen, ahead, fed.shape[1])
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


def _places(takes: set[str], valid: Tensor, ahead: Tensor | None, new: int) -> dict[str, Tensor]:
    """Mask and positions of a call.

    Args:
        valid: bool [B, T] of all tokens so far, of which the last `new` are read now. ahead: see `Laid`.
    """
    found = {"attention_mask": valid.long()}
    if "position_ids" in takes:
        place = positions(valid)[:, -new:]
        # Text has the same position on each of several axes.
        found["position_ids"] = place if ahead is None else (place + ahead)[None].expand(3, -1, -1)
    return found
