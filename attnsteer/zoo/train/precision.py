"""Exchanges the attention primitive of a model that is being trained, for two reasons.

bf16 on CPUs: with bf16 matrix units a small model trains two to three times faster in bf16, but the backward pass of the
fused CPU attention is four times slower there than in fp32. So attention alone runs in fp32.

Weighted keys: n identical keys act like one whose score is raised by log n (see `mmdit`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnsteer.hosts.sdpa.rebind import DISPATCH, SDPA, rebind

NAME = "attnsteer_train_fp32"


def attention_in_fp32(model: nn.Module) -> None:
    """Let the attention of transformers and diffusers models compute in fp32 under bf16 autocast."""
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            _register()
            module.set_attn_implementation(NAME)
    exchange(model, {SDPA: sdpa_in_fp32, DISPATCH: _dispatch_in_fp32})


def exchange(model: nn.Module, primitives: dict[str, Callable[..., Tensor]]) -> None:
    """Give the attention processors of a diffusers model these primitives; those exchanged before are left alone."""
    # One type for all modules, so that blocks that differ in nothing else are compiled once.
    made: dict[type, type] = {}
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is None or not callable(processor) or type(processor).__name__.startswith("Training"):
            continue
        kind = type(processor)
        if kind not in made:
            call = rebind(kind.__call__, primitives)
            made[kind] = type(f"Training{kind.__name__}", (kind,), {"__call__": call})
        # In place, since a processor may have weights of its own.
        processor.__class__ = made[kind]


def sdpa_in_fp32(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention` in fp32; the result has the query's dtype."""
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast(query.device.type, enabled=False):
        out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask, **options)
    return out.to(query.dtype)


def _dispatch_in_fp32(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    with torch.autocast(query.device.type, enabled=False):
        out = dispatch_attention_fn(query.float(), key.float(), value.float(), *args, **options)
    return out.to(query.dtype)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        with torch.autocast(query.device.type, enabled=False):
            out, _ = sdpa_attention_forward(
                module, query.float(), key.float(), value.float(), attention_mask, **options
            )
        return out.to(query.dtype), None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
