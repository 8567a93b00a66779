"""Michel's importance is the gradient of the gates in both conventions; its curve removes the least first. Shapley values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnsteer import HeadGate, HeadSet, Where, steer
from attnsteer.errors import SelectionError
from attnsteer.search import michel, pruning_curve, shapley, shapley_intervals
from attnsteer.search.screen import measured
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.search.common import random_choices


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_transformers("llama").double()


def test_the_gradient_of_the_gates_is_that_of_finite_differences(model: Any) -> None:
    samples = random_choices(3, lengths=(9, 12))
    found = michel(model, samples, normalise=False)
    for head in ((0, 1), (1, 2), (2, 0)):
        up, down = (measured(model, HeadGate({head: 1 + e}), samples, "log_likelihood") for e in (1e-3, -1e-3))
        want = (up - down).abs() / 2e-3
        # The log-likelihoods are in float32.
        assert torch.allclose(found.samples[:, found.columns.index(head)], want, rtol=1e-2, atol=2e-3)
        assert found.scores[head] == pytest.approx(float(want.mean()), rel=2e-2, abs=1e-3)


def test_both_conventions_as_the_official_arithmetic_has_them(model: Any) -> None:
    """dot = einsum("bhli,bhli->bhl", grad, context); dot.abs().sum(-1).sum(0), over the tokens; layers over their norm.

    `calculate_head_importance` in examples/classifier_eval.py of pmichel31415/pytorch-pretrained-BERT, branch paul at 18a86a7.
    """
    inputs = tiny_transformers_inputs("llama", model, batch=2, length=8)
    kept = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: (args[0].retain_grad(), kept.append(args[0]))[1]
        )
        for layer in model.model.layers
    ]
    p = model(input_ids=inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    p.gather(2, inputs["input_ids"][:, 1:, None])[..., 0].mean(dim=1).sum().backward()
    model.zero_grad()
    token, example = torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for layer, context in enumerate(kept):
        a, g = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in (context.detach(), context.grad))
        dot = torch.einsum("bhli,bhli->bhl", g, a)
        # The last row predicts nothing, but its outputs have no gradient: it is not counted among the tokens.
        token[layer] = dot.abs().sum(-1).sum(0) / (2 * 7)
        example[layer] = dot.sum(-1).abs().mean(0)
    for convention, want in (("token", token), ("example", example)):
        found = michel(model, [{"input_ids": inputs["input_ids"]}], abs_over=convention, normalise=False)
        assert torch.allclose(torch.tensor([found.scores[x] for x in found]).double(), want.flatten(), rtol=1e-6)
        normed = michel(model, [{"input_ids": inputs["input_ids"]}], abs_over=convention)
        want = want / (want.pow(2).sum(-1).pow(0.5).unsqueeze(-1) + 1e-20)
        assert torch.allclose(torch.tensor([normed.scores[x] for x in normed]).double(), want.flatten(), rtol=1e-6)


def test_padding_does_not_count() -> None:
    model = tiny_transformers("llama").double()
    inputs = tiny_transformers_inputs("llama", model, batch=2, padding="right")
    padded = michel(model, [inputs], abs_over="token", normalise=False, where=Where(layers=[1]))
    alone = [
        {"input_ids": ids[mask.bool()][None]}
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    assert torch.allclose(padded.samples, michel(model, alone, abs_over="token", where=Where(layers=[1])).samples)


def test_the_curve_removes_the_least_important_first(model: Any) -> None:
    samples = random_choices(4, lengths=(10,))
    found = michel(model, samples)
    curve = pruning_curve(model, found, samples, fractions=(0, 0.25, 0.5), random_draws=2, keep_per_layer=1)
    assert curve[0].removed == () and curve[0].change.value == 0
    least = sorted(found, key=lambda p: found.scores[p])
    spared = {max(((layer, h) for h in range(4)), key=lambda p: found.scores[p]) for layer in range(3)}
    assert list(curve[1].removed) == [p for p in least if p not in spared][:3] and len(curve[2].random) == 2
    with torch.no_grad(), steer(model, HeadGate(dict.fromkeys(curve[2].removed, 0.0))):
        assert curve[2].value == pytest.approx(float(measured_here(model, samples)), abs=1e-6)
    with pytest.raises(SelectionError, match="without a score"):
        pruning_curve(model, HeadSet({0: [1]}), samples)


def measured_here(model: Any, samples: Any) -> Any:
    p = model(input_ids=torch.tensor([s.prompt for s in samples])).logits[:, -1].log_softmax(-1)
    return torch.stack(
        [p[i, [c[0] for c in s.candidates]].log_softmax(-1)[s.answer] for i, s in enumerate(samples)]
    ).mean()


def test_shapley_of_a_planted_game() -> None:
    """Additive values and one pair that helps together: the pair's bonus is shared, and the sum is that of all."""
    heads = HeadSet({0: [0, 1, 2], 1: [0, 1]})
    own = {(0, 0): 1.0, (0, 1): -0.5, (0, 2): 0.0, (1, 0): 0.25, (1, 1): 2.0}

    def value(kept: frozenset[tuple[int, int]]) -> float:
        return sum(own[p] for p in kept) + (0.8 if {(0, 0), (1, 0)} <= kept else 0.0)

    found = shapley(None, value=value, heads=heads, permutations=300, seed=1)
    want = own | {(0, 0): 1.4, (1, 0): 0.65}
    bounds = shapley_intervals(found)
    for pair, right in want.items():
        assert bounds[pair].low - 1e-9 <= right <= bounds[pair].high + 1e-9
    assert found.scores[0, 0] == pytest.approx(1.4, abs=0.1)
    assert torch.allclose(found.samples.sum(dim=1), torch.full((len(found.samples),), 3.55).double())
    cut = shapley(None, value=value, heads=heads, permutations=50, floor=3.0)
    assert cut.provenance["truncated"] > 0.2


def test_shapley_of_a_model_is_efficient(model: Any) -> None:
    samples = random_choices(2, lengths=(8,))
    heads = HeadSet({1: [0, 3], 2: [1]})
    found = shapley(model, samples, heads=heads, permutations=4)
    gone = float(measured(model, HeadGate(dict.fromkeys(heads, 0.0)), samples, "choice").mean())
    every = float(measured(model, None, samples, "choice").mean())
    assert sum(found.scores.values()) == pytest.approx(every - gone, abs=1e-6) and found.shape == (3, 4)
    with pytest.raises(SelectionError, match="give samples"):
        shapley(model)
