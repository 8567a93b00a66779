"""Multiple choice by likelihood: log p(choice | prompt) of every choice, in nats.

Where every choice of a batch is one token, the batch is one padded forward that computes the last row's logits alone. Else
the prompts are prefilled, the statistics of methods are frozen, and the choices are scored over the cache, so that no choice
can move them; prompts with images one by one. What prompts of a batch begin with is read once where the recipe says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...errors import RunError
from ..loaded import Loaded
from . import Request, sample_fields
from .prompts import beginnings, continuations, encode, positions

RECORD_KEYS = ("scores",)
SAMPLE_KEYS = ("choices", "answer", "level", "category")
UNIT = "samples"
DECODING: dict[str, Any] = {}
# Where the model gives a choice no probability at all; JSON has no infinity.
LEAST = -1e9


def answer(loaded: Loaded, request: Request) -> tuple[list[dict[str, Any]], list[int]]:
    """Records with `choices`, `scores`, `answer`."""
    import torch

    every = [continuations(loaded.tokenizer, s["prompt"], s["choices"])[1] for s in request.samples]
    with torch.inference_mode():
        scores = _over_beginnings(loaded, request, every) if request.shared_prefix else None
        if scores is None and all(len(c) == 1 for own in every for c in own):
            scores = _at_once(loaded, request, every)
        elif scores is None and loaded.kind == "lm":
            scores = _over_the_cache(loaded, request, every)
        elif scores is None:
            scores = [_one_by_one(loaded, request, i, own) for i, own in enumerate(every)]
    bad = [s["id"] for s, own in zip(request.samples, scores, strict=True) if any(map(math.isnan, own))]
    if bad:
        raise RunError(
            f"the log-likelihoods of {', '.join(bad[:3])} are not finite; use model.dtype float32, or a smaller strength."
        )
    records = [
        {**sample_fields(s, SAMPLE_KEYS), "scores": [max(float(v), LEAST) for v in own]}
        for s, own in zip(request.samples, scores, strict=True)
    ]
    return records, [1] * len(records)


def _at_once(loaded: Loaded, request: Request, every: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
    batch = encode(loaded, request, strip=True)
    if loaded.kind == "lm":
        batch = {**batch, **positions(loaded.target, batch["attention_mask"])}
    logits = loaded.target(**batch, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
    return [logits[i, [c[0] for c in own]].tolist() for i, own in enumerate(every)]


def _over_the_cache(loaded: Loaded, request: Request, every: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
    contexts = [loaded.tokenizer(s["prompt"].rstrip()).input_ids for s in request.samples]
    return _scored(loaded, request, contexts, every)


def _over_beginnings(
    loaded: Loaded, request: Request, every: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]] | None:
    """None where no two prompts begin alike."""
    contexts, shared = beginnings(loaded, request, encode(loaded, request, strip=True))
    return None if shared is None else _scored(loaded, request, contexts, every, shared)


def _scored(
    loaded: Loaded,
    request: Request,
    contexts: Sequence[Sequence[int]],
    every: Sequence[Sequence[Sequence[int]]],
    shared: Any = None,
) -> list[list[float]]:
    from ...evals.continuations import score_continuations

    found = score_continuations(loaded.target, contexts, every, request.run, shared=shared)
    return [[score.log_likelihood for score in own] for own in found]


def _one_by_one(loaded: Loaded, request: Request, index: int, own: Sequence[Sequence[int]]) -> list[float]:
    from dataclasses import replace

    from ...search.samples import Choice, candidate_log_likelihoods

    inputs = dict(encode(loaded, replace(request, samples=[request.samples[index]]), strip=True))
    prompt = tuple(inputs.pop("input_ids")[0].tolist())
    inputs.pop("attention_mask", None)
    return candidate_log_likelihoods(loaded.target, Choice(prompt, tuple(own), 0), request.run, inputs)
