"""Tiny random denoisers of diffusers: those of `attnsteer.testing` and many more families."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from attnsteer.testing import DENOISERS, tiny_denoiser, tiny_denoiser_inputs
from tests.hosts.family_configs import FAMILIES
from tests.hosts.shapes import DIM, B, Family, randn

__all__ = ["DIM", "FAMILIES", "B", "Family", "forward", "known", "randn"]


def known() -> dict[str, Family]:
    """The families of `attnsteer.testing` and those above."""
    orders = {"sd3": "image text", "sd35": "image text", "flux": "text image", "qwenimage": "text image"}
    single = {"flux": {"num_layers": 0}}
    ours = {
        name: Family(
            tiny.model_class,
            tiny.config,
            lambda name=name: tiny_denoiser_inputs(name, tiny_denoiser(name), batch=B),
            order=orders.get(name, ""),
            only_joint=single.get(name, {}),
        )
        for name, tiny in DENOISERS.items()
    }
    return {**ours, **FAMILIES}


@torch.no_grad()
def forward(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The prediction as one tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own: autocast on CPU, deprecations
        out = model(**inputs, return_dict=False)
    out = out if isinstance(out, Tensor) else out[0]
    return torch.stack([t.flatten() for t in out]) if isinstance(out, (list, tuple)) else out
