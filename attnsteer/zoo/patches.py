"""PAINT's patches for pictures of the shapes world, by the authors' rule on the embedded vision tower."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch


@functools.cache
def _tower() -> Any:
    from . import load

    tower = load("shapes-lvlm").model.model.vision_tower
    tower.set_attn_implementation("eager")
    return tower


@torch.no_grad()
def paint_patches(scenes: Sequence[Any], ratio: float = 0.25) -> tuple[list[list[int]], list[list[int]]]:
    """(local, summary) patch numbers of each scene: `select_patches` of the class token's attention in the tower's first layer
    and in its last but one. shapes-lvlm and smollm2-llava share the tower."""
    from ..methods.paint import select_patches
    from .shapes.render import render

    maps = _tower()(render(list(scenes)) * 2 - 1, output_attentions=True).attentions
    first, late = (maps[i][:, :, 0, 1:].sum(dim=1) for i in (0, -2))
    return select_patches(first, late, ratio)
