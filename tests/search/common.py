"""A small Llama, random choice samples, and the slow search: one steered forward per head and sample."""

from __future__ import annotations

from typing import Any

import torch

from attnsteer import Intervention, steer
from attnsteer.search import Choice, candidate_log_likelihoods
from attnsteer.search.alone import only


def random_choices(
    count: int, lengths: tuple[int, ...] = (10, 14), longest: int = 1, vocab: int = 99, seed: int = 0
) -> list[Choice]:
    """Samples whose candidates have 1 to `longest` tokens; prompt lengths are taken in turn."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(4, vocab, (n,), generator=g).tolist()  # noqa: E731
    found = []
    for i in range(count):
        sizes = [1 + (i + c) % longest for c in range(2 + i % 2)]
        found.append(Choice(draw(lengths[i % len(lengths)]), [draw(n) for n in sizes], i % 2))
    return found


def slow_search(
    model: Any, method: Intervention, samples: list[Choice], pairs: list[tuple[int, int]]
) -> tuple[dict[tuple[int, int], list[list[float]]], list[list[float]]]:
    """Log-likelihoods of all candidates of all samples, for each head alone, and unedited."""
    plain = [candidate_log_likelihoods(model, s) for s in samples]
    found = {}
    for layer, head in pairs:
        with steer(model, only(method, layer, head), control=True) as run:
            found[layer, head] = [candidate_log_likelihoods(model, s, run) for s in samples]
    return found, plain
