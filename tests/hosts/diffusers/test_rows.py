"""Which rows are conditional, which step it is, and what is refused because neither is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import PAG, HeadGate, SoftPAG, Where, steer
from attnsteer.errors import NothingChanged, SelectionError, UnsupportedHost
from attnsteer.hosts.diffusers.steps import Sampling
from attnsteer.testing import official_pag, tiny_call, tiny_denoiser, tiny_denoiser_inputs, tiny_pipeline
from tests.hosts.diffusers.common import (
    BOUND,
    EFFECT,
    against_a_wrapper,
    at,
    call_of,
    identity_at,
    paths,
    pipeline,
    relative,
)
from tests.reference.guidance_loops import Edit, combine, edited, guided_latents

# ------------------------------------------------------------------------------------------- pipelines, by running


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_two_calls_without_a_context(strength: float, cfg: bool) -> None:
    """FLUX image-to-image: the conditional call and the unconditional one are told apart by their turn."""
    from diffusers import FluxImg2ImgPipeline

    text = tiny_pipeline("flux")
    pipe = FluxImg2ImgPipeline(**text.components)
    pipe.set_progress_bar_config(disable=True)
    layer, state = paths(text)[2], {"call": 0}

    def call() -> dict[str, Any]:
        given = tiny_call("flux", steps=4, true_cfg_scale=4.0 if cfg else 1.0)
        del given["latents"]
        return {
            **given,
            "image": torch.rand(1, 3, 128, 128, generator=noise()),
            "strength": strength,
            "generator": noise(),
        }

    def guide(predict: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor:
        state["call"] += 1
        if not cfg or state["call"] % 2 == 1:
            with edited(pipe.transformer, [layer], Edit(), (8, 8)):
                state["term"] = 3.0 * (out - predict(kwargs))
        return out + state["term"]

    against_a_wrapper(pipe, call, PAG(3.0, joint="joint_identity", where=at([layer])), guide)


@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
def test_image_to_image_steps_and_fractions(scheduler: str) -> None:
    """Steps are those that run; a window of fractions is one of the run, start included."""
    from diffusers import StableDiffusionImg2ImgPipeline

    text = tiny_pipeline("sd", scheduler=scheduler)
    pipe = StableDiffusionImg2ImgPipeline(**{**text.components, "requires_safety_checker": False})
    pipe.set_progress_bar_config(disable=True)
    # half of eight steps; PNDM has one call more
    count = {"ddim": 4, "pndm": 5}[scheduler]
    layers, state = paths(text, "mid_block"), {"times": [], "inside": []}

    def call() -> dict[str, Any]:
        assert len(state["times"]) in (0, count)
        state["times"] = []
        given = tiny_call("sd", steps=8)
        for name in ("latents", "height", "width"):
            del given[name]
        return {**given, "image": torch.rand(1, 3, 128, 128, generator=noise()), "strength": 0.5, "generator": noise()}

    def guide(predict: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor:
        t = float(kwargs["timestep"])
        if t not in state["times"]:
            state["times"].append(t)
        step = state["times"].index(t)
        if step not in state["inside"]:
            return out
        half = {k: v[1:] if isinstance(v, Tensor) and v.ndim else v for k, v in kwargs.items()}
        with edited(pipe.unet, layers, Edit(), (16, 16)):
            term = 3.0 * (out[1:] - predict(half))
        return out + term

    for steps, inside in (((0.0, 0.5), (0, 1, 2)[: -(-count // 2)]), (range(2), (0, 1)), ([1, 3], (1, 3))):
        state["inside"] = inside
        against_a_wrapper(pipe, call, PAG(3.0, where=at(layers, steps=steps)), guide)


@pytest.mark.parametrize("steps", [(0.25, 0.75), [1, 2], 0, (0.0, 0.01), range(3, 9)])
def test_windows_of_steps(steps: Any) -> None:
    pipe = pipeline("sd")
    call = call_of("sd", steps=4)
    inside = {(0.25, 0.75): [1, 2], (0.0, 0.01): [0]}.get(steps) if isinstance(steps, tuple) else None
    inside = inside or ([0] if steps == 0 else [i for i in steps if i < 4])
    expected = guided_latents(
        "sd", pipe, call, paths(pipe, "mid_block"), Edit(), lambda step: 3.0 if step in inside else 0.0
    )
    with steer(pipe, PAG(3.0, where=at(paths(pipe, "mid_block"), steps=steps))) as run:
        # twice: the second run starts at step 0 again
        for _ in range(2):
            assert relative(pipe(**call)[0], expected) < BOUND
    assert run.audit.to_dict()["interventions"][0]["inside passes"] == 2 * len(inside)


def test_a_run_that_was_broken_off_does_not_count() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    text = tiny_pipeline("sd")
    pipe = StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    given = {k: v for k, v in tiny_call("sd", steps=4).items() if k not in ("latents", "height", "width")}
    call = {**given, "image": torch.rand(1, 3, 128, 128, generator=noise())}

    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    with steer(pipe, HeadGate({(2, 0): 0.0}, where=Where(kinds="self", steps=0))) as run:
        hook = pipe.unet.register_forward_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            pipe(**call, strength=1.0)
        hook.remove()
        # half the schedule: its first step is step 0, though its time is below that of the broken run
        pipe(**call, strength=0.5)
    assert [r.calls for r in run.audit.records.values()] == [2]


@pytest.mark.parametrize("part", [{}, {"denoising_end": 0.5}])
def test_timesteps_of_a_run_that_ends_early(part: dict[str, float]) -> None:
    """A base model that leaves the last steps to a refiner: the timesteps are the scheduler's first ones."""
    pipe, scale = tiny_pipeline("sdxl"), {"pag_scale": 3.0, "pag_adaptive_scale": 0.004}
    expected = official_pag("sdxl", pipe, "mid")(**tiny_call("sdxl", steps=8, **part), **scale)[0]
    with steer(pipe, PAG(3.0, adaptive=0.004)):
        assert relative(pipe(**tiny_call("sdxl", steps=8, **part))[0], expected) < BOUND
    with steer(pipe, PAG(3.0)):
        assert relative(pipe(**tiny_call("sdxl", steps=8, **part))[0], expected) > 1e-3
    # A window of fractions is one of the steps that run.
    with steer(pipe, PAG(3.0, where=Where(modules=r"mid_block.*attn1", steps=(0.5, 1.0)))) as run:
        pipe(**tiny_call("sdxl", steps=8, **part))
    assert run.audit.to_dict()["interventions"][0]["inside passes"] == (2 if part else 4)


def test_fractions_need_a_schedule() -> None:
    model = tiny_denoiser("sd")
    run = steer(model, PAG(3.0, where=Where(modules="mid_block.*attn1", steps=(0.0, 0.5))))
    with pytest.raises(SelectionError, match="fractions"), run.branches("cond"):
        model(**tiny_denoiser_inputs("sd", model))
    with pytest.warns(NothingChanged, match="never acted"):
        run.remove()


def test_two_experts_share_one_clock() -> None:
    """Wan 2.2: the steps of the second transformer go on where those of the first ended."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    one = tiny_pipeline("wan")
    second = tiny_denoiser("wan", seed=3)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(**{**one.components, "scheduler": scheduler, "transformer_2": second, "boundary_ratio": 0.8})
    pipe.set_progress_bar_config(disable=True)
    call = tiny_call("wan", steps=5)
    seen: list[tuple[str, float]] = []
    hooks = [
        m.register_forward_pre_hook(lambda _, a, k, n=n: seen.append((n, float(k["timestep"][0]))), with_kwargs=True)
        for n, m in (("transformer", pipe.transformer), ("transformer_2", second))
    ]
    plain = pipe(**call)[0]
    for hook in hooks:
        hook.remove()
    times = list(dict.fromkeys(t for _, t in seen))
    first = {n: [times.index(t) for m, t in seen[::2] if m == n] for n in ("transformer", "transformer_2")}
    assert first["transformer"] and first["transformer_2"]
    where = Where(modules=r".*blocks\.1\.attn1", steps=first["transformer_2"])
    with steer(pipe, PAG(3.0, where=where)) as run:
        steered = pipe(**call)[0]
    assert relative(steered, plain) > EFFECT
    calls = {path.split(".")[0]: r.calls for (_, path), r in run.audit.records.items()}
    # Both experts have a record: the site of the first was there, and never in the selection.
    assert calls == {"transformer": 0, "transformer_2": len(first["transformer_2"])}


def test_instruct_pix2pix_has_three_parts() -> None:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    text = tiny_pipeline("sd", in_channels=8)
    pipe = StableDiffusionInstructPix2PixPipeline(
        **{k: v for k, v in text.components.items() if k != "image_encoder"}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    layers = paths(text, "mid_block")

    def call() -> dict[str, Any]:
        embeds = {k: v for k, v in tiny_call("sd").items() if k.endswith("prompt_embeds")}
        options = {"num_inference_steps": 3, "output_type": "latent", "return_dict": False, "generator": noise()}
        return {
            **embeds,
            **options,
            "image": torch.rand(1, 3, 128, 128, generator=noise()),
            "image_guidance_scale": 1.5,
        }

    def guide(predict: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor:
        first = {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in kwargs.items()}
        with edited(pipe.unet, layers, Edit(), (16, 16)):
            return out + 3.0 * (out[:1] - predict(first))

    against_a_wrapper(pipe, call, PAG(3.0), guide)


# --------------------------------------------------------------------------------------- branches, bare denoisers


@torch.no_grad()
def test_a_bare_denoiser_is_told_its_branches() -> None:
    model = tiny_denoiser("sd")
    inputs = tiny_denoiser_inputs("sd", model, batch=4)
    method = SoftPAG(3.0, 0.5, where=Where(modules="mid_block.*attn1"))
    plain = model(**inputs).sample
    half = {k: v[2:] if v.ndim else v for k, v in inputs.items()}
    alone = model(**half).sample
    with edited(model, ["mid_block.attentions.0.transformer_blocks.0.attn1"], Edit(strength=0.5), (16, 16)):
        weak = model(**half).sample
    run = steer(model, method)
    with pytest.raises(UnsupportedHost, match=r"run\.branches"):
        model(**inputs)
    with run.branches("uncond", "cond"):
        term = 3.0 * (plain[2:] - weak)
        assert relative(model(**inputs).sample, plain + torch.cat([term, term])) < BOUND
        assert relative(model(**inputs, return_dict=False)[0], plain + torch.cat([term, term])) < BOUND
        # positional arguments too
        given = (inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
        assert relative(model(*given).sample, plain + torch.cat([term, term])) < BOUND
    with run.branches("cond"):
        assert relative(model(**half).sample, combine(alone, None, weak, 1.0, 3.0)) < BOUND
    with run.branches("uncond"), pytest.raises(UnsupportedHost, match="conditional branch first"):
        model(**{**half, "timestep": torch.tensor(7)})
    run.remove()
    assert torch.equal(model(**inputs).sample, plain)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_gate_on_one_branch(name: str) -> None:
    """Rows of the doubled batch, or calls of the other kind, stay as they were."""
    pipe = pipeline(name)
    call = call_of(name, steps=1, **({"true_cfg_scale": 4.0} if name == "flux" else {}))
    seen: list[Tensor] = []
    model = pipe.unet if name == "sd" else pipe.transformer
    hook = model.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    pipe(**call)
    plain = torch.cat(seen)
    for branch, untouched in (("cond", "uncond"), ("uncond", "cond")):
        seen.clear()
        with steer(pipe, HeadGate({(2, 0): 0.0, (1, 1): 0.0}, where=Where(branches=branch))):
            pipe(**call)
        rows = torch.cat(seen)
        # FLUX calls the conditional branch first
        cond_at = 1 if name == "sd" else 0
        same = cond_at if untouched == "cond" else 1 - cond_at
        assert relative(rows[same], plain[same]) < 1e-6
        assert relative(rows[1 - same], plain[1 - same]) > 1e-3
    hook.remove()


def test_branches_of_a_bare_denoiser_are_not_guessed() -> None:
    model = tiny_denoiser("sd")
    gate = HeadGate({(2, 0): 0.0}, where=Where(branches="cond"))
    with pytest.raises(SelectionError, match=r"run\.branches"), steer(model, gate):
        model(**tiny_denoiser_inputs("sd", model))


# ----------------------------------------------------------------------------------------------------- refusals


def test_pipelines_that_no_table_lists_are_known_by_their_values() -> None:
    from diffusers import StableDiffusionPipeline

    class Other(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    text = tiny_pipeline("sd")
    pipe = Other(**text.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = tiny_call("sd", steps=2)
    # What holds for one call is nothing for the next, whose prompt was the other's negative one.
    swapped = {**call, "prompt_embeds": call["negative_prompt_embeds"], "negative_prompt_embeds": call["prompt_embeds"]}
    expected, other = (guided_latents("sd", text, c, paths(text, "mid_block"), Edit(), 3.0) for c in (call, swapped))
    with steer(pipe, PAG(3.0)) as run:
        assert relative(pipe(**call)[0], expected) < BOUND
        assert relative(pipe(**swapped)[0], other) < BOUND
        with run.branches("uncond", "cond"):
            assert relative(pipe(**call)[0], expected) < BOUND
    # Equal prompts do not tell, and no table has this pipeline.
    equal = {**call, "negative_prompt_embeds": call["prompt_embeds"]}
    with pytest.raises(UnsupportedHost, match=r"Other .*run\.branches"), steer(pipe, PAG(3.0)):
        pipe(**equal)
    expected = guided_latents("sd", text, equal, paths(text, "mid_block"), Edit(), 3.0)
    with steer(text, PAG(3.0)):
        assert relative(text(**equal)[0], expected) < BOUND


def test_a_pipeline_inside_another_has_its_own_rows_and_steps() -> None:
    from diffusers import DiffusionPipeline

    text = tiny_pipeline("sd")

    class Combined(DiffusionPipeline):
        def __init__(self, unet: Any, scheduler: Any):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)
            self.inner = text

        def __call__(self, **call: Any) -> Any:
            return self.inner(**call)

    call = tiny_call("sd", steps=3)
    expected = guided_latents("sd", text, call, paths(text, "mid_block"), Edit(), 3.0)
    pipe = Combined(text.unet, text.scheduler)
    with steer(pipe, PAG(3.0)):
        assert relative(pipe(**call)[0], expected) < BOUND
    kept = text.unet
    try:
        with pytest.raises(UnsupportedHost, match="exchanged"), steer(pipe, PAG(3.0)):
            text.unet = tiny_denoiser("sd")
            pipe(**call)
    finally:
        text.unet = kept


def test_two_conditional_rows_of_one_latent_are_no_answer() -> None:
    """Where both sides stand in one tensor, and the negative one was projected since, values do not tell them apart."""
    sampling = Sampling(tiny_pipeline("sd"))
    sampling.conditions.labels = lambda values, rows, latent: ["cond"] * rows  # type: ignore[method-assign]
    sampling.latent_rows = 1
    text = torch.zeros(2, 3, 4)
    assert sampling._measured(2, {"sample": text, "encoder_hidden_states": text}, "sample") is None
    sampling.latent_rows = 2
    assert sampling._measured(2, {"sample": text, "encoder_hidden_states": text + 1}, "sample") == ("cond",)


def test_parts_that_do_not_divide_the_rows_are_refused() -> None:
    model = tiny_denoiser("sd")
    run = steer(model, PAG(3.0), control=True)
    with pytest.raises(SelectionError, match="3 rows"), run.branches("uncond", "cond"):
        model(**tiny_denoiser_inputs("sd", model, batch=3))
    run.remove()


def test_other_guidance_that_adds_rows_or_calls_is_refused() -> None:
    pag = official_pag("sd", tiny_pipeline("sd"))
    with (
        pytest.raises(UnsupportedHost, match="3 rows"),
        steer(pag, PAG(3.0, where=Where(modules=".*up_blocks.*attn1"))),
    ):
        pag(**tiny_call("sd", steps=1), pag_scale=3.0)
    pipe = tiny_pipeline("sd3")
    call = tiny_call("sd3", steps=4)
    with pytest.raises(UnsupportedHost, match="other guidance"), steer(pipe, PAG(3.0, where=Where(layers=[2]))):
        pipe(**call, skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)


def test_a_term_goes_behind_a_combination_that_normalises() -> None:
    """Qwen-Image pulls the combination to the norm of the conditional prediction; guidance is added to what comes out."""
    pipe = tiny_pipeline("qwenimage")
    call = tiny_call("qwenimage", steps=2)
    plain = pipe(**call)[0]
    with steer(pipe, PAG(3.0, joint="joint_identity", where=Where(layers=[1]))):
        steered = pipe(**call)[0]
    model, step, state = pipe.transformer, pipe.scheduler.step, {"calls": 0}

    def forward(**kwargs: Any) -> Any:
        out = type(model).forward(model, **{**kwargs, "return_dict": False})
        state["calls"] += 1
        if state["calls"] % 2:
            with identity_at(model, "transformer_blocks.1.attn"):
                state["term"] = 3.0 * (out[0] - type(model).forward(model, **{**kwargs, "return_dict": False})[0])
        return out

    model.forward = forward
    pipe.scheduler.step = lambda noise, *args, **kwargs: step(noise + state["term"], *args, **kwargs)
    expected = pipe(**call)[0]
    assert relative(steered, expected) < BOUND
    assert relative(steered, plain) > EFFECT
