"""Dense attention with the methods' equations, from q, k, v, mask and layout: none of the library's kernels or accounts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NAME = "attnsteer_testing_oracle"
SPANS = ((1, 3), (4, 5))
THRESHOLD = 0.12


@dataclass
class Oracle:
    """The method at one layer, and what it knows of the call that runs: the truth of its slots.

    Attributes:
        method, strength, layer, heads, phases: of the case. valid, request, index: [B, T] of the slots so far.
        prompt: slots of the prompt. past: slots before this call. state: sums of ACT by slot.
    """

    method: str
    strength: float
    layer: int
    heads: tuple[int, ...]
    phases: str
    valid: Tensor | None = None
    request: Tensor | None = None
    index: Tensor | None = None
    prompt: int = 0
    past: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def attention(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Any:
        """In the place of the model's attention function."""
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        z = options["scaling"] * (q @ k.transpose(2, 3))
        cap = options.get("softcap")
        z = z if cap is None else cap * torch.tanh(z / cap)
        mask = mask[..., : k.shape[2]]
        hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
        z = z.masked_fill(hidden, -torch.inf)
        sinks = options.get("s_aux")
        sink = (
            torch.full_like(z[..., :1], -torch.inf)
            if sinks is None
            else sinks[None, :, None, None].expand_as(z[..., :1])
        )
        A = torch.cat([z, sink], dim=-1).softmax(dim=-1).nan_to_num(0.0)
        A, sunk = A[..., :-1], A[..., -1:]
        if module.layer_idx == self.layer and self.prompt_acts():
            heads = list(self.heads)
            if self.method != "HeadGate":
                A = A.clone()
                edited = self.edited(A[:, heads], sunk[:, heads], ~hidden)
                A[:, heads] = torch.where(self.rows()[:, None, :, None], edited, A[:, heads])
        out = A @ v
        if self.method == "HeadGate" and module.layer_idx == self.layer and self.prompt_acts():
            out[:, list(self.heads)] = torch.where(
                self.rows()[:, None, :, None], self.strength * out[:, list(self.heads)], out[:, list(self.heads)]
            )
        return out.transpose(1, 2).contiguous(), None

    def decoding(self) -> bool:
        """Whether the call is behind the prompt."""
        return self.past >= self.prompt

    def prompt_acts(self) -> bool:
        """Whether the phases of the case take this call."""
        return self.phases == "all" or (self.phases == "decode") == self.decoding()

    def rows(self) -> Tensor:
        """bool [B, n]: the rows that are edited."""
        return self.valid[:, self.past :]

    def edited(self, A: Tensor, sunk: Tensor, seen: Tensor) -> Tensor:
        """The map under the method's equation."""
        m, length = A.shape[3], self.valid.shape[1]
        at = slice(length - m, length)
        valid, index = self.valid[:, at], self.index[:, at]
        generated = (torch.arange(length)[at] >= self.prompt) & valid
        if self.method == "ACT":
            return self._act(A, seen, at)
        weight = torch.ones_like(A)
        if self.method == "ZeroTuning":
            weight = weight.masked_fill(((index == 0) & valid)[:, None, None], self.strength)
        else:
            span = torch.zeros_like(valid)
            for start, stop in SPANS:
                span |= valid & (index >= start) & (index < stop)
            if self.method == "PASTA":
                weight = weight.masked_fill(~(span | generated)[:, None, None], self.strength)
            else:
                share = (A * span[:, None, None]).sum(dim=-1, keepdim=True)
                low = (share > 0) & (share < self.strength)
                factor = torch.where(low, self.strength / share.clamp_min(1e-30), 1.0)
                weight = torch.where(span[:, None, None], factor, weight)
        new = A * weight
        return new / (new.sum(dim=-1, keepdim=True) + sunk).clamp_min(1e-37)

    def _act(self, A: Tensor, seen: Tensor, at: slice) -> Tensor:
        length = at.stop
        for name in ("sum", "count"):
            old = self.state.get(name)
            grown = A.new_zeros(*A.shape[:2], length)
            if old is not None:
                grown[..., : old.shape[-1]] = old
            self.state[name] = grown
        if not self.decoding():
            rows = self.rows()[:, None, :, None]
            self.state["sum"][..., at] += (A * rows).sum(dim=2)
            self.state["count"][..., at] += (seen & rows).sum(dim=2)
        mean = self.state["sum"] / self.state["count"].clamp_min(1)
        first = (self.index == 0) & self.valid
        S = ((mean > THRESHOLD) & (self.state["count"] > 0) & (self.valid & ~first)[:, None])[..., at]
        S = S[:, :, None].to(A.dtype)
        mass, rest = (A * S).sum(dim=-1, keepdim=True), (A * (1 - S)).sum(dim=-1, keepdim=True)
        new = A * S * self.strength + A * (1 - S) * (1 + (1 - self.strength) * mass / rest.clamp_min(1e-37))
        return torch.where(rest > 0, new, A)


@contextlib.contextmanager
def instead(model: nn.Module, oracle: Oracle) -> Iterator[None]:
    """The model runs the oracle's attention in this block."""
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    before = model.config._attn_implementation_internal
    AttentionInterface.register(NAME, oracle.attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        model.config._attn_implementation_internal = before
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)
