"""Latent optimisation, written out: losses pixel by pixel, attention maps by hand, sampling loops one sample at a time.

Nothing here is fast and nothing here imports the library. A [h, w, M] is the mean cross-attention map of one sample,
S [H, N, N] are self-attention maps, z the latent before a call of the scheduler, i the call's number. Every map comes from a
whole forward of the denoiser on one sample.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------ maps and losses


@functools.cache
def kernel() -> Tensor:
    """The 3 x 3 kernel of the official code in its own single precision: exp(-(x / (2 * 0.5))^2) per axis, over the sum."""
    from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
        pipeline_stable_diffusion_attend_and_excite as official,
    )

    with warnings.catch_warnings():
        # It calls torch.meshgrid in the old way.
        warnings.simplefilter("ignore")
        return official.GaussianSmoothing().weight[0, 0]


def smooth(m: Tensor) -> Tensor:
    """[h, w] blurred; beyond an edge comes the row or column before the last one again."""
    h, w = m.shape
    wide = m[[1, *range(h), h - 2]][:, [1, *range(w), w - 2]]
    near = [(dy, dx) for dy in range(3) for dx in range(3)]
    return sum(kernel()[dy, dx].to(m.dtype) * wide[dy : dy + h, dx : dx + w] for dy, dx in near)


def word_maps(A: Tensor, words: Sequence[Sequence[int]], competing: Sequence[int], blur: bool = True) -> list[Tensor]:
    """softmax over the competing tokens of 100 A, summed over each word's tokens, blurred."""
    P = torch.softmax(100 * A[:, :, list(competing)], dim=-1)
    place = {token: i for i, token in enumerate(competing)}
    found = [sum(P[:, :, place[token]] for token in word) for word in words]
    return [smooth(m) for m in found] if blur else found


def attend_excite(maps: Sequence[Tensor]) -> Tensor:
    """max over words of max(0, 1 - max of the map)."""
    losses = [1 - m.max() for m in maps]
    worst = max(range(len(losses)), key=lambda k: losses[k].item())
    return losses[worst] if losses[worst].item() > 0 else 0 * losses[worst]


Cells = set[tuple[int, int]]


def car_paper(maps: Sequence[Tensor], regions: Sequence[Cells]) -> Tensor:
    """mean_i (1 - max of A_i inside) + mean_i max of A_i outside."""
    total = 0
    for m, region in zip(maps, regions, strict=True):
        pixels = [(y, x) for y in range(m.shape[0]) for x in range(m.shape[1])]
        inside = torch.stack([m[y, x] for y, x in pixels if (y, x) in region])
        outside = torch.stack([m[y, x] for y, x in pixels if (y, x) not in region])
        total = total + 1 - inside.max() + outside.max()
    return total / len(maps)


def car_mask(maps: Sequence[Tensor], regions: Sequence[Cells]) -> Tensor:
    """The same with means in place of maxima: segmentation masks."""
    total = 0
    for m, region in zip(maps, regions, strict=True):
        pixels = [(y, x) for y in range(m.shape[0]) for x in range(m.shape[1])]
        inside = torch.stack([m[y, x] for y, x in pixels if (y, x) in region])
        outside = torch.stack([m[y, x] for y, x in pixels if (y, x) not in region])
        total = total + 1 - inside.mean() + outside.mean()
    return total / len(maps)


def sar_paper(S: Sequence[Tensor], regions: Sequence[Cells], grid: tuple[int, int]) -> Tensor:
    """mean over layers of mean_i sum_{p in B_i} sum_{q outside} S[q, p] / number of pixels outside; S averaged over heads."""
    h, w = grid
    layers = []
    for maps in S:
        m, total = maps.mean(dim=0), 0
        for region in regions:
            outside = [y * w + x for y in range(h) for x in range(w) if (y, x) not in region]
            for y, x in region:
                total = total + m[outside, y * w + x].sum() / len(outside)
        layers.append(total / len(regions))
    return sum(layers) / len(layers)


def car_released(maps: Sequence[Tensor], boxes: Sequence[Sequence[Cells]], i: int) -> tuple[Tensor, float]:
    """(CAR, min_inside) of the released code, one object per word; `boxes`: cells of each box of each word."""
    total, least = 0, 1000.0
    for o, m in enumerate(maps):
        pixels = {(y, x) for y in range(m.shape[0]) for x in range(m.shape[1])}
        at = lambda cells, m=m: torch.stack([m[y, x] for y, x in sorted(cells)]).max()  # noqa: E731
        own = set().union(*boxes[o])
        for box in boxes[o]:
            f = at(box)
            weight = 6 if f < 0.1 else 1 if f < 0.2 else 1 if i < 15 else 0
            total, least = total + weight * (1 - f), min(least, f.item())
        for other in range(len(maps)):
            for box in boxes[other] if other != o else ():
                if box - own:
                    # A pixel that is set to zero still takes part in the maximum; attention is never below zero.
                    g = at(box - own)
                    total = total + (4 if g > 0.15 else 1 if g > 0.1 else 1 if i < 15 else 0) * g
        rest = pixels - set().union(*(cells for parts in boxes for cells in parts))
        total = total + len(boxes[o]) * at(rest) / 2
    return total / len(maps), least


def sar_released(S: Sequence[Tensor], boxes: Sequence[Sequence[Cells]], grid: tuple[int, int]) -> Tensor:
    """Attention mass that leaves each box, mean over its queries and heads, sum over boxes, / words, mean over layers."""
    h, w = grid
    layers = []
    for maps in S:
        total = 0
        for parts in boxes:
            for box in parts:
                outside = [y * w + x for y in range(h) for x in range(w) if (y, x) not in box]
                total = total + sum(maps[:, y * w + x, outside].sum() for y, x in box) / (len(box) * maps.shape[0])
        layers.append(total / len(boxes))
    return sum(layers) / len(layers)


def truncated(box: tuple[float, float, float, float], grid: tuple[int, int]) -> Cells:
    """Cells of a box as the released code takes them."""
    x0, y0, x1, y1 = box
    h, w = grid
    return {(y, x) for y in range(int(y0 * h), int(y1 * h)) for x in range(int(x0 * w), int(x1 * w))}


def centred(box: tuple[float, float, float, float], grid: tuple[int, int]) -> Cells:
    """Cells whose centre lies in a box."""
    x0, y0, x1, y1 = box
    h, w = grid
    inside = lambda a, i, n, b: a <= (i + 0.5) / n < b  # noqa: E731
    return {(y, x) for y in range(h) for x in range(w) if inside(y0, y, h, y1) and inside(x0, x, w, x1)}


# ------------------------------------------------------------------------------------------------ maps of a model


@contextmanager
def recorded(denoiser: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """softmax(q k' / sqrt d) [B, H, n, m] of each named layer that runs in this block, with its graph."""
    found: dict[str, Tensor] = {}
    running: list[str] = []
    plain = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        if not running:
            return plain(query, key, value, attn_mask=attn_mask, **rest)
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        P = torch.softmax(logits if attn_mask is None else logits + attn_mask, dim=-1)
        found[running[-1]] = P
        return P @ value

    hooks = []
    for name in layers:
        module = denoiser.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    F.scaled_dot_product_attention = attention
    try:
        yield found
    finally:
        F.scaled_dot_product_attention = plain
        for hook in hooks:
            hook.remove()


def cross_map(
    maps: Sequence[Tensor], grid: tuple[int, int], text: slice | None = None, image: slice | None = None
) -> Tensor:
    """A [h, w, M] of one sample: mean over layers and heads; in joint attention image rows over text keys, renormalised."""
    rows = []
    for P in maps:
        if text is not None:
            P = P[:, :, image, text]
            P = P / P.sum(dim=-1, keepdim=True)
        rows.append(P[0].reshape(-1, *grid, P.shape[-1]))
    stacked = torch.cat(rows)
    return stacked.sum(dim=0) / stacked.shape[0]


# ------------------------------------------------------------------------------------------------ update rules

# (z [1, ...]) to (loss, whatever the rule needs besides), both of a fresh forward with gradients.
Loss = Callable[[Tensor], tuple[Tensor, Any]]


def step(z: Tensor, loss: Loss, size: float) -> tuple[Tensor, Tensor, Any]:
    """(z - size * gradient, the loss before, what came with it)."""
    with torch.enable_grad():
        z = z.detach().clone().requires_grad_(True)
        value, more = loss(z)
        (gradient,) = torch.autograd.grad(value, z)
    return (z - size * gradient).detach(), value.detach(), more


def attend_excite_rule(
    z: Tensor,
    loss: Loss,
    i: int,
    n: int,
    thresholds: Mapping[int, float],
    until: int,
    most: int = 20,
    size: float = 20.0,
) -> Tensor:
    """Refine while the loss is above its target, then one update."""
    eta = size * math.sqrt(np.linspace(1.0, 0.5, n)[i])
    if i in thresholds and float(step(z, loss, 0.0)[1]) > 1 - thresholds[i]:
        for _ in range(most):
            z, value, _ = step(z, loss, eta)
            if float(value) <= 1 - thresholds[i]:
                break
    return step(z, loss, eta)[0] if i < until else z


# ------------------------------------------------------------------------------------------------ sampling loops

# (z [B, ...], predict, i, number of calls) to z*; predict(b, z [1, ...]) runs the conditional model on sample b.
Optimise = Callable[[Tensor, Callable[[int, Tensor], Tensor], int, int], Tensor]


def _row(value: Any, b: int) -> Any:
    return {k: _row(v, b) for k, v in value.items()} if isinstance(value, dict) else value[b : b + 1]


@torch.no_grad()
def unet_latents(pipe: Any, call: Mapping[str, Any], optimise: Optimise) -> Tensor:
    """Stable Diffusion (XL) with classifier-free guidance; prompts as embeddings."""
    cond, uncond = call["prompt_embeds"], call["negative_prompt_embeds"]
    added, both_added = {}, {}
    if "pooled_prompt_embeds" in call:
        size = (call["height"], call["width"])
        ids = torch.tensor([[*size, 0, 0, *size]] * len(cond), dtype=cond.dtype)
        added = {"added_cond_kwargs": {"text_embeds": call["pooled_prompt_embeds"], "time_ids": ids}}
        pooled = torch.cat([call["negative_pooled_prompt_embeds"], call["pooled_prompt_embeds"]])
        both_added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.cat([ids, ids])}}
    scheduler = pipe.scheduler
    scheduler.set_timesteps(call["num_inference_steps"])
    z = call["latents"] * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):

        def predict(b: int, x: Tensor, t: Tensor = t) -> Tensor:
            x = scheduler.scale_model_input(x, t)
            return pipe.unet(x, t, encoder_hidden_states=cond[b : b + 1], **_row(added, b)).sample

        z = optimise(z, predict, i, len(scheduler.timesteps))
        doubled = scheduler.scale_model_input(torch.cat([z, z]), t)
        e_u, e_c = pipe.unet(doubled, t, encoder_hidden_states=torch.cat([uncond, cond]), **both_added).sample.chunk(2)
        z = scheduler.step(e_u + call["guidance_scale"] * (e_c - e_u), t, z).prev_sample
    return z


@torch.no_grad()
def plms_latents(pipe: Any, call: Mapping[str, Any], optimise: Optimise) -> Tensor:
    """`plms_sampling` and `p_sample_plms` (Attention-Refocusing/attention-refocusing, ldm/models/diffusion/plms.py at 2c265cb).

    Step i optimises the latent once; the second prediction of step 0, at the latent that the first one leads to, does not.
    """
    cond, uncond, steps = call["prompt_embeds"], call["negative_prompt_embeds"], call["num_inference_steps"]
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    # The schedule names the second step's timestep twice, for the second prediction of the first step.
    times = [int(t) for t in scheduler.timesteps]
    times = times[:1] + times[2:]
    assert len(times) == steps
    gap = scheduler.config.num_train_timesteps // steps
    alpha = lambda t: float(scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod)  # noqa: E731
    x, old = call["latents"], []

    def noise(x: Tensor, t: int) -> Tensor:
        e = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([uncond, cond])).sample
        e_u, e_c = e.chunk(2)
        return e_u + call["guidance_scale"] * (e_c - e_u)

    def previous(x: Tensor, e: Tensor, t: int) -> Tensor:
        a, a_prev = alpha(t), alpha(t - gap)
        clean = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
        return math.sqrt(a_prev) * clean + math.sqrt(1 - a_prev) * e

    for i, t in enumerate(times):
        predict = lambda b, x, t=t: pipe.unet(x, t, encoder_hidden_states=cond[b : b + 1]).sample  # noqa: E731
        x = optimise(x, predict, i, steps)
        e = noise(x, t)
        if not old:
            mixed = (e + noise(previous(x, e, t), times[min(1, steps - 1)])) / 2
        elif len(old) == 1:
            mixed = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            mixed = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mixed = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x, old = previous(x, mixed, t), [*old[-2:], e]
    return x


@torch.no_grad()
def sd3_latents(pipe: Any, call: Mapping[str, Any], optimise: Optimise) -> Tensor:
    """Stable Diffusion 3 with classifier-free guidance; prompts as embeddings."""
    texts = call["negative_prompt_embeds"], call["prompt_embeds"]
    pooled = call["negative_pooled_prompt_embeds"], call["pooled_prompt_embeds"]
    scheduler, z = pipe.scheduler, call["latents"]
    scheduler.set_timesteps(call["num_inference_steps"])

    def model(x: Tensor, t: Tensor, text: Tensor, vector: Tensor) -> Tensor:
        times = t.expand(len(x))
        return pipe.transformer(
            hidden_states=x, timestep=times, encoder_hidden_states=text, pooled_projections=vector, return_dict=False
        )[0]

    for i, t in enumerate(scheduler.timesteps):
        predict = lambda b, x, t=t: model(x, t, texts[1][b : b + 1], pooled[1][b : b + 1])  # noqa: E731
        z = optimise(z, predict, i, len(scheduler.timesteps))
        e_u, e_c = model(torch.cat([z, z]), t, torch.cat(texts), torch.cat(pooled)).chunk(2)
        z = scheduler.step(e_u + call["guidance_scale"] * (e_c - e_u), t, z).prev_sample
    return z


@torch.no_grad()
def flux_latents(pipe: Any, call: Mapping[str, Any], optimise: Optimise) -> Tensor:
    """FLUX; with `true_cfg_scale` above one both calls see the moved latent, which is optimised once."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    g = call.get("true_cfg_scale", 1.0)
    z, text, vector = call["latents"], call["prompt_embeds"], call["pooled_prompt_embeds"]
    side, count, scheduler = call["height"] // 16, call["num_inference_steps"], pipe.scheduler
    ids = torch.tensor([[0, y, x] for y in range(side) for x in range(call["width"] // 16)], dtype=z.dtype)
    text_ids = torch.zeros(text.shape[1], 3, dtype=z.dtype)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), mu=calculate_shift(z.shape[1]))

    def model(x: Tensor, t: Tensor, text: Tensor, vector: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=x, timestep=t.expand(len(x)).to(x.dtype) / 1000, guidance=None, pooled_projections=vector,
            encoder_hidden_states=text, txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip

    for i, t in enumerate(scheduler.timesteps):
        predict = lambda b, x, t=t: model(x, t, text[b : b + 1], vector[b : b + 1])  # noqa: E731
        z = optimise(z, predict, i, len(scheduler.timesteps))
        e = model(z, t, text, vector)
        if g > 1:
            e_u = model(z, t, call["negative_prompt_embeds"], call["negative_pooled_prompt_embeds"])
            e = e_u + g * (e - e_u)
        z = scheduler.step(e, t, z).prev_sample
    return z


LOOPS: dict[str, Callable[[Any, Mapping[str, Any], Optimise], Tensor]] = {
    "sd": unet_latents,
    "sdxl": unet_latents,
    "sd3": sd3_latents,
    "flux": flux_latents,
}
