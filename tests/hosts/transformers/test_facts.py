"""What a site says of itself, of models whose names mislead: gates beside queries, shared layers, masks that depend on a name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from attnsteer import ACT, HeadGate, HeadSet, ZeroTuning, sites, steer
from attnsteer.hosts.transformers.attention_function import NAME, asks_for_name, view
from attnsteer.testing.sweep.inputs import ids
from attnsteer.testing.sweep.transformers import build


@torch.no_grad()
def closed(name: str, layer: int, head: int, module: str) -> tuple[Tensor, Tensor]:
    """Logits with a closed head, and with its columns in front of the output projection zero."""
    model = build(name)
    site = next(s for s in sites(model) if s.layer == layer)
    projection = site.module.get_submodule(module)
    width = projection.in_features // site.heads

    def close(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].clone()
        hidden[..., head * width : (head + 1) * width] = 0
        return (hidden, *args[1:])

    hook = projection.register_forward_pre_hook(close)
    expected = model(input_ids=ids(model, 9)).logits
    hook.remove()
    with steer(model, HeadGate({(layer, head): 0.0})):
        return model(input_ids=ids(model, 9)).logits, expected


def test_gates_beside_the_queries_are_no_heads() -> None:
    model = build("qwen3_next")
    (site,) = sites(model)
    assert (site.layer, site.heads, site.module.q_proj.out_features) == (1, 4, 2 * 4 * 16)
    torch.testing.assert_close(*closed("qwen3_next", 1, 2, "o_proj"), rtol=0, atol=1e-6)


def test_a_stack_that_masks_causally_has_causal_layers() -> None:
    model = build("doge")
    assert [s.causal for s in sites(model)] == [True, True]
    with torch.no_grad(), steer(model, ACT(heads=HeadSet({0: [1]})), control=True):
        model(input_ids=ids(model, 9))


def test_layers_that_share_a_module_are_numbered_by_their_place() -> None:
    assert [s.layer for s in sites(build("zamba2"))] == [1]


@torch.no_grad()
def test_the_mask_of_an_indexer_is_applied_under_any_name() -> None:
    """Sparse attention masks only where the implementation is named "eager" or "sdpa", which it asks its config for."""
    model = build("deepseek_v32")
    given = ids(model, 9)
    assert model.config.index_topk < given.shape[1]
    plain = model(input_ids=given).logits
    gates = {(s.layer, h): 1.0 for s in sites(model) for h in range(s.heads)}
    with steer(model, HeadGate(gates), control=True):
        assert torch.equal(model(input_ids=given).logits, plain)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        with steer(model, ZeroTuning(gamma=2.0)):
            model(input_ids=given)


def test_a_name_that_is_asked_for_equals_the_base() -> None:
    model = build("deepseek_v32")
    module = sites(model)[0].module
    assert asks_for_name(module)
    assert not asks_for_name(sites(build("llama"))[0].module)
    seen = view(module.config, asked=True)._attn_implementation
    assert seen == NAME and seen == "sdpa" and seen in ("eager", "sdpa") and seen != "eager"
    assert {NAME: 1}.get(seen) == 1
    model.set_attn_implementation("eager")
    assert seen == "eager" and seen != "sdpa"
    for made in (copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))):
        assert made(view(module.config, asked=True))._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["led"])
def test_one_module_that_cannot_be_edited_leaves_the_others(name: str) -> None:
    """Its windows are softmaxes in parts; the decoder beside it is steered."""
    model = build(name)
    layers = {s.layer for s in sites(model) if s.stack == "decoder" and s.kind == "self"}
    given = {"input_ids": ids(model, 9), "decoder_input_ids": ids(model, 5)}
    from attnsteer import Where

    with (
        torch.no_grad(),
        steer(model, HeadGate({(0, 0): 0.0}, where=Where(modules=r".*decoder.*self_attn", kinds="self"))),
    ):
        model(**given)
    assert layers == {0, 1}
