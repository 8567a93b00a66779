"""Prefill, chunks of it, decoding over the cache, and scoring a continuation, with given tokens."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...steering import Steering

STEPS = 2


def other_tokens(ids: Tensor, start: int) -> Tensor:
    """Other ordinary tokens from `start` on; ids below 8 may be special in the tiny models."""
    other = ids.clone()
    other[:, start:] = (other[:, start:] - 8 + 5) % 24 + 8
    return other


def with_continuation(inputs: dict[str, Any], steps: int) -> dict[str, Any]:
    """The prompt and `steps` further tokens as one prompt."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    extra = other_tokens(ids, 0)[:, ids.shape[1] - steps :]
    longer = {**inputs, "input_ids": torch.cat([ids, extra], dim=1)}
    if mask is not None:
        longer["attention_mask"] = torch.cat([mask, torch.ones_like(extra)], dim=1)
        longer["position_ids"] = (longer["attention_mask"].cumsum(dim=-1) - 1).clamp_min(0)
    return longer


def decode(
    target: nn.Module,
    inputs: dict[str, Any],
    chunks: Sequence[int] = (),
    steps: int = STEPS,
    run: Steering | None = None,
) -> Tensor:
    """All logits [B, T + steps, V] of a prefill (`chunks`: sizes of its later calls) and of `steps` decoded tokens."""
    n = inputs["input_ids"].shape[1]
    longer = with_continuation(inputs, steps)
    ids, mask, position = (longer.get(k) for k in ("input_ids", "attention_mask", "position_ids"))
    edges = [0, *_chunk_edges(n, chunks), *range(n + 1, n + steps + 1)]
    cache, logits = None, []
    for at, stop in itertools.pairwise(edges):
        more = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs and at == 0 else {}
        if mask is not None:
            more |= {"attention_mask": mask[:, :stop], "position_ids": position[:, at:stop]}
        with run.chunked_prefill(tokens=n) if run is not None and stop <= n else contextlib.nullcontext():
            out = target(input_ids=ids[:, at:stop], past_key_values=cache, use_cache=True, **more)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def _chunk_edges(n: int, chunks: Sequence[int]) -> list[int]:
    """Ends of the prefill calls: the first takes what the later chunks (given from the end) leave."""
    ends = [n]
    for size in reversed(chunks):
        ends.append(ends[-1] - size)
    return [e for e in reversed(ends) if e > 0]


def score(target: nn.Module, run: Steering | None, inputs: dict[str, Any], extra: Tensor) -> Tensor:
    """Prefill the prompt, freeze, score the continuation over a copy of the cache; all logits."""
    out = target(**inputs, use_cache=True)
    more = {}
    if "attention_mask" in inputs:
        more["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(extra)], dim=1)
    with contextlib.nullcontext() if run is None else run.freeze():
        scored = target(input_ids=extra, past_key_values=copy.deepcopy(out.past_key_values), **more)
    return torch.cat([out.logits, scored.logits], dim=1)


def for_generate(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that `generate` takes: it counts positions itself."""
    return {k: v for k, v in inputs.items() if k != "position_ids"}
