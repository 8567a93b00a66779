"""A baked model is the gated one, on every layout of projections, and a plain checkpoint."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from attnsteer import ACT, HeadGate, HeadSet, Where, bake, steer
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs

GATES = {(0, 1): 0.0, (1, 3): -1.5, (1, 0): 2.0}


def gated(model: Any, inputs: dict[str, Any], method: HeadGate) -> torch.Tensor:
    with torch.no_grad(), steer(model, method):
        return model(**inputs)[0]


# Groups of heads, fused q k v, transposed weights with biases, sinks, encoders, a decoder with cross-attention, images.
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_oss", "falcon", "bart", "llava", "vit"])
def test_equal_to_the_gated_model(family: str) -> None:
    model = tiny_transformers(family)
    inputs, before = tiny_transformers_inputs(family, model), copy.deepcopy(model.state_dict())
    want = gated(model, inputs, HeadGate(GATES))
    baked = bake(model, GATES)
    assert type(baked) is type(model) and baked is not model
    with torch.no_grad():
        assert (baked(**inputs)[0] - want).abs().max() < 1e-5 < 0.1 < (model(**inputs)[0] - want).abs().max()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_choice_among_the_gated_heads() -> None:
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model)
    some = HeadGate(GATES, where=Where(heads={1: [0, 2]}))
    want = gated(model, inputs, HeadGate({(1, 0): 2.0}))
    assert torch.equal(gated(model, inputs, some), want)
    with torch.no_grad():
        assert (bake(model, some)(**inputs)[0] - want).abs().max() < 1e-5


def test_the_checkpoint_runs_without_this_library(tmp_path: Path) -> None:
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model)
    want = gated(model, inputs, HeadGate(GATES))
    bake(model, HeadGate(GATES), save_to=tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (loaded(**inputs)[0] - want).abs().max() < 1e-5
    assert "attnsteer" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "attnsteer_bake.json").read_text())["gates"] == [
        [0, 1, 0.0],
        [1, 0, 2.0],
        [1, 3, -1.5],
    ]


def test_in_place_the_vision_tower_and_half_precision() -> None:
    model = tiny_transformers("llava")
    inputs = tiny_transformers_inputs("llava", model)
    method = HeadGate({(1, 0): 0.0}, where=Where(modalities="vision"))
    want = gated(model, inputs, method)
    with pytest.raises(UnsupportedHost, match="give inputs="):
        bake(model, method)
    assert bake(model, method, inputs=inputs, inplace=True) is model
    with torch.no_grad():
        assert (model(**inputs)[0] - want).abs().max() < 1e-5
    half = tiny_transformers("llama").bfloat16()
    weight = half.model.layers[1].self_attn.o_proj.weight.clone()
    got = bake(half, {(1, 0): 0.3}).model.layers[1].self_attn.o_proj.weight
    # Rounded once.
    assert torch.equal(got[:, :16], (weight[:, :16].double() * 0.3).bfloat16()) and torch.equal(
        got[:, 16:], weight[:, 16:]
    )


def test_what_depends_on_the_input_is_refused() -> None:
    model = tiny_transformers("llama")
    with pytest.raises(SelectionError, match="ACT, whose edit depends on the input"):
        bake(model, ACT())
    with pytest.raises(SelectionError, match="a gate for each sample"):
        bake(model, HeadGate({(0, 0): [0.0, 1.0]}))
    with pytest.raises(SelectionError, match="phases"):
        bake(model, HeadGate(GATES, where=Where(phases="decode")))
    with pytest.raises(SelectionError, match="no gates"):
        bake(model, HeadSet({0: [1]}))
    with pytest.raises(SelectionError, match="head"):
        bake(model, {(0, 9): 0.0})
    with steer(model, HeadGate({(0, 0): 0.5}), control=True), pytest.raises(SelectionError, match="is steered"):
        bake(model, GATES, inplace=True)


def test_weights_that_act_elsewhere_too_are_refused() -> None:
    model = tiny_transformers("llama")
    model.model.layers[1].self_attn.o_proj.weight = model.model.layers[0].self_attn.o_proj.weight
    with pytest.raises(UnsupportedHost, match="shared"):
        bake(model, GATES)
    normed = tiny_transformers("llama")
    layer = normed.model.layers[0].self_attn
    layer.o_proj = torch.nn.Sequential(torch.nn.LayerNorm(64), layer.o_proj)
    with pytest.raises(UnsupportedHost, match="stands between"):
        bake(normed, GATES)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_take_the_gate_too() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_transformers("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj", "q_proj"], init_lora_weights=False))
    inputs = tiny_transformers_inputs("llama", model)
    adapted.eval()
    want = gated(adapted, inputs, HeadGate(GATES))
    with torch.no_grad():
        assert (bake(adapted, GATES)(**inputs)[0] - want).abs().max() < 1e-5
