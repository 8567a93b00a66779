"""Attention that a module writes out itself: edited as it runs, refused where the edit could not be exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import HeadGate, Intervention, Where, ZeroTuning, sites, steer
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.testing.fingerprint import fingerprint
from attnsteer.testing.weights import randomize_

TOKENS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gptj() -> nn.Module:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(**TOKENS, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, attn_pdrop=0.1)
    return randomize_(GPTJForCausalLM(config), 0).eval()


def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4)
    return randomize_(BloomForCausalLM(config), 0).eval()


def xlnet() -> nn.Module:
    from transformers import XLNetConfig, XLNetLMHeadModel

    config = XLNetConfig(**TOKENS, d_model=32, n_layer=2, n_head=4, d_inner=48)
    return randomize_(XLNetLMHeadModel(config), 0).eval()


# The module whose input holds the outputs of all heads, side by side, by the name of its attention's child.
MODELS = {"gptj": (gptj, "out_proj"), "bloom": (bloom, "dense")}


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(4, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_closed_head_is_one_whose_columns_are_zero(name: str) -> None:
    make, projection = MODELS[name]
    model, given = make(), inputs()
    before, plain = fingerprint(model), model(**given).logits
    site = sites(model)[1]
    assert (site.layer, site.heads, site.causal) == (1, 4, True)

    def close(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].clone()
        hidden[..., 16:24] = 0
        return (hidden, *args[1:])

    hook = getattr(site.module, projection).register_forward_pre_hook(close)
    expected = model(**given).logits
    hook.remove()
    with steer(model, HeadGate({(1, 2): 0.0})):
        torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=1e-6)
    assert (expected - plain).abs().max() > 1e-2
    assert torch.equal(model(**given).logits, plain)
    assert fingerprint(model) == before


@torch.no_grad()
def test_the_scores_of_a_method_are_those_of_the_softmax() -> None:
    """ALiBi and the mask are in them: a reweighting equals the softmax with log gamma on the first key, caught in the module."""
    model, given = bloom(), inputs()
    original = torch.nn.functional.softmax
    expected: list[Tensor] = []

    class Scaled(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is original:
                args[0][..., 0] += torch.log(torch.tensor(4.0))
            return func(*args, **(kwargs or {}))

    with Scaled():
        expected.append(model(**given).logits)
    valid = given["attention_mask"].bool()
    for reference in (False, True):
        with steer(model, ZeroTuning(gamma=4.0), reference=reference):
            torch.testing.assert_close(model(**given).logits[valid], expected[0][valid], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", [gptj, xlnet], ids=["gptj", "xlnet"])
def test_open_gates_change_no_bit(make: Any) -> None:
    model, given = make(), inputs()
    plain = model(**given).logits
    with steer(model, HeadGate({(0, 0): 1.0, (1, 3): 1.0}), control=True):
        assert torch.equal(model(**given).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("make", [gptj, bloom], ids=["gptj", "bloom"])
def test_half_precision_is_taken_as_the_model_takes_it(make: Any) -> None:
    """Scores in float32 beside values in half precision, and scores in half precision."""
    model, given = make(), inputs()
    valid = given["attention_mask"].bool()
    with steer(model, ZeroTuning(gamma=4.0)):
        exact = model(**given).logits[valid]
    with steer(model.bfloat16(), ZeroTuning(gamma=4.0)):
        half = model(**given).logits[valid]
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.03 * exact.norm()


@torch.no_grad()
def test_cached_decoding_equals_uncached() -> None:
    model, given = gptj(), {"input_ids": inputs()["input_ids"]}
    how = {
        "max_new_tokens": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": 0,
    }
    with steer(model, ZeroTuning(gamma=4.0)):
        cached, uncached = (model.generate(**given, **how, use_cache=c).logits for c in (True, False))
    torch.testing.assert_close(cached, uncached, rtol=0, atol=2e-5)


@torch.no_grad()
def test_what_could_not_be_exact_is_refused() -> None:
    model, given = gptj(), inputs()
    with steer(model, HeadGate({(0, 0): 0.0})):
        model(**given, output_attentions=True)
    with steer(model, ZeroTuning(gamma=2.0)):
        model(**given)
        with pytest.raises(UnsupportedHost, match="attn hands its attention map out before it is edited"):
            model(**given, output_attentions=True)
    model.train()
    with pytest.raises(UnsupportedHost, match=r"attention dropout 0\.1"), steer(model, ZeroTuning(gamma=2.0)):
        model(**given)


def test_queries_and_keys_cannot_be_edited() -> None:
    @dataclass(frozen=True)
    class Turned(Intervention):
        def inputs(self, call: Any) -> Any:
            return -call.q, call.k, call.v

    with pytest.raises(UnsupportedHost, match=r"writes its attention out.*Turned edits them"):
        steer(gptj(), Turned())


def test_a_module_without_a_number_of_heads_is_listed_and_leaves_the_others() -> None:
    class Anonymous(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    model = gptj()
    model.transformer.extra = Anonymous()
    listed = sites(model)
    assert [s.refused for s in listed][:2] == ["", ""]
    assert "does not say how many heads" in listed[2].refused
    assert "cannot be steered: transformer.extra: Anonymous" in str(listed)
    steer(model, HeadGate({(0, 0): 0.0}), control=True).remove()
    with steer(model, ZeroTuning(gamma=2.0), control=True) as run:
        assert [s.name for s in run.sites] == ["transformer.h.0.attn", "transformer.h.1.attn"]
    with pytest.raises(UnsupportedHost, match=r"selects transformer\.extra, which cannot be steered"):
        steer(model, ZeroTuning(gamma=2.0, where=Where(modules=r"transformer\.extra")))
    with pytest.raises(SelectionError):
        steer(model, HeadGate({(7, 0): 0.0}))
