"""Attend-and-Excite on unmodified pipelines: the built-in pipeline for SD 1.x, hand-written loops for SDXL, SD3, FLUX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import AttendAndExcite, Where, steer
from attnsteer.errors import UnsupportedHost
from attnsteer.hosts.diffusers.latents import Latents
from attnsteer.testing import PIPELINES, tiny_call, tiny_pipeline, tiny_scheduler
from tests.reference import latent_loops as slow

from ..hosts.diffusers import test_more_pipelines as more
from .latent_common import EXACT, by_sample, call_of, cross_layers, double, excite_loss, far

# "a red cube and a blue ball": cube and ball.
CUBE, BALL = 3, 7
STEPS, RULE = 4, {"thresholds": {0: 0.5}, "until": 3, "max_refinements": 3}


def built_in(pipe: Any, call: dict[str, Any], **rule: Any) -> Tensor:
    """diffusers' own pipeline with the components of `pipe`."""
    from diffusers import StableDiffusionAttendAndExcitePipeline

    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    official = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    official.set_progress_bar_config(disable=True)
    return official(**call, attn_res=(16, 16), **rule)[0]


@pytest.fixture
def twenty_become_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in pipeline refines up to 20 times, fixed in a default argument: three keep the test short."""
    from diffusers import StableDiffusionAttendAndExcitePipeline as Official

    refine = Official._perform_iterative_refinement_step
    monkeypatch.setattr(
        Official, "_perform_iterative_refinement_step", lambda self, **k: refine(self, **k, max_refinement_steps=3)
    )


@pytest.mark.filterwarnings("ignore:torch.meshgrid", "ignore:.*StableDiffusionAttendAndExcite")
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler", "dpm++2m"])
def test_equal_to_the_built_in_pipeline(
    scheduler: str, twenty_become_three: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call = double("sd", scheduler), call_of("sd", text=True, steps=STEPS)
    plain = pipe(**call)[0]
    expected = built_in(pipe, call, token_indices=[CUBE, BALL], thresholds={0: 0.5}, max_iter_to_alter=3)
    method = AttendAndExcite.released_code(["cube", "ball"], **RULE)
    with steer(pipe, method) as run:
        ours = pipe(**call)[0]
    assert run.audit.extra[0]["latent updates"] == 3 + 1 + 2
    assert far(ours, expected) < EXACT
    assert far(plain, expected) > 0.1
    # A wrap of the denoiser alone predicts from the moved latent, but steps from the old one.
    monkeypatch.setattr(Latents, "stepped", lambda self, given: given)
    with steer(pipe, method):
        wrong = pipe(**call)[0]
    assert far(wrong, expected) > 1e-3
    assert far(wrong, plain) > 1e-3
    monkeypatch.undo()
    assert torch.equal(pipe(**call)[0], plain)


@pytest.mark.filterwarnings("ignore:torch.meshgrid", "ignore:.*StableDiffusionAttendAndExcite")
def test_equal_to_the_built_in_pipeline_on_a_batch_with_several_images_per_prompt(twenty_become_three: None) -> None:
    """Each sample has its own words, its own loss and its own number of refinements."""
    pipe, call = double("sd"), call_of("sd", text=True, steps=3)
    call["prompt"] = ["a red cube and a blue ball", "a small dog under the big tree photo"]
    call["negative_prompt"] = ["dark", "dark photo"]
    call["latents"] = torch.randn(4, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    call["num_images_per_prompt"] = 2
    rule = {"thresholds": {0: 0.045, 1: 0.3}, "max_iter_to_alter": 2}
    expected = built_in(pipe, call, token_indices=[[3, 7], [3]], **rule)
    method = AttendAndExcite.released_code(
        [["cube", "ball"], ["dog"]], thresholds=rule["thresholds"], until=2, max_refinements=3
    )
    with steer(pipe, method) as run:
        ours = pipe(**call)[0]
    counts = run.audit.extra[0]
    # Were all samples alike, each pass would update all four.
    assert 4 * 2 < counts["latent updates"] < 4 * counts["gradient passes"]
    assert far(ours, expected) < EXACT


@pytest.mark.filterwarnings("ignore:torch.meshgrid", "ignore:.*StableDiffusionAttendAndExcite")
def test_default_scales_the_model_input_and_skips_calls_that_the_scheduler_does_not_use() -> None:
    """DDIM: the default is the released form. Euler: it differs by the scaling; PNDM: by the second call."""
    rule = {"thresholds": {}, "until": 2}
    outs = {}
    for scheduler in ("ddim", "euler", "pndm"):
        pipe, call = double("sd", scheduler), call_of("sd", text=True, steps=3)
        for form in (AttendAndExcite, AttendAndExcite.released_code):
            with steer(pipe, form(["cube", "ball"], **rule)) as run:
                outs[scheduler, form] = pipe(**call)[0], run.audit.extra[0]["latent updates"]
    same = lambda s: far(outs[s, AttendAndExcite][0], outs[s, AttendAndExcite.released_code][0])  # noqa: E731
    assert same("ddim") == 0.0 and same("euler") > 1e-3
    assert outs["pndm", AttendAndExcite][1] == 1 and outs["pndm", AttendAndExcite.released_code][1] == 2


@pytest.mark.parametrize("name", ["sd", "sd-unipc", "sdxl", "sd3", "flux", "flux-true-cfg"])
def test_equal_to_a_hand_written_loop(name: str) -> None:
    """Batch of two, prompts as embeddings, words as positions; one optimisation per step, also with true CFG."""
    guide = {"true_cfg_scale": 4.0} if name.endswith("cfg") else {}
    scheduler = "unipc" if name.endswith("unipc") else None
    name = name.split("-")[0]
    pipe, call = double(name, scheduler), call_of(name, batch=2, steps=3, **guide)
    text = call["prompt_embeds"].shape[1]
    denoiser = getattr(pipe, PIPELINES[name].denoiser)
    if name in ("sd", "sdxl"):
        layers, grid = cross_layers(pipe, 16 if name == "sd" else 8), (16, 16) if name == "sd" else (8, 8)
        competing, parts = range(1, text - 1), {}
    else:
        layers = ["transformer_blocks.2.attn"] if name == "sd3" else ["transformer_blocks.1.attn"]
        grid, competing = (8, 8), range(text)
        first, second = (slice(0, 64), slice(64, None)) if name == "sd3" else (slice(text, None), slice(0, text))
        parts = {"image": first, "text": second}
    words = [[[2], [4]], [[3]]]
    loss = excite_loss(denoiser, layers, grid, words, competing, **parts)
    rule = lambda z, one, i, n, b: slow.attend_excite_rule(z, one, i, n, {0: 0.6}, 2, most=3)  # noqa: E731
    expected = slow.LOOPS[name](pipe, call, by_sample(rule, loss))
    method = AttendAndExcite(
        [[(2, 3), (4, 5)], [(3, 4)]], {0: 0.6}, 3, until=2, compete=None if name in ("sd", "sdxl") else "all"
    )
    if name == "sd3":
        method = method.new(where=Where(layers=[2]))
    plain = pipe(**call)[0]
    with steer(pipe, method) as run:
        ours = pipe(**call)[0]
    assert {r.site.name for r in run.runtimes.values() if run.audit.record(0, r.site.path).edits} == set(layers)
    assert far(ours, expected) < EXACT * max(1.0, float(expected.abs().max()))
    assert far(plain, expected) > 1e-3
    assert torch.equal(pipe(**call)[0], plain)


def test_single_precision_pipeline_with_another_pipeline_size() -> None:
    """A latent that is not square: the maps have its shape, and the run stays finite."""
    from attnsteer.testing import tiny_pipeline

    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", text=True, steps=2, width=192)
    with steer(pipe, AttendAndExcite(["cube"], until=1)) as run:
        out = pipe(**call)[0]
    assert out.shape == (1, 4, 16, 24) and bool(torch.isfinite(out).all())
    assert run.audit.extra[0]["latent updates"] >= 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["image_to_image", "inpainting"])
def test_runs_that_begin_in_the_middle_count_their_own_calls(kind: str) -> None:
    """Image-to-image and inpainting run the last part of the schedule; `until` is a fraction of that."""
    pipe, _, call = getattr(more, kind)()
    pipe.scheduler = tiny_scheduler("ddim")
    more.silent(pipe)
    plain, indices = pipe(**call())[0], []
    with steer(pipe, AttendAndExcite([(2, 3)], {}, until=0.5)) as run:
        out = pipe(**call(), callback_on_step_end=lambda p, i, t, k: indices.append(i) or k)[0]
    rows = out.shape[0]
    assert len(indices) == {"image_to_image": 3, "inpainting": 4}[kind]
    assert run.audit.extra[0]["latent updates"] == rows * (len(indices) // 2)
    assert far(out, plain) > 1e-3 and torch.equal(pipe(**call())[0], plain)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pipelines_that_use_the_latent_elsewhere_are_refused() -> None:
    pipe, _, call = more.controlnet()
    with pytest.raises(UnsupportedHost, match="beside a ControlNet"), steer(pipe, AttendAndExcite([(2, 3)])):
        more.silent(pipe)(**call())
    # Nine channels: latent, mask and masked image.
    import diffusers

    parts = {**tiny_pipeline("sd", in_channels=9).components, "requires_safety_checker": False}
    pipe = more.silent(diffusers.StableDiffusionInpaintPipeline(**parts))
    given = {**tiny_call("sd", steps=2), "image": torch.rand(1, 3, 128, 128), "mask_image": torch.ones(1, 1, 128, 128)}
    with pytest.raises(UnsupportedHost, match="appends channels or tokens"), steer(pipe, AttendAndExcite([(2, 3)])):
        pipe(**given)


def test_a_loop_that_changes_the_latent_before_the_step_is_refused() -> None:
    """What the scheduler is given must be what the model was asked on."""
    pipe, call = double("sd"), call_of("sd", text=True, steps=1)
    with (
        pytest.raises(UnsupportedHost, match="steps from another tensor"),
        steer(pipe, AttendAndExcite(["cube"], {}, until=1)),
    ):
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda noise, t, sample, **rest: step(noise, t, sample + 1.0, **rest)
        try:
            pipe(**call)
        finally:
            pipe.scheduler.step = step
