"""Attention Regulation written out over whole maps: the authors' inner loop, and a processor that remembers the step before.

Read in YaNgZhAnG-V5/attention_regulation at b66d9db (attn_processor.py), in the precision of its inputs instead of fp16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def bumps(w: int) -> Tensor:
    """[1, C, w, w, 1]"""
    sigma, x = w // 16, torch.arange(w, dtype=torch.float64)
    centres = [(i, j) for i in range(2 * sigma, w, 2 * sigma) for j in range(2 * sigma, w, 2 * sigma)]
    maps = [torch.exp(-((x - a) ** 2 + (x[:, None] - b) ** 2) / (2 * sigma**2)) for a, b in centres]
    return torch.stack(maps)[None, ..., None]


def penalty(P: Tensor, W: Tensor) -> Tensor:
    """P [Bh, w, w, T], W [Bh, C, 1, 1, T]"""
    T, w = P.shape[-1], P.shape[1]
    theta = min(1.0, 0.2 * T)
    high = torch.mean((torch.quantile(P.reshape(len(P), -1, T), 0.9, dim=-2) - 0.9) ** 2)
    share = torch.mean((torch.sum(P / w**2, dim=(1, 2)) - theta / T) ** 2)
    return high + 80 * share + 0.09 * torch.mean(W**2)


def descend(S: Tensor, targets: Sequence[int], W: Tensor) -> Tensor:
    """The best additive map [Bh, w, w, T] of 20 steps; S [Bh, w, w, M] scores, W [Bh, C, 1, 1, T]."""
    G, least, best = bumps(S.shape[1]).to(S), math.inf, None
    for _ in range(20):
        with torch.enable_grad():
            W = W.detach().requires_grad_(True)
            D = torch.zeros_like(S)
            D[..., list(targets)] = (G * W).sum(dim=1)
            loss = penalty(torch.softmax(S + D, dim=-1)[..., list(targets)], W)
            (gradient,) = torch.autograd.grad(loss, W)
        if loss.item() < least:
            least, best = loss.item(), D.detach()[..., list(targets)]
        W = W - len(S) * 100 * gradient
    return best


class Processor:
    """One site: the conditional rows, the last of the batch, are edited in the first `until` calls.

    Args:
        targets: of each conditional row. ends: its first padding token. start: (call, row) -> W [H, C, T].
    """

    def __init__(
        self, targets: Sequence[Sequence[int]], ends: Sequence[int], start: Callable[[int, int], Tensor], until: int
    ):
        self.targets, self.ends, self.start, self.until = targets, ends, start, until
        self.step, self.before = 0, {}

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, y in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        S = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        P, b = torch.softmax(S, dim=-1), len(self.targets)
        side = math.isqrt(S.shape[2])
        for i in range(b if self.step < self.until else 0):
            row, own, plain = len(S) - b + i, list(self.targets[i]), P[len(S) - b + i].clone()
            W, square = self.start(self.step, i)[:, :, None, None], S[row].unflatten(1, (side, side))
            best = descend(square, own, W.to(S))
            before = self.before.get(i, (bumps(side).to(S) * W.to(S)).sum(dim=1))
            self.before[i], D = best, torch.zeros_like(square)
            D[..., own] = 0.25 * before + 0.75 * best
            P[row] = torch.softmax(square + 0.99**self.step * D, dim=-1).flatten(1, 2)
            for column in (0, self.ends[i]):
                P[row, :, :, column] = plain[:, :, column]
        self.step += 1
        out = (P @ v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


@contextmanager
def regulated(model: nn.Module, sites: dict[str, Processor]) -> Iterator[None]:
    modules = {name: model.get_submodule(name) for name in sites}
    old = {name: module.processor for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.processor = sites[name]
        yield
    finally:
        for name, module in modules.items():
            module.processor = old[name]
