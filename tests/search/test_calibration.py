"""The row-batched search gives what one steered forward per head and sample gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attnsteer import ACT, PAG, HeadSet, Where, ZeroTuning
from attnsteer.errors import NeverFired, SelectionError, SerializationError, UnsupportedHost
from attnsteer.search import Choice, calibrate_act, calibrate_heads, calibration
from attnsteer.testing import tiny_transformers
from attnsteer.testing.fingerprint import fingerprint
from tests.search.common import random_choices, slow_search

PAIRS = [(layer, head) for layer in range(3) for head in range(4)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_transformers("llama")


def expected(model: Any, method: Any, samples: Any, pairs: Any) -> dict[str, dict[tuple[int, int], float]]:
    """Gains in both metrics, from the slow search and the definition of each metric."""
    found, plain = slow_search(model, method, samples, pairs)

    def mean(rows: list[list[float]]) -> tuple[float, float]:
        right = [r[s.answer] for r, s in zip(rows, samples, strict=True)]
        best = [max(range(len(r)), key=r.__getitem__) == s.answer for r, s in zip(rows, samples, strict=True)]
        return sum(best) / len(samples), sum(right) / len(samples)

    base = mean(plain)
    gains = {p: mean(found[p]) for p in pairs}
    return {
        "accuracy": {p: g[0] - base[0] for p, g in gains.items()},
        "log_likelihood": {p: g[1] - base[1] for p, g in gains.items()},
    }


METHODS = {
    "act": ACT(beta=0.2, threshold=0.08),
    "act-late-sinks": ACT(beta=0.0, threshold=0.12, min_rows=3),
    "act-prefill": ACT(beta=0.2, threshold=0.08, decode="prefill_only"),
    "act-running": ACT(beta=0.2, alpha=1.0, decode="running"),
    "act-some": ACT(heads=HeadSet({1: [0, 3], 2: [2]}), beta=0.2, threshold=0.08),
    "zerotuning": ZeroTuning(gamma=1.7, where=Where(layers=[0, 2])),
    "decode-only": ZeroTuning(gamma=2.5, where=Where(phases="decode")),
}


@pytest.mark.parametrize("longest", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_equal_to_one_forward_per_head_and_sample(model: Any, name: str, longest: int) -> None:
    method, samples = METHODS[name], random_choices(7, longest=longest)
    pairs = [(1, 0), (1, 3), (2, 2)] if name == "act-some" else [p for p in PAIRS if name != "zerotuning" or p[0] != 1]
    if name == "decode-only" and longest == 1:
        with pytest.raises(NeverFired):
            calibrate_heads(model, method, samples, progress=False)
        return
    want = expected(model, method, samples, pairs)
    assert any(abs(g) > 1e-4 for g in want["log_likelihood"].values())
    for metric in ("accuracy", "log_likelihood"):
        found = calibrate_heads(model, method, samples, metric=metric, keep="all", batch=5, progress=False)
        assert list(found) == pairs and found.shape == (3, 4)
        for pair in pairs:
            assert found.scores[pair] == pytest.approx(want[metric][pair], abs=2e-6)


# Windows, soft caps, learned sinks, absolute positions, a vision-language model; eager maps.
FAMILIES = ["mistral", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "llava"]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str) -> None:
    model, method = tiny_transformers(family), ACT(beta=0.2, threshold=0.08)
    samples = random_choices(3, longest=2)
    pairs = [(0, 1), (2, 3)]
    want = expected(model, method, samples, pairs)
    found = calibrate_act(model, samples, method, keep="all", metric="log_likelihood", progress=False)
    assert any(abs(g) > 1e-4 for g in want["log_likelihood"].values())
    for pair in pairs:
        assert found.scores[pair] == pytest.approx(want["log_likelihood"][pair], abs=1e-5)


def test_eager_and_half_precision(model: Any) -> None:
    method, samples = ACT(beta=0.2, threshold=0.08), random_choices(4)
    want = expected(model, method, samples, PAIRS)["log_likelihood"]
    eager = tiny_transformers("llama", attn_implementation="eager")
    found = calibrate_act(eager, samples, method, keep="all", metric="log_likelihood", progress=False)
    assert found.scores == pytest.approx(want, abs=1e-5)
    half = calibrate_act(
        tiny_transformers("llama").bfloat16(), samples, method, keep="all", metric="log_likelihood", progress=False
    )
    # bfloat16 has three digits: log-likelihoods near -5 are good to a few hundredths.
    assert half.scores == pytest.approx(want, abs=0.05)


def test_each_part_is_computed_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token rows that pass through each block: one plain pass, and per moved head the blocks from its own on."""
    method = ACT(heads=HeadSet({0: [0], 2: [2]}), beta=0.2, threshold=0.08)
    samples, rows = random_choices(4, lengths=(12,)), [0, 0, 0]
    monkeypatch.setattr("attnsteer.search.calibration._Search._check", lambda *_: None)
    hooks = [
        block.mlp.register_forward_pre_hook(
            lambda _, args, i=i: rows.__setitem__(i, rows[i] + args[0].shape[:2].numel())
        )
        for i, block in enumerate(model.model.layers)
    ]
    try:
        calibrate_act(model, samples, method, keep="all", metric="log_likelihood", progress=False)
    finally:
        for hook in hooks:
            hook.remove()
    plain = 4 * 12
    assert plain < rows[0] <= plain + 4 * 12 and plain < rows[1] <= plain + 4 * 12
    # Of the last block, only the row that predicts: at most one per sample and head.
    assert plain < rows[2] <= plain + 2 * 4


def test_only_heads_that_improve_with_all_the_facts(model: Any) -> None:
    method, samples = ACT(beta=0.2, threshold=0.08), random_choices(9)
    want = expected(model, method, samples, PAIRS)
    found = calibrate_act(model, samples, method, metric="log_likelihood", progress=False)
    better = [p for p in PAIRS if want["log_likelihood"][p] > 0]
    assert list(found) == better and 0 < len(better) < len(PAIRS)
    facts = found.provenance
    assert facts["samples"] == 9 and facts["metric"] == "log_likelihood" and facts["search"] == "calibrate_heads"
    assert facts["method"] == {"name": "ACT", "parameters": method.to_dict()}
    for metric in ("accuracy", "log_likelihood"):
        for layer, head in PAIRS:
            assert facts["gains"][metric][layer][head] == pytest.approx(want[metric][layer, head], abs=2e-6)
    # Order, prompts, candidates and answers are all in the hash; nothing else is.
    again = calibrate_act(model, [vars(s) for s in samples], method, metric="log_likelihood", progress=False)
    assert again == found and again.provenance["split"] == facts["split"]
    other = calibrate_act(model, samples[::-1], method, metric="log_likelihood", progress=False)
    assert list(other) == list(found) and other.provenance["split"] != facts["split"]


def test_a_broken_search_goes_on_where_it_was(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, samples, state = ACT(beta=0.2, threshold=0.08), random_choices(12, (8, 10, 12)), tmp_path / "s.safetensors"
    options = {"metric": "log_likelihood", "keep": "all", "batch": 2, "progress": False}
    want = calibrate_act(model, samples, method, **options)
    scored: list[int] = []
    original = calibration._Search._score

    def score(self: Any, run: Any, indices: list[int]) -> None:
        if len(scored) >= 5:
            raise KeyboardInterrupt
        original(self, run, indices)
        scored.extend(indices)

    with monkeypatch.context() as broken:
        broken.setattr(calibration._Search, "_score", score)
        with pytest.raises(KeyboardInterrupt):
            calibrate_act(model, samples, method, state=state, **options)
    first, scored[:] = list(scored), []
    with monkeypatch.context() as counted:
        counted.setattr(calibration._Search, "_score", lambda s, r, i: (scored.extend(i), original(s, r, i))[1])
        found = calibrate_act(model, samples, method, state=state, **options)
        assert found == want and found.provenance == want.provenance
        assert first and sorted(first + scored) == list(range(12))
        scored.clear()
        # All is known: another metric needs no model.
        calibrate_act(model, samples, method, state=state, **(options | {"metric": "accuracy"}))
        assert not scored
    with pytest.raises(SerializationError, match=r"other settings \(split: .* there, .* here"):
        calibrate_act(model, samples[:-1], method, state=state, **options)
    with pytest.raises(SerializationError, match=r"other settings .*model"):
        calibrate_act(tiny_transformers("llama", seed=1), samples, method, state=state, **options)


class TestBadInput:
    def test_a_test_split_that_overlaps(self, model: Any) -> None:
        samples = random_choices(4)
        twin = Choice(samples[2].prompt, [5, 6, 7], 0)
        with pytest.raises(SelectionError, match="1 samples of the test split are also used to choose heads"):
            calibrate_act(model, samples, test=[twin], progress=False)
        calibrate_act(model, samples, test=random_choices(4, seed=9), keep="all", progress=False)

    def test_samples(self, model: Any) -> None:
        good = {"prompt": [4, 5], "candidates": [6, 7], "answer": 0}
        assert Choice(**good) == Choice(torch.tensor([4, 5]), torch.tensor([6, 7]), 0)
        for change, match in [
            ({"prompt": []}, "give a prompt and at least two candidates"),
            ({"candidates": [6]}, "at least two candidates"),
            ({"candidates": [[6], []]}, "none of them empty"),
            ({"answer": 2}, "there are 2 candidates"),
            ({"answer": "A"}, "index of the right candidate"),
            ({"prompt": "what"}, "tokenise the text first"),
            ({"prompt": [[4, 5]]}, "without a batch axis"),
            ({"candidates": 6}, "give a list of token ids"),
        ]:
            with pytest.raises(SelectionError, match=match):
                Choice(**good | change)
        with pytest.raises(SelectionError, match="there are no samples"):
            calibrate_act(model, [])
        with pytest.raises(SelectionError, match="sample 0 is dict"):
            calibrate_act(model, [{"prompt": [4]}])

    def test_options(self, model: Any) -> None:
        samples = random_choices(2)
        with pytest.raises(SelectionError, match="metric='f1'"):
            calibrate_act(model, samples, metric="f1")
        with pytest.raises(SelectionError, match="give an ACT"):
            calibrate_act(model, samples, ZeroTuning(gamma=2.0))
        with pytest.raises(SelectionError, match="several times"):
            calibrate_heads(model, PAG(), samples)
        with pytest.raises(SelectionError, match="improves accuracy in none of 12 heads"):
            calibrate_act(model, samples, ACT(beta=1.0), progress=False)

    def test_models(self, model: Any) -> None:
        samples = random_choices(2)
        with pytest.raises(UnsupportedHost, match="scored one by one on those only"):
            calibrate_heads(tiny_transformers("bert"), ZeroTuning(gamma=2.0), samples, progress=False)
        with pytest.raises(UnsupportedHost):
            calibrate_act(tiny_transformers("bart"), samples, progress=False)
        broken = tiny_transformers("llama")
        with torch.no_grad():
            broken.lm_head.weight.fill_(float("nan"))
        with pytest.raises(UnsupportedHost, match="the model gives NaN there"):
            calibrate_act(broken, samples, progress=False)

    def test_a_model_whose_blocks_hang_together_otherwise(self) -> None:
        """The last block also reads the embeddings: recomputing from a block on is not the same, and that is noticed."""
        model = tiny_transformers("llama")
        seen: list[Any] = []
        top = model.model.layers[-1]
        model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        plain = top.mlp.forward
        # What a replay feeds to the first block is not what it fed in the plain pass: rows from the first moved one on.
        top.mlp.forward = lambda h: plain(h) + seen[-1].mean()
        with pytest.raises(UnsupportedHost, match="the steered model gives"):
            calibrate_act(model, random_choices(4), ACT(beta=0.0, threshold=0.08), keep="all", progress=False)


def test_the_model_is_as_it_was(model: Any) -> None:
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    before, out = fingerprint(model), model(ids).logits
    calibrate_act(model, random_choices(3, longest=2), ACT(threshold=0.08), keep="all", progress=False)
    assert fingerprint(model) == before and torch.equal(model(ids).logits, out)
