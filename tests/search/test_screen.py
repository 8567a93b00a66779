"""The first-order screen: gradients by hooks, small edits, several methods at once, and the effects that it stands for."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from attnsteer import ACT, PAG, HeadGate, HeadSet, Where, ZeroTuning, steer
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.search import Choice, ScoredHeads, screen_heads
from attnsteer.search.alone import only
from attnsteer.search.screen import agreement, measured
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.search.common import random_choices

PAIRS = [(layer, head) for layer in range(3) for head in range(4)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_transformers("llama").double()


def head_outputs(model: Any, layer: int, ids: torch.Tensor, *methods: Any) -> torch.Tensor:
    """What enters the output projection of a layer, [B, n, H, d], with its graph."""
    kept = []
    hook = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        if methods:
            with steer(model, *methods, control=True):
                model(input_ids=ids)
        else:
            model(input_ids=ids)
    finally:
        hook.remove()
    return kept[0].unflatten(-1, (4, 16))


def test_change_times_gradient_as_hooks_have_them(model: Any) -> None:
    samples = random_choices(3, lengths=(12,))
    method = ZeroTuning(gamma=2.5)
    ids = torch.tensor([s.prompt for s in samples])
    kept = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: (args[0].retain_grad(), kept.append(args[0]))[1]
        )
        for layer in model.model.layers
    ]
    p = model(input_ids=ids).logits[:, -1].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    torch.stack([p[i, s.candidates[s.answer][0]] for i, s in enumerate(samples)]).sum().backward()
    model.zero_grad()
    found = screen_heads(model, method, samples, metric="log_likelihood")
    assert isinstance(found, ScoredHeads) and list(found) == PAIRS and found.shape == (3, 4)
    for layer in range(3):
        with torch.no_grad():
            # A head's input does not depend on edits in its own layer.
            edited = head_outputs(model, layer, ids, method.new(where=Where(layers=[layer])))
        change = edited - kept[layer].detach().unflatten(-1, (4, 16))
        want = (change * kept[layer].grad.unflatten(-1, (4, 16))).sum(dim=(1, 3))
        got = found.samples[:, [found.columns.index((layer, h)) for h in range(4)]]
        assert want.abs().max() > 1e-3 and torch.allclose(got, want, atol=1e-9)
    assert found.scores[1, 2] == pytest.approx(float(found.samples[:, found.columns.index((1, 2))].mean()))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("longest", [1, 3])
def test_a_small_edit_has_the_measured_effect(model: Any, longest: int) -> None:
    samples = random_choices(4, lengths=(9, 12), longest=longest)
    for method in (ZeroTuning(gamma=1.002), ACT(beta=0.998, threshold=0.08), HeadGate(dict.fromkeys(PAIRS, 0.999))):
        found = screen_heads(model, method, samples, batch=3)
        plain = measured(model, None, samples, "choice")
        for layer, head in ((0, 1), (2, 3)):
            one = HeadGate({(layer, head): 0.999}) if isinstance(method, HeadGate) else only(method, layer, head)
            effect = measured(model, one, samples, "choice") - plain
            got = found.samples[:, found.columns.index((layer, head))]
            assert torch.allclose(got, effect, rtol=2e-2, atol=2e-6), (type(method).__name__, got, effect)


def test_candidates_of_one_token_behind_longer_ones(model: Any) -> None:
    """What was noted for the longer ones is not taken for the others, of the same shape or of another."""
    long, method = random_choices(1, lengths=(9,), longest=3), ACT(beta=0.4, threshold=0.08)
    for lengths in ((9,), (9, 12)):
        short = random_choices(2, lengths=lengths)
        apart = [screen_heads(model, method, some).samples for some in (long, short)]
        assert torch.allclose(screen_heads(model, method, [*long, *short]).samples, torch.cat(apart), atol=1e-12)


def test_several_methods_and_groups_of_heads_at_once(model: Any) -> None:
    samples = random_choices(4, lengths=(9, 12))
    methods = {
        "zero": ZeroTuning(gamma=3.0),
        "some": ACT(heads=HeadSet({0: [1], 2: [0, 3]}), beta=0.2, threshold=0.08),
        "gate": HeadGate({(0, 1): 0.0, (1, 2): -1.0}),
    }
    together = screen_heads(model, methods, samples)
    assert set(together) == set(methods) and list(together["gate"]) == [(0, 1), (1, 2)]
    for name, method in methods.items():
        alone = screen_heads(model, method, samples, batch=1)
        assert torch.allclose(together[name].samples, alone.samples, atol=1e-9)
        assert (
            together[name].provenance["error"] and together[name].provenance["method"]["name"] == type(method).__name__
        )


def test_model_inputs_with_padding_and_a_function_as_metric() -> None:
    model = tiny_transformers("llama").double()
    inputs = tiny_transformers_inputs("llama", model, batch=3, padding="left")
    method = ZeroTuning(gamma=1.5)
    found = screen_heads(model, method, [inputs], metric="log_likelihood")
    alone = [
        {"input_ids": ids[mask.bool()][None]}
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    one = screen_heads(model, method, alone, metric="log_likelihood")
    assert torch.allclose(found.samples, one.samples, atol=1e-8)
    vit = tiny_transformers("vit").double()
    pixels = {"pixel_values": tiny_transformers_inputs("vit", vit)["pixel_values"].double()}
    gates = HeadGate({(1, 2): 0.999})
    norm = lambda outputs, _: outputs.last_hidden_state[:, 0].pow(2).sum(dim=-1)  # noqa: E731
    got = screen_heads(vit, gates, [pixels], metric=norm)
    effect = measured(vit, gates, [pixels], norm) - measured(vit, None, [pixels], norm)
    # A metric is taken in float32.
    assert torch.allclose(got.samples[:, 0], effect, rtol=5e-2, atol=2e-5)


def test_statistics_of_samples() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(200, 3, generator=g, dtype=torch.float64) + torch.tensor([1.0, 0.0, -0.5])
    found = ScoredHeads([(0, 0), (0, 1), (1, 0)], values, shape=(2, 2))
    assert set(found.significant()) == {(0, 0), (1, 0)}
    assert found.errors()[0, 1] == pytest.approx(float(values[:, 1].std() / 200**0.5))
    low, high = found.intervals()[0, 1][1:]
    assert low < 0 < high and found.t()[0, 0] > 10
    assert list(found.top(1)) == [(0, 0)]
    assert agreement(found, {(0, 0): 3.0, (0, 1): 2.0, (1, 0): -9.0}) == pytest.approx(1.0)


def test_confirmed_on_other_prompts(model: Any) -> None:
    samples = random_choices(10)
    found = screen_heads(model, ZeroTuning(gamma=3.0), samples[:6], confirm=2, confirm_on=samples[6:])
    rows = found.provenance["confirmed"]
    assert [r["kind"] for r in rows] == ["best", "best", "random", "random"]
    assert rows[0]["screened"] == max(found.scores.values())
    assert all(r["low"] <= r["measured"] <= r["high"] for r in rows)
    with pytest.raises(SelectionError, match="also used to choose"):
        screen_heads(model, ZeroTuning(gamma=3.0), samples, confirm=2, confirm_on=samples[6:])


def test_refused(model: Any) -> None:
    samples = random_choices(2)
    with pytest.raises(SelectionError, match="calls the model several times"):
        screen_heads(model, PAG(), samples)
    with pytest.raises(SelectionError, match="confirm_on"):
        screen_heads(model, ACT(), samples, confirm=3)
    with pytest.raises(SelectionError, match="metric='accuracy'"):
        screen_heads(model, ACT(), samples, metric="accuracy")
    with pytest.raises(SelectionError, match="not both"):
        screen_heads(model, ACT(), [*samples, {"input_ids": torch.ones(1, 4).long()}], metric="log_likelihood")
    with torch.inference_mode(), pytest.raises(UnsupportedHost, match="inference_mode"):
        screen_heads(model, ZeroTuning(gamma=2.0), samples)
    bart = tiny_transformers("bart")
    with pytest.raises(SelectionError, match="kinds"):
        screen_heads(bart, HeadGate({(0, 0): 0.5}), samples)
    with pytest.raises(UnsupportedHost, match="no gradient"):
        cut = lambda outputs, inputs: outputs.logits.detach()[:, -1].amax(-1)  # noqa: E731
        screen_heads(model, ZeroTuning(gamma=2.0), [{"input_ids": torch.ones(1, 4).long() * 5}], metric=cut)


def test_heads_screened_on_calibration_passages_are_good_on_test_passages() -> None:
    """Scores shrink on other passages, and their order changes; the best heads are still far above the rest."""
    from attnsteer import zoo
    from attnsteer.zoo.shapes import reading

    model, tokenizer = zoo.load("shapes-lm")
    where = Where(layers=range(2, 6))
    methods = {"act": ACT(beta=0.4, where=where), "zero": ZeroTuning(gamma=6.0, where=where)}

    def screened(split: str) -> Any:
        samples = []
        for i in range(100, 124):
            r = reading.reading(split, i, "one-shot")
            ids = [tokenizer.convert_tokens_to_ids(c) for c in r.choices]
            samples.append(Choice(tokenizer(r.prompt)["input_ids"], ids, r.answer))
        return screen_heads(model, methods, samples, batch=24)

    calibration, test = screened("calibration"), screened("test")
    for name in methods:
        best, scores = calibration[name].top(6), test[name].scores
        top = sum(scores[p] for p in best) / 6
        rest = sum(v for p, v in scores.items() if p not in best) / (len(scores) - 6)
        assert top > 2 * max(rest, 0.0) and top > 0, (name, top, rest)
        assert agreement(calibration[name], scores) > 0.2, name


@pytest.mark.long
def test_against_one_head_at_a_time_on_the_embedded_model() -> None:
    from attnsteer import zoo
    from attnsteer.zoo.shapes import reading

    model, tokenizer = zoo.load("shapes-lm")
    samples = []
    for i in range(48):
        r = reading.reading("calibration", i, "one-shot")
        ids = [tokenizer.convert_tokens_to_ids(c) for c in r.choices]
        samples.append(Choice(tokenizer(r.prompt)["input_ids"], ids, r.answer))
    bars = {"zero": (ZeroTuning(gamma=2.0), 0.97), "act": (ACT(beta=0.4), 0.85), "low": (ZeroTuning(gamma=0.3), 0.97)}
    methods = {name: method for name, (method, _) in bars.items()} | {"high": ZeroTuning(gamma=4.0)}
    start = time.process_time()
    found = screen_heads(model, methods, samples)
    screened = time.process_time() - start
    plain, alone = measured(model, None, samples, "choice"), []
    for name, (method, bar) in bars.items():
        start = time.process_time()
        effects = {p: float((measured(model, only(method, *p), samples, "choice") - plain).mean()) for p in found[name]}
        alone.append(time.process_time() - start)
        assert agreement(found[name], effects) >= bar, name
    # Four methods from one forward and backward, against the mean of three measured ones.
    assert sum(alone) / 3 * 4 >= 15 * screened, (alone, screened)
