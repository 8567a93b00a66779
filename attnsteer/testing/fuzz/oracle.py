"""Dense attention with the methods' equations, from q, k, v, mask and roles: none of the library's kernels or accounts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case
from .layout import Roles

NAME = "attnsteer_testing_oracle"
SDPA = "scaled_dot_product_attention"
# Of samples with even and odd numbers.
SPANS = (((1, 3), (4, 5)), ((0, 2), (3, 4)))
SOME = (2, 6)
THRESHOLD, ALPHA = 0.12, 1.2


@dataclass
class Oracle:
    """The method at one layer, and what it knows of the call that runs: the truth of its slots.

    Attributes:
        case: what acts. roles: of the slots so far. prompt: slots of the prompt. past: slots before this call.
        sample: int [B], the sample of each batch row. frozen: the call moves no statistics. state: sums of ACT by slot.
    """

    case: Case
    roles: Roles | None = None
    prompt: int = 0
    past: int = 0
    sample: Tensor | None = None
    frozen: bool = False
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
        z = z if mask.dtype == torch.bool else z + mask.masked_fill(hidden, 0.0)
        z = z.masked_fill(hidden, -torch.inf)
        sinks = options.get("s_aux")
        sink = (
            torch.full_like(z[..., :1], -torch.inf)
            if sinks is None
            else sinks[None, :, None, None].expand_as(z[..., :1])
        )
        A = torch.cat([z, sink], dim=-1).softmax(dim=-1).nan_to_num(0.0)
        A, sunk = A[..., :-1], A[..., -1:]
        heads = list(self.case.heads)
        here = module.layer_idx == self.case.layer
        if here and self.case.method == "ACT":
            # Which columns are sinks is found in the prompt, also where only later rows are edited.
            self._count(A[:, heads], ~hidden[:, :1])
        acting = here and self.acting()
        rows = self.rows()[:, None, :, None] if acting else None
        if acting and self.case.method != "HeadGate":
            A = A.clone()
            edited = self.edited(A[:, heads], sunk[:, heads])
            A[:, heads] = torch.where(rows, edited, A[:, heads])
        out = A @ v
        if acting and self.case.method == "HeadGate":
            out[:, heads] = torch.where(rows, self.strength() * out[:, heads], out[:, heads])
        return out.transpose(1, 2).contiguous(), None

    def sdpa(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """In the place of torch's function, in a module that calls it."""
        mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool) if attn_mask is None else attn_mask
        mask = mask.tril() if is_causal else mask
        return self.attention(module, q, k, v, mask, scaling=scale or q.shape[-1] ** -0.5)[0].transpose(1, 2)

    def strength(self) -> Tensor:
        """[B, 1, 1, 1]."""
        given = torch.tensor(self.case.strength)
        return given.expand(max(len(given), int(self.sample.max()) + 1))[self.sample][:, None, None, None]

    def decoding(self) -> bool:
        """Whether the call is behind the prompt."""
        return self.past >= self.prompt

    def acting(self) -> bool:
        """Whether the phases of the case take this call."""
        return self.case.phases == "all" or (self.case.phases == "decode") == self.decoding()

    def rows(self) -> Tensor:
        """bool [B, n]: the rows that are edited."""
        valid, index, request = (t[:, self.past :] for t in (self.roles.valid, self.roles.index, self.roles.request))
        if self.case.region == "some":
            return valid & (index >= SOME[0]) & (index < SOME[1])
        if self.case.region == "last":
            later = (request[:, :, None] == request[:, None]) & (index[:, None] > index[:, :, None]) & valid[:, None]
            return valid & ~later.any(dim=-1)
        return valid

    def edited(self, A: Tensor, sunk: Tensor) -> Tensor:
        """The map under the method's equation."""
        m, length = A.shape[3], self.roles.valid.shape[1]
        at = slice(length - m, length)
        valid, index = self.roles.valid[:, at], self.roles.index[:, at]
        generated = (torch.arange(length)[at] >= self.prompt) & valid
        method, strength = self.case.method, self.strength()
        if method == "ACT":
            return self._act(A, at)
        weight = torch.ones_like(A)
        if method == "ZeroTuning":
            weight = torch.where(((index == 0) & valid)[:, None, None], strength, weight)
        else:
            span = torch.zeros_like(valid)
            for b, sample in enumerate(self.sample.tolist()):
                for start, stop in SPANS[sample % 2]:
                    span[b] |= valid[b] & (index[b] >= start) & (index[b] < stop)
            span = span[:, None, None]
            if method == "PASTA":
                other = 1 / strength if self.case.variant == "include" else strength
                weight = torch.where(span | generated[:, None, None], weight, other)
            else:
                share = (A * span).sum(dim=-1, keepdim=True)
                if self.case.variant == "pooled":
                    request = self.roles.request[:, self.past :]
                    # rows of the same sequence, [B, 1, n, n]
                    same = (request[:, :, None] == request[:, None]) & self.roles.valid[:, None, self.past :]
                    same = same[:, None].to(A.dtype)
                    mean = same @ share.mean(dim=1, keepdim=True) / same.sum(dim=-1, keepdim=True).clamp_min(1)
                    share = mean.expand_as(share)
                low = (share > 0) & (share < strength)
                weight = torch.where(span, torch.where(low, strength / share.clamp_min(1e-30), 1.0), weight)
        new = A * weight
        return new / (new.sum(dim=-1, keepdim=True) + sunk).clamp_min(1e-37)

    def _count(self, A: Tensor, seen: Tensor) -> None:
        """Sums over the prompt's rows, or all, of each column, and the rows that see it."""
        roles, length = self.roles, self.roles.valid.shape[1]
        at = slice(length - A.shape[3], length)
        for name in ("sum", "count"):
            old = self.state.get(name)
            grown = A.new_zeros(*A.shape[:2], length)
            if old is not None:
                grown[..., : old.shape[-1]] = old
            self.state[name] = grown
        if self.decoding() and (self.frozen or self.case.variant != "running"):
            return
        rows = roles.valid[:, self.past :][:, None, :, None]
        self.state["sum"][..., at] += (A * rows).sum(dim=2)
        self.state["count"][..., at] += (seen & rows).sum(dim=2)
        # For each slot, how many tokens its sequence has so far.
        same = (roles.request[:, :, None] == roles.request[:, None]) & roles.valid[:, None]
        self.state["tokens"] = same.sum(dim=-1).clamp_min(1)[:, None]

    def _act(self, A: Tensor, at: slice) -> Tensor:
        roles, variant = self.roles, self.case.variant
        if variant == "prefill_only" and self.decoding():
            return A
        mean = self.state["sum"] / self.state["count"].clamp_min(1)
        limit = torch.full_like(mean[:, :1], THRESHOLD)
        if variant == "alpha":
            tokens = self.state["tokens"]
            limit[..., : tokens.shape[-1]] = ALPHA / tokens
        S = (mean > limit) & (self.state["count"] > 0) & roles.valid[:, None]
        if variant == "first_hit":
            same = roles.request[:, :, None] == roles.request[:, None]
            before = (S[..., None, :] & same[:, None]).tril(-1).any(dim=-1)
            S = S & before
        else:
            S = S & (roles.index > 0)[:, None]
        S = S[..., at]
        S, beta = S[:, :, None].to(A.dtype), self.strength()
        mass, rest = (A * S).sum(dim=-1, keepdim=True), (A * (1 - S)).sum(dim=-1, keepdim=True)
        new = A * S * beta + A * (1 - S) * (1 + (1 - beta) * mass / rest.clamp_min(1e-37))
        return torch.where(rest > 0, new, A)


@contextlib.contextmanager
def instead(model: nn.Module, oracle: Oracle) -> Iterator[None]:
    """The model runs the oracle's attention in this block."""
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    direct = [m for m in model.modules() if SDPA in getattr(getattr(type(m).forward, "__code__", None), "co_names", ())]
    if direct:
        with _instead_of_sdpa(direct, oracle):
            yield
        return
    config = model.config.get_text_config()
    before = config._attn_implementation_internal
    AttentionInterface.register(NAME, oracle.attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)


@contextlib.contextmanager
def _instead_of_sdpa(modules: list[nn.Module], oracle: Oracle) -> Iterator[None]:
    """These modules find the oracle's attention under the name of torch's."""
    running: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda module, _: running.append(module)) for m in modules]
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *args, **options: oracle.sdpa(running[-1], *args, **options)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
        for hook in hooks:
            hook.remove()
