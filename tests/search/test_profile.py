"""PASTA's profiling: the best heads of each task, and those that the tasks share, by hand and by one steered run each."""

from __future__ import annotations

import pytest
import torch

from attnsteer import PASTA, HeadSet, Where, steer
from attnsteer.errors import SelectionError
from attnsteer.search import Choice, calibrate_heads, profile_heads, shared_heads
from attnsteer.testing import tiny_transformers


def scored(values: list[float]) -> HeadSet:
    scores = {(i // 2, i % 2): v for i, v in enumerate(values)}
    return HeadSet(list(scores), scores=scores, shape=(3, 2))


def test_heads_that_all_tasks_share() -> None:
    tasks = {"a": scored([5, 4, 3, 2, 1, 0]), "b": scored([0, 5, 4, 1, 3, 2])}
    found = shared_heads(tasks, 3)
    assert list(found) == [(0, 1), (1, 0)] and found.scores == {(0, 1): 4.5, (1, 0): 3.5} and found.shape == (3, 2)
    assert found.provenance["tasks"]["b"]["best"] == [[0, 1], [1, 0], [2, 0]] and found.provenance["k"] == 3
    assert list(shared_heads({"a": tasks["a"]}, 2)) == [(0, 0), (0, 1)]
    with pytest.raises(SelectionError, match="no head is among the best 1 of all 2 tasks"):
        shared_heads(tasks, 1)
    for k in (0, 7, 1.5):
        with pytest.raises(SelectionError, match="give 1 to 6"):
            shared_heads(tasks, k)
    with pytest.raises(SelectionError, match="by task"):
        shared_heads({}, 1)


def test_the_union_of_the_official_configs() -> None:
    """QingruZhang/PASTA at a6065ac, config/head_config/gptj: task_specific/*/top3_*, and multi_task/union/top3_*."""
    tasks = {
        "json": [(1, 10), (5, 8), (23, 11)],
        "pron": [(3, 15), (8, 4), (13, 10)],
        "cf": [(22, 5), (16, 10), (19, 12)],
        "bio": [(18, 13), (17, 12), (19, 0)],
    }
    union = {5: [8], 22: [5], 8: [4, 9], 16: [10], 18: [13], 13: [10], 19: [0, 12], 1: [10], 3: [15], 17: [12]}
    every = sorted({pair for own in tasks.values() for pair in own})
    profiles = {
        name: HeadSet(every, scores={p: float(p in own) for p in every}, shape=(28, 16)) for name, own in tasks.items()
    }
    found, theirs = shared_heads(profiles, 3, "union"), HeadSet(union)
    # Their list for JSON is of another run than what went into their union.
    assert set(found) - set(theirs) == {(23, 11)} and set(theirs) - set(found) == {(8, 9)}
    with pytest.raises(SelectionError, match="how='all'"):
        shared_heads(profiles, 3, "all")


@torch.no_grad()
def test_each_head_alone_on_each_task() -> None:
    model = tiny_transformers("llama")
    draw = torch.Generator().manual_seed(0)

    def samples(n: int) -> list[Choice]:
        ids = torch.randint(4, 90, (n, 9), generator=draw).tolist()
        return [Choice(row, [[5], [6]], i % 2) for i, row in enumerate(ids)]

    tasks = {"first": samples(3), "second": samples(3)}
    methods = {"first": PASTA([[(1, 3)]], alpha=0.01), "second": PASTA([[(4, 6)]], alpha=0.01)}
    options = {"metric": "log_likelihood", "progress": False, "batch": 1}
    found = profile_heads(model, methods, tasks, 8, **options)
    each = {n: calibrate_heads(model, methods[n], tasks[n], keep="all", **options) for n in tasks}
    assert found == shared_heads(each, 8) and 0 < len(found) < 12

    def gain(pair: tuple[int, int], name: str) -> float:
        method = methods[name].new(where=Where(layers=[pair[0]], heads=[pair[1]]))
        total = 0.0
        for s in tasks[name]:
            ids = torch.tensor([s.prompt])
            plain = model(input_ids=ids).logits[0, -1].log_softmax(-1)
            with steer(model, method):
                edited = model(input_ids=ids).logits[0, -1].log_softmax(-1)
            right = s.candidates[s.answer][0]
            total += float(edited[right] - plain[right])
        return total / len(tasks[name])

    for pair in list(found)[:2]:
        assert found.scores[pair] == pytest.approx((gain(pair, "first") + gain(pair, "second")) / 2, abs=1e-4)
    with pytest.raises(SelectionError, match="no method for tasks"):
        profile_heads(model, {"first": methods["first"]}, tasks, 2, **options)
    with pytest.raises(SelectionError, match="by task"):
        profile_heads(model, methods, {}, 2, **options)
