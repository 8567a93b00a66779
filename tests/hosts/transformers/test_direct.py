"""transformers models whose modules call SDPA themselves, and those whose attention is written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import ACT, HeadGate, HeadSet, SpotLight, Where, sites, steer
from attnsteer.errors import CompositionError, UnsupportedHost
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from attnsteer.testing.fingerprint import fingerprint
from attnsteer.testing.transformers_models import randomize_
from tests.laws.dense_model import Dense, Sequence, act_edit, dense_model

FORMS = [{}, {"alibi": True, "multi_query": False}, {"new_decoder_architecture": True, "num_kv_heads": 2}]
HEADS = HeadSet({1: [0, 2], 2: [1]})


def vision() -> nn.Module:
    """Its relative position bias reaches SDPA as a float mask."""
    from transformers import Data2VecVisionConfig, Data2VecVisionModel

    config = Data2VecVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        use_relative_position_bias=True,
    )
    return randomize_(Data2VecVisionModel(config), 0).eval()


def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", FORMS, ids=["rotary", "alibi", "grouped"])
@torch.no_grad()
def test_every_form_of_falcon_against_the_dense_definition(form: dict[str, Any]) -> None:
    model = tiny_transformers("falcon", **form)
    inputs = tiny_transformers_inputs("falcon", model, batch=3, length=12, padding="left")
    valid = inputs["attention_mask"].bool()
    plain = model(**inputs).logits
    found = sites(model)
    assert [(s.layer, s.heads, s.causal, s.modality) for s in found] == [(i, 4, True, "text") for i in range(3)]
    assert {s.kv_heads for s in found} == {1 if not form else form.get("num_kv_heads", 4)}
    with steer(model, ACT(HEADS, 0.4, 0.12)) as run:
        ours = model(**inputs).logits
    assert run.audit.fired(0)
    edits = {s.name: (list(HEADS[s.layer]), act_edit(beta=0.4, threshold=0.12)) for s in found if s.layer}
    with dense_model(model, Dense(model, edits, {}), []) as dense:
        dense.sequence = Sequence(valid, prompt=12)
        theirs = model(**inputs).logits
    assert dense.applied == 2
    assert (ours - theirs)[valid].abs().max() <= 1e-5
    assert (ours - plain)[valid].abs().max() > 1e-3
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_generation_keeps_the_state_of_the_prompt() -> None:
    model = tiny_transformers("falcon")
    inputs = tiny_transformers_inputs("falcon", model, batch=2, length=10, padding="left")
    outputs = []
    for reference in (False, True):
        with steer(model, ACT(HEADS, 0.2, 0.12), reference=reference):
            outputs.append(model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False))
    assert torch.equal(*outputs)
    with steer(model, SpotLight([[(1, 3)]] * 2, 0.5, where=Where(phases="decode"))) as run:
        assert not torch.equal(
            model.generate(**inputs, max_new_tokens=6, do_sample=False),
            model.generate(**inputs, max_new_tokens=1, do_sample=False),
        )
    assert run.audit.fired(0)


@torch.no_grad()
def test_compiled_before_steering() -> None:
    torch._dynamo.reset()
    model = tiny_transformers("falcon")
    inputs = tiny_transformers_inputs("falcon", model)
    plain = model(**inputs).logits
    with steer(model, ACT(HEADS, 0.4, 0.12)):
        expected = model(**inputs).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, plain)
    with steer(compiled, ACT(HEADS, 0.4, 0.12)):
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled(**inputs).logits, plain)
    assert (expected - plain).abs().max() > 1e-3


@torch.no_grad()
def test_a_vision_tower_with_a_position_bias() -> None:
    model, x = vision(), image()
    plain = model(pixel_values=x).last_hidden_state
    assert {(s.modality, s.kind, s.causal, s.heads) for s in sites(model)} == {("vision", "self", False, 2)}
    gate = HeadGate({(1, 0): 0.0, (2, 1): -1.0})
    hidden = []
    hooks = [
        model.encoder.layer[i].attention.output.dense.register_forward_pre_hook(_gated(i, gate, hidden)) for i in (1, 2)
    ]
    expected = model(pixel_values=x).last_hidden_state
    for hook in hooks:
        hook.remove()
    with steer(model, gate):
        out = model(pixel_values=x).last_hidden_state
    assert len(hidden) == 2 and (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(model(pixel_values=x).last_hidden_state, plain)


def _gated(layer: int, gate: HeadGate, seen: list[int]) -> Any:
    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(layer)
        heads = args[0].unflatten(-1, (2, -1)).clone()
        for (at, head), value in dict(gate.gates).items():
            if at == layer:
                heads[..., head, :] *= value
        return (heads.flatten(-2), *args[1:])

    return before


class Both(nn.Module):
    """One target with modules of either kind."""

    def __init__(self) -> None:
        super().__init__()
        self.text = tiny_transformers("llama")
        self.vision = vision()

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(input_ids).logits, self.vision(pixel_values=pixel_values).last_hidden_state


@torch.no_grad()
def test_both_kinds_in_one_target() -> None:
    model = Both()
    ids = tiny_transformers_inputs("llama", model.text)["input_ids"]
    plain, before = model(ids, image()), fingerprint(model)
    methods = (ACT(HEADS, 0.4, 0.12), HeadGate({(1, 0): 0.0}, where=Where(modalities="vision")))
    with steer(model, *methods) as run:
        both = model(ids, image())
        assert {s.name.split(".")[0] for s in run.sites} == {"text", "vision"}
    for new, old in zip(both, plain, strict=True):
        assert (new - old).abs().max() > 1e-3
    assert fingerprint(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model(ids, image()), plain, strict=True))


def test_a_pooling_head_beside_layers_is_no_site() -> None:
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    config = Aimv2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    names = [s.name for s in sites(Aimv2VisionModel(config).eval())]
    assert names == ["encoder.layers.0.attention", "encoder.layers.1.attention"]


def test_its_own_eager_attention_is_refused() -> None:
    model = tiny_transformers("falcon", attn_implementation="eager")
    before = fingerprint(model)
    with pytest.raises(UnsupportedHost, match=r"h\.1\.self_attention.*'eager'.*attn_implementation=\"sdpa\""):
        steer(model, HeadGate({(1, 0): 0.0}))
    assert fingerprint(model) == before


def test_a_second_steering_is_refused() -> None:
    model = tiny_transformers("falcon")
    with steer(model, HeadGate({(1, 0): 2.0})) as run, pytest.raises(CompositionError, match="steered already"):
        model(torch.tensor([[4, 5]]))
        steer(model, HeadGate({(1, 1): 0.0}))
    assert run.audit.fired(0)


@torch.no_grad()
def test_a_call_that_leaves_sdpa_raises_and_is_undone() -> None:
    model = tiny_transformers("falcon")
    inputs, before = tiny_transformers_inputs("falcon", model), fingerprint(model)
    plain = model(**inputs).logits
    with (
        pytest.raises(UnsupportedHost, match=r"h\.1\.self_attention.*0 times.*output_attentions"),
        steer(model, HeadGate({(1, 0): 0.0})),
    ):
        model(**inputs, output_attentions=True)
    assert fingerprint(model) == before
    assert torch.equal(model(**inputs).logits, plain)


def test_a_model_without_attention_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=16, state_size=4, num_hidden_layers=2)).eval()
    assert list(sites(model)) == []
    before = fingerprint(model)
    with pytest.raises(UnsupportedHost, match=r"MambaForCausalLM has no attention that can be reached.*by hand"):
        steer(model, HeadGate({(0, 0): 0.0}))
    assert fingerprint(model) == before
