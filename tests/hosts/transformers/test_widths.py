"""Multi-head latent attention: values of another width than queries and keys, which the fused CPU kernel does not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import (
    ACT,
    PASTA,
    FreezeMaps,
    HeadGate,
    InjectMap,
    InstABoost,
    PatchHeads,
    SpotLight,
    Where,
    ZeroTuning,
    bake,
    capture,
    steer,
)
from attnsteer.analysis import head_profile, head_weights
from attnsteer.errors import UnsupportedHost
from attnsteer.testing.weights import randomize_

HEADS = {1: [0, 3], 2: [1]}
SPANS = [[(1, 4), (6, 8)], [(0, 3)], [(2, 7)]]
METHODS: dict[str, Any] = {
    "ACT": lambda donor: [ACT(HEADS, 0.4, 0.05)],
    "ACT of all heads": lambda donor: [ACT(None, 0.4, 0.05)],
    "ZeroTuning": lambda donor: [ZeroTuning(HEADS, 2.0)],
    "PASTA": lambda donor: [PASTA(SPANS, HEADS, 0.1)],
    "SpotLight": lambda donor: [SpotLight(SPANS, [0.4, 0.3, None])],
    "InstABoost": lambda donor: [InstABoost(SPANS, 3.0)],
    "two": lambda donor: [InstABoost(SPANS, 3.0), SpotLight(SPANS, 0.4, where=Where(layers=[1]))],
    "HeadGate": lambda donor: [HeadGate({(1, 0): -1.0})],
    "InjectMap": lambda donor: [InjectMap("same_token", HEADS)],
    "FreezeMaps": lambda donor: [FreezeMaps(donor, same_tokens=False)],
    "PatchHeads": lambda donor: [PatchHeads(donor, HEADS), PatchHeads(donor, {0: [2]}, "v")],
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, first_k_dense_replace=3,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        pad_token_id=0,
    )  # fmt: skip
    made = DeepseekV3ForCausalLM(config)
    randomize_(made, 0, 2.0, 1.0)
    return made.eval()


def both(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a prompt and of a step behind it."""
    out = model(**inputs, use_cache=True)
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(3, 1)], dim=1)
    step = model(input_ids=inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=out.past_key_values)
    return torch.cat([out.logits * inputs["attention_mask"][..., None], step.logits], dim=1)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_equal_to_the_dense_path(model: nn.Module, name: str) -> None:
    ids = torch.randint(4, 12, (3, 12), generator=torch.Generator().manual_seed(1))
    for padding in (0, 2):
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        with capture(model, what=("q", "k", "v", "output")) as donor:
            model(**inputs | {"input_ids": ids.flip(0)})
        found = []
        for reference in (False, True):
            with steer(model, *METHODS[name](donor), reference=reference):
                found.append(both(model, inputs))
        assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()


@torch.no_grad()
def test_profile_and_gates_without_matrices_of_values(model: nn.Module) -> None:
    ids = torch.randint(4, 12, (3, 12), generator=torch.Generator().manual_seed(1))
    table = head_profile(model, [{"input_ids": ids}])
    assert "entropy" in table.columns and "copying" not in table.columns
    with pytest.raises(UnsupportedHost, match="latent attention"):
        head_weights(model)
    gates = {(0, 1): 0.0, (2, 3): -1.5}
    with steer(model, HeadGate(gates)):
        wanted = model(ids).logits
    assert (bake(model, gates)(ids).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
