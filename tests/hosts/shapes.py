"""What a tiny denoiser family is, and the tensors of one forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnsteer.testing import randomize_

TEXT, DIM, B = 6, 32, 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def times(value: float = 601.0) -> Tensor:
    return torch.full((B,), value)


def valid(length: int = TEXT) -> Tensor:
    return torch.ones(B, length, dtype=torch.long)


@dataclass(frozen=True)
class Family:
    """One denoiser class.

    Attributes:
        model_class: its name in diffusers. config: keyword arguments. inputs: those of one forward.
        text: the arguments that carry the prompt.
        order: how joint sites lay their sequence out, "image text" or "text image"; "" where there are none, or
            where it differs per sample and is not told.
    """

    model_class: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    text: tuple[str, ...] = ("encoder_hidden_states",)
    order: str = ""
    only_joint: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0, **overrides: Any) -> nn.Module:
        import diffusers

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = getattr(diffusers, self.model_class)(**{**self.config, **overrides})
        return randomize_(model, seed).eval()


def ids(side: int, axes: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows)] * (axes - 2) + [rows, columns], dim=-1).reshape(-1, axes).float()


def image(channels: int = 4, size: int = 8) -> Tensor:
    return randn(B, channels, size, size, seed=1)


def video(channels: int = 4, frames: int = 2, size: int = 8) -> Tensor:
    return randn(B, channels, frames, size, size, seed=1)


def text(width: int = DIM, length: int = TEXT) -> Tensor:
    return randn(B, length, width, seed=2)
