"""Global reference attention against the paper's equation, the official processor and diffusers' own; the loop of a story."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attnsteer import HeadGate, StoryAdapter, Where, sites, steer, story
from attnsteer.errors import CompositionError, SelectionError, UnsupportedHost
from attnsteer.testing import tiny_call, tiny_denoiser, tiny_denoiser_inputs, tiny_pipeline
from tests.hosts.diffusers.common import guidance, relative
from tests.hosts.diffusers.test_image_prompts import make_eager, with_ip_adapter
from tests.hosts.families import DIM, forward, randn
from tests.reference.global_reference import Equation, Official, attending

FRAMES = 3


def adapted(name: str = "sd") -> Any:
    pipe = tiny_pipeline(name)
    with_ip_adapter(pipe.unet)
    return pipe


def call_of(name: str = "sd", frames: int = FRAMES, cfg: bool = True, batch: int = 1) -> dict[str, Any]:
    """Two steps with the embeddings of so many frames; behind guidance the zeros of the unconditional half."""
    frame = randn(1, frames, DIM, seed=9)
    embeds = [torch.cat([torch.zeros_like(frame), frame]) if cfg else frame]
    return {**tiny_call(name, batch, steps=2, **guidance(name, cfg)), "ip_adapter_image_embeds": embeds}


def crosses(pipe: Any) -> list[str]:
    return [s.name for s in sites(pipe) if s.kind == "cross"]


@pytest.mark.parametrize(
    ("name", "cfg", "batch"), [("sd", True, 2), ("sd", False, 1), ("sdxl", True, 1)], ids=["sd-2", "sd-no-cfg", "sdxl"]
)
def test_the_equation_and_the_official_processor(name: str, cfg: bool, batch: int) -> None:
    pipe = adapted(name)
    call = call_of(name, cfg=cfg, batch=batch)
    plain = pipe(**call)[0]
    with steer(pipe, StoryAdapter(0.35, frames=FRAMES)):
        ours = pipe(**call)[0]
    for kind in (Equation, Official):
        with attending(pipe.unet, kind, dict.fromkeys(crosses(pipe), 0.35)):
            assert relative(ours, pipe(**call)[0]) < 5e-6
    assert relative(plain, ours) > 1e-2
    # diffusers' own, given the scale: the same operations.
    pipe.set_ip_adapter_scale(0.35)
    assert torch.equal(pipe(**call)[0], ours)
    # Each reference counts: those of another story are another picture.
    with steer(pipe, StoryAdapter(0.35), control=True):
        assert relative(pipe(**call_of(name, FRAMES - 1, cfg, batch))[0], ours) > 1e-4


@pytest.mark.parametrize("own", [1.0, 0.0], ids=["adapter on", "adapter off"])
def test_zero_is_the_pipeline_without_an_adapter(own: float) -> None:
    without = tiny_pipeline("sd")(**tiny_call("sd", steps=2))[0]
    pipe, call = adapted(), call_of()
    pipe.set_ip_adapter_scale(own)
    with steer(pipe, StoryAdapter(0.0), control=True):
        assert torch.equal(pipe(**call)[0], without)
    # The pipeline's own scale is as it was.
    assert torch.equal(pipe(**call)[0], without) == (own == 0.0)
    with steer(pipe, StoryAdapter(0.4)):
        ours = pipe(**call)[0]
    pipe.set_ip_adapter_scale(0.4)
    assert torch.equal(pipe(**call)[0], ours)


@pytest.mark.parametrize("eager", [False, True])
def test_some_heads_and_samples(eager: bool) -> None:
    """Those that are left alone keep the pipeline's own scale."""
    model = tiny_denoiser("sd")
    with_ip_adapter(model)
    if eager:
        from diffusers.models.attention_processor import AttnProcessor

        for module in (s.module for s in sites(model) if s.kind == "self"):
            module.set_processor(AttnProcessor())
        make_eager(model)
    inputs = {
        **tiny_denoiser_inputs("sd", model),
        "added_cond_kwargs": {"image_embeds": [randn(2, FRAMES, DIM, seed=9)]},
    }
    site = [s for s in sites(model) if s.kind == "cross"][1]
    for s in sites(model):
        if s.kind == "cross":
            s.module.processor.scale = [0.7]
    rest = {s.name: 0.7 for s in sites(model) if s.kind == "cross"}
    heads = torch.full((2, site.heads), 0.7)
    heads[:, 1] = torch.tensor([0.2, 0.5])
    with steer(model, StoryAdapter([0.2, 0.5], where=Where(heads={site.layer: [1]}, kinds="cross"))):
        ours = forward(model, inputs)
    with attending(model, Equation, {**rest, site.name: heads}):
        assert relative(ours, forward(model, inputs)) < 5e-6
    heads[1, 1] = 0.7
    with steer(model, StoryAdapter([0.2, None], where=Where(heads={site.layer: [1]}, kinds="cross"))):
        ours = forward(model, inputs)
    with attending(model, Equation, {**rest, site.name: heads}):
        assert relative(ours, forward(model, inputs)) < 5e-6
    # Where the pipeline adds nothing, only these heads see the references.
    heads[:], heads[:, 1] = 0.0, 0.4
    site.module.processor.scale = [0.0]
    with steer(model, StoryAdapter(0.4, where=Where(heads={site.layer: [1]}, kinds="cross"))):
        ours = forward(model, inputs)
    with attending(model, Equation, {**rest, site.name: heads}):
        assert relative(ours, forward(model, inputs)) < 5e-6


def test_with_gates_and_steps() -> None:
    pipe, call = adapted(), call_of()
    layer = next(s.layer for s in sites(pipe) if s.kind == "cross")
    gate = HeadGate({(layer, 0): 0.0}, where=Where(kinds="cross"))
    with steer(pipe, StoryAdapter(0.4), gate):
        gated = pipe(**call)[0]
    pipe.set_ip_adapter_scale(0.4)
    with steer(pipe, gate):
        assert relative(gated, pipe(**call)[0]) < 5e-6
    for first in (gate, StoryAdapter(0.2)):
        with pytest.raises(
            CompositionError, match=f"would undo what {type(first).__name__} before it did to the image prompt"
        ):
            steer(pipe, first, StoryAdapter(0.4))
    # In the second step the pipeline's own scale.
    pipe.set_ip_adapter_scale(0.0)
    with steer(pipe, StoryAdapter(0.4, where=Where(steps=[0]))):
        one = pipe(**call)[0]

    def off(pipe: Any, step: int, t: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.set_ip_adapter_scale(0.0)
        return kwargs

    pipe.set_ip_adapter_scale(0.4)
    assert torch.equal(pipe(**call, callback_on_step_end=off)[0], one)


def test_what_is_refused() -> None:
    with pytest.raises(
        UnsupportedHost, match=r"StoryAdapter acts on the attention to an image prompt.*Load an IP-Adapter"
    ):
        steer(tiny_pipeline("sd"), StoryAdapter())
    with pytest.raises(UnsupportedHost, match="Load an IP-Adapter into a UNet first"):
        steer(tiny_pipeline("pixart"), StoryAdapter())
    with pytest.raises((SelectionError, UnsupportedHost), match="cross"):
        steer(tiny_pipeline("flux"), StoryAdapter())
    with pytest.raises(SelectionError, match="at least one round"):
        StoryAdapter.schedule(0)
    pipe = adapted()
    message = r"StoryAdapter\(frames=4\): the pipeline was given 3 reference images"
    with pytest.raises(SelectionError, match=message), steer(pipe, StoryAdapter(frames=4)):
        pipe(**call_of())
    masked = {"ip_adapter_masks": [torch.ones(1, FRAMES, 16, 16)]}
    with pytest.raises(UnsupportedHost, match="a softmax of its own"), steer(pipe, StoryAdapter()):
        pipe(**call_of(), cross_attention_kwargs=masked)
    with pytest.raises(UnsupportedHost, match=r"pipe\.load_ip_adapter"):
        story(pipe, ["a cube"])


def test_rounds() -> None:
    """Against the loop by hand: diffusers' own pipeline, its scale, all frames of the round before."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    from attnsteer import zoo

    pipe = zoo.load("shapes-sd")
    torch.manual_seed(0)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=16, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            projection_dim=DIM,
        )
    )  # fmt: skip
    extractor = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    pipe.register_modules(image_encoder=encoder.eval(), feature_extractor=extractor)
    prompts, more = ["a red star", "a star and a blue cross"], {"num_inference_steps": 2, "guidance_scale": 3.0}

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(4)

    frames = [pipe(p, generator=noise(), **more).images[0] for p in prompts]
    with_ip_adapter(pipe.unet)
    made = story(pipe, prompts, rounds=2, seed=4, **more)
    assert made.scales == (0.3, 0.5) and made.prompts == tuple(prompts) and len(made.rounds) == 3
    for round, scale in enumerate([None, *made.scales]):
        if scale is not None:
            pipe.set_ip_adapter_scale(scale)
            seen = [f.resize((256, 256)) for f in frames]
            frames = [pipe(p, ip_adapter_image=[seen], generator=noise(), **more).images[0] for p in prompts]
        assert all(map(same, made.rounds[round], frames))
    assert made.frames == made.rounds[2] and not same(made.rounds[2][0], made.rounds[0][0])
    # A start of one's own, and all frames in one call.
    again = story(pipe, prompts, scales=made.scales[1:], first=made.rounds[1], seed=4, batch_size=2, **more)
    assert all(same(a, b, 1) for a, b in zip(again.frames, made.frames, strict=True))
    with pytest.raises(SelectionError, match="first has 1 pictures for 2 frames"):
        story(pipe, prompts, first=made.frames[:1])
    with pytest.raises(SelectionError, match="story gives latents itself"):
        story(pipe, prompts, latents=torch.zeros(1))
    for bad, message in (
        ({"prompts": "a red star"}, "list of texts"), ({"prompts": None}, "list of texts"), ({"scales": 0.3}, "list of numbers"),
        ({"scales": ["x"]}, "scale='x'"), ({"rounds": 1.5}, "at least one round"), ({"first": [None, None]}, "PIL pictures"),
        ({"batch_size": "2"}, "batch_size='2'"), ({"size": 0}, "size=0"), ({"seed": 2**70}, "seed="), ({"where": "x"}, "where='x'"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt itself"),
    ):  # fmt: skip
        with pytest.raises(SelectionError, match=message):
            story(pipe, **{"prompts": prompts, **bad})


def same(a: Image.Image, b: Image.Image, slack: int = 0) -> bool:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) <= slack


def test_the_embedded_adapter_reads_the_colour_of_a_star() -> None:
    """Loaded as any other; its image encoder tells the colours of stars apart, and the adapter's tokens move the prediction."""
    from attnsteer import zoo
    from attnsteer.zoo.shapes.render import render
    from attnsteer.zoo.shapes.world import COLOUR_NAMES, Object, Scene

    pipe = zoo.load("shapes-sd")
    pipe.load_ip_adapter(str(zoo.folder("shapes-sd")), subfolder="ip_adapter", weight_name="ip-adapter.safetensors")
    named = ["green", "yellow", "purple", "cyan"]
    scenes = [Scene((Object("star", c, "large", 0.4, 0.5, 0.14),)) for c in named]
    pictures = [Image.fromarray((p.permute(1, 2, 0) * 255).byte().numpy()) for p in render(scenes)]
    with torch.no_grad():
        codes, _ = pipe.encode_image(pictures, "cpu", 1)
    assert [COLOUR_NAMES[int(i)] for i in codes[:, :6].argmax(1)] == named
    call = {"prompt": "a star", "ip_adapter_image": [pictures[:1]], "num_inference_steps": 1, "output_type": "latent"}
    outs = []
    for scale in (0.0, 1.0):
        with steer(pipe, StoryAdapter(scale), control=True):
            outs.append(pipe(**call, generator=torch.Generator().manual_seed(0))[0])
    assert relative(outs[1], outs[0]) > 1e-2
