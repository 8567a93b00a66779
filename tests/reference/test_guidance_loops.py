"""The guidance references against stock pipelines, the official PAG pipelines and closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnsteer.testing import (
    DENOISERS,
    PIPELINES,
    SCHEDULERS,
    STOCHASTIC_SCHEDULERS,
    official_pag,
    self_attention_modules,
    tiny_call,
    tiny_denoiser,
    tiny_denoiser_inputs,
    tiny_pipeline,
)

from .guidance_loops import (
    INF,
    JOINT,
    LOOPS,
    Edit,
    edited,
    guided_latents,
    identity_target,
    kernel_size,
    smoothing_matrix,
    token_grid,
    weak_forward,
)

# What diffusers perturbs by default, as whole paths; `blocks.1` is one block because the tiny models have few.
OFFICIAL_LAYERS = {
    "sd": "mid",
    "sdxl": "mid",
    "sd3": "blocks.1",
    "pixart": "blocks.1",
    "sana": "transformer_blocks.0",
}
IDENTITY = Edit(joint="ii_identity")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and lose much when the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative(a: Tensor, b: Tensor) -> float:
    """The error of the spec's tables: largest absolute difference over largest absolute value."""
    return float((a - b).abs().max() / b.abs().max())


def denoiser_of(name: str, pipe: Any) -> torch.nn.Module:
    return getattr(pipe, PIPELINES[name].denoiser)


def layers_of(name: str, denoiser: torch.nn.Module, part: str = "") -> list[str]:
    return [path for path in self_attention_modules(denoiser) if part in path]


def tiny_grid(name: str) -> tuple[int, int] | None:
    return {"sd": (16, 16), "sdxl": (16, 16), "wan": None}.get(name, (8, 8))


# ------------------------------------------------------------------------------------------------------- stock


@pytest.mark.parametrize("off", [False, True], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("name", LOOPS)
def test_scale_zero_is_the_stock_pipeline_bit_for_bit(name: str, off: bool) -> None:
    pipe = tiny_pipeline(name)
    guidance = {"guidance_scale": 1.0} if off else {}
    if name == "flux":
        guidance = {} if off else {"true_cfg_scale": 4.0}
    call = tiny_call(name, batch=2, **guidance)
    layers = layers_of(name, denoiser_of(name, pipe))[:1]
    assert torch.equal(guided_latents(name, pipe, call, layers, IDENTITY, 0.0), pipe(**call)[0])


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scale_zero_is_stable_diffusion_with_any_scheduler(kind: str) -> None:
    pipe = tiny_pipeline("sd", scheduler=kind)

    def call() -> dict[str, Any]:
        stochastic = kind in STOCHASTIC_SCHEDULERS
        return tiny_call("sd", **({"generator": torch.Generator().manual_seed(1)} if stochastic else {}))

    layers = layers_of("sd", pipe.unet, "mid")
    assert torch.equal(guided_latents("sd", pipe, call(), layers, IDENTITY, 0.0), pipe(**call())[0])


def test_scale_zero_with_distilled_guidance_strings_and_rescale() -> None:
    flux = tiny_pipeline("flux", guidance_embeds=True)
    call = tiny_call("flux", guidance_scale=2.0)
    layers = layers_of("flux", flux.transformer)
    assert torch.equal(guided_latents("flux", flux, call, layers, IDENTITY, 0.0), flux(**call)[0])
    for name in ("sd", "sdxl"):
        pipe = tiny_pipeline(name)
        call = tiny_call(name, text=True, guidance_rescale=0.7, height=96, width=160)
        layers = layers_of(name, pipe.unet, "mid")
        assert torch.equal(guided_latents(name, pipe, call, layers, IDENTITY, 0.0), pipe(**call)[0])


@pytest.mark.parametrize("name", LOOPS)
@torch.no_grad()
def test_a_strength_of_zero_is_the_unedited_denoiser(name: str) -> None:
    model = tiny_denoiser(name)
    inputs = tiny_denoiser_inputs(name, model)
    plain = model(**inputs, return_dict=False)[0]
    processors = {path: module.processor for path, module in self_attention_modules(model).items()}
    out = weak_forward(model, inputs, list(processors), Edit(strength=0.0), tiny_grid(name))
    assert 0 < relative(out, plain) < 5e-6
    assert torch.equal(model(**inputs, return_dict=False)[0], plain)
    assert all(model.get_submodule(path).processor is processor for path, processor in processors.items())


def test_processors_come_back_after_an_exception() -> None:
    model = tiny_denoiser("sd3")
    module = model.get_submodule("transformer_blocks.1.attn")
    original = module.processor
    with pytest.raises(RuntimeError, match="stop"), edited(model, ["transformer_blocks.1.attn"], Edit(), (8, 8)):
        assert module.processor is not original
        raise RuntimeError("stop")
    assert module.processor is original


# ------------------------------------------------------------------------------------------------ official PAG


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("name", OFFICIAL_LAYERS)
def test_pag_is_the_official_pipeline(name: str, guidance: float) -> None:
    pipe = tiny_pipeline(name)
    call = tiny_call(name, batch=2, guidance_scale=guidance)
    layers = layers_of(name, denoiser_of(name, pipe), OFFICIAL_LAYERS[name])
    assert layers
    official = official_pag(name, pipe)(**call, pag_scale=3.0)[0]
    ours = guided_latents(name, pipe, call, layers, IDENTITY, 3.0)
    assert relative(ours, official) < 5e-6
    assert relative(pipe(**call)[0], official) > 1e-2


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_pag_is_official_with_every_scheduler(kind: str) -> None:
    pipe = tiny_pipeline("sd", scheduler=kind)

    def call() -> dict[str, Any]:
        stochastic = kind in STOCHASTIC_SCHEDULERS
        return tiny_call("sd", **({"generator": torch.Generator().manual_seed(1)} if stochastic else {}))

    official = official_pag("sd", pipe)(**call(), pag_scale=3.0)[0]
    ours = guided_latents("sd", pipe, call(), layers_of("sd", pipe.unet, "mid"), IDENTITY, 3.0)
    assert relative(ours, official) < 5e-6


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_pag_is_official_with_rescale_strings_and_a_schedule(name: str) -> None:
    pipe = tiny_pipeline(name)
    call = tiny_call(name, text=True, guidance_rescale=0.7, height=96, width=160)
    layers = layers_of(name, pipe.unet, "up_blocks.0")
    pag = official_pag(name, pipe, layers="up_blocks.0")
    assert relative(guided_latents(name, pipe, call, layers, IDENTITY, 3.0), pag(**call, pag_scale=3.0)[0]) < 5e-6
    # adaptive: s - a (1000 - t), not below zero
    pipe.scheduler.set_timesteps(call["num_inference_steps"])
    scales = [max(0.0, 3.0 - 0.004 * (1000 - float(t))) for t in pipe.scheduler.timesteps]
    assert scales[-1] == 0 < scales[0]
    adaptive = pag(**call, pag_scale=3.0, pag_adaptive_scale=0.004)[0]
    assert relative(guided_latents(name, pipe, call, layers, IDENTITY, scales.__getitem__), adaptive) < 5e-6


def test_the_readings_of_identity_differ_in_joint_attention() -> None:
    for name in ("sd3", "flux"):
        pipe = tiny_pipeline(name)
        call = tiny_call(name, steps=2)
        layers = layers_of(name, pipe.transformer)[1:2]
        results = [guided_latents(name, pipe, call, layers, Edit(joint=joint), 3.0) for joint in JOINT]
        for i, a in enumerate(results):
            for b in results[:i]:
                assert relative(a, b) > 1e-3


def head_outputs(
    name: str, model: torch.nn.Module, layer: str, edit: Edit, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What enters the image rows' output projection of `layer`, and their values, as `[B, N, H, D]`."""
    module = model.get_submodule(layer)
    seen = {}
    hooks = [
        module.to_out[0].register_forward_pre_hook(lambda _, args: seen.update(out=args[0])),
        module.to_v.register_forward_hook(lambda _, args, out: seen.update(value=out)),
    ]
    weak_forward(model, inputs, [layer], edit, tiny_grid(name))
    for hook in hooks:
        hook.remove()
    out, value = (seen[key].unflatten(-1, (module.heads, -1)) for key in ("out", "value"))
    return out, value


@pytest.mark.parametrize("name", LOOPS)
@torch.no_grad()
def test_a_soft_identity_mixes_outputs_with_values_in_its_heads_only(name: str) -> None:
    model = tiny_denoiser(name)
    inputs = tiny_denoiser_inputs(name, model)
    layer = layers_of(name, model)[1]  # the second double block of FLUX
    plain, value = head_outputs(name, model, layer, Edit(heads=[]), inputs)
    for heads in ([1], {layer: [0, 1]}):
        edit = Edit(strength=0.3, heads=heads)
        out, same_value = head_outputs(name, model, layer, edit, inputs)
        assert torch.equal(value, same_value)
        chosen = heads if isinstance(heads, list) else heads[layer]
        expected = plain.clone()
        expected[:, :, chosen] = 0.7 * plain[:, :, chosen] + 0.3 * value[:, :, chosen]
        assert relative(out, expected) < 1e-6
        others = [h for h in range(plain.shape[2]) if h not in chosen]
        assert torch.equal(out[:, :, others], plain[:, :, others])
        assert relative(expected, plain) > 1e-2


@pytest.mark.parametrize("name", ["sd", "pixart", "sd3", "flux", "wan"])
@torch.no_grad()
def test_an_infinite_sigma_gives_every_image_token_the_same_output(name: str) -> None:
    model = tiny_denoiser(name)
    layer = layers_of(name, model)[1]
    out, _ = head_outputs(name, model, layer, Edit("seg"), tiny_denoiser_inputs(name, model))
    assert relative(out, out[:, :1].expand_as(out)) < 1e-6


@torch.no_grad()
def test_an_infinite_sigma_is_attention_of_the_mean_query() -> None:
    model = tiny_denoiser("sd")
    layer = layers_of("sd", model)[1]
    module = model.get_submodule(layer)
    inputs = tiny_denoiser_inputs("sd", model)
    entered = []
    hook = module.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    out, _ = head_outputs("sd", model, layer, Edit("seg"), inputs)
    hook.remove()
    q, k, v = (
        linear(entered[0]).unflatten(-1, (module.heads, -1)).transpose(1, 2)
        for linear in (module.to_q, module.to_k, module.to_v)
    )
    expected = F.scaled_dot_product_attention(q.mean(2, keepdim=True), k, v).transpose(1, 2)
    assert relative(out, expected.expand_as(out)) < 1e-5


# -------------------------------------------------------------------------------------------------- definitions


def random_qkv(n: int = 12, heads: int = 2, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, d, generator=g, dtype=torch.float64) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("order", ["image_first", "text_first"])
def test_targets_by_their_closed_forms(order: str) -> None:
    q, k, v = random_qkv()
    n, n_image = q.shape[2], 9
    image = torch.arange(n) < n_image if order == "image_first" else torch.arange(n) >= n - n_image
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    plain = logits.softmax(-1)
    assert torch.equal(identity_target(logits, image, "joint_identity") @ v, v)
    for joint in JOINT[1:]:
        target = identity_target(logits, image, joint)
        torch.testing.assert_close(target.sum(-1), torch.ones_like(target.sum(-1)))
        assert torch.equal(target[..., ~image, :], plain[..., ~image, :]), "text rows are unchanged"
        off_diagonal = ~torch.eye(n, dtype=torch.bool) & image[:, None] & image[None]
        assert not target[..., off_diagonal].any()
    rows = identity_target(logits, image, "image_rows_identity") @ v
    assert torch.equal(rows[..., image, :], v[..., image, :])

    # logit form: a softmax over the self logit and the text logits
    exp = logits.exp()
    text_part = exp[..., image, :][..., ~image]
    self_part = exp.diagonal(dim1=-2, dim2=-1)[..., image, None]
    numerator = text_part @ v[..., ~image, :] + self_part * v[..., image, :]
    expected = numerator / (text_part.sum(-1, keepdim=True) + self_part)
    torch.testing.assert_close((identity_target(logits, image, "ii_identity") @ v)[..., image, :], expected)

    # renormalised form: p_text O_text + (1 - p_text) V
    p_text = plain[..., image, :][..., ~image].sum(-1, keepdim=True)
    o_text = logits[..., image, :][..., ~image].softmax(-1) @ v[..., ~image, :]
    expected = p_text * o_text + (1 - p_text) * v[..., image, :]
    torch.testing.assert_close((identity_target(logits, image, "ii_identity_renorm") @ v)[..., image, :], expected)


def test_all_readings_agree_without_text() -> None:
    q, k, _ = random_qkv()
    image = torch.ones(q.shape[2], dtype=torch.bool)
    for joint in JOINT:
        target = identity_target(q @ k.mT, image, joint)
        torch.testing.assert_close(target, torch.eye(q.shape[2], dtype=target.dtype).expand_as(target))


def official_blur(image: Tensor, size: int, sigma: float) -> Tensor:
    """SEG-SDXL's blur of square `[B, C, S, S]` maps: a depthwise convolution with reflect padding."""
    side = image.shape[-1]
    size = min(size, side - (side % 2 - 1))
    half = (size - 1) * 0.5
    taps = torch.exp(-0.5 * (torch.linspace(-half, half, steps=size, dtype=image.dtype) / sigma) ** 2)
    taps = taps / taps.sum()
    kernel = torch.outer(taps, taps).expand(image.shape[1], 1, size, size)
    padded = F.pad(image, [size // 2] * 4, mode="reflect")
    return F.conv2d(padded, kernel, groups=image.shape[1])


@pytest.mark.parametrize("side", [4, 7, 8])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 100.0])
def test_the_smoothing_matrix_is_the_official_blur(side: int, sigma: float) -> None:
    maps = torch.randn(2, 3, side, side, dtype=torch.float64)
    wanted = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    expected = official_blur(maps, wanted, sigma).flatten(2)
    matrix = smoothing_matrix(sigma, side * side, (side, side))
    torch.testing.assert_close(maps.flatten(2) @ matrix.T, expected)
    torch.testing.assert_close(matrix.sum(1), torch.ones(side * side, dtype=torch.float64))


def test_sizes_of_kernels_and_grids() -> None:
    assert [kernel_size(1.0, side) for side in (3, 4, 6, 7, 16)] == [3, 5, 7, 7, 7]
    assert kernel_size(0.5, 16) == 3 and kernel_size(100.0, 32) == 33
    assert token_grid((16, 24), 16 * 24) == (16, 24)
    assert token_grid((15, 9), 8 * 5) == (8, 5)
    with pytest.raises(ValueError, match="grid"):
        smoothing_matrix(1.0, 12, (3, 5))
    oblong = smoothing_matrix(1.0, 12, (3, 4)).reshape(3, 4, 3, 4)
    assert torch.all(oblong[0, 0, 2, 3] < oblong[0, 0, 0, 0])


@pytest.mark.parametrize("name", ["sd", "sd3", "sd35", "flux", "pixart", "wan"])
@torch.no_grad()
def test_smoothing_blurs_the_logits_along_the_queries(name: str) -> None:
    """Without norm and rotary positions both stages agree; with them they differ."""
    model = tiny_denoiser(name)
    inputs = tiny_denoiser_inputs(name, model)
    layers = layers_of(name, model)[:1]
    sigmas = (INF,) if name == "wan" else (1.0, INF)
    for sigma in sigmas:
        pre, post = (
            weak_forward(model, inputs, layers, Edit("seg", sigma=sigma, stage=stage), tiny_grid(name))
            for stage in ("pre_norm", "post_rope")
        )
        plain = model(**inputs, return_dict=False)[0]
        assert relative(post, plain) > 1e-3
        if name in ("sd35", "flux", "wan"):
            assert relative(pre, post) > 1e-4
        else:
            assert relative(pre, post) < 5e-6


def test_seg_refuses_what_has_no_definition() -> None:
    with pytest.raises(NotImplementedError, match="linear"):
        model = tiny_denoiser("sana")
        weak_forward(model, tiny_denoiser_inputs("sana", model), layers_of("sana", model), Edit("seg"), (8, 8))
    with pytest.raises(NotImplementedError, match="grid"):
        model = tiny_denoiser("wan")
        edit = Edit("seg", sigma=1.0)
        weak_forward(model, tiny_denoiser_inputs("wan", model), layers_of("wan", model), edit, None)


def test_every_family_with_a_loop_has_a_tiny_denoiser() -> None:
    assert set(LOOPS) <= set(DENOISERS)
