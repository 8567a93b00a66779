"""Global reference cross-attention written out: the paper's equation over dense maps, and the official processor's arithmetic.

Both take what diffusers gives a cross-attention with an IP-Adapter: the text [b, m, c], and the projected image tokens
[b, images, tokens, c] of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """One head after the other; q [b, n, H d], k and v [b, m, H d] -> [b, n, H, d]."""
    out = []
    for part in torch.arange(q.shape[-1]).chunk(heads):
        logits = q[..., part] @ k[..., part].mT / math.sqrt(len(part))
        p = (logits - logits.max(dim=-1, keepdim=True).values).exp()
        out.append(p / p.sum(-1, keepdim=True) @ v[..., part])
    return torch.stack(out, dim=2)


class Equation:
    """A(Q, K_text, V_text) + lambda A(Q, K_ip, V_ip); lambda is a number, or one for each row and head [b, H]."""

    def __init__(self, own: nn.Module, scale: Any):
        self.own, self.scale = own, scale

    def mixed(self, attn: nn.Module, hidden: Tensor, text: Tensor, images: Tensor) -> Tensor:
        q, line = attn.to_q(hidden), images.flatten(1, 2)
        words = softmax_attention(q, attn.to_k(text), attn.to_v(text), attn.heads)
        seen = softmax_attention(q, self.own.to_k_ip[0](line), self.own.to_v_ip[0](line), attn.heads)
        scale = torch.as_tensor(self.scale, dtype=seen.dtype)
        scale = scale.expand(len(q), attn.heads) if scale.ndim == 0 else scale
        return (words + scale[:, None, :, None] * seen).flatten(2)

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Any, *_: Any, **__: Any
    ) -> Tensor:
        text, (images,) = encoder_hidden_states
        return attn.to_out[0](self.mixed(attn, hidden_states, text, images))


class Official(Equation):
    """IPAttnProcessor of UCSC-VLAA/story-adapter at 6f1c402, ip_adapter/attention_processor.py: one line of text and image tokens,
    cut where the text ends (77 there), maps of heads in the batch, `txt_scale * hidden_states + scale * ip_hidden_states`."""

    def mixed(self, attn: nn.Module, hidden: Tensor, text: Tensor, images: Tensor) -> Tensor:
        # StoryAdapterXL.generate: all tokens of all frames behind the text.
        encoder_hidden_states, end_pos = torch.cat([text, images.flatten(1, 2)], dim=1), text.shape[1]
        query = attn.to_q(hidden)
        encoder_hidden_states, ip_hidden_states = encoder_hidden_states[:, :end_pos], encoder_hidden_states[:, end_pos:]
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        query, key, value = (attn.head_to_batch_dim(t) for t in (query, key, value))
        out = attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(query, key, None), value))
        ip_key, ip_value = self.own.to_k_ip[0](ip_hidden_states), self.own.to_v_ip[0](ip_hidden_states)
        ip_key, ip_value = attn.head_to_batch_dim(ip_key), attn.head_to_batch_dim(ip_value)
        seen = attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(query, ip_key, None), ip_value))
        return 1.0 * out + self.scale * seen


@contextmanager
def attending(unet: nn.Module, kind: type[Equation], scales: dict[str, Any]) -> Iterator[None]:
    """These cross-attentions of a UNet by name, computed by `kind` with these scales."""
    modules = {name: unet.get_submodule(name) for name in scales}
    own = {name: m.processor for name, m in modules.items()}
    for name, module in modules.items():
        module._modules.pop("processor", None)
        vars(module)["processor"] = kind(own[name], scales[name])
    try:
        yield
    finally:
        for name, module in modules.items():
            del vars(module)["processor"]
            module.processor = own[name]
