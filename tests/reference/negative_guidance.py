"""NAG written out: the forwards of Flux and SD3 as the official code runs them, and cross-attention over dense maps.

Read in ChenDarYen/Normalized-Attention-Guidance at 69159ca (attention_flux_nag.py, transformer_flux.py, normalization.py):
one image stream and two text streams in double blocks, the image modulated by the embedding of the prompt alone; single blocks
run a doubled batch, each half with its own embedding, and get the same attention outputs for the image. SD3 as Flux, without
single blocks and rotary positions. `scale` is the official nag_scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def guide(plus: Tensor, minus: Tensor, scale: float, tau: float, alpha: float, p: int) -> Tensor:
    """[b, n, H d]"""
    guided = plus * scale - minus * (scale - 1)
    norm_plus, norm_guided = (x.abs().pow(p).sum(-1, keepdim=True) ** (1 / p) for x in (plus, guided))
    ratio = norm_guided / norm_plus
    guided = guided * torch.minimum(ratio, torch.full_like(ratio, tau)) / ratio
    return guided * alpha + plus * (1 - alpha)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[b, n, H, d] each -> [b, n, H d]"""
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(logits, -1), v).flatten(2)


def rotate(x: Tensor, rotary: Any) -> Tensor:
    if rotary is None:
        return x
    cos, sin = (part[None, :, None, :] for part in rotary)
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def heads(attn: nn.Module, x: Tensor, layers: Sequence[nn.Module], norms: Sequence[nn.Module | None]) -> list[Tensor]:
    found = [layer(x).unflatten(-1, (attn.heads, -1)) for layer in layers]
    return [t if norm is None else norm(t) for t, norm in zip(found, norms, strict=True)]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def double(block: nn.Module, h: Tensor, e: Tensor, temb: Tensor, rotary: Any, *rule: Any) -> tuple[Tensor, Tensor]:
    """One double block: h [b, N, C], e and temb [2b, ...]."""
    b, attn = len(h), block.attn
    nh, gate, shift, scale, gate_mlp = block.norm1(h, emb=temb[:b])
    last = getattr(block, "context_pre_only", False)
    ne, *rest = (block.norm1_context(e, temb),) if last else block.norm1_context(e, emb=temb)
    image = heads(attn, nh, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None))
    text = heads(
        attn, ne, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k, None)
    )
    both = [torch.cat([t, torch.cat([i, i])], dim=1) for t, i in zip(text, image, strict=True)]
    q, k, v = rotate(both[0], rotary), rotate(both[1], rotary), both[2]
    out, n = attend(q, k, v), e.shape[1]
    h = h + gate[:, None] * attn.to_out[0](guide(out[:b, n:], out[b:, n:], *rule))
    h = h + gate_mlp[:, None] * block.ff(modulated(block.norm2(h), shift, scale))
    if last:
        return h, e
    c_gate, c_shift, c_scale, c_gate_mlp = rest
    e = e + c_gate[:, None] * attn.to_add_out(out[:, :n])
    return h, e + c_gate_mlp[:, None] * block.ff_context(modulated(block.norm2_context(e), c_shift, c_scale))


def single(block: nn.Module, x: Tensor, n: int, temb: Tensor, rotary: Any, *rule: Any) -> Tensor:
    """One single block: x and temb [2b, ...], n text tokens first."""
    b, attn = len(x) // 2, block.attn
    nx, gate = block.norm(x, emb=temb)
    q, k, v = heads(attn, nx, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None))
    out = attend(rotate(q, rotary), rotate(k, rotary), v)
    image = guide(out[:b, n:], out[b:, n:], *rule)
    out = torch.cat([out[:, :n], torch.cat([image, image])], dim=1)
    return x + gate[:, None] * block.proj_out(torch.cat([out, block.act_mlp(block.proj_mlp(nx))], dim=2))


def forward(model: nn.Module, inputs: dict[str, Any], negative: dict[str, Tensor], *rule: Any) -> Tensor:
    """Flux or SD3 with every row of the batch guided; `rule`: scale, tau, alpha, p."""
    flux = type(model).__name__ == "FluxTransformer2DModel"
    e = model.context_embedder(torch.cat([inputs["encoder_hidden_states"], negative["encoder_hidden_states"]]))
    pooled = torch.cat([inputs["pooled_projections"], negative["pooled_projections"]])
    t = torch.cat([inputs["timestep"], inputs["timestep"]])
    if flux:
        temb = model.time_text_embed(t * 1000, pooled)
        h, rotary = (
            model.x_embedder(inputs["hidden_states"]),
            model.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]])),
        )
    else:
        temb, h, rotary = model.time_text_embed(t, pooled), model.pos_embed(inputs["hidden_states"]), None
    for block in model.transformer_blocks:
        h, e = double(block, h, e, temb, rotary, *rule)
    if flux:
        n, x = e.shape[1], torch.cat([e, torch.cat([h, h])], dim=1)
        for block in model.single_transformer_blocks:
            x = single(block, x, n, temb, rotary, *rule)
        h = x[: len(h), n:]
    h = model.proj_out(model.norm_out(h, temb[: len(h)]))
    if flux:
        return h
    side, p = inputs["hidden_states"].shape[-1] // model.config.patch_size, model.config.patch_size
    return h.unflatten(1, (side, side)).unflatten(-1, (p, p, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class CrossAttention:
    """Cross-attention whose conditional rows, the last ones of the batch, are guided; `negative` is the text at this site."""

    def __init__(self, negative: Tensor, mask: Tensor | None, *rule: Any):
        self.negative, self.mask, self.rule = negative, mask, rule

    def maps(self, attn: nn.Module, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (attn.heads, -1))
            for layer, y in ((attn.to_q, x), (attn.to_k, text), (attn.to_v, text))
        )
        q, k = (t if norm is None else norm(t) for t, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        logits = logits if mask is None else logits.masked_fill(~mask.bool()[:, None, None], -math.inf)
        return torch.einsum("bhij,bjhd->bihd", torch.softmax(logits, -1), v).flatten(2)

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> Tensor:
        seen = rest.get("attention_mask")
        # The model made a bias of its mask.
        plain = self.maps(attn, hidden_states, encoder_hidden_states, None if seen is None else seen[:, 0] > -1)
        b = len(self.negative)
        minus = self.maps(attn, hidden_states[-b:], self.negative, self.mask)
        out = torch.cat([plain[:-b], guide(plain[-b:], minus, *self.rule)])
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


@contextmanager
def guided(model: nn.Module, names: Sequence[str], *given: Any) -> Iterator[None]:
    """These cross-attentions are guided; `given`: negative text, its mask, scale, tau, alpha, p."""
    modules = [model.get_submodule(name) for name in names]
    before = [module.processor for module in modules]
    try:
        for module in modules:
            module.processor = CrossAttention(*given)
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            module.processor = old
