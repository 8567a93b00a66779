"""Modular pipelines and guiders: guidance equals the classic pipelines, and a term behind any formula."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import PAG, HeadGate, Where, steer
from attnsteer.errors import UnsupportedHost
from attnsteer.testing import tiny_call, tiny_pipeline
from tests.hosts.diffusers.common import EFFECT, identity_at, relative

SITES = {
    "sdxl": "mid_block.attentions.0.transformer_blocks.0.attn1",
    "sd3": "transformer_blocks.2.attn",
    "wan": "blocks.1.attn1",
}
BLOCKS = {"sdxl": "StableDiffusionXLAutoBlocks", "sd3": "StableDiffusion3AutoBlocks", "wan": "WanBlocks"}


@contextlib.contextmanager
def quiet() -> Any:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def modular(name: str, guider: Any) -> Any:
    """The parts of a tiny classic pipeline in a modular one that starts from embeddings."""
    import diffusers.modular_pipelines as library

    with quiet():
        blocks = getattr(library, BLOCKS[name])()
        for key in list(blocks.sub_blocks):
            if (name != "sdxl" and "text" in key) or key == "decode":
                blocks.sub_blocks.pop(key)
        pipe = blocks.init_pipeline()
        parts = tiny_pipeline(name).components
        pipe.update_components(**{k: v for k, v in parts.items() if v is not None and k in pipe._component_specs})
        pipe.guider = guider
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, name: str, steps: int = 3) -> Tensor:
    call = tiny_call(name, steps=steps, text=name == "sdxl")
    drop = ("return_dict", "output_type", "guidance_scale")
    given = {k: v[0] if k.endswith("prompt") else v for k, v in call.items() if k not in drop}
    with quiet():
        return pipe(**given).get("latents")


def guiders() -> dict[str, Callable[[], Any]]:
    import diffusers.guiders as library

    return {
        "plain": lambda: library.ClassifierFreeGuidance(guidance_scale=5.0),
        "zero star": lambda: library.ClassifierFreeZeroStarGuidance(guidance_scale=5.0),
        "projected": lambda: library.AdaptiveProjectedGuidance(
            guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5
        ),
        "rescaled": lambda: library.ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.7),
        "skipped layers": lambda: library.SkipLayerGuidance(
            guidance_scale=5.0,
            skip_layer_config=library.skip_layer_guidance.LayerSkipConfig(
                indices=[0], fqn="mid_block.attentions.0.transformer_blocks"
            ),
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        ),
    }


def method(name: str, scale: float = 2.0) -> PAG:
    return PAG(scale, joint="joint_identity", where=Where(modules=SITES[name].replace(".", r"\.")))


LONG = pytest.mark.long


@pytest.mark.parametrize("name", ["sdxl", pytest.param("sd3", marks=LONG), pytest.param("wan", marks=LONG)])
def test_guidance_equals_the_classic_pipeline(name: str) -> None:
    with quiet():
        pipe = modular(name, guiders()["plain"]())
    classic = tiny_pipeline(name)
    call = tiny_call(name, steps=3, text=name == "sdxl")
    with quiet():
        plain = classic(**call)[0]
        with steer(classic, method(name)):
            expected = classic(**call)[0]
    unsteered = run(pipe, name)
    with steer(pipe, method(name)):
        ours = run(pipe, name)
    assert relative(ours.reshape(expected.shape), expected) < 1e-5
    assert relative(plain, expected) > EFFECT
    assert torch.equal(run(pipe, name), unsteered)


def by_hand(guider: Any, unet: Any, scale: float) -> None:
    """The guider with one more pass of the conditional batch, its map exchanged, and the term behind its formula."""
    forward, state = unet.forward, {}
    ready, combine = guider.prepare_models, guider.forward
    prepare = guider.prepare_inputs

    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        state["batches"], state["next"] = prepare(*args, **kwargs), 0
        return state["batches"]

    def prepare_models(denoiser: Any) -> None:
        state["name"] = state["batches"][state["next"]].__guidance_identifier__
        state["next"] += 1
        ready(denoiser)

    def predict(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if state["name"] == "pred_cond":
            with identity_at(unet, SITES["sdxl"]):
                state["term"] = scale * (out[0] - forward(*args, **kwargs)[0])
        return out

    def combined(*args: Any, **kwargs: Any) -> Any:
        out = combine(*args, **kwargs)
        out["pred"] = out.pred + state["term"]
        return out

    guider.prepare_inputs, guider.prepare_models, guider.forward, unet.forward = (
        prepare_inputs, prepare_models, combined, predict,
    )  # fmt: skip


FORMULAS = ["zero star", *(pytest.param(f, marks=LONG) for f in ("projected", "rescaled", "skipped layers"))]


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_term_goes_behind_any_formula(formula: str) -> None:
    from attnsteer.hosts.diffusers.guider import AttnSteerGuider

    with quiet():
        make = guiders()[formula]
        first = modular("sdxl", make())
        plain = run(first, "sdxl")
        first.guider = make()
        with steer(first, method("sdxl", 2.0)):
            ours = run(first, "sdxl")
        first.guider = AttnSteerGuider(make(), method("sdxl", 0.0))
        assert torch.equal(run(first, "sdxl"), plain)
        first.guider = AttnSteerGuider(make(), method("sdxl", 2.0))
        chosen = run(first, "sdxl")
        assert first.guider.audit.to_dict()["interventions"][0]["inside passes"] == 3
        assert "forward" not in vars(first.unet)
        second = modular("sdxl", make())
        by_hand(second.guider, second.unet, 2.0)
        expected = run(second, "sdxl")
    assert relative(ours, expected) < 1e-5
    assert torch.equal(chosen, ours)
    assert relative(plain, expected) > EFFECT


def test_branches_and_an_exchange() -> None:
    with quiet():
        pipe = modular("sdxl", guiders()["plain"]())
        plain = run(pipe, "sdxl", steps=1)
        gate = HeadGate({(3, 0): 0.0}, where=Where(kinds="self", branches="cond"))
        with steer(pipe, gate) as handle:
            one = run(pipe, "sdxl", steps=1)
        assert [r.calls for r in handle.audit.records.values()] == [2]
        with steer(pipe, HeadGate({(3, 0): 0.0}, where=Where(kinds="self"))):
            both = run(pipe, "sdxl", steps=1)
        assert relative(one, plain) > 1e-3 and relative(both, one) > 1e-3
        pipe.guider = guiders()["plain"]()
        run_of = steer(pipe, method("sdxl"), control=True)
        pipe.guider = guiders()["plain"]()
        with pytest.raises(UnsupportedHost, match=r"guider of .* was exchanged"):
            run(pipe, "sdxl", steps=1)
        run_of.remove()


def test_steering_beside_the_perturbed_attention_guider() -> None:
    """It looks processors up by their class, and must find ours; afterwards nothing is left in its table."""
    import diffusers.guiders as library
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    block = "mid_block.attentions.0.transformer_blocks"
    config = library.skip_layer_guidance.LayerSkipConfig(
        indices=[0], fqn=block, skip_attention=False, skip_ff=False, skip_attention_scores=True
    )
    guider = library.PerturbedAttentionGuidance(
        guidance_scale=5.0, perturbed_guidance_config=config, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
    )
    plain, pipe = run(modular("sdxl", guider.new()), "sdxl"), modular("sdxl", guider.new())
    before = dict(AttentionProcessorRegistry._registry)
    where = Where(modules=SITES["sdxl"])
    with steer(pipe, PAG(0.0, where=where), control=True):
        assert torch.equal(run(pipe, "sdxl"), plain)
    with steer(pipe, PAG(2.0, where=where)):
        assert relative(run(pipe, "sdxl"), plain) > EFFECT
    assert before == AttentionProcessorRegistry._registry
