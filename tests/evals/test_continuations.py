"""Continuations in batches are scored as one at a time, and move no statistics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnsteer import ACT, HeadGate, Where, ZeroTuning, steer
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.evals.continuations import common_prefix, score_continuations
from attnsteer.search import Choice, candidate_log_likelihoods
from attnsteer.testing import tiny_transformers

ACTING = ACT(beta=0.0, threshold=0.06)


def questions(seed: int = 0, vocab: int = 99) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Contexts of 3 to 17 tokens, with two or three continuations of 1 to 5."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(4, vocab, (n,), generator=g).tolist()  # noqa: E731
    contexts = [draw(n) for n in (9, 17, 3, 12, 17)]
    return contexts, [[draw(1 + (2 * b + c) % 5) for c in range(2 + b % 2)] for b in range(len(contexts))]


def one_by_one(model: Any, method: Any, contexts: Any, continuations: Any) -> list[list[float]]:
    if method is None:
        return [candidate_log_likelihoods(model, Choice(c, o, 0)) for c, o in zip(contexts, continuations, strict=True)]
    with steer(model, method) as run:
        return [
            candidate_log_likelihoods(model, Choice(c, o, 0), run) for c, o in zip(contexts, continuations, strict=True)
        ]


def batched(model: Any, method: Any, contexts: Any, continuations: Any, **options: Any) -> list[list[float]]:
    if method is None:
        found = score_continuations(model, contexts, continuations, **options)
    else:
        with steer(model, method) as run:
            found = score_continuations(model, contexts, continuations, run, **options)
    return [[s.log_likelihood for s in own] for own in found]


def flat(rows: list[list[float]]) -> list[float]:
    return [v for row in rows for v in row]


# Rotary and absolute positions, windows, soft caps, learned sinks, modules that call SDPA by themselves.
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "gpt_oss", "falcon"])
@pytest.mark.parametrize("method", [None, ACTING, ACT(beta=0.0, threshold=0.06, decode="running")])
def test_a_batch_equals_one_at_a_time(family: str, method: Any) -> None:
    model, asked = tiny_transformers(family), questions()
    want = one_by_one(model, method, *asked)
    for rows in (None, 2):
        assert flat(batched(model, method, *asked, rows=rows)) == pytest.approx(flat(want), abs=2e-5)
    if method is not None:
        plain = one_by_one(model, None, *asked)
        assert max(abs(a - b) for a, b in zip(flat(plain), flat(want), strict=True)) > 1e-3


def test_a_longer_continuation_changes_no_other_score() -> None:
    model = tiny_transformers("llama")
    contexts, continuations = questions()
    for method in (None, ACTING, ZeroTuning(gamma=2.0)):
        before = batched(model, method, contexts, continuations)
        longer = [[*own, [7] * 30] for own in continuations]
        after = [own[:-1] for own in batched(model, method, contexts, longer)]
        assert flat(after) == pytest.approx(flat(before), abs=1e-5)


def test_the_sum_over_tokens_and_what_is_greedy() -> None:
    """Against teacher forcing without a cache, for a method whose statistics are of the context alone."""
    model = tiny_transformers("llama")
    context, continuation = questions()[0][0], [5, 6, 7]
    with torch.no_grad():
        p = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    want = sum(float(p[len(context) - 1 + i, t]) for i, t in enumerate(continuation))
    ids = torch.tensor([context])
    best = model.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))[
        0, len(context) :
    ]
    best = best.tolist()
    [[given, greedy, almost]] = score_continuations(model, [context], [[continuation, best, [*best[:2], best[2] + 1]]])
    assert given.log_likelihood == pytest.approx(want, abs=1e-5) and not given.greedy
    assert greedy.greedy and not almost.greedy and greedy.log_likelihood > almost.log_likelihood


def test_a_model_without_a_cache_is_refused() -> None:
    class Cacheless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.arange(9.0))

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=self.bias.expand(*input_ids.shape, -1), past_key_values=None)

    [[score]] = score_continuations(Cacheless(), [[5, 6]], [[[8]]])
    assert score.greedy and score.log_likelihood == pytest.approx(float(torch.arange(9.0).log_softmax(-1)[8]))
    with pytest.raises(UnsupportedHost, match="Cacheless gives NoneType for a cache"):
        score_continuations(Cacheless(), [[5, 6]], [[[7, 8]]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize(
    "method",
    [None, ZeroTuning(gamma=4.0), HeadGate({(0, 1): 0.0, (1, 0): 3.0}), ZeroTuning(gamma=4.0, where=Where(layers=1))],
    ids=["plain", "first token", "gate", "one layer"],
)
def test_a_shared_beginning_is_read_once_and_changes_nothing(family: str, method: Any) -> None:
    model, (contexts, continuations) = tiny_transformers(family), questions()
    contexts = [[11, 12, 13, 14, 15, 16, *c] for c in contexts]
    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    try:
        found = batched(model, method, contexts, continuations, shared=6)
    finally:
        hook.remove()
    assert seen[:2] == [(1, 6), (5, 17)]
    assert flat(found) == pytest.approx(flat(one_by_one(model, method, contexts, continuations)), abs=2e-5)
    equal = [c[:9] for c in contexts]
    want = one_by_one(model, method, equal, continuations)
    assert flat(batched(model, method, equal, continuations, shared=4)) == pytest.approx(flat(want), abs=2e-5)


def test_what_is_shared() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 1
    assert common_prefix([[1, 2, 3], [1, 2, 3, 4]]) == 2
    assert common_prefix([[1, 2, 3]]) == common_prefix([[1], [1]]) == common_prefix([[2, 1], [1, 1]]) == 0
    model = tiny_transformers("llama")
    for shared in (3, -1):
        with pytest.raises(SelectionError, match="begin with 2 tokens alike"):
            score_continuations(model, [[5, 6, 7], [5, 6, 8]], [[[9]], [[9]]], shared=shared)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_windows_would_count_the_padding_between_a_beginning_and_the_rest(family: str) -> None:
    with pytest.raises(UnsupportedHost, match="Read every prompt whole"):
        score_continuations(tiny_transformers(family), [[5, 6, 7, 8], [5, 6, 8]], [[[9]], [[9]]], shared=2)
