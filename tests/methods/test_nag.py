"""Normalised attention guidance against the official arithmetic, on Flux, SD3, UNets and models with projected text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import NAG, PAG, AttendAndExcite, HeadGate, Where, sites, steer
from attnsteer.errors import CompositionError, SelectionError, UnsupportedHost
from attnsteer.methods.nag import normalised
from attnsteer.testing import tiny_denoiser, tiny_denoiser_inputs, tiny_pipeline
from tests.hosts.diffusers.common import BOUND, EFFECT, call_of, guidance, pipeline, relative
from tests.hosts.families import forward
from tests.reference import negative_guidance as slow

RULE = {"l1": (5.0, 2.5, 0.4, 1), "l2": (5.0, 1.2, 0.4, 2)}


def method(negative: Any, norm: str = "l1", **more: Any) -> NAG:
    """As RULE has it: the official scale is phi + 1."""
    scale, tau, alpha, _ = RULE[norm]
    return NAG(negative, scale - 1, tau, alpha, norm=norm, **more)


def randoms(inputs: dict[str, Any], names: tuple[str, ...], batch: int = 1, seed: int = 9) -> dict[str, Tensor]:
    """Another text for each of these arguments."""
    noise = torch.Generator().manual_seed(seed)
    return {n: torch.randn(batch, *inputs[n].shape[1:], generator=noise) for n in names}


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("name", ["flux", "sd3"])
@torch.no_grad()
def test_equal_to_the_official_forward(name: str, norm: str) -> None:
    model = tiny_denoiser(name)
    inputs = tiny_denoiser_inputs(name, model)
    negative = randoms(inputs, ("encoder_hidden_states", "pooled_projections"), batch=2)
    expected = slow.forward(model, inputs, negative, *RULE[norm])
    with steer(model, method(negative, norm)) as run, run.branches("cond"):
        ours = forward(model, inputs)
    assert relative(ours, expected) < BOUND
    assert relative(forward(model, inputs), expected) > EFFECT


def test_of_a_norm_of_zero_nothing_is_left_and_nothing_breaks() -> None:
    zero = torch.zeros(1, 2, 3, 4)
    assert torch.equal(normalised(zero, torch.ones_like(zero), 2.0, 1), zero)
    assert torch.equal(normalised(torch.ones_like(zero), zero, 2.0, 2), zero)


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_negative_prompt_beside_cross_attention(name: str, cfg: bool) -> None:
    """A text: the pipeline's own encoder gives its embeddings. Two prompts, a subset of the sites."""
    pipe = pipeline(name)
    call = call_of(name, text=True, steps=2, **guidance(name, cfg))
    call["prompt"], call["negative_prompt"] = ["a red cube", "a small dog"], ["dark", "photo"]
    call["latents"] = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    own = {"prompt": ["under the tree", "big photo"], "device": "cpu", "do_classifier_free_guidance": False}
    text = pipe.encode_prompt(**own, num_images_per_prompt=1)[0]
    layers = [s.name for s in sites(pipe) if s.kind == "cross"][1:]
    plain = pipe(**call)[0]
    with slow.guided(pipe.unet, layers, text, None, *RULE["l1"]):
        expected = pipe(**call)[0]
    with steer(pipe, method(own["prompt"], where=Where(modules=[n.replace(".", r"\.") for n in layers]))):
        ours = pipe(**call)[0]
    assert relative(ours, expected) < BOUND
    assert relative(plain, expected) > 1e-3
    assert torch.equal(pipe(**call)[0], plain)


@pytest.mark.parametrize("processor", ["AttnProcessor2_0", "AttnProcessor", "Stranger"])
@torch.no_grad()
def test_queries_are_computed_once_where_keys_are_of_the_text_alone(processor: str) -> None:
    """The negative text's keys and values take one query to be had; processors that are not known compute them all."""
    import diffusers.models.attention_processor as known

    model = tiny_denoiser("sd")
    inputs = tiny_denoiser_inputs("sd", model)
    negative = randoms(inputs, ("encoder_hidden_states",), batch=2)
    with steer(model, method(negative)) as run, run.branches("cond"):
        expected = forward(model, inputs)
    own = getattr(known, processor, None) or type(processor, (known.AttnProcessor2_0,), {})
    model.set_attn_processor(own())
    tokens: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if name.endswith("attn2"):
            seen = tokens.setdefault(name, [])
            module.to_q.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[0].shape[1]))
    with steer(model, method(negative)) as run, run.branches("cond"):
        assert relative(forward(model, inputs), expected) < BOUND
    for first, second in tokens.values():
        assert first == (second if processor == "Stranger" else 1) and second > 1


def test_projected_and_masked_text() -> None:
    pipe = pipeline("pixart")
    call = call_of("pixart", steps=2)
    negative = randoms({"encoder_hidden_states": call["prompt_embeds"]}, ("encoder_hidden_states",))
    negative["encoder_attention_mask"] = torch.ones_like(call["prompt_attention_mask"])
    negative["encoder_attention_mask"][:, 3:] = 0
    model, plain = pipe.transformer, pipe(**call)[0]
    layers = [s.name for s in sites(pipe) if s.kind == "cross"]
    with torch.no_grad():
        text = model.caption_projection(negative["encoder_hidden_states"])
    with slow.guided(model, layers, text, negative["encoder_attention_mask"], *RULE["l1"]):
        expected = pipe(**call)[0]
    with steer(pipe, method(negative)):
        ours = pipe(**call)[0]
    assert relative(ours, expected) < BOUND
    assert relative(plain, expected) > 1e-3


@pytest.mark.parametrize("name", ["sana", "wan", "flux"])
def test_conditional_calls_alone_are_guided(name: str) -> None:
    """With the prompt as negative prompt nothing changes; with another one it does, in single and doubled calls."""
    pipe = pipeline(name)
    call = call_of(name, steps=2, **guidance(name, True))
    names = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    own = {k: call[v] for k, v in names.items() if v in call}
    if "prompt_attention_mask" in call:
        own["encoder_attention_mask"] = call["prompt_attention_mask"]
    plain = pipe(**call)[0]
    with steer(pipe, method(own), control=True):
        assert relative(pipe(**call)[0], plain) < BOUND
    with steer(pipe, method({**own, "encoder_hidden_states": own["encoder_hidden_states"].flip(1) * 2.0})):
        assert relative(pipe(**call)[0], plain) > 1e-3


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_each_sample_has_its_own_strength(name: str) -> None:
    pipe = pipeline(name)
    call = call_of(name, batch=3, steps=2)
    inputs = {"encoder_hidden_states": call["prompt_embeds"], "pooled_projections": call.get("pooled_prompt_embeds")}
    negative = randoms(inputs, tuple(k for k, v in inputs.items() if v is not None))
    plain, outs = pipe(**call)[0], {}
    for scale in (4.0, 1.0, (4.0, None, 1.0)):
        with steer(pipe, NAG(negative, scale, alpha=0.5)):
            outs[scale] = pipe(**call)[0]
    each = outs[4.0, None, 1.0]
    assert relative(each[1], plain[1]) < BOUND and relative(each[0], plain[0]) > 1e-3
    assert relative(each[0], outs[4.0][0]) < BOUND and relative(each[2], outs[1.0][2]) < BOUND


def test_steps_and_a_scale_of_zero() -> None:
    """Outside its steps the model runs as it is, with the rows that it was given."""
    pipe = pipeline("sd3")
    call = call_of("sd3", steps=4)
    negative = randoms(
        {"encoder_hidden_states": call["prompt_embeds"], "pooled_projections": call["pooled_prompt_embeds"]},
        ("encoder_hidden_states", "pooled_projections"),
    )
    seen: list[int] = []
    hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        with steer(pipe, NAG(negative, where=Where(steps=(0.0, 0.5)))):
            pipe(**call)
        with steer(pipe, NAG(negative, 0.0), control=True):
            off = pipe(**call)[0]
    finally:
        hook.remove()
    assert seen == [3, 3, 2, 2, *[2] * 4] and torch.equal(off, pipe(**call)[0])


def test_beside_other_methods() -> None:
    """A weak branch has the negative prompt in both of its passes, as the official processors for PAG do."""
    pipe = pipeline("sd")
    call = call_of("sd", steps=1)
    negative = randoms({"encoder_hidden_states": call["prompt_embeds"]}, ("encoder_hidden_states",))
    nag, layers = method(negative), [s.name for s in sites(pipe) if s.kind == "cross"]
    with slow.guided(pipe.unet, layers, negative["encoder_hidden_states"], None, *RULE["l1"]), steer(pipe, PAG(2.0)):
        expected = pipe(**call)[0]
    with steer(pipe, nag, PAG(2.0)):
        assert relative(pipe(**call)[0], expected) < BOUND
    with steer(pipe, PAG(2.0), nag, HeadGate({(0, 0): 1.0}), control=True):
        assert relative(pipe(**call)[0], expected) < BOUND


def test_what_cannot_be_exact_is_refused() -> None:
    flux, sd = pipeline("flux"), pipeline("sd")
    call = call_of("flux", steps=1)
    text = {"encoder_hidden_states": call["prompt_embeds"], "pooled_projections": call["pooled_prompt_embeds"]}
    with pytest.raises(SelectionError, match="the two streams would part"):
        steer(flux, NAG(text, where=Where(layers=[0])))
    with pytest.raises(SelectionError, match="rows are left out"):
        steer(flux, NAG(text, where=Where(rows=(0, 3))))
    with pytest.raises(SelectionError, match="leave out"):
        NAG("dark", where=Where(heads=[0]))
    with pytest.raises(SelectionError, match="give a text"):
        NAG(["dark", 3])
    with pytest.raises(UnsupportedHost, match="is not known"):
        steer(pipeline("qwenimage"), NAG("dark"))
    with pytest.raises(CompositionError, match="2 times"):
        steer(sd, NAG("dark"), NAG("photo"))
    with pytest.raises(CompositionError, match="move the latent"):
        steer(flux, NAG(text), AttendAndExcite([(1, 2)]))
    with pytest.raises(SelectionError, match="cannot encode a prompt"):
        steer(tiny_denoiser("sd"), NAG("dark"))
    short = {**text, "encoder_hidden_states": text["encoder_hidden_states"][:, :3]}
    with pytest.raises(UnsupportedHost, match="must agree"), steer(flux, NAG(short)):
        flux(**call)
    with (
        pytest.raises(SelectionError, match="no 'pooled_projections'"),
        steer(flux, NAG({"encoder_hidden_states": call["prompt_embeds"]})),
    ):
        flux(**call)
    for pipe, names in ((sd, "encoder_hidden_states"), (flux, "encoder_hidden_states and pooled_projections")):
        with pytest.raises(SelectionError, match=f"has 'foo', and of .* {names} can be negative"):
            steer(
                pipe,
                NAG({**text, "foo": text["pooled_projections"]} if pipe is flux else {"foo": torch.ones(1, 8, 32)}),
            )
    given = call_of("sd", text=True, steps=1)
    with pytest.raises(SelectionError, match="2 negative prompts for 1"), steer(sd, NAG(["dark", "photo"])):
        sd(**given)
    compiled = tiny_pipeline("sd")
    compiled.unet.compile_repeated_blocks(backend="eager")
    with pytest.raises(UnsupportedHost, match="compiled"):
        steer(compiled, NAG("dark"))
