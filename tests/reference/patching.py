"""Frozen patterns and patched heads of a Llama without scaling, in its own modules one by one; nothing here imports the library."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["direct", "frozen_llama", "norm_of", "with_patch"]


def frozen_llama(model: nn.Module, ids: Tensor, maps: list[Tensor], shift: dict[int, Tensor] | None = None) -> Tensor:
    """Logits [1, n, V] with A of each layer given, [1, H, n, n], and a vector added to what some layers give."""
    x = model.model.embed_tokens(ids)
    for number, layer in enumerate(model.model.layers):
        own = layer.self_attn
        v = own.v_proj(layer.input_layernorm(x)).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
        heads = maps[number].shape[1]
        out = torch.stack([maps[number][:, h] @ v[:, h * v.shape[1] // heads] for h in range(heads)], dim=2)
        x = x + own.o_proj(out.flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        if shift and number in shift:
            x = x + shift[number]
    return model.lm_head(model.model.norm(x))


def norm_of(x: Tensor, gain: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """RMS norm of x [D], by its own scale or a given one."""
    scale = ((x * x).mean() + eps).sqrt() if scale is None else scale
    return gain * x / scale


def with_patch(model: nn.Module, ids: Tensor, layer: int, head: int, new: Tensor) -> Tensor:
    """Last logits [V] with the output of one head at the last token replaced by `new` [d], through a hook on the projection."""
    own = model.model.layers[layer].self_attn

    def put(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[:, -1, head * own.head_dim : (head + 1) * own.head_dim] = new
        return (x,)

    hook = own.o_proj.register_forward_pre_hook(put)
    try:
        return model(input_ids=ids, use_cache=False).logits[0, -1]
    finally:
        hook.remove()


def direct(model: nn.Module, ids: Tensor, layer: int, head: int, change: Tensor, live: bool) -> Tensor:
    """Change of the last logits [V] where `change` [d] of one head's output reaches the final norm alone."""
    kept: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1]))
    model(input_ids=ids, use_cache=False)
    hook.remove()
    own, norm = model.model.layers[layer].self_attn, model.model.norm
    d = own.head_dim
    added = own.o_proj.weight[:, head * d : (head + 1) * d] @ change
    r, gain, eps = kept[0], norm.weight, norm.variance_epsilon
    if live:
        return model.lm_head.weight @ (norm_of(r + added, gain, eps) - norm_of(r, gain, eps))
    return model.lm_head.weight @ norm_of(added, gain, eps, ((r * r).mean() + eps).sqrt())
