"""Processors with several attentions in one call: IP-Adapter and image-to-video keys are not the text attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import PAG, HeadGate, Intervention, Where, sites, steer
from attnsteer.call import AttnCall, Reweight
from attnsteer.testing import official_pag, tiny_call, tiny_denoiser, tiny_denoiser_inputs, tiny_pipeline
from tests.hosts.diffusers.common import relative
from tests.hosts.families import DIM, FAMILIES, B, forward, randn


def entering(module: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What enters the output projection of an attention module in one forward."""
    seen: list[Tensor] = []
    hook = module.to_out[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    forward(model, inputs)
    hook.remove()
    assert len(seen) == 1
    return seen[0]


def with_ip_adapter(model: nn.Module, tokens: int = 4) -> None:
    """An image-prompt adapter with random weights, loaded the way the pipelines load one."""
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    width = model.config.cross_attention_dim
    state["image_proj"] = {
        "proj.weight": randn(tokens * width, DIM, seed=7) / 6,
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    for number, name in enumerate(model.attn_processors):
        if name.endswith("attn2.processor"):
            heads = model.get_submodule(name.removesuffix(".processor"))
            shape = (heads.to_k.out_features, width)
            state["ip_adapter"][f"{number}.to_k_ip.weight"] = randn(*shape, seed=number) / 6
            state["ip_adapter"][f"{number}.to_v_ip.weight"] = randn(*shape, seed=number + 50) / 6
    model._load_ip_adapter_weights([state], low_cpu_mem_usage=False)


@dataclass(frozen=True)
class First(Intervention):
    """Every row sees the first text key only."""

    def weights(self, call: AttnCall) -> Reweight:
        return Reweight((((torch.arange(call.k.shape[2]) > 0)[None, None], 0.0),))


def check_streams(module: nn.Module, model: nn.Module, inputs: dict[str, Any], text: Tensor) -> None:
    """A gate is on a head's whole output; an edit of the map is one of the text's.

    Args:
        text: what enters the output projection without the image prompt.
    """
    site = next(s for s in sites(model) if s.module is module)
    both = entering(module, model, inputs)
    image = both - text
    assert relative(text, both) > 1e-2 and relative(image, both) > 1e-2
    width = both.shape[-1] // site.heads
    with steer(model, HeadGate({(site.layer, 0): 0.0}, where=Where(kinds="cross"))):
        gated = entering(module, model, inputs)
    assert not gated[..., :width].any()
    assert torch.equal(gated[..., width:], both[..., width:])
    with steer(model, HeadGate({(site.layer, h): 0.5 for h in range(site.heads)}, where=Where(kinds="cross"))):
        assert relative(entering(module, model, inputs), 0.5 * both) < 1e-6
    with steer(model, First(where=Where(kinds="cross", layers=[site.layer]))):
        moved = entering(module, model, inputs) - image
    # All rows of a head have that key's value.
    assert relative(moved, moved[:, :1].expand_as(moved)) < 1e-5
    assert relative(moved, text) > 1e-2
    assert torch.equal(entering(module, model, inputs), both)


@pytest.mark.parametrize("eager", [False, True])
def test_an_image_prompt_is_not_the_text_attention(eager: bool) -> None:
    model = tiny_denoiser("sd")
    if eager:
        from diffusers.models.attention_processor import AttnProcessor

        model.set_attn_processor(AttnProcessor())
    with_ip_adapter(model)
    if eager:
        make_eager(model)
    inputs = {**tiny_denoiser_inputs("sd", model), "added_cond_kwargs": {"image_embeds": [randn(2, 1, DIM, seed=9)]}}
    module = next(s for s in sites(model) if s.kind == "cross").module
    assert type(module.processor).__name__ == ("IPAdapterAttnProcessor" if eager else "IPAdapterAttnProcessor2_0")
    module.processor.scale = [0.0]
    text = entering(module, model, inputs)
    module.processor.scale = [1.0]
    check_streams(module, model, inputs, text)


def make_eager(model: nn.Module) -> None:
    """The image-prompt processors in their form without SDPA, with the same weights."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor

    for site in sites(model):
        own = site.module.processor
        if type(own).__name__ == "IPAdapterAttnProcessor2_0":
            eager = IPAdapterAttnProcessor(own.hidden_size, own.cross_attention_dim, own.num_tokens, own.scale)
            eager.load_state_dict(own.state_dict())
            site.module.set_processor(eager)


def test_pag_with_an_image_prompt_is_the_official_one() -> None:
    pipe = tiny_pipeline("sd")
    with_ip_adapter(pipe.unet)
    embeds = [torch.cat([torch.zeros(1, 1, DIM), randn(1, 1, DIM, seed=9)])]
    call = {**tiny_call("sd", steps=3), "ip_adapter_image_embeds": embeds}
    official = official_pag("sd", pipe)
    official.register_to_config(requires_safety_checker=False)
    expected = official(**call, pag_scale=3.0)[0]
    with steer(pipe, PAG(3.0)):
        assert relative(pipe(**call)[0], expected) < 5e-6
    assert relative(pipe(**call)[0], expected) > 1e-2


@pytest.mark.parametrize("name", ["wan", "skyreels"])
def test_image_keys_of_image_to_video_are_not_the_text_attention(name: str) -> None:
    extra = {"image_dim": 16, "added_kv_proj_dim": {"wan": 48, "skyreels": 32}[name]}
    if name == "wan":
        model = tiny_denoiser("wan", **extra)
        inputs = tiny_denoiser_inputs("wan", model)
    else:
        model, inputs = FAMILIES[name].build(**extra), FAMILIES[name].inputs()
    # the processor takes the last 512 tokens for text
    inputs["encoder_hidden_states"] = randn(B, 512, DIM, seed=3)
    inputs["encoder_hidden_states_image"] = randn(B, 5, 16, seed=4)
    site = next(s for s in sites(model) if s.kind == "cross")
    module = site.module
    weight = module.add_v_proj.weight.clone(), module.add_v_proj.bias.clone()
    with torch.no_grad():
        module.add_v_proj.weight.zero_(), module.add_v_proj.bias.zero_()
        text = entering(module, model, inputs)
        module.add_v_proj.weight.copy_(weight[0]), module.add_v_proj.bias.copy_(weight[1])
    check_streams(module, model, inputs, text)
