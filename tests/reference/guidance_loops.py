"""Weak-branch guidance, written out: attention maps edited densely and sampling loops with one call per branch.

Nothing here is fast and nothing here imports the library. Notation follows ``specs/guidance.md`` 0: u strength, g CFG
scale (1 off), s perturbation scale (0 off), e_c and e_u the conditional and unconditional predictions, e_w the weak
one, made from the conditional inputs. With s = 0 each loop gives the latents of the stock pipeline, bit for bit.

Choices that the spec leaves open, made here:

* A soft mix with a joint target interpolates the whole map, (1 - u) A + u T; text rows of T are those of A unless the
  target is ``joint_identity``.
* SEG in joint attention replaces the queries of image rows only, and text rows keep theirs.
* SEG's finite kernel is limited per axis by that axis' own side, which is the official rule on square grids; reflect
  padding is then always possible.
* Video has no finite blur: only the mean over all tokens is defined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

INF = float("inf")
JOINT = ("joint_identity", "ii_identity", "ii_identity_renorm", "image_rows_identity")


@dataclass(frozen=True)
class Edit:
    """What the weak branch does to the attention map of the selected heads.

    Attributes:
        kind: "identity" (PAG, SoftPAG) or "seg".
        strength: u, the weight of the edited map.
        heads: None for all, a sequence for the same heads in every layer, or a mapping from layer name.
        joint: which reading of "identity" joint attention gets, one of `JOINT`; all agree in self-attention.
        sigma: width of SEG's Gaussian in tokens; infinite for the mean query.
        stage: where SEG smooths, on the output of the projection ("pre_norm") or after norm and rotary positions
            ("post_rope"). They agree where there is neither.
    """

    kind: str = "identity"
    strength: float = 1.0
    heads: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    joint: str = "joint_identity"
    sigma: float = INF
    stage: str = "post_rope"

    def __post_init__(self) -> None:
        if self.kind not in ("identity", "seg"):
            raise ValueError(f"unknown kind {self.kind!r}")
        if self.joint not in JOINT:
            raise ValueError(f"unknown joint reading {self.joint!r}")
        if self.stage not in ("pre_norm", "post_rope"):
            raise ValueError(f"unknown stage {self.stage!r}")

    def weight(self, layer: str, n_heads: int) -> Tensor:
        """u as `[H, 1, 1]`: the strength for selected heads, zero for the others."""
        heads = self.heads[layer] if isinstance(self.heads, Mapping) else self.heads
        u = torch.zeros(n_heads, 1, 1, dtype=torch.float64)
        u[list(range(n_heads)) if heads is None else list(heads)] = self.strength
        return u


# ---------------------------------------------------------------------------------------- maps, by definition


def kernel_size(sigma: float, side: int) -> int:
    """SEG's odd kernel size: 6 sigma rounded up to odd, at most the side (made odd upwards)."""
    wanted = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    return min(wanted, side if side % 2 == 1 else side + 1)


def gaussian_matrix(sigma: float, side: int) -> Tensor:
    """`[side, side]`: row i holds the weights of the 1-D Gaussian at i, with reflected borders. Rows sum to one."""
    size = kernel_size(sigma, side)
    half = size // 2
    taps = [math.exp(-0.5 * ((j - half) / sigma) ** 2) for j in range(size)]
    total = sum(taps)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    for i in range(side):
        for j in range(size):
            source = i + j - half
            if source < 0:
                source = -source
            if source > side - 1:
                source = 2 * (side - 1) - source
            matrix[i, source] += taps[j] / total
    return matrix


def smoothing_matrix(sigma: float, n: int, grid: tuple[int, int] | None) -> Tensor:
    """`[n, n]`: what SEG applies to the n image queries, laid out in row-major order on the grid."""
    if math.isinf(sigma):
        return torch.full((n, n), 1.0 / n, dtype=torch.float64)
    if grid is None:
        raise NotImplementedError("a finite blur needs a two-dimensional grid of tokens")
    height, width = grid
    if height * width != n:
        raise ValueError(f"{n} image tokens do not lie on a grid of {height} x {width}")
    return torch.kron(gaussian_matrix(sigma, height), gaussian_matrix(sigma, width))


def token_grid(grid: tuple[int, int] | None, n: int) -> tuple[int, int] | None:
    """The grid of n tokens at the resolution of a UNet level: the finest one, halved (rounding up) until it fits."""
    if grid is None:
        return None
    height, width = grid
    while height * width > n:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width)


def softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1)


def identity_target(logits: Tensor, image: Tensor, joint: str) -> Tensor:
    """The fully edited map of PAG.

    Args:
        logits: `[B, H, N, N]`, scaled.
        image: `[N]` boolean, true for image tokens; all true in self-attention.
    """
    n = logits.shape[-1]
    eye = torch.eye(n, dtype=logits.dtype, device=logits.device)
    plain = softmax(logits)
    image_row = image[:, None]
    image_to_image = image[:, None] & image[None, :]
    if joint == "joint_identity":
        return eye.expand_as(plain)
    if joint == "image_rows_identity":
        return torch.where(image_row, eye, plain)
    if joint == "ii_identity":
        return softmax(logits.masked_fill(image_to_image & (eye == 0), -INF))
    # ii_identity_renorm: the text columns stay, the image mass of an image row moves to its diagonal
    image_mass = (plain * image_to_image).sum(-1, keepdim=True)
    moved = plain * ~image_to_image + eye * image_mass
    return torch.where(image_row, moved, plain)


# ------------------------------------------------------------------------------------------------- processors


class _Weak:
    """The dense attention core that the processors below share."""

    def __init__(self, edit: Edit, layer: str, grid: tuple[int, int] | None, n_image: int | None) -> None:
        self.edit, self.layer, self.grid, self.n_image = edit, layer, grid, n_image

    def smooth(self, x: Tensor, image: Tensor) -> Tensor:
        """SEG's smoothing of the image rows of `[B, N, ...]`; other rows stay."""
        n = int(image.sum())
        matrix = smoothing_matrix(self.edit.sigma, n, token_grid(self.grid, n)).to(x.device)
        rows = x[:, image].double().flatten(2)
        smoothed = torch.einsum("ij,bjc->bic", matrix, rows).reshape(x[:, image].shape)
        result = x.clone()
        result[:, image] = smoothed.to(x.dtype)
        return result

    def queries(self, raw: Tensor, finish: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Plain and smoothed queries: `finish` takes projections `[B, N, C]` to `[B, N, H, D]` with norm and rotary."""
        query = finish(raw)
        if self.edit.kind != "seg":
            return query, None
        if self.edit.stage == "pre_norm":
            return query, finish(self.smooth(raw, image))
        return query, self.smooth(query, image)

    def attend(self, query: Tensor, smoothed: Tensor | None, key: Tensor, value: Tensor, image: Tensor) -> Tensor:
        """All arguments `[B, N, H, D]`; returns the head outputs flattened, `[B, N, H D]`, before the projection."""
        q, k, v = (x.transpose(1, 2).double() for x in (query, key, value))
        scale = 1 / math.sqrt(q.shape[-1])
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * scale
        if smoothed is None:
            target = identity_target(logits, image, self.edit.joint)
        else:
            weak_q = smoothed.transpose(1, 2).double()
            target = softmax(torch.einsum("bhid,bhjd->bhij", weak_q, k) * scale)
        return self.mix(softmax(logits), target, v).to(query.dtype)

    def mix(self, plain: Tensor, target: Tensor, v: Tensor) -> Tensor:
        u = self.edit.weight(self.layer, v.shape[1]).to(v.device)
        weights = (1 - u) * plain + u * target
        return torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2)


class WeakSelfAttention(_Weak):
    """`Attention` of UNets and PixArt: no rotary positions, optional norms."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            raise ValueError(f"{self.layer} is a cross-attention")
        if attention_mask is not None or hidden_states.ndim != 3 or attn.spatial_norm is not None:
            raise NotImplementedError("masks, four-dimensional inputs and spatial norms")
        residual = hidden_states
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        image = torch.ones(hidden_states.shape[1], dtype=torch.bool, device=hidden_states.device)

        def normed(x: Tensor, norm: nn.Module | None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1))
            return x if norm is None else norm(x)

        query, smoothed = self.queries(attn.to_q(hidden_states), lambda x: normed(x, attn.norm_q), image)
        key = normed(attn.to_k(hidden_states), attn.norm_k)
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))
        out = attn.to_out[1](attn.to_out[0](self.attend(query, smoothed, key, value, image)))
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


class WeakSD3Attention(_Weak):
    """SD3 and SD3.5: tokens in the order [image, text]; `attn2` of SD3.5 has image tokens only."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        n_image = hidden_states.shape[1]

        def finish_image(x: Tensor, norm: nn.Module | None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1))
            return x if norm is None else norm(x)

        everything = torch.ones(n_image, dtype=torch.bool, device=hidden_states.device)
        query, smoothed = self.queries(attn.to_q(hidden_states), lambda x: finish_image(x, attn.norm_q), everything)
        key = finish_image(attn.to_k(hidden_states), attn.norm_k)
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))
        image = everything
        if encoder_hidden_states is not None:
            text_query = finish_image(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)
            text_key = finish_image(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)
            text_value = attn.add_v_proj(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
            query = torch.cat([query, text_query], dim=1)
            smoothed = None if smoothed is None else torch.cat([smoothed, text_query], dim=1)
            key = torch.cat([key, text_key], dim=1)
            value = torch.cat([value, text_value], dim=1)
            image = torch.arange(query.shape[1], device=query.device) < n_image
        out = self.attend(query, smoothed, key, value, image)
        image_out = attn.to_out[1](attn.to_out[0](out[:, :n_image]))
        if encoder_hidden_states is None:
            return image_out
        text_out = out[:, n_image:]
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


class WeakFluxAttention(_Weak):
    """FLUX: tokens in the order [text, image]; single blocks get them concatenated already."""

    @staticmethod
    def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Pairs (2i, 2i + 1) of `[B, N, H, D]` turned by the angles of `[N, D]` cosines and sines."""
        cos, sin = (part[None, :, None, :] for part in rotary)
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        return (x.float() * cos + turned.float() * sin).to(x.dtype)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        double = encoder_hidden_states is not None
        n_text = encoder_hidden_states.shape[1] if double else hidden_states.shape[1] - self.n_image
        n = n_text + self.n_image
        image = torch.arange(n, device=hidden_states.device) >= n_text

        def finish(x: Tensor, norm: nn.Module, text_norm: nn.Module) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1))
            x = torch.cat([text_norm(x[:, :n_text]), norm(x[:, n_text:])], dim=1)
            return self.rotate(x, image_rotary_emb)

        def project(linear: nn.Module, text_linear: nn.Module | None) -> Tensor:
            x = linear(hidden_states)
            return torch.cat([text_linear(encoder_hidden_states), x], dim=1) if double else x

        raw_query = project(attn.to_q, attn.add_q_proj if double else None)
        raw_key = project(attn.to_k, attn.add_k_proj if double else None)
        value = project(attn.to_v, attn.add_v_proj if double else None).unflatten(-1, (attn.heads, -1))
        text_norms = (attn.norm_added_q, attn.norm_added_k) if double else (attn.norm_q, attn.norm_k)
        query, smoothed = self.queries(raw_query, lambda x: finish(x, attn.norm_q, text_norms[0]), image)
        key = finish(raw_key, attn.norm_k, text_norms[1])
        out = self.attend(query, smoothed, key, value, image)
        if not double:
            return out
        return attn.to_out[1](attn.to_out[0](out[:, n_text:])), attn.to_add_out(out[:, :n_text])


class WeakWanAttention(_Weak):
    """Self-attention of Wan: norms over all heads together, then rotary positions; no text tokens."""

    @staticmethod
    def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            raise ValueError(f"{self.layer} is a cross-attention")
        image = torch.ones(hidden_states.shape[1], dtype=torch.bool, device=hidden_states.device)

        def finish(x: Tensor, norm: nn.Module) -> Tensor:
            return self.rotate(norm(x).unflatten(-1, (attn.heads, -1)), rotary_emb)

        query, smoothed = self.queries(attn.to_q(hidden_states), lambda x: finish(x, attn.norm_q), image)
        key = finish(attn.to_k(hidden_states), attn.norm_k)
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))
        return attn.to_out[1](attn.to_out[0](self.attend(query, smoothed, key, value, image)))


class WeakSanaLinearAttention(_Weak):
    """Linear self-attention of Sana: the map is relu(Q) relu(K)' with rows normalised by their sum."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if self.edit.kind != "identity":
            raise NotImplementedError("linear attention has no query to smooth before a softmax")
        query, key = attn.to_q(hidden_states), attn.to_k(hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        value = attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).double() for x in (query, key, value))
        products = torch.einsum("bhid,bhjd->bhij", F.relu(q), F.relu(k))
        plain = products / (products.sum(-1, keepdim=True) + 1e-15)
        eye = torch.eye(plain.shape[-1], dtype=plain.dtype, device=plain.device)
        return attn.to_out[1](attn.to_out[0](self.mix(plain, eye, v).to(hidden_states.dtype)))


_PROCESSORS: dict[str, type[_Weak]] = {
    "UNet2DConditionModel": WeakSelfAttention,
    "PixArtTransformer2DModel": WeakSelfAttention,
    "SD3Transformer2DModel": WeakSD3Attention,
    "FluxTransformer2DModel": WeakFluxAttention,
    "WanTransformer3DModel": WeakWanAttention,
    "SanaTransformer2DModel": WeakSanaLinearAttention,
}


@contextmanager
def edited(
    denoiser: nn.Module, layers: Sequence[str], edit: Edit, grid: tuple[int, int] | None, n_image: int | None = None
) -> Iterator[None]:
    """The attention modules named by `layers` (whole paths) run their edited form inside the context.

    Args:
        grid: rows and columns of image tokens at the finest level; None for video.
        n_image: the number of image tokens, needed by single blocks of FLUX; the grid's area by default.
    """
    processor_class = _PROCESSORS[type(denoiser).__name__]
    if n_image is None and grid is not None:
        n_image = grid[0] * grid[1]
    modules = {layer: denoiser.get_submodule(layer) for layer in layers}
    originals = {layer: module.processor for layer, module in modules.items()}
    try:
        for layer, module in modules.items():
            module.processor = processor_class(edit, layer, grid, n_image)
        yield
    finally:
        for layer, module in modules.items():
            module.processor = originals[layer]


@torch.no_grad()
def weak_forward(
    denoiser: nn.Module, inputs: Mapping[str, Any], layers: Sequence[str], edit: Edit, grid: tuple[int, int] | None
) -> Tensor:
    """One forward of a bare denoiser with the layers edited, for every row of the batch."""
    with edited(denoiser, layers, edit, grid):
        return denoiser(**inputs, return_dict=False)[0]


# ------------------------------------------------------------------------------------------------------ loops

Scale = float | Callable[[int], float]


def at(scale: Scale, step: int) -> float:
    return scale(step) if callable(scale) else scale


def combine(cond: Tensor, uncond: Tensor | None, weak: Tensor, g: float, s: float) -> Tensor:
    """e_u + g (e_c - e_u) + s (e_c - e_w), or e_c + s (e_c - e_w) where CFG is off."""
    strong = cond if uncond is None else uncond + g * (cond - uncond)
    return strong + s * (cond - weak)


def rescale(prediction: Tensor, cond: Tensor, phi: float) -> Tensor:
    """`guidance_rescale`: the standard deviation of each sample pulled towards that of e_c."""
    dims = list(range(1, cond.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / prediction.std(dim=dims, keepdim=True)
    return phi * (prediction * ratio) + (1 - phi) * prediction


def _half(latents: Tensor) -> tuple[int, int]:
    """Rows and columns of 2 by 2 patches."""
    return (latents.shape[-2] // 2, latents.shape[-1] // 2)


def _split(prediction: Tensor, cfg: bool) -> tuple[Tensor, Tensor | None]:
    """(e_c, e_u) of a batch ordered [uncond, cond]."""
    if not cfg:
        return prediction, None
    uncond, cond = prediction.chunk(2)
    return cond, uncond


@torch.no_grad()
def sd_latents(pipe: Any, call: Mapping[str, Any], layers: Sequence[str], edit: Edit, scale: Scale) -> Tensor:
    """Stable Diffusion 1 and 2, any scheduler; with `guidance_rescale` as the PAG pipeline has it."""
    g = call.get("guidance_scale", 7.5)
    phi = call.get("guidance_rescale", 0.0)
    cfg = g > 1
    device = pipe._execution_device
    prompt_embeds, negative = pipe.encode_prompt(
        call.get("prompt"),
        device,
        1,
        cfg,
        call.get("negative_prompt"),
        prompt_embeds=call.get("prompt_embeds"),
        negative_prompt_embeds=call.get("negative_prompt_embeds"),
    )
    both = torch.cat([negative, prompt_embeds]) if cfg else prompt_embeds
    pipe.scheduler.set_timesteps(call["num_inference_steps"], device=device)
    latents = pipe.prepare_latents(
        prompt_embeds.shape[0],
        pipe.unet.config.in_channels,
        call["height"],
        call["width"],
        prompt_embeds.dtype,
        device,
        call.get("generator"),
        call.get("latents"),
    )
    extra = pipe.prepare_extra_step_kwargs(call.get("generator"), call.get("eta", 0.0))
    grid = (latents.shape[-2], latents.shape[-1])
    for step, t in enumerate(pipe.scheduler.timesteps):
        doubled = pipe.scheduler.scale_model_input(torch.cat([latents] * 2) if cfg else latents, t)
        single = doubled[-latents.shape[0] :]
        strong = pipe.unet(doubled, t, encoder_hidden_states=both, return_dict=False)[0]
        with edited(pipe.unet, layers, edit, grid):
            weak = pipe.unet(single, t, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        cond, uncond = _split(strong, cfg)
        prediction = combine(cond, uncond, weak, g, at(scale, step))
        if cfg and phi > 0:
            prediction = rescale(prediction, cond, phi)
        latents = pipe.scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
    return latents


@torch.no_grad()
def sdxl_latents(pipe: Any, call: Mapping[str, Any], layers: Sequence[str], edit: Edit, scale: Scale) -> Tensor:
    """Stable Diffusion XL, without micro-conditions other than the size of the image."""
    g = call.get("guidance_scale", 5.0)
    phi = call.get("guidance_rescale", 0.0)
    cfg = g > 1
    device = pipe._execution_device
    prompt_embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompt=call.get("prompt"),
        device=device,
        do_classifier_free_guidance=cfg,
        negative_prompt=call.get("negative_prompt"),
        prompt_embeds=call.get("prompt_embeds"),
        negative_prompt_embeds=call.get("negative_prompt_embeds"),
        pooled_prompt_embeds=call.get("pooled_prompt_embeds"),
        negative_pooled_prompt_embeds=call.get("negative_pooled_prompt_embeds"),
    )
    batch = prompt_embeds.shape[0]
    pipe.scheduler.set_timesteps(call["num_inference_steps"], device=device)
    latents = pipe.prepare_latents(
        batch,
        pipe.unet.config.in_channels,
        call["height"],
        call["width"],
        prompt_embeds.dtype,
        device,
        call.get("generator"),
        call.get("latents"),
    )
    extra = pipe.prepare_extra_step_kwargs(call.get("generator"), call.get("eta", 0.0))
    size = (call["height"], call["width"])
    time_ids = pipe._get_add_time_ids(
        size, (0, 0), size, dtype=prompt_embeds.dtype, text_encoder_projection_dim=pooled.shape[-1]
    ).repeat(batch, 1)
    cond_kwargs = {"text_embeds": pooled, "time_ids": time_ids}
    both, both_kwargs = prompt_embeds, cond_kwargs
    if cfg:
        both = torch.cat([negative, prompt_embeds])
        both_kwargs = {
            "text_embeds": torch.cat([negative_pooled, pooled]),
            "time_ids": torch.cat([time_ids, time_ids]),
        }
    grid = (latents.shape[-2], latents.shape[-1])
    for step, t in enumerate(pipe.scheduler.timesteps):
        doubled = pipe.scheduler.scale_model_input(torch.cat([latents] * 2) if cfg else latents, t)
        single = doubled[-batch:]
        strong = pipe.unet(doubled, t, encoder_hidden_states=both, added_cond_kwargs=both_kwargs, return_dict=False)[0]
        with edited(pipe.unet, layers, edit, grid):
            weak = pipe.unet(
                single, t, encoder_hidden_states=prompt_embeds, added_cond_kwargs=cond_kwargs, return_dict=False
            )[0]
        cond, uncond = _split(strong, cfg)
        prediction = combine(cond, uncond, weak, g, at(scale, step))
        if cfg and phi > 0:
            prediction = rescale(prediction, cond, phi)
        latents = pipe.scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
    return latents


@torch.no_grad()
def sd3_latents(pipe: Any, call: Mapping[str, Any], layers: Sequence[str], edit: Edit, scale: Scale) -> Tensor:
    """Stable Diffusion 3 and 3.5 with a scheduler that does not shift dynamically."""
    g = call.get("guidance_scale", 7.0)
    cfg = g > 1
    device = pipe._execution_device
    prompt_embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompt=call.get("prompt"),
        prompt_2=None,
        prompt_3=None,
        negative_prompt=call.get("negative_prompt"),
        do_classifier_free_guidance=cfg,
        prompt_embeds=call.get("prompt_embeds"),
        negative_prompt_embeds=call.get("negative_prompt_embeds"),
        pooled_prompt_embeds=call.get("pooled_prompt_embeds"),
        negative_pooled_prompt_embeds=call.get("negative_pooled_prompt_embeds"),
        device=device,
    )
    both = torch.cat([negative, prompt_embeds]) if cfg else prompt_embeds
    both_pooled = torch.cat([negative_pooled, pooled]) if cfg else pooled
    latents = pipe.prepare_latents(
        prompt_embeds.shape[0],
        pipe.transformer.config.in_channels,
        call["height"],
        call["width"],
        prompt_embeds.dtype,
        device,
        call.get("generator"),
        call.get("latents"),
    )
    pipe.scheduler.set_timesteps(call["num_inference_steps"], device=device)

    def forward(x: Tensor, t: Tensor, text: Tensor, vector: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=x,
            timestep=t.expand(x.shape[0]),
            encoder_hidden_states=text,
            pooled_projections=vector,
            return_dict=False,
        )[0]

    for step, t in enumerate(pipe.scheduler.timesteps):
        strong = forward(torch.cat([latents] * 2) if cfg else latents, t, both, both_pooled)
        with edited(pipe.transformer, layers, edit, _half(latents)):
            weak = forward(latents, t, prompt_embeds, pooled)
        prediction = combine(*_split(strong, cfg), weak, g, at(scale, step))
        latents = pipe.scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def pixart_latents(pipe: Any, call: Mapping[str, Any], layers: Sequence[str], edit: Edit, scale: Scale) -> Tensor:
    """PixArt-Sigma: guidance acts on all 2C channels, of which the learned variance is then dropped."""
    g = call.get("guidance_scale", 4.5)
    cfg = g > 1
    device = pipe._execution_device
    prompt_embeds, mask, negative, negative_mask = pipe.encode_prompt(
        call.get("prompt"),
        cfg,
        negative_prompt=call.get("negative_prompt"),
        device=device,
        prompt_embeds=call.get("prompt_embeds"),
        negative_prompt_embeds=call.get("negative_prompt_embeds"),
        prompt_attention_mask=call.get("prompt_attention_mask"),
        negative_prompt_attention_mask=call.get("negative_prompt_attention_mask"),
    )
    both = torch.cat([negative, prompt_embeds]) if cfg else prompt_embeds
    both_mask = torch.cat([negative_mask, mask]) if cfg else mask
    pipe.scheduler.set_timesteps(call["num_inference_steps"], device=device)
    channels = pipe.transformer.config.in_channels
    latents = pipe.prepare_latents(
        prompt_embeds.shape[0],
        channels,
        call["height"],
        call["width"],
        prompt_embeds.dtype,
        device,
        call.get("generator"),
        call.get("latents"),
    )
    extra = pipe.prepare_extra_step_kwargs(call.get("generator"), call.get("eta", 0.0))

    def forward(x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        return pipe.transformer(
            x,
            encoder_hidden_states=text,
            encoder_attention_mask=text_mask,
            timestep=t.expand(x.shape[0]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]

    for step, t in enumerate(pipe.scheduler.timesteps):
        doubled = pipe.scheduler.scale_model_input(torch.cat([latents] * 2) if cfg else latents, t)
        strong = forward(doubled, t, both, both_mask)
        with edited(pipe.transformer, layers, edit, _half(latents)):
            weak = forward(doubled[-latents.shape[0] :], t, prompt_embeds, mask)
        prediction = combine(*_split(strong, cfg), weak, g, at(scale, step))
        if pipe.transformer.config.out_channels // 2 == channels:
            prediction = prediction.chunk(2, dim=1)[0]
        latents = pipe.scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
    return latents


@torch.no_grad()
def sana_latents(pipe: Any, call: Mapping[str, Any], layers: Sequence[str], edit: Edit, scale: Scale) -> Tensor:
    """Sana: linear self-attention, one token per latent pixel."""
    g = call.get("guidance_scale", 4.5)
    cfg = g > 1
    device = pipe._execution_device
    prompt_embeds, mask, negative, negative_mask = pipe.encode_prompt(
        call.get("prompt"),
        cfg,
        negative_prompt=call.get("negative_prompt"),
        device=device,
        prompt_embeds=call.get("prompt_embeds"),
        negative_prompt_embeds=call.get("negative_prompt_embeds"),
        prompt_attention_mask=call.get("prompt_attention_mask"),
        negative_prompt_attention_mask=call.get("negative_prompt_attention_mask"),
    )
    both = torch.cat([negative, prompt_embeds]) if cfg else prompt_embeds
    both_mask = torch.cat([negative_mask, mask]) if cfg else mask
    pipe.scheduler.set_timesteps(call["num_inference_steps"], device=device)
    latents = pipe.prepare_latents(
        prompt_embeds.shape[0],
        pipe.transformer.config.in_channels,
        call["height"],
        call["width"],
        torch.float32,
        device,
        call.get("generator"),
        call.get("latents"),
    )
    extra = pipe.prepare_extra_step_kwargs(call.get("generator"), call.get("eta", 0.0))
    grid = (latents.shape[-2], latents.shape[-1])

    def forward(x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        return pipe.transformer(
            x,
            encoder_hidden_states=text,
            encoder_attention_mask=text_mask,
            timestep=t.expand(x.shape[0]) * pipe.transformer.config.timestep_scale,
            return_dict=False,
        )[0].float()

    for step, t in enumerate(pipe.scheduler.timesteps):
        strong = forward(torch.cat([latents] * 2) if cfg else latents, t, both, both_mask)
        with edited(pipe.transformer, layers, edit, grid):
            weak = forward(latents, t, prompt_embeds, mask)
        prediction = combine(*_split(strong, cfg), weak, g, at(scale, step))
        latents = pipe.scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
    return latents


@torch.no_grad()
def flux_latents(pipe: Any, call: Mapping[str, Any], layers: Sequence[str], edit: Edit, scale: Scale) -> Tensor:
    """FLUX: distilled guidance alone, or true CFG (`true_cfg_scale`) as two calls."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    g = call.get("true_cfg_scale", 1.0)
    cfg = g > 1 and call.get("negative_prompt_embeds") is not None
    device = pipe._execution_device
    prompt_embeds, pooled, text_ids = pipe.encode_prompt(
        prompt=call.get("prompt"),
        prompt_2=None,
        prompt_embeds=call.get("prompt_embeds"),
        pooled_prompt_embeds=call.get("pooled_prompt_embeds"),
        device=device,
    )
    latents, image_ids = pipe.prepare_latents(
        prompt_embeds.shape[0],
        pipe.transformer.config.in_channels // 4,
        call["height"],
        call["width"],
        prompt_embeds.dtype,
        device,
        call.get("generator"),
        call.get("latents"),
    )
    steps = call["num_inference_steps"]
    config = pipe.scheduler.config
    mu = calculate_shift(
        latents.shape[1],
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu, device=device)
    guidance = None
    if pipe.transformer.config.guidance_embeds:
        guidance = torch.full([1], call.get("guidance_scale", 3.5), device=device).expand(latents.shape[0])
    side = 2 * pipe.vae_scale_factor
    grid = (call["height"] // side, call["width"] // side)
    negative, negative_pooled = call.get("negative_prompt_embeds"), call.get("negative_pooled_prompt_embeds")

    def forward(t: Tensor, text: Tensor, vector: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=latents,
            timestep=t.expand(latents.shape[0]).to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=vector,
            encoder_hidden_states=text,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]

    pipe.scheduler.set_begin_index(0)
    for step, t in enumerate(pipe.scheduler.timesteps):
        cond = forward(t, prompt_embeds, pooled)
        uncond = forward(t, negative, negative_pooled) if cfg else None
        with edited(pipe.transformer, layers, edit, grid):
            weak = forward(t, prompt_embeds, pooled)
        prediction = combine(cond, uncond, weak, g, at(scale, step))
        latents = pipe.scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def wan_latents(pipe: Any, call: Mapping[str, Any], layers: Sequence[str], edit: Edit, scale: Scale) -> Tensor:
    """Wan with one expert; CFG as two calls."""
    g = call.get("guidance_scale", 5.0)
    cfg = g > 1
    device = pipe._execution_device
    prompt_embeds, negative = pipe.encode_prompt(
        prompt=call.get("prompt"),
        negative_prompt=call.get("negative_prompt"),
        do_classifier_free_guidance=cfg,
        prompt_embeds=call.get("prompt_embeds"),
        negative_prompt_embeds=call.get("negative_prompt_embeds"),
        device=device,
    )
    pipe.scheduler.set_timesteps(call["num_inference_steps"], device=device)
    latents = pipe.prepare_latents(
        prompt_embeds.shape[0],
        pipe.transformer.config.in_channels,
        call["height"],
        call["width"],
        call["num_frames"],
        torch.float32,
        device,
        call.get("generator"),
        call.get("latents"),
    )

    def forward(t: Tensor, text: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=latents,
            timestep=t.expand(latents.shape[0]),
            encoder_hidden_states=text,
            return_dict=False,
        )[0]

    pipe.scheduler.set_begin_index(0)
    for step, t in enumerate(pipe.scheduler.timesteps):
        cond = forward(t, prompt_embeds)
        uncond = forward(t, negative) if cfg else None
        with edited(pipe.transformer, layers, edit, None):
            weak = forward(t, prompt_embeds)
        prediction = combine(cond, uncond, weak, g, at(scale, step))
        latents = pipe.scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


LOOPS: dict[str, Callable[[Any, Mapping[str, Any], Sequence[str], Edit, Scale], Tensor]] = {
    "sd": sd_latents,
    "sdxl": sdxl_latents,
    "sd3": sd3_latents,
    "sd35": sd3_latents,
    "flux": flux_latents,
    "pixart": pixart_latents,
    "sana": sana_latents,
    "wan": wan_latents,
}


def guided_latents(
    name: str, pipe: Any, call: Mapping[str, Any], layers: Sequence[str], edit: Edit, scale: Scale
) -> Tensor:
    """Final latents of the pipeline family `name`.

    Args:
        pipe: a stock pipeline.
        call: what the pipeline would be called with (`num_inference_steps`, `height` and `width` included).
        layers: whole module paths of the self or joint attentions that the weak branch edits.
        scale: s, or a function of the step.
    """
    return LOOPS[name](pipe, call, layers, edit, scale)
