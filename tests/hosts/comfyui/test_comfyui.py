"""ComfyUI's models steered through its seams: equal to the diffusers host on the same weights, composable, and gone when bypassed.

Run against a stand-in (`stub.py`); and, where ATTNSTEER_COMFYUI names a checkout, against the program itself (`real.py`).
"""

from __future__ import annotations

import functools
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

import attnsteer
import attnsteer.comfyui as nodes_of
from attnsteer import NAG, PAG, SEG, AttentionRefocusing, HeadSet, Intervention, SoftPAG, Where
from attnsteer.errors import CompositionError, SelectionError, UnsupportedHost
from attnsteer.hosts.comfyui.install import install, installed
from attnsteer.hosts.comfyui.passes import SLOT
from attnsteer.hosts.comfyui.sites import layout_of
from attnsteer.hosts.comfyui.words import segment

from . import real, stub

BACKENDS = [
    "stub",
    pytest.param("real", marks=pytest.mark.skipif(not real.CHECKOUT, reason="needs a checkout in ATTNSTEER_COMFYUI")),
]
# Relative to the effect's surroundings: another order of the same sums.
CLOSE = 1e-5


@functools.cache
def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=32,
    ).eval()  # fmt: skip


@functools.cache
def flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


@functools.cache
def sd3() -> Any:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=128, pooled_projection_dim=12, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip


@pytest.fixture(params=BACKENDS)
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "real":
        real.comfy()
        yield real
    else:
        yield from (stub for _ in stub.installed(monkeypatch))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from (stub for _ in stub.installed(monkeypatch))


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


POSITIVE, NEGATIVE, NOISE = drawn(1, 7, 16), drawn(1, 7, 16, seed=2), drawn(2, 4, 16, 16, seed=3)


def sampled(world: Any, model: Any, **how: Any) -> torch.Tensor:
    how = {"positive": world.conds(POSITIVE), "negative": world.conds(NEGATIVE), "noise": NOISE, **how}
    with torch.no_grad():
        return world.sample(model, **how)


def euler(
    world: Any, patcher: Any, predict: Any, noise: torch.Tensor, cfg: float = 7.0, steps: int = 3
) -> torch.Tensor:
    """The same sampling by hand; `predict(x, t) -> (uncond, cond)` asks the diffusers model."""
    ms, schedule = patcher.model.model_sampling, world.sigmas(patcher, steps)
    x = world.start(patcher, noise, schedule)
    for now, then in itertools.pairwise(schedule):
        sigma = now * torch.ones(len(x))
        uncond, cond = (
            ms.calculate_denoised(sigma, out, x) for out in predict(ms.calculate_input(sigma, x), ms.timestep(sigma))
        )
        x = x + (x - (uncond + (cond - uncond) * cfg)) / now * (then - now)
    return x


def by_diffusers(world: Any, patcher: Any, *methods: Intervention, **how: Any) -> torch.Tensor:
    """That loop with the UNet steered in diffusers."""
    model, text = unet(), torch.cat([NEGATIVE.expand(2, -1, -1), POSITIVE.expand(2, -1, -1)])
    predict = lambda x, t: model(torch.cat([x, x]), torch.cat([t, t]).float(), text).sample.chunk(2)  # noqa: E731
    with torch.no_grad():
        if not methods:
            return euler(world, patcher, predict, NOISE, **how)
        with attnsteer.steer(model, *methods) as run, run.branches("uncond", "cond"):
            return euler(world, patcher, predict, NOISE, **how)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    apart = float((one - other).norm() / other.norm())
    assert apart <= CLOSE, apart


NEGATIVE_OF = {"comfy": {"context": NEGATIVE}, "diffusers": {"encoder_hidden_states": NEGATIVE}}
METHODS = {
    "pag": [PAG(3.0)],
    "softpag per head": [SoftPAG(3.0, 0.5, heads=HeadSet({1: [0, 2], 3: [1]}), where=Where(layers=[1, 3]))],
    "seg": [SEG(3.0, sigma=1.5)],
    "mean query": [SEG(2.0, where=Where(layers=[0]))],
    "two": [PAG(1.0), SoftPAG(2.0, 0.5, where=Where(layers=[0]))],
}


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_a_unet_is_steered_as_in_diffusers(world: Any, name: str) -> None:
    patcher = world.unet(unet())
    base = sampled(world, patcher)
    close(base, by_diffusers(world, patcher))
    clone, report = install(patcher, *METHODS[name])
    ours = sampled(world, clone)
    close(ours, by_diffusers(world, patcher, *METHODS[name]))
    assert float((ours - base).norm() / base.norm()) > 1e-3
    assert "fired: " in report.text and "3 steps" in report.text and "did nothing" not in report.text
    assert torch.equal(sampled(world, patcher), base) and torch.equal(sampled(world, clone), ours)


def test_sites_have_the_names_and_numbers_of_diffusers(world: Any) -> None:
    for made, model in ((world.unet, unet()), (world.flux, flux()), (world.sd3, sd3())):
        mine = layout_of(made(model).model.diffusion_model).sites
        assert [(s.name, s.layer, s.kind, s.heads) for s in mine] == [
            (s.name, s.layer, s.kind, s.heads) for s in attnsteer.sites(model)
        ]


# Negative prompts.


@pytest.mark.parametrize(
    ("split", "cfg"),
    [(True, 7.0), *(pytest.param(*case, marks=pytest.mark.long) for case in ((False, 7.0), (False, 1.0), (True, 1.0)))],
)
def test_nag_is_that_of_diffusers_also_where_the_branches_run_apart(alone: Any, split: bool, cfg: float) -> None:
    stub.State.split = split
    patcher = alone.unet(unet())
    clone, report = install(patcher, NAG(NEGATIVE_OF["comfy"], scale=4.0))
    ours = sampled(alone, clone, cfg=cfg)
    close(ours, by_diffusers(alone, patcher, NAG(NEGATIVE_OF["diffusers"], scale=4.0), cfg=cfg))
    assert "NAG fired: 4 of 4 sites" in report.text


@pytest.mark.long
def test_nag_in_the_program_itself_and_with_a_longer_negative_prompt(world: Any) -> None:
    patcher, longer = world.unet(unet()), drawn(1, 14, 16, seed=5)
    clone, _ = install(patcher, NAG({"context": longer}, scale=4.0))
    close(sampled(world, clone), by_diffusers(world, patcher, NAG({"encoder_hidden_states": longer}, scale=4.0)))


@pytest.mark.long
def test_nag_takes_one_negative_prompt_and_all_heads(alone: Any) -> None:
    clone, _ = install(alone.unet(unet()), NAG(NEGATIVE_OF["comfy"], where=Where(layers=[0])))
    with pytest.raises(CompositionError, match=r"NAG is at .*attn2 already"):
        install(clone, NAG(NEGATIVE_OF["comfy"]))
    other, _ = install(clone, NAG(NEGATIVE_OF["comfy"], where=Where(layers=[1])))
    with pytest.raises(CompositionError, match="one negative prompt"):
        sampled(alone, other)
    wrong, _ = install(alone.unet(unet()), NAG(NEGATIVE_OF["diffusers"]))
    with pytest.raises(UnsupportedHost, match='"context"'):
        sampled(alone, wrong)


# Flux.

TEXT, OTHER = drawn(1, 5, 24, seed=6), drawn(1, 5, 24, seed=7)
POOLED, OTHER_POOLED = drawn(1, 12, seed=8), drawn(1, 12, seed=9)
IMAGE = drawn(2, 4, 8, 6, seed=10)


def flux_by_diffusers(world: Any, patcher: Any, *methods: Intervention, cfg: float = 3.0) -> torch.Tensor:
    model = flux()
    text, pooled = torch.cat([OTHER, OTHER, TEXT, TEXT]), torch.cat([OTHER_POOLED, OTHER_POOLED, POOLED, POOLED])
    h, w = IMAGE.shape[2] // 2, IMAGE.shape[3] // 2
    ids = torch.zeros(h, w, 3)
    ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)

    def predict(x: torch.Tensor, t: torch.Tensor) -> Any:
        img = x.view(2, 4, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, h * w, -1)
        out = model(
            hidden_states=torch.cat([img, img]), encoder_hidden_states=text, pooled_projections=pooled,
            timestep=torch.cat([t, t]), img_ids=ids.reshape(-1, 3), txt_ids=torch.zeros(5, 3),
        ).sample  # fmt: skip
        return out.view(4, h, w, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(4, 4, 2 * h, 2 * w).chunk(2)

    with torch.no_grad():
        if not methods:
            return euler(world, patcher, predict, IMAGE, cfg)
        with attnsteer.steer(model, *methods) as run, run.branches("uncond", "cond"):
            return euler(world, patcher, predict, IMAGE, cfg)


def flux_sampled(world: Any, model: Any, cfg: float = 3.0) -> torch.Tensor:
    return sampled(
        world, model, cfg=cfg, noise=IMAGE, positive=world.conds(TEXT, pooled_output=POOLED),
        negative=world.conds(OTHER, pooled_output=OTHER_POOLED),
    )  # fmt: skip


FLUX = {
    "softpag": (SoftPAG(2.0, 0.6, heads=HeadSet({1: [0], 2: [1]}), where=Where(layers=[1, 2])),) * 2,
    "pag": (PAG(2.0, where=Where(layers=[3])),) * 2,
    "seg": (SEG(2.0, sigma=1.0, where=Where(layers=[0, 3])),) * 2,
    "nag": (
        NAG({"context": OTHER, "y": OTHER_POOLED}, scale=3.0),
        NAG({"encoder_hidden_states": OTHER, "pooled_projections": OTHER_POOLED}, scale=3.0),
    ),
}


@pytest.mark.parametrize("name", [n if n == "nag" else pytest.param(n, marks=pytest.mark.long) for n in FLUX])
def test_flux_is_steered_as_in_diffusers(world: Any, name: str) -> None:
    patcher = world.flux(flux())
    ours, theirs = FLUX[name]
    base = flux_sampled(world, patcher)
    close(base, flux_by_diffusers(world, patcher))
    clone, report = install(patcher, ours)
    steered = flux_sampled(world, clone)
    close(steered, flux_by_diffusers(world, patcher, theirs))
    assert float((steered - base).norm() / base.norm()) > 1e-4 and "did nothing" not in report.text
    assert torch.equal(flux_sampled(world, patcher), base)


@pytest.mark.long
def test_flux_needs_layers_and_nag_all_of_them(alone: Any) -> None:
    patcher = alone.flux(flux())
    with pytest.raises(SelectionError, match="needs where="):
        install(patcher, PAG(3.0))
    clone, _ = install(patcher, NAG({"context": OTHER, "y": OTHER_POOLED}, where=Where(layers=[0])))
    with pytest.raises(UnsupportedHost, match="the two streams would part"):
        flux_sampled(alone, clone)
    longer, _ = install(patcher, NAG({"context": drawn(1, 6, 24), "y": OTHER_POOLED}))
    with pytest.raises(UnsupportedHost, match="agree in tokens"):
        flux_sampled(alone, longer)


# SD3, whose first block attends a second time, to the image alone.


def sd3_by_diffusers(world: Any, patcher: Any, *methods: Intervention, cfg: float = 3.0) -> torch.Tensor:
    model = sd3()
    text, pooled = torch.cat([OTHER, OTHER, TEXT, TEXT]), torch.cat([OTHER_POOLED, OTHER_POOLED, POOLED, POOLED])

    def predict(x: torch.Tensor, t: torch.Tensor) -> Any:
        return model(torch.cat([x, x]), text, pooled, torch.cat([t, t])).sample.chunk(2)

    with torch.no_grad():
        if not methods:
            return euler(world, patcher, predict, IMAGE, cfg)
        with attnsteer.steer(model, *methods) as run, run.branches("uncond", "cond"):
            return euler(world, patcher, predict, IMAGE, cfg)


SD3 = {
    "softpag": (SoftPAG(2.0, 0.6, heads=HeadSet({0: [0], 1: [1]}), where=Where(layers=[0, 1], kinds="joint")),) * 2,
    "pag": (PAG(2.0, where=Where(layers=[0])),) * 2,
    "seg": (SEG(2.0, sigma=1.0, where=Where(layers=[0, 1])),) * 2,
    "nag": (
        NAG({"context": OTHER, "y": OTHER_POOLED}, scale=3.0),
        NAG({"encoder_hidden_states": OTHER, "pooled_projections": OTHER_POOLED}, scale=3.0),
    ),
}


@pytest.mark.parametrize("name", [n if n == "nag" else pytest.param(n, marks=pytest.mark.long) for n in SD3])
def test_sd3_is_steered_as_in_diffusers(world: Any, name: str) -> None:
    patcher = world.sd3(sd3())
    ours, theirs = SD3[name]
    base = flux_sampled(world, patcher)
    close(base, sd3_by_diffusers(world, patcher))
    clone, report = install(patcher, ours)
    steered = flux_sampled(world, clone)
    close(steered, sd3_by_diffusers(world, patcher, theirs))
    assert float((steered - base).norm() / base.norm()) > 1e-4 and "did nothing" not in report.text
    assert torch.equal(flux_sampled(world, patcher), base)


def test_boxes_are_refused_in_sd3(alone: Any) -> None:
    clone, _ = install(alone.sd3(sd3()), BOXES.new(where=Where(layers=[0])))
    with pytest.raises(UnsupportedHost, match="blocks of SD3 compute theirs anew"):
        flux_sampled(alone, clone)


# Nothing changed, nothing left behind.


@pytest.mark.parametrize(
    "neutral",
    [PAG(0.0), SoftPAG(3.0, 0.0), NAG(NEGATIVE_OF["comfy"], scale=0.0), PAG(3.0, where=Where(steps=(0.9, 1.0)))],
)
def test_neutral_strengths_change_no_bit(world: Any, neutral: Intervention) -> None:
    patcher = world.unet(unet())
    clone, report = install(patcher, neutral)
    assert torch.equal(sampled(world, clone), sampled(world, patcher))
    assert "did nothing" in report.text


@pytest.mark.long
@pytest.mark.parametrize("deep", [False, True])
def test_clones_share_what_acts_and_what_reports(alone: Any, deep: bool) -> None:
    stub.State.deep = deep
    patcher = alone.unet(unet())
    one, first = install(patcher, SoftPAG(3.0, 0.5))
    copied = one.clone()
    assert installed(copied) is installed(one) and installed(patcher) is None
    expected = sampled(alone, one)
    assert torch.equal(sampled(alone, copied), expected) and "fired" in first.text
    two, second = install(copied, SEG(2.0, where=Where(layers=[0])))
    both = sampled(alone, two)
    assert "SEG fired" in second.text and "SoftPAG fired" in second.text and first.text == second.text
    close(both, by_diffusers(alone, patcher, SoftPAG(3.0, 0.5), SEG(2.0, where=Where(layers=[0]))))
    # The branch without the second node is still the first one alone.
    assert torch.equal(sampled(alone, one), expected)
    with pytest.raises(CompositionError, match=r"SEG is at .*attn1 already"):
        install(two, SEG(1.0, where=Where(layers=[0])))


@pytest.mark.long
def test_an_exception_leaves_the_model_as_it_was(world: Any) -> None:
    patcher = world.unet(unet())
    base = sampled(world, patcher)
    before = dict(patcher.model_options["transformer_options"])
    clone, report = install(patcher, PAG(3.0))

    def boom(func: Any, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("a node that breaks")

    clone.model_options["transformer_options"][SLOT] = boom
    with pytest.raises(ValueError, match="a node that breaks"):
        sampled(world, clone)
    assert report.text != "not run yet" and patcher.model_options["transformer_options"] == before
    assert torch.equal(sampled(world, patcher), base)
    del clone.model_options["transformer_options"][SLOT]
    assert not torch.equal(sampled(world, clone), base) and "fired" in report.text


# Other nodes.


@pytest.mark.long
def test_a_later_node_that_takes_the_slot_is_called_and_not_lost(world: Any) -> None:
    patcher = world.unet(unet())
    clone, _ = install(patcher, PAG(3.0))
    expected, calls = sampled(world, clone), []

    def other(func: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return func(*args, **kwargs)

    for late in (True, False):
        calls.clear()
        if late:
            taken = clone.clone()
            taken.model_options["transformer_options"][SLOT] = other
        else:
            early = patcher.clone()
            early.model_options["transformer_options"][SLOT] = other
            taken, _ = install(early, PAG(3.0))
        # Its own pass in each step, and no call of the other in the edited self-attention of the weak branch.
        assert torch.equal(sampled(world, taken), expected) and len(calls) >= 3 * (8 + 7)


def test_another_attention_at_a_steered_site_is_refused(alone: Any) -> None:
    clone, _ = install(alone.unet(unet()), PAG(3.0))

    def doubling(func: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * func(*args, **kwargs)

    clone.model_options["transformer_options"][SLOT] = doubling
    with pytest.raises(UnsupportedHost, match=r"doubling computes something else than attention \(100"):
        sampled(alone, clone)


@pytest.mark.long
def test_patches_of_other_nodes_stay_in_place(alone: Any) -> None:
    patcher, seen = alone.unet(unet()), []
    patched = patcher.clone()

    def shifted(n: Any, context: Any, value: Any, extra: Any) -> Any:
        seen.append(extra["block"])
        return n * 1.1, context, value

    patched.model_options["transformer_options"]["patches"] = {"attn2_patch": [shifted]}
    base = sampled(alone, patched)
    count = len(seen)
    clone, _ = install(patched, SoftPAG(3.0, 0.0))
    assert torch.equal(sampled(alone, clone), base) and len(seen) == 3 * count


# Rows.


@pytest.mark.long
def test_splitting_unequal_prompts_and_areas(alone: Any) -> None:
    patcher = alone.unet(unet())
    clone, _ = install(patcher, PAG(3.0), NAG(NEGATIVE_OF["comfy"], scale=4.0))
    whole = sampled(alone, clone)
    stub.State.split = True
    close(sampled(alone, clone), whole)
    stub.State.split = False
    # 14 tokens are repeated to 14, 9 to their own call: the keys of the prompt are what they were.
    for tokens in (14, 9):
        longer = alone.conds(drawn(1, tokens, 16, seed=2))
        plain = sampled(alone, install(patcher, PAG(3.0))[0], negative=longer)
        assert torch.isfinite(plain).all()
    # Two areas, each a crop; the weak branch is that of both.
    halves = [[POSITIVE, {"area": (8, 16, 0, 0)}], [POSITIVE, {"area": (8, 16, 8, 0)}]]
    base = sampled(alone, patcher, positive=halves)
    guided = sampled(alone, install(patcher, SEG(3.0, sigma=1.0))[0], positive=halves)
    by_rows = by_areas(alone, patcher, SEG(3.0, sigma=1.0))
    close(guided, by_rows)
    assert float((guided - base).norm() / base.norm()) > 1e-4
    masks = [[POSITIVE, {"mask": torch.ones(1, 16, 16)}], [POSITIVE, {"mask": torch.ones(1, 16, 16)}]]
    close(sampled(alone, clone, positive=masks), whole)


def by_areas(world: Any, patcher: Any, method: Intervention) -> torch.Tensor:
    """Guidance in diffusers on the two halves, each as a picture of its own."""
    model = unet()

    def predict(x: torch.Tensor, t: torch.Tensor) -> Any:
        uncond = model(x, t.float(), NEGATIVE.expand(2, -1, -1)).sample
        with attnsteer.steer(model, method) as run, run.branches("cond"):
            cond = torch.cat(
                [model(part, t.float(), POSITIVE.expand(2, -1, -1)).sample for part in x.chunk(2, dim=2)], dim=2
            )
        plain = torch.cat(
            [model(part, t.float(), POSITIVE.expand(2, -1, -1)).sample for part in x.chunk(2, dim=2)], dim=2
        )
        # What guidance adds goes into both.
        return uncond + (cond - plain), cond

    with torch.no_grad():
        return euler(world, patcher, predict, NOISE)


@pytest.mark.long
def test_each_sample_has_its_own_strength(alone: Any) -> None:
    patcher = alone.unet(unet())
    each = sampled(alone, install(patcher, SoftPAG(scale=[3.0, 1.0], strength=[0.5, None]))[0])
    alike = sampled(alone, install(patcher, SoftPAG(3.0, 0.5))[0])
    close(each[:1], alike[:1])
    close(each[1:], sampled(alone, patcher)[1:])


@pytest.mark.long
def test_fp16(world: Any) -> None:
    patcher = world.unet(unet(), torch.float16)
    clone, report = install(patcher, SoftPAG(3.0, 0.5), NAG(NEGATIVE_OF["comfy"], scale=4.0))
    ours = sampled(world, clone)
    reference = sampled(world, install(world.unet(unet()), SoftPAG(3.0, 0.5), NAG(NEGATIVE_OF["comfy"], scale=4.0))[0])
    assert float((ours - reference).norm() / reference.norm()) < 2e-2 and "did nothing" not in report.text


def test_other_models_are_refused_by_name() -> None:
    model = types.SimpleNamespace(blocks=[])
    with pytest.raises(UnsupportedHost, match="SimpleNamespace sits"):
        layout_of(model)


# Words and boxes.


def test_words_are_found_in_the_chunks_of_a_prompt() -> None:
    words = {0: "<|startoftext|>", 1: "<|endoftext|>", 2: "a</w>", 3: "fo", 4: "x</w>", 5: "barn</w>"}
    untokenize = lambda chunk: [(pair, words[pair[0]]) for pair in chunk]  # noqa: E731
    chunks = [[(t, 1.0) for t in (0, 2, 3, 4, 1, 1)], [(t, 1.0) for t in (0, 2, 5, 1, 1, 1)]]
    found = segment(chunks, untokenize)
    assert found.text == "a fox a barn " and found.length == 12 and found.content() == [1, 2, 3, 7, 8]
    from attnsteer.maps.phrases import Prompt

    prompt = Prompt(((found,),))
    assert prompt.terms([["fox", "barn"]]) == [[(0, [2, 3]), (1, [8])]]
    with pytest.raises(SelectionError, match="not in the prompt"):
        prompt.terms([["cat"]])


BOXES = AttentionRefocusing(
    boxes={(2, 3): (0.0, 0.0, 0.5, 1.0)}, schedule=((0.0, 1.0, 4.0, 2),), where=Where(layers=[0, 1])
)


@pytest.mark.long
def test_boxes_move_the_latent_as_in_diffusers(alone: Any) -> None:
    from diffusers import EulerDiscreteScheduler

    from attnsteer import zoo

    pipe = zoo.load("shapes-sd")
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", steps_offset=1
    )
    pipe.set_progress_bar_config(disable=True)
    encoded = pipe.encode_prompt("a red circle", "cpu", 1, True, "")
    method = AttentionRefocusing(boxes={(2, 4): (0.0, 0.0, 0.5, 1.0)}, schedule=((0.0, 1.0, 2.0, 2),))
    size = pipe.unet.config.sample_size
    latents = drawn(1, pipe.unet.config.in_channels, size, size)
    with attnsteer.steer(pipe, method):
        theirs = pipe(
            "a red circle", num_inference_steps=3, guidance_scale=4.0, latents=latents, output_type="latent"
        ).images
    patcher = alone.unet(pipe.unet)
    ms, scheduler = patcher.model.model_sampling, pipe.scheduler
    ms.sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    ms.schedule = lambda steps: scheduler.sigmas
    how = {"positive": alone.conds(encoded[0]), "negative": alone.conds(encoded[1]), "cfg": 4.0}
    noise = latents * scheduler.init_noise_sigma / scheduler.sigmas[0]
    base = sampled(alone, patcher, noise=noise, **how)
    clone, report = install(patcher, method)
    ours = sampled(alone, clone, noise=noise, **how)
    close(ours, theirs)
    assert float((ours - base).norm() / base.norm()) > 1e-3 and "AttentionRefocusing fired" in report.text
    assert torch.equal(sampled(alone, patcher, noise=noise, **how), base)


@pytest.mark.long
def test_boxes_in_the_program_itself(world: Any) -> None:
    # Weights are loaded in inference mode there, in which nothing may be kept for a gradient.
    with torch.inference_mode():
        patcher = world.unet(unet())
        held = [*patcher.model.diffusion_model.parameters()]
        clone, report = install(patcher, BOXES)
        ours = world.sample(clone, NOISE.clone(), world.conds(POSITIVE), world.conds(NEGATIVE))
        base = world.sample(patcher, NOISE.clone(), world.conds(POSITIVE), world.conds(NEGATIVE))
    assert float((ours - base).norm() / base.norm()) > 1e-4 and "AttentionRefocusing fired" in report.text
    assert all(a is b for a, b in zip(held, patcher.model.diffusion_model.parameters(), strict=True))
    with pytest.raises(UnsupportedHost, match="steps from another tensor"):
        sampled(world, clone, sampler="heun")
    with pytest.raises(UnsupportedHost, match="noise mask"):
        sampled(world, clone, denoise_mask=torch.ones(1, 1, 16, 16))


# Nodes.


class Clip:
    """Seven tokens: the start, five words, the end."""

    def __init__(self) -> None:
        self.tokenizer = self

    def tokenize(self, text: str) -> dict[str, Any]:
        return {"l": [[(t, 1.0) for t in ["<|startoftext|>", *(f"{w}</w>" for w in text.split()), "<|endoftext|>"]]]}

    def untokenize(self, chunk: Any) -> Any:
        return [(pair, pair[0]) for pair in chunk]


def test_nodes_steer_and_tell(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    server = types.SimpleNamespace(send_progress_text=lambda text, node: told.append((node, text)))
    monkeypatch.setitem(
        sys.modules, "server", types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server))
    )
    nodes, patcher = nodes_of.classic(), alone.unet(unet())

    def run(name: str, number: str = "7", **inputs: Any) -> Any:
        cls = nodes[name]
        given = {k: v[1]["default"] for k, v in cls.INPUT_TYPES()["required"].items() if "default" in v[1]}
        return getattr(cls(), cls.FUNCTION)(unique_id=number, **{**given, **inputs})

    one, report = run("AttnsteerSoftPAG", model=patcher, heads="1: 0, 2\n3: 1")
    two, both = run("AttnsteerNAG", "8", model=one, negative=alone.conds(NEGATIVE))
    out = sampled(alone, two)
    chosen = SoftPAG(3.0, 0.5, heads=HeadSet({1: [0, 2], 3: [1]}), where=Where(layers=[1, 3]))
    close(out, by_diffusers(alone, patcher, chosen, NAG(NEGATIVE_OF["diffusers"])))
    shown = run("AttnsteerReport", latent={}, report=report)
    assert shown["ui"]["text"] == shown["result"] == (report.text,) and report.text == both.text
    assert "SoftPAG fired: 2 of 2 sites" in report.text and "NAG fired: 4 of 4 sites" in report.text
    assert {node for node, _ in told} == {"7", "8"} and all(text == report.text for _, text in told)

    mapped, maps = run("AttnsteerWordMaps", model=patcher, clip=Clip(), text="a red fox runs by", words="red, fox runs")
    assert torch.equal(sampled(alone, mapped), sampled(alone, patcher))
    (images,) = run("AttnsteerMapPreview", latent={}, maps=maps)
    assert images.shape == (2 * 2, 256, 256, 3) and images.amax() == 1.0 and images.std() > 0.01
    boxed, report = run(
        "AttnsteerRefocus",
        model=patcher,
        clip=Clip(),
        text="a red fox runs by",
        boxes="fox: 0.0, 0.0, 0.5, 1.0",
        step_size=4.0,
    )
    assert not torch.equal(sampled(alone, boxed), sampled(alone, patcher)) and "fired" in report.text
    for name, inputs, match in (
        ("AttnsteerSoftPAG", {"model": patcher, "heads": "1, 2"}, "give one layer a line"),
        ("AttnsteerPAG", {"model": patcher, "layers": "9"}, "9"),
        (
            "AttnsteerRefocus",
            {"model": patcher, "clip": Clip(), "text": "a fox", "boxes": "cat: 0, 0, 1, 1"},
            "not in the prompt",
        ),
        (
            "AttnsteerRefocus",
            {"model": patcher, "clip": Clip(), "text": "a fox", "boxes": "fox 0 0 1 1"},
            "give a phrase",
        ),
        ("AttnsteerNAG", {"model": patcher, "negative": alone.conds(NEGATIVE) * 2}, "one negative prompt"),
    ):
        with pytest.raises(SelectionError, match=match):
            run(name, **inputs)


@pytest.mark.skipif(not real.CHECKOUT, reason="needs a checkout in ATTNSTEER_COMFYUI")
def test_nodes_in_the_newer_form() -> None:
    real.comfy()
    found = {cls.define_schema().node_id: cls for cls in nodes_of.current()}
    assert set(found) == set(nodes_of.classic())
    for cls in found.values():
        cls.GET_SCHEMA()
    patcher = real.unet(unet())
    clone, report = (
        found["AttnsteerPAG"].execute(model=patcher, scale=3.0, layers="", steps_from=0.0, steps_to=1.0).result
    )
    sampled(real, clone)
    shown = found["AttnsteerReport"].execute(latent={}, report=report)
    assert shown.result == (report.text,) and "PAG fired" in str(shown.ui.as_dict())


def test_the_pack_hands_its_nodes_over_in_one_form() -> None:
    import asyncio
    import importlib.util
    from pathlib import Path

    folder = Path(__file__).parents[3] / "integrations" / "comfyui"
    spec = importlib.util.spec_from_file_location("attnsteer_pack", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if importlib.util.find_spec("comfy_api") is None:
        assert set(module.NODE_CLASS_MAPPINGS) == set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(nodes_of.classic())
        assert not hasattr(module, "comfy_entrypoint")
    else:
        assert not hasattr(module, "NODE_CLASS_MAPPINGS")
        extension = asyncio.run(module.comfy_entrypoint())
        assert len(asyncio.run(extension.get_node_list())) == len(nodes_of.NODES)
