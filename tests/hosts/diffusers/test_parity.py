"""Guided pipelines against hand-written sampling loops and against the official PAG pipelines of diffusers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import PAG, SEG, HeadSet, SoftPAG, Where, sites, steer
from attnsteer.errors import NothingChanged
from attnsteer.testing import (
    SCHEDULERS,
    official_pag,
    tiny_denoiser,
    tiny_denoiser_inputs,
    tiny_pipeline,
    tiny_scheduler,
)
from tests.hosts.diffusers.common import BOUND, EFFECT, at, call_of, guidance, paths, pipeline, relative
from tests.reference import guidance_loops
from tests.reference.guidance_loops import JOINT, LOOPS, Edit, guided_latents

# What diffusers perturbs by default; the tiny models have one block with each of these names.
OFFICIAL = {"sd": "mid", "sdxl": "mid", "sd3": "blocks.1", "pixart": "blocks.1", "sana": "transformer_blocks.0"}


def check(pipe: Any, call: dict[str, Any], method: Any, expected: Tensor) -> None:
    """The steered pipeline gives `expected`, which the method moved, and is itself again afterwards."""
    plain = pipe(**call)[0]
    assert relative(plain, expected) > EFFECT
    with steer(pipe, method):
        steered = pipe(**call)[0]
    assert relative(steered, expected) < BOUND
    assert torch.equal(pipe(**call)[0], plain)


# --------------------------------------------------------------------------------------------------------- PAG


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("name", LOOPS)
def test_pag_is_the_loop(name: str, cfg: bool, batch: int) -> None:
    pipe = pipeline(name)
    call = call_of(name, batch=batch, steps=3, **guidance(name, cfg))
    layers = paths(pipe)[1:2]
    joint = "joint_identity" if batch == 1 else "ii_identity"
    expected = guided_latents(name, pipe, call, layers, Edit(joint=joint), 3.0)
    check(pipe, call, PAG(3.0, joint=joint, where=at(layers)), expected)


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_pag_is_the_official_pipeline(name: str, cfg: bool) -> None:
    pipe = pipeline(name)
    call = call_of(name, batch=2, steps=3, **guidance(name, cfg))
    official = official_pag(name, pipe)(**call, pag_scale=3.0)[0]
    where = Where() if OFFICIAL[name] == "mid" else at(paths(pipe, OFFICIAL[name]))
    check(pipe, call, PAG(3.0, where=where), official)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_pag_is_official_with_every_scheduler_in_fp32(kind: str) -> None:
    pipe = tiny_pipeline("sd", scheduler=tiny_scheduler(kind))
    official = official_pag("sd", pipe)(**call_of("sd", kind), pag_scale=3.0)[0]
    plain = pipe(**call_of("sd", kind))[0]
    with steer(pipe, PAG(3.0)):
        steered = pipe(**call_of("sd", kind))[0]
    assert relative(steered, official) < BOUND
    assert relative(plain, official) > EFFECT


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_pag_is_official_with_every_scheduler(kind: str, prediction: str) -> None:
    """In fp64: multi-step schedulers magnify fp32 rounding, which differs between processors, beyond any useful bound."""
    pipe = tiny_pipeline("sd", scheduler=tiny_scheduler(kind, prediction_type=prediction)).to(torch.float64)

    def call() -> dict[str, Any]:
        given = call_of("sd", kind)
        return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}

    official = official_pag("sd", pipe)(**call(), pag_scale=3.0)[0]
    plain = pipe(**call())[0]
    with steer(pipe, PAG(3.0)):
        steered = pipe(**call())[0]
    assert steered.dtype == torch.float64 and relative(steered, official) < 1e-10
    assert relative(plain, official) > EFFECT
    assert torch.equal(pipe(**call())[0], plain)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_pag_is_official_with_strings_an_oblong_image_and_an_adaptive_scale(name: str) -> None:
    pipe = pipeline(name)
    call = call_of(name, text=True, height=96, width=160, steps=5)
    official = official_pag(name, pipe, layers="up_blocks.0")
    where = at(paths(pipe, "up_blocks.0"))
    expected = official(**call, pag_scale=3.0, pag_adaptive_scale=0.004)[0]
    check(pipe, call, PAG(3.0, adaptive=0.004, where=where), expected)
    with steer(pipe, PAG(3.0, adaptive=0.004, where=where)) as run:
        pipe(**call)
    # the scale is 0 up to t = 250: no weak pass there
    guided = int((pipe.scheduler.timesteps > 250).sum())
    assert 0 < guided < 5
    assert run.audit.to_dict()["interventions"][0]["inside passes"] == guided


@pytest.mark.parametrize("name", ["sd3", "sana"])
def test_an_adaptive_scale_is_official_on_transformers(name: str) -> None:
    """Sana's model is given another number than the scheduler's timestep."""
    pipe = pipeline(name)
    call = call_of(name, steps=4)
    expected = official_pag(name, pipe)(**call, pag_scale=3.0, pag_adaptive_scale=0.004)[0]
    check(pipe, call, PAG(3.0, adaptive=0.004, where=at(paths(pipe, OFFICIAL[name]))), expected)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_an_adaptive_scale_counts_as_the_scheduler_does(name: str) -> None:
    pipe = pipeline(name)
    call = call_of(name, steps=4, **guidance(name, True))
    layers = paths(pipe)[1:2]
    plain = pipe(**call)[0]
    times = pipe.scheduler.timesteps.tolist()
    scales = [max(0.0, 3.0 - 0.004 * (1000 - t)) for t in times]
    assert scales[0] > scales[-1]
    expected = guided_latents(name, pipe, call, layers, Edit(), scales.__getitem__)
    assert relative(plain, expected) > EFFECT
    check(pipe, call, PAG(3.0, adaptive=0.004, joint="joint_identity", where=at(layers)), expected)


def test_distilled_guidance_is_left_alone() -> None:
    pipe = tiny_pipeline("flux", guidance_embeds=True)
    call = call_of("flux", guidance_scale=2.0, steps=3)
    layers = paths(pipe)[2:3]
    expected = guided_latents("flux", pipe, call, layers, Edit(), 3.0)
    check(pipe, call, PAG(3.0, joint="joint_identity", where=at(layers)), expected)


def test_a_scale_of_zero_computes_no_weak_pass() -> None:
    pipe = pipeline("sd")
    call = call_of("sd", steps=2)
    plain = pipe(**call)[0]
    handle = steer(pipe, PAG(0.0))
    assert torch.equal(pipe(**call)[0], plain)
    assert "inside passes" not in handle.audit.to_dict()["interventions"][0]
    with pytest.warns(NothingChanged, match="strength is neutral"):
        handle.remove()


# ----------------------------------------------------------------------------------------------------- SoftPAG


def heads_of(pipe: Any, layers: list[str], every: int = 2) -> tuple[HeadSet, dict[str, list[int]]]:
    """Some heads of each layer: as a HeadSet of layer numbers, and by module name for the loops."""
    chosen = {s: list(range(s.layer % every, s.heads, every)) for s in sites(pipe) if s.name in layers}
    return HeadSet({s.layer: h for s, h in chosen.items()}), {s.name: h for s, h in chosen.items()}


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("name", [n for n in LOOPS if n != "sd35"])
def test_softpag_in_some_heads_of_several_layers(name: str, cfg: bool) -> None:
    pipe = pipeline(name)
    call = call_of(name, steps=3, **guidance(name, cfg))
    layers = paths(pipe)[1:]
    heads, by_name = heads_of(pipe, layers)
    expected = guided_latents(name, pipe, call, layers, Edit(strength=0.5, heads=by_name), 3.0)
    check(pipe, call, SoftPAG(3.0, 0.5, heads=heads, where=at(layers)), expected)


def test_softpag_in_one_head() -> None:
    pipe = pipeline("sd3")
    call = call_of("sd3", steps=3)
    expected = guided_latents("sd3", pipe, call, paths(pipe)[2:3], Edit(strength=0.5, heads=[3]), 4.0)
    check(pipe, call, SoftPAG(4.0, 0.5, heads={2: [3]}), expected)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("joint", JOINT)
@pytest.mark.parametrize("name", ["sd3", "sd35", "flux"])
def test_every_reading_of_identity_in_joint_attention(name: str, joint: str, strength: float) -> None:
    pipe = pipeline(name)
    call = call_of(name, steps=3, **guidance(name, strength == 1.0))
    # the first is a double block, the last of FLUX a single one; attn2 of SD3.5 sees the image only
    layers = [paths(pipe)[0], paths(pipe)[-2]]
    expected = guided_latents(name, pipe, call, layers, Edit(strength=strength, joint=joint), 3.0)
    check(pipe, call, SoftPAG(3.0, strength, joint=joint, where=at(layers)), expected)


@pytest.mark.parametrize("target", ["uniform", "zero", "mean_query"])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
def test_other_targets(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = {
        "uniform": lambda logits, image, joint: torch.full_like(logits, 1 / logits.shape[-1]),
        "zero": lambda logits, image, joint: torch.zeros_like(logits),
    }
    if target in maps:
        monkeypatch.setattr(guidance_loops, "identity_target", maps[target])
    pipe = pipeline(name)
    call = call_of(name, steps=3)
    layers = paths(pipe)[1:2]
    edit = Edit("seg" if target == "mean_query" else "identity", strength=0.5, heads=[0, 1])
    expected = guided_latents(name, pipe, call, layers, edit, 3.0)
    where = Where(modules=at(layers).modules, heads=(0, 1))
    check(pipe, call, SoftPAG(3.0, 0.5, target=target, where=where), expected)


# --------------------------------------------------------------------------------------------------------- SEG

SIZES = {"square": {}, "oblong": {"height": 96, "width": 160}, "odd": {"height": 120, "width": 72}}


@pytest.mark.parametrize("sigma", [1.0, 100.0, math.inf])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_seg_on_a_unet(name: str, size: str, sigma: float) -> None:
    pipe = pipeline(name)
    call = call_of(name, steps=3, **SIZES[size])
    layers = paths(pipe, "mid_block")
    expected = guided_latents(name, pipe, call, layers, Edit("seg", sigma=sigma), 3.0)
    check(pipe, call, SEG(3.0, sigma), expected)


@pytest.mark.parametrize("sigma", [1.0, math.inf])
@pytest.mark.parametrize("size", ["square", "oblong"])
@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "pixart"])
def test_seg_on_a_transformer(name: str, size: str, sigma: float) -> None:
    pipe = pipeline(name)
    call = call_of(name, steps=3, **SIZES[size], **guidance(name, size == "square"))
    layers = paths(pipe)[:2]
    expected = guided_latents(name, pipe, call, layers, Edit("seg", sigma=sigma), 3.0)
    check(pipe, call, SEG(3.0, sigma, where=at(layers)), expected)


def test_seg_on_video_takes_the_mean_query_only() -> None:
    pipe = pipeline("wan")
    call = call_of("wan", steps=3)
    layers = paths(pipe)[:2]
    expected = guided_latents("wan", pipe, call, layers, Edit("seg"), 3.0)
    check(pipe, call, SEG(3.0, where=at(layers)), expected)
    with pytest.raises(Exception, match="token grid"), steer(pipe, SEG(3.0, 1.0, where=at(layers))):
        pipe(**call)


def test_seg_in_some_heads() -> None:
    pipe = pipeline("sd")
    call = call_of("sd", steps=3)
    expected = guided_latents("sd", pipe, call, paths(pipe)[1:2], Edit("seg", sigma=1.0, heads=[1]), 3.0)
    layer = next(s.layer for s in sites(pipe) if s.name == paths(pipe)[1])
    check(pipe, call, SEG(3.0, 1.0, heads={layer: [1]}, where=Where(kinds="self")), expected)


# --------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("sd", PAG(3.0)),
        ("sd", SEG(3.0, 1.0)),
        ("sd", SEG(3.0)),
        *(("sd3", SoftPAG(3.0, 0.5, joint=joint, where=Where(layers=[2]))) for joint in JOINT),
        ("flux", SoftPAG(3.0, 0.5, joint="ii_identity_renorm", where=Where(layers=[1, 2]))),
        ("wan", PAG(3.0, where=Where(layers=[1], kinds="self"))),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"{type(value).__name__}-{getattr(value, 'joint', value)}"[:30]
    ),
)
@torch.no_grad()
def test_half_precision_is_close_to_single(name: str, method: Any, dtype: torch.dtype) -> None:
    model = tiny_denoiser(name)
    inputs = tiny_denoiser_inputs(name, model)

    def guided() -> Tensor:
        with steer(model, method) as run, run.branches("uncond", "cond"):
            return model(**inputs, return_dict=False)[0]

    plain, single = model(**inputs, return_dict=False)[0], guided()
    model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() and k != "timestep" else v for k, v in inputs.items()}
    rounded, half = model(**inputs, return_dict=False)[0], guided()
    assert half.dtype == dtype and half.isfinite().all()
    # the term is three times a difference: about as many times the rounding of the model itself
    assert relative(half.float(), single) < 12 * relative(rounded.float(), plain)
    assert relative(single, plain) > 1e-2
