"""SLG, NAG, CONFORM, Attention Regulation and StoryAdapter beside offloading, LoRA, ControlNet, feature caches and compiled code:
right, or refused by name."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

from attnsteer import CONFORM, NAG, SLG, AttentionRegulation, StoryAdapter, Where, sites, steer
from attnsteer.errors import UnsupportedHost
from attnsteer.testing import tiny_call, tiny_pipeline
from tests.hosts.diffusers.common import relative
from tests.hosts.diffusers.test_caches import put_on
from tests.hosts.diffusers.test_image_prompts import with_ip_adapter
from tests.hosts.families import DIM, randn
from tests.reference import negative_guidance, skipped_blocks
from tests.reference.guidance_loops import Edit

NEGATIVE = {"encoder_hidden_states": randn(1, *tiny_call("sd")["prompt_embeds"].shape[1:], seed=3)}
METHODS = {
    "SLG": SLG(2.0, None, None, where=Where(layers=[2])),
    "NAG": NAG(NEGATIVE, 4.0, alpha=0.5),
    "CONFORM": CONFORM([[(2, 3), (3, 4)], [(5, 6)]], (0,), 1, until=2),
    "AttentionRegulation": AttentionRegulation(
        [(2, 3)], 1.0, iterations=4, rate=5.0, keep=False, where=Where(layers=[1], kinds="cross")
    ),
    "StoryAdapter": StoryAdapter(0.4),
}


def each(*always: str) -> Any:
    """All five methods; every run has these, `make test-long` the others too."""
    return pytest.mark.parametrize(
        "name", [n if n in always else pytest.param(n, marks=pytest.mark.long) for n in METHODS]
    )


def fresh(name: str) -> Any:
    """A pipeline of its own; StoryAdapter's has an IP-Adapter that adds nothing by itself."""
    pipe = tiny_pipeline("sd")
    if name == "StoryAdapter":
        with_ip_adapter(pipe.unet)
        pipe.set_ip_adapter_scale(0.0)
    return pipe


def call_of(name: str) -> dict[str, Any]:
    frames = randn(1, 3, DIM, seed=9)
    more = (
        {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(frames), frames])]} if name == "StoryAdapter" else {}
    )
    return {**tiny_call("sd", steps=3), **more}


def steered(pipe: Any, name: str, **more: Any) -> Tensor:
    with steer(pipe, METHODS[name]):
        return pipe(**call_of(name), **more)[0]


@functools.cache
def alone(name: str) -> tuple[Tensor, Tensor]:
    """(without, with the method) where nothing else is."""
    pipe = fresh(name)
    return pipe(**call_of(name))[0], steered(pipe, name)


@pytest.mark.parametrize("how", [pytest.param("hooks", marks=pytest.mark.long), "weights elsewhere"])
@each("SLG", "AttentionRegulation")
def test_offloading(name: str, how: str) -> None:
    """Bit for bit; with `cpu_offload`, as with a pipeline's sequential one, the modules' own weights are on no device."""
    pipe = fresh(name)
    if how == "hooks":
        for module in pipe.unet.modules():
            if not list(module.children()):
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    else:
        cpu_offload(pipe.unet, torch.device("cpu"))
    assert torch.equal(steered(pipe, name), alone(name)[1])


@each("StoryAdapter")
def test_a_lora_is_part_of_the_model(name: str) -> None:
    """As where its weights are added to the layers' own."""
    from peft import LoraConfig

    pipe = fresh(name)
    torch.manual_seed(0)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=layers))
    ours, plain = steered(pipe, name), pipe(**call_of(name))[0]
    assert relative(plain, alone(name)[0]) > 1e-2 and relative(ours, plain) > 1e-2
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    # The sum of a layer's weights is rounded once more, and steps along a gradient magnify that.
    assert relative(ours, steered(pipe, name)) < (2e-3 if name == "CONFORM" else 1e-4)


@each("NAG", "CONFORM")
def test_a_controlnet(name: str) -> None:
    """As the plain pipeline whose denoiser is given the same residuals; the latent must not move under them."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    pipe = fresh(name)
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(tiny_pipeline("sd").unet).eval()
    for key, weight in net.named_parameters():
        if "controlnet_" in key:
            nn.init.normal_(weight, std=0.05)
    parts = {n: getattr(pipe, n) for n in ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "image_encoder")}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    controlled = StableDiffusionControlNetPipeline(**parts, controlnet=net)
    controlled.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    if name == "CONFORM":
        with pytest.raises(UnsupportedHost, match="CONFORM cannot act beside a ControlNet"):
            steered(controlled, name, image=image)
        return
    ours = steered(controlled, name, image=image)
    assert relative(ours, controlled(**call_of(name), image=image)[0]) > 1e-2

    @torch.no_grad()
    def add(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        text = kwargs["encoder_hidden_states"]
        down, mid = net(args[0], args[1], text, torch.cat([image, image]), return_dict=False)
        return args, {**kwargs, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    pipe.unet.register_forward_pre_hook(add, with_kwargs=True)
    assert relative(ours, steered(pipe, name)) < 5e-6
    assert relative(ours, alone(name)[1]) > 1e-2


@each("SLG", "CONFORM")
def test_a_feature_cache(name: str) -> None:
    """Broadcast attention: what is replayed is what the edited attention gave; a weak pass has a cache of its own."""
    pipe = fresh(name)
    put_on(pipe.unet, "broadcast", "apply")
    if name == "CONFORM":
        with pytest.raises(UnsupportedHost, match="feature cache, and CONFORM takes gradients"):
            steered(pipe, name)
        return
    ours = steered(pipe, name)
    cached = fresh(name)
    put_on(cached.unet, "broadcast", "apply")
    assert relative(ours, cached(**call_of(name))[0]) > 1e-2
    if name == "AttentionRegulation":
        return
    other = fresh(name)
    if name == "StoryAdapter":
        put_on(other.unet, "broadcast", "apply")
        other.set_ip_adapter_scale(0.4)
        assert torch.equal(ours, other(**call_of(name))[0])
    elif name == "NAG":
        layers = [s.name for s in sites(other) if s.kind == "cross"]
        with negative_guidance.guided(other.unet, layers, NEGATIVE["encoder_hidden_states"], None, 5.0, 2.5, 0.5, 1):
            put_on(other.unet, "broadcast", "apply")
            assert relative(ours, other(**call_of(name))[0]) < 5e-6
    else:
        assert relative(ours, _skipped_beside_a_cache(other)) < 5e-6


def _skipped_beside_a_cache(pipe: Any) -> Tensor:
    """SLG by hand: the weak pass is of a second model without the block, with a cache of its own."""
    weak, strong = tiny_pipeline("sd").unet, pipe.unet.forward
    for unet in (weak, pipe.unet):
        put_on(unet, "broadcast", "apply")
    block = next(s.name for s in sites(pipe) if s.layer == 2 and s.kind == "self").removesuffix(".attn1")

    def forward(sample: Tensor, t: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        kwargs["return_dict"] = False
        out = strong(sample, t, encoder_hidden_states, **kwargs)[0]
        with skipped_blocks.skipped(weak, [block], Edit(), (8, 8)):
            low = weak(sample[1:], t, encoder_hidden_states[1:], **kwargs)[0]
        return (out + 2.0 * (out[1:] - low),)

    vars(pipe.unet)["forward"] = forward
    return pipe(**call_of("SLG"))[0]


REFUSED = {
    "SLG": "leaves blocks of UNet2DConditionModel out",
    "NAG": "runs cross-attention a second time, which compiled UNets do not allow",
    "CONFORM": "takes gradients through UNet2DConditionModel",
    "AttentionRegulation": "keeps what it found from step to step",
}


@pytest.fixture
def _dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("name", REFUSED)
def test_compiled_code_is_refused_by_name_where_it_cannot_be_entered(name: str) -> None:
    pipe = fresh(name)
    pipe.unet.compile(backend="eager")
    with pytest.raises(UnsupportedHost, match=REFUSED[name]):
        steered(pipe, name)


@pytest.mark.long
@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize(("name", "how"), [("StoryAdapter", "whole"), ("StoryAdapter", "blocks"), ("SLG", "blocks")])
def test_compiled_and_steered(name: str, how: str) -> None:
    pipe = fresh(name)
    if how == "whole":
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet.compile_repeated_blocks(backend="eager")
    assert relative(steered(pipe, name), alone(name)[1]) < 5e-6
