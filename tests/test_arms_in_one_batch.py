"""Baseline, zero strength, method and two controls with other heads, as five rows of one batch: each as in a run of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import ACT, PASTA, HeadSet, Intervention, SpotLight, Where, ZeroTuning, steer
from attnsteer.testing import tiny_transformers

CHOSEN, FIRST, SECOND = HeadSet({0: [1], 1: [0, 2]}), HeadSet({0: [0], 1: [1, 3]}), HeadSet({0: [3], 2: [0, 1]})
# None: no edit at all.
HEADS = [CHOSEN, CHOSEN, CHOSEN, FIRST, SECOND]
SPAN = [(2, 5)]


def arms(name: str) -> tuple[Intervention, list[Intervention | None]]:
    """(the five arms in one method, each by itself)."""
    build, neutral, strength = {
        "ZeroTuning": (lambda heads, s, n: ZeroTuning(heads, s), 1.0, 4.0),
        "ACT": (lambda heads, s, n: ACT(heads, s, threshold=0.05), 1.0, 0.3),
        "PASTA": (lambda heads, s, n: PASTA([SPAN] * n, heads, s), 1.0, 0.05),
        "SpotLight": (lambda heads, s, n: SpotLight([SPAN] * n, s, where=Where(heads=heads)), 0.0, 0.6),
    }[name]
    strengths = [None, neutral, strength, strength, strength]
    together = build(CHOSEN if name == "SpotLight" else HEADS, strengths, 5)
    heads = [CHOSEN] * 5 if name == "SpotLight" else HEADS
    apart = [None if s is None else build(h, s, 1) for h, s in zip(heads, strengths, strict=True)]
    return together, apart


def logits(model: Any, ids: Tensor, method: Intervention | None) -> list[Tensor]:
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    call = lambda: model.generate(  # noqa: E731
        input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options
    )
    if method is None:
        return call().logits
    with steer(model, method, control=True):
        return call().logits


@torch.no_grad()
@pytest.mark.parametrize("name", ["ZeroTuning", "ACT", "PASTA", "SpotLight"])
def test_five_arms(name: str) -> None:
    model = tiny_transformers("llama")
    ids = torch.randint(4, 90, (1, 11), generator=torch.Generator().manual_seed(7))
    together, apart = arms(name)
    batch = logits(model, ids.expand(5, -1), together)
    moved = set()
    for row, method in enumerate(apart):
        for step, alone in enumerate(logits(model, ids, method)):
            torch.testing.assert_close(batch[step][row : row + 1], alone, rtol=0, atol=1e-5)
        if (batch[0][row] - batch[0][0]).abs().max() > 1e-3:
            moved.add(row)
    # A test of arms that all do nothing would say nothing.
    assert moved == {2, 3, 4}
