"""A stand-in for ComfyUI's sampling and models: what its seams hand out, when, and in which form. Our own code, written from notes
on how that program behaves; it runs the layers of small diffusers models, so that both hosts can be compared on the same weights.

It follows: the one override slot and the rule of its wrapper; clones that copy options deeply, or lists and dicts only; chunks
with the negative rows first; split batches; keys repeated to the least common multiple; areas that are crops; patches.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

STEPS_OF_TRAINING = 1000


class State:
    """What a test sets: whether every chunk gets a call of its own, and how a clone copies its options."""

    split = False
    deep = True


# Attention.


def kernel(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, attn_precision: Any = None, skip_reshape: bool = False,
    skip_output_reshape: bool = False, **kwargs: Any,
) -> Tensor:  # fmt: skip
    if not skip_reshape:
        q, k, v = (t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def optimized_attention(*args: Any, **kwargs: Any) -> Tensor:
    if "_inside_attn_wrapper" in kwargs:
        return kernel(*args, **kwargs)
    kwargs = {**kwargs, "_inside_attn_wrapper": True}
    override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
    return kernel(*args, **kwargs) if override is None else override(kernel, *args, **kwargs)


# A UNet.


class CrossAttention(nn.Module):
    def __init__(self, attn: Any):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out, self.heads = (
            attn.to_q, attn.to_k, attn.to_v, attn.to_out, attn.heads,
        )  # fmt: skip

    def forward(self, x: Tensor, context: Any, value: Any, options: dict[str, Any]) -> Tensor:
        context = x if context is None else context
        k, v = self.to_k(context), self.to_v(context if value is None else value)
        out = optimized_attention(
            self.to_q(x), k, v, self.heads, None, attn_precision=None, transformer_options=options
        )
        return self.to_out[1](self.to_out[0](out))


class BasicTransformerBlock(nn.Module):
    def __init__(self, block: Any):
        super().__init__()
        self.inner = block
        self.attn1, self.attn2 = CrossAttention(block.attn1), CrossAttention(block.attn2)

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        for norm, name, attn, text in (
            (self.inner.norm1, "attn1_patch", self.attn1, None), (self.inner.norm2, "attn2_patch", self.attn2, context),
        ):  # fmt: skip
            n, value = norm(x), None
            patches = options.get("patches", {}).get(name)
            if patches:
                text = n if text is None else text
                value = text
                extra = {k: v for k, v in options.items() if k not in ("patches", "patches_replace")}
                for patch in patches:
                    n, text, value = patch(n, text, value, extra)
            x = attn(n, text, value, options) + x
        return self.inner.ff(self.inner.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(b) for b in inner.transformer_blocks)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        b, _, h, w = x.shape
        options["activations_shape"] = list(x.shape)
        y = self.inner.proj_in(self.inner.norm(x)).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.transformer_blocks):
            options["block_index"] = i
            y = block(y, context, options)
        return self.inner.proj_out(y.transpose(1, 2).reshape(b, -1, h, w)) + x


class ResBlock(nn.Module):
    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        return self.inner(x, emb)


class Downsample(nn.Module):
    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        return self.inner(x)


class Upsample(Downsample):
    pass


class Conv(Downsample):
    pass


class UNetModel(nn.Module):
    """The layers of a `UNet2DConditionModel`, in that program's blocks."""

    def __init__(self, unet: Any):
        super().__init__()
        unet = copy.deepcopy(unet)
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        self.norm, self.act, self.out = unet.conv_norm_out, unet.conv_act, unet.conv_out
        self.input_blocks = nn.ModuleList([nn.ModuleList([Conv(unet.conv_in)])])
        for block in unet.down_blocks:
            for i, res in enumerate(block.resnets):
                attends = getattr(block, "attentions", None)
                self.input_blocks.append(
                    nn.ModuleList([ResBlock(res), *([SpatialTransformer(attends[i])] if attends else [])])
                )
            if block.downsamplers:
                self.input_blocks.append(nn.ModuleList([Downsample(block.downsamplers[0])]))
        mid = unet.mid_block
        self.middle_block = nn.ModuleList(
            [ResBlock(mid.resnets[0]), SpatialTransformer(mid.attentions[0]), ResBlock(mid.resnets[1])]
        )
        self.output_blocks = nn.ModuleList()
        for block in unet.up_blocks:
            for i, res in enumerate(block.resnets):
                attends = getattr(block, "attentions", None)
                parts = [ResBlock(res), *([SpatialTransformer(attends[i])] if attends else [])]
                if block.upsamplers and i == len(block.resnets) - 1:
                    parts.append(Upsample(block.upsamplers[0]))
                self.output_blocks.append(nn.ModuleList(parts))

    @property
    def dtype(self) -> torch.dtype:
        return self.out.weight.dtype

    def forward(self, x: Tensor, t: Tensor, context: Tensor, options: dict[str, Any], **kwargs: Any) -> Tensor:
        options["original_shape"], options["transformer_index"] = list(x.shape), 0
        emb = self.time_embedding(self.time_proj(t).to(x.dtype))
        kept, h = [], x
        for n, block in enumerate(self.input_blocks):
            options["block"] = ("input", n)
            for part in block:
                h = part(h, emb, context, options)
            kept.append(h)
        options["block"] = ("middle", 0)
        for part in self.middle_block:
            h = part(h, emb, context, options)
        for n, block in enumerate(self.output_blocks):
            options["block"] = ("output", n)
            h = torch.cat([h, kept.pop()], dim=1)
            for part in block:
                h = part(h, emb, context, options)
        return self.out(self.act(self.norm(h)))


# Flux.


class Processor:
    """Flux's attention in that program's terms."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
        options: Any = None,
    ) -> Any:
        split = lambda t: t.unflatten(-1, (attn.heads, -1))  # noqa: E731
        q, k = attn.norm_q(split(attn.to_q(hidden_states))), attn.norm_k(split(attn.to_k(hidden_states)))
        v = split(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            q = torch.cat([attn.norm_added_q(split(attn.add_q_proj(text))), q], dim=1)
            k = torch.cat([attn.norm_added_k(split(attn.add_k_proj(text))), k], dim=1)
            v = torch.cat([split(attn.add_v_proj(text)), v], dim=1)
        q, k = (apply_rotary_emb(t, image_rotary_emb, sequence_dim=1) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = optimized_attention(q, k, v, attn.heads, skip_reshape=True, mask=None, transformer_options=options)
        if encoder_hidden_states is None:
            return out
        n = encoder_hidden_states.shape[1]
        return attn.to_out[1](attn.to_out[0](out[:, n:])), attn.to_add_out(out[:, :n])


class Flux(nn.Module):
    """The layers of a `FluxTransformer2DModel`, in that program's blocks."""

    patch_size = 2

    def __init__(self, model: Any):
        super().__init__()
        self.inner = copy.deepcopy(model)
        self.double_blocks, self.single_blocks = self.inner.transformer_blocks, self.inner.single_transformer_blocks
        self.num_heads = model.config.num_attention_heads
        for block in [*self.double_blocks, *self.single_blocks]:
            block.attn.processor = Processor()

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.proj_out.weight.dtype

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, y: Any = None, guidance: Any = None, ref_latents: Any = None,
        control: Any = None, transformer_options: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        wrappers = [
            f for fs in (transformer_options.get("wrappers", {}).get("diffusion_model", {})).values() for f in fs
        ]
        return Executor(self._forward, wrappers, self)(
            x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs
        )

    def _forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, y: Any = None, guidance: Any = None, ref_latents: Any = None,
        control: Any = None, transformer_options: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        B, C, H, W = x.shape
        h, w, m = H // 2, W // 2, self.inner
        img = m.x_embedder(x.view(B, C, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, -1))
        txt, temb = m.context_embedder(context), m.time_text_embed(timestep * 1000, y)
        ids = torch.zeros(h, w, 3)
        ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)
        rope = m.pos_embed(torch.cat([torch.zeros(context.shape[1], 3), ids.reshape(-1, 3)]))
        replace = transformer_options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.double_blocks):

            def run(a: Any, block: Any = block) -> dict[str, Tensor]:
                more = {"options": a["transformer_options"]}
                out = block(a["img"], a["txt"], temb, rope, joint_attention_kwargs=more)
                return {"txt": out[0], "img": out[1]}

            args = {"img": img, "txt": txt, "vec": temb, "pe": rope, "transformer_options": transformer_options}
            key = ("double_block", i)
            out = replace[key](args, {"original_block": run}) if key in replace else run(args)
            img, txt = out["img"], out["txt"]
        n, both = txt.shape[1], torch.cat([txt, img], dim=1)
        for i, block in enumerate(self.single_blocks):

            def one(a: Any, block: Any = block) -> dict[str, Tensor]:
                more = {"options": a["transformer_options"]}
                out = block(a["img"][:, n:], a["img"][:, :n], temb, rope, joint_attention_kwargs=more)
                return {"img": torch.cat(out, dim=1)}

            args = {"img": both, "vec": temb, "pe": rope, "transformer_options": transformer_options}
            key = ("single_block", i)
            both = (replace[key](args, {"original_block": one}) if key in replace else one(args))["img"]
        out = m.proj_out(m.norm_out(both[:, n:], temb))
        return out.view(B, h, w, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


# SD3.


class JointProcessor:
    """SD3's attention in that program's terms: the text stands first; without a text it is the second one, of the image alone."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, options: Any = None
    ) -> Any:  # fmt: skip
        split = lambda t: t.unflatten(-1, (attn.heads, -1))  # noqa: E731
        normed = lambda norm, t: t if norm is None else norm(t)  # noqa: E731
        q, k = (
            normed(attn.norm_q, split(attn.to_q(hidden_states))),
            normed(attn.norm_k, split(attn.to_k(hidden_states))),
        )
        v, text = split(attn.to_v(hidden_states)), encoder_hidden_states
        if text is not None:
            q = torch.cat([normed(attn.norm_added_q, split(attn.add_q_proj(text))), q], dim=1)
            k = torch.cat([normed(attn.norm_added_k, split(attn.add_k_proj(text))), k], dim=1)
            v = torch.cat([split(attn.add_v_proj(text)), v], dim=1)
        q, k, v = (t.flatten(2) for t in (q, k, v))
        out = optimized_attention(q, k, v, heads=attn.heads, transformer_options=options)
        if text is None:
            return attn.to_out[1](attn.to_out[0](out))
        n = text.shape[1]
        return attn.to_out[1](attn.to_out[0](out[:, n:])), None if attn.context_pre_only else attn.to_add_out(
            out[:, :n]
        )


class JointBlock(nn.Module):
    def __init__(self, inner: Any):
        super().__init__()
        self.inner, self.context_block = inner, inner.norm1_context
        inner.attn.processor = JointProcessor()
        if inner.use_dual_attention:
            inner.attn2.processor = JointProcessor()
        self.x_block = types.SimpleNamespace(x_block_self_attn=inner.use_dual_attention)

    def forward(self, context: Tensor, x: Tensor, c: Tensor, transformer_options: Any) -> Any:
        return self.inner(x, context, c, joint_attention_kwargs={"options": transformer_options})


class MMDiT(nn.Module):
    """The layers of an `SD3Transformer2DModel`, in that program's blocks."""

    patch_size = 2

    def __init__(self, model: Any):
        super().__init__()
        self.inner = copy.deepcopy(model)
        self.joint_blocks = nn.ModuleList(JointBlock(b) for b in self.inner.transformer_blocks)
        self.num_heads = model.config.num_attention_heads

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.proj_out.weight.dtype

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Any = None, y: Any = None, control: Any = None,
        transformer_options: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        m, (h, w) = self.inner, (x.shape[2] // 2, x.shape[3] // 2)
        img, txt = m.pos_embed(x), m.context_embedder(context)
        temb = m.time_text_embed(timesteps, y)
        replace = transformer_options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.joint_blocks):

            def run(a: Any, block: Any = block) -> dict[str, Any]:
                out = block(a["txt"], a["img"], c=a["vec"], transformer_options=a["transformer_options"])
                return {"txt": out[0], "img": out[1]}

            args = {"img": img, "txt": txt, "vec": temb, "transformer_options": transformer_options}
            key = ("double_block", i)
            out = replace[key](args, {"original_block": run}) if key in replace else run(args)
            img, txt = out["img"], out["txt"]
        out = m.proj_out(m.norm_out(img, temb)).view(len(x), h, w, 2, 2, -1)
        return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), -1, 2 * h, 2 * w)


# Sampling.


class Executor:
    def __init__(self, original: Callable[..., Any], wrappers: list[Any], class_obj: Any = None, at: int = 0):
        self.original, self.wrappers, self.class_obj, self.at = original, wrappers, class_obj, at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.at == len(self.wrappers):
            return self.original(*args, **kwargs)
        following = Executor(self.original, self.wrappers, self.class_obj, self.at + 1)
        return self.wrappers[self.at](following, *args, **kwargs)


class Eps:
    """Noise prediction with a linear schedule of betas, as in SD1.x."""

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS_OF_TRAINING) ** 2
        alphas = (1 - betas).cumprod(0)
        self.sigmas = ((1 - alphas) / alphas) ** 0.5

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log()[:, None] - self.sigmas.log()).abs().argmin(dim=1)

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (sigma.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5

    def calculate_denoised(self, sigma: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return x - out * sigma.view(-1, 1, 1, 1)

    def schedule(self, steps: int) -> Tensor:
        return torch.cat([self.sigmas[torch.linspace(STEPS_OF_TRAINING - 1, 1, steps).long()], torch.zeros(1)])


class Flow(Eps):
    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x

    def schedule(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)


class BaseModel:
    def __init__(self, model: nn.Module, sampling: Eps):
        self.diffusion_model, self.model_sampling, self.current_patcher = model, sampling, None

    def apply_model(self, x: Tensor, t: Tensor, context: Tensor, options: dict[str, Any], **more: Any) -> Tensor:
        dtype = self.diffusion_model.dtype
        xc = self.model_sampling.calculate_input(t, x).to(dtype)
        time = self.model_sampling.timestep(t).float()
        y = {"y": more["y"].to(dtype)} if more.get("y") is not None else {}
        out = self.diffusion_model(xc, time, context.to(dtype), transformer_options=options, **y) if y else (
            self.diffusion_model(xc, time, context.to(dtype), options)
        )  # fmt: skip
        return self.model_sampling.calculate_denoised(t, out.float(), x)


class FluxModel(BaseModel):
    pass


FluxModel.__name__ = "Flux"


class Thousandths(Flow):
    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * 1000


class SD3Model(BaseModel):
    """This one is called through wrappers of `apply_model`, which the newer models have too."""

    def apply_model(self, x: Tensor, t: Tensor, context: Tensor, options: dict[str, Any], **more: Any) -> Tensor:
        wrappers = [f for fs in options.get("wrappers", {}).get("apply_model", {}).values() for f in fs]
        return Executor(self._apply_model, wrappers, self)(x, t, None, context, None, options, **more)

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        time = self.model_sampling.timestep(t).float()
        out = self.diffusion_model(x, time, context=c_crossattn, transformer_options=transformer_options, **kwargs)
        return self.model_sampling.calculate_denoised(t, out.float(), x)


def calc_cond_batch(model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Any) -> list[Tensor]:
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {}).get("calc_cond_batch", {})
    return Executor(_calc_cond_batch, [f for fs in wrappers.values() for f in fs])(
        model, conds, x, timestep, model_options
    )


def _calc_cond_batch(model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Any) -> list[Tensor]:
    outs, counts = [torch.zeros_like(x) for _ in conds], [torch.full_like(x, 1e-37) for _ in conds]
    waiting = [(c, i) for i, cond in enumerate(conds) if cond is not None for c in cond]
    model.current_patcher.prepare_state(timestep)
    while waiting:
        first = waiting[0][0]
        together = [j for j in range(len(waiting)) if _concat(waiting[j][0], first)][::-1]
        chosen = [waiting[j] for j in (together[:1] if State.split else together)]
        waiting = [w for w in waiting if not any(w is c for c in chosen)]
        keys = math.lcm(*(c["cross"].shape[1] for c, _ in chosen))
        crops, texts = [], []
        for c, _ in chosen:
            h, w, top, left = c.get("area") or (*x.shape[-2:], 0, 0)
            crops.append(x[..., top : top + h, left : left + w])
            text = c["cross"].repeat(1, keys // c["cross"].shape[1], 1)
            texts.append(text.expand(len(x) // len(text) * len(text), -1, -1) if len(text) == 1 else text)
        options = {**model_options.get("transformer_options", {})}
        options["cond_or_uncond"] = [i for _, i in chosen]
        options["uuids"] = [uuid.uuid4() for _ in chosen]
        options["sigmas"] = timestep
        pooled = [c["pooled"].expand(len(x), -1) for c, _ in chosen if c.get("pooled") is not None]
        out = model.apply_model(
            torch.cat(crops), torch.cat([timestep] * len(chosen)), torch.cat(texts), options,
            y=torch.cat(pooled) if pooled else None,
        ).chunk(len(chosen))  # fmt: skip
        for part, (c, i) in zip(out, chosen, strict=True):
            h, w, top, left = c.get("area") or (*x.shape[-2:], 0, 0)
            mult = c["mask"][:, None] if c.get("mask") is not None else torch.ones_like(part)
            outs[i][..., top : top + h, left : left + w] += part * mult
            counts[i][..., top : top + h, left : left + w] += mult
    return [o / c for o, c in zip(outs, counts, strict=True)]


def _concat(one: dict[str, Any], other: dict[str, Any]) -> bool:
    a, b = one["cross"].shape[1], other["cross"].shape[1]
    size = lambda c: tuple((c.get("area") or ())[:2])  # noqa: E731
    return size(one) == size(other) and (a == b or math.lcm(a, b) // min(a, b) <= 4)


def sampling_function(
    model: Any, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, scale: float, options: Any
) -> Tensor:
    if math.isclose(scale, 1.0) and not options.get("disable_cfg1_optimization"):
        uncond = None
    out = calc_cond_batch(model, [cond, uncond], x, sigma, options)
    result = out[1] + (out[0] - out[1]) * scale
    for f in options.get("sampler_post_cfg_function", ()):
        result = f(
            {
                "denoised": result, "cond": cond, "uncond": uncond, "cond_scale": scale, "model": model, "sigma": sigma, "input": x,
                "uncond_denoised": out[1], "cond_denoised": out[0], "model_options": options,
            }
        )  # fmt: skip
    return result


class Guider:
    def __init__(self, patcher: Any, cfg: float, positive: Any, negative: Any):
        self.patcher, self.cfg, self.inner_model = patcher, cfg, patcher.model
        self.conds = {"positive": _converted(positive), "negative": _converted(negative)}

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        return sampling_function(
            self.inner_model, x, timestep, self.conds["negative"], self.conds["positive"], self.cfg, model_options
        )

    def predict(self, x: Tensor, timestep: Tensor, options: Any) -> Tensor:
        wrappers = self.patcher.wrappers.get("predict_noise", {})
        return Executor(self.predict_noise, [f for fs in wrappers.values() for f in fs], self)(
            x, timestep, options, None
        )

    def inner_sample(
        self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, denoise_mask: Any = None
    ) -> Tensor:
        options = {**self.patcher.model_options}
        transformer = {**options.get("transformer_options", {})}
        transformer["wrappers"] = {k: {a: [*b] for a, b in v.items()} for k, v in self.patcher.wrappers.items()}
        options["transformer_options"] = {**transformer, "sample_sigmas": sigmas}
        return sampler.sampler_function(lambda x, s: self.predict(x, s * torch.ones(len(x)), options), noise, sigmas)

    def sample(self, noise: Tensor, sampler: Any, sigmas: Tensor, denoise_mask: Any = None) -> Tensor:
        wrappers = [f for fs in self.patcher.wrappers.get("outer_sample", {}).values() for f in fs]
        return Executor(self._outer, wrappers, self)(noise, torch.zeros_like(noise), sampler, sigmas, denoise_mask)

    def _outer(self, *args: Any) -> Tensor:
        self.patcher.pre_run()
        try:
            with torch.no_grad():
                return self.inner_sample(*args)
        finally:
            self.patcher.cleanup()


def _converted(conds: Any) -> list[dict[str, Any]]:
    return [{"cross": text, "pooled": more.get("pooled_output"), **more} for text, more in conds]


def sample_euler(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for now, then in itertools.pairwise(sigmas):
        x = x + (x - model(x, now)) / now * (then - now)
    return x


def start(model: ModelPatcher, noise: Tensor, schedule: Tensor) -> Tensor:
    return noise * schedule[0]


def sample_heun(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return sample_euler(model, x, sigmas)


class ModelPatcher:
    def __init__(self, model: BaseModel):
        self.model, self.model_options = model, {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.callbacks: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> ModelPatcher:
        new = ModelPatcher(self.model)
        new.model_options = copy.deepcopy(self.model_options) if State.deep else _containers(self.model_options)
        new.wrappers, new.callbacks = _containers(self.wrappers), _containers(self.callbacks)
        return new

    def add_wrapper_with_key(self, kind: str, key: str, function: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(function)

    def add_callback_with_key(self, kind: str, key: str, function: Any) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(function)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def remove_callbacks_with_key(self, kind: str, key: str) -> None:
        self.callbacks.get(kind, {}).pop(key, None)

    def _call(self, kind: str, *args: Any) -> None:
        for functions in self.callbacks.get(kind, {}).values():
            for function in functions:
                function(self, *args)

    def pre_run(self) -> None:
        self.model.current_patcher = self
        self._call("on_pre_run")

    def prepare_state(self, timestep: Tensor) -> None:
        self._call("on_prepare_state", timestep)

    def cleanup(self) -> None:
        self.model.current_patcher = None
        self._call("on_cleanup")


def _containers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _containers(v) for k, v in value.items()}
    return [_containers(v) for v in value] if isinstance(value, list) else value


# What tests call; `real.py` has the same.


def unet(model: Any, dtype: torch.dtype = torch.float32) -> ModelPatcher:
    return ModelPatcher(BaseModel(UNetModel(model).to(dtype), Eps()))


def flux(model: Any) -> ModelPatcher:
    return ModelPatcher(FluxModel(Flux(model), Flow()))


def sd3(model: Any) -> ModelPatcher:
    return ModelPatcher(SD3Model(MMDiT(model), Thousandths()))


def conds(context: Tensor, extra: Any = None, **more: Any) -> list[list[Any]]:
    return [[context, {**(extra or {}), **more}]]


def sigmas(model: ModelPatcher, steps: int) -> Tensor:
    return model.model.model_sampling.schedule(steps)


def sample(
    model: ModelPatcher, noise: Tensor, positive: Any, negative: Any, cfg: float = 7.0, steps: int = 3, sampler: str = "euler",
    denoise_mask: Any = None,
) -> Tensor:  # fmt: skip
    function = {"euler": sample_euler, "heun": sample_heun}[sampler]
    schedule = sigmas(model, steps)
    return Guider(model, cfg, positive, negative).sample(
        start(model, noise, schedule), types.SimpleNamespace(sampler_function=function), schedule, denoise_mask
    )


def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts the module of samplers where the host looks for it."""
    module = types.ModuleType("comfy.samplers")
    module.calc_cond_batch = calc_cond_batch
    monkeypatch.setitem(sys.modules, "comfy.samplers", module)
    State.split, State.deep = False, True
    yield
    State.split, State.deep = False, True
