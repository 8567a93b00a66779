"""`guidance_rescale` beside a weak branch: the official PAG pipelines' order of term and rescale, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnsteer import PAG, SEG, SoftPAG, Where, steer
from attnsteer.errors import UnsupportedHost
from attnsteer.testing import SCHEDULERS, official_pag, tiny_call, tiny_pipeline, tiny_scheduler, tiny_vae
from tests.hosts.diffusers.common import BOUND, EFFECT, at, call_of, paths, pipeline, relative
from tests.hosts.families import DIM, FAMILIES, randn
from tests.reference.guidance_loops import Edit, guided_latents


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_rescale_is_the_official_one_with_every_scheduler(kind: str) -> None:
    pipe = pipeline("sd", scheduler=kind)

    def call() -> dict[str, Any]:
        return call_of("sd", kind, guidance_rescale=0.7, batch=2)

    expected = official_pag("sd", pipe)(**call(), pag_scale=3.0)[0]
    plain = pipe(**call())[0]
    with steer(pipe, PAG(3.0)):
        assert relative(pipe(**call())[0], expected) < BOUND
    assert relative(plain, expected) > EFFECT
    assert torch.equal(pipe(**call())[0], plain)


@pytest.mark.parametrize("adaptive", [0.0, 0.004])
def test_rescale_is_the_official_one_on_sdxl(adaptive: float) -> None:
    pipe = pipeline("sdxl")
    call = call_of("sdxl", guidance_rescale=0.7, steps=5)
    expected = official_pag("sdxl", pipe)(**call, pag_scale=3.0, pag_adaptive_scale=adaptive)[0]
    with steer(pipe, PAG(3.0, adaptive=adaptive)):
        assert relative(pipe(**call)[0], expected) < BOUND
    without = call_of("sdxl", steps=5)
    assert relative(pipe(**without)[0], pipe(**call)[0]) > EFFECT


def test_rescale_of_other_weak_branches_and_without_guidance() -> None:
    pipe = pipeline("sd")
    layers = paths(pipe, "mid_block")
    for edit, method in (
        (Edit("seg", sigma=1.0), SEG(3.0, 1.0, where=at(layers))),
        (Edit(strength=0.5), SoftPAG(3.0, 0.5, where=at(layers))),
    ):
        for guidance in (5.0, 1.0):
            call = call_of("sd", guidance_rescale=0.7, guidance_scale=guidance, steps=3)
            expected = guided_latents("sd", pipe, call, layers, edit, 3.0)
            with steer(pipe, method):
                assert relative(pipe(**call)[0], expected) < BOUND


def test_the_pipeline_gets_its_rescale_back() -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=3, guidance_rescale=0.7)
    seen: list[float] = []

    def watch(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(pipe.guidance_rescale)
        return {}

    with steer(pipe, PAG(3.0)):
        pipe(**call, callback_on_step_end=watch)
    assert seen == [0.7] * 3
    hook = pipe.unet.up_blocks[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"), steer(pipe, PAG(3.0)):
        pipe(**call)
    hook.remove()
    step = pipe.scheduler.step

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("stop")

    handle = steer(pipe, PAG(3.0))
    ours, vars(pipe.scheduler)["step"] = vars(pipe.scheduler)["step"], fail
    with pytest.raises(RuntimeError, match="stop"):
        pipe(**call)
    # the term was never used: the next run says so instead of losing it
    with pytest.raises(UnsupportedHost, match="never used"):
        pipe(**call)
    vars(pipe.scheduler)["step"] = ours
    handle.remove()
    assert pipe.guidance_rescale == 0.7
    assert pipe.scheduler.step == step


def test_a_rescale_that_cannot_be_taken_over_is_refused() -> None:
    """HunyuanDiT reads its own argument in every step, not the pipeline's attribute."""
    from diffusers import HunyuanDiTPipeline

    pipe = HunyuanDiTPipeline(
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=FAMILIES["hunyuandit"].build(text_len=77, text_len_t5=256, use_style_cond_and_image_meta_size=True),
        scheduler=tiny_scheduler("ddim"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent", "return_dict": False,
        "use_resolution_binning": False, "latents": randn(1, 4, 8, 8, seed=1), "guidance_scale": 5.0,
    }  # fmt: skip
    for number, (suffix, length) in enumerate((("", 77), ("_2", 256))):
        for sign in ("", "negative_"):
            call[f"{sign}prompt_embeds{suffix}"] = randn(1, length, DIM, seed=20 + number + 5 * len(sign))
            call[f"{sign}prompt_attention_mask{suffix}"] = torch.ones(1, length, dtype=torch.long)
    method = PAG(3.0, where=Where(layers=[1]))
    plain = pipe(**call)[0]
    with steer(pipe, method):
        assert relative(pipe(**call)[0], plain) > EFFECT
    with pytest.raises(UnsupportedHost, match="guidance_rescale=0"), steer(pipe, method):
        pipe(**call, guidance_rescale=0.7)
    assert torch.equal(pipe(**call)[0], plain)


def test_a_rescale_that_is_an_argument_only_is_refused_too() -> None:
    from diffusers import StableDiffusionXLInstructPix2PixPipeline

    text = tiny_pipeline("sdxl", in_channels=8)
    parts = {k: v for k, v in text.components.items() if k not in ("feature_extractor", "image_encoder")}
    pipe = StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in tiny_call("sdxl", steps=2).items() if k != "latents"}
    call |= {"image": torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))}
    assert not hasattr(pipe, "guidance_rescale")
    with steer(pipe, PAG(3.0)):
        pipe(**call)
    with pytest.raises(UnsupportedHost, match=r"guidance_rescale=0\.7"), steer(pipe, PAG(3.0)):
        pipe(**call, guidance_rescale=0.7)
