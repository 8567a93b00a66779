"""The exact renderer: anti-aliased shapes from signed distances, a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .world import COLOURS, REACH, SHAPES, Ground, Scene

SIDE = 64


def render(scenes: Sequence[Scene], side: int = SIDE, device: str | torch.device = "cpu") -> Tensor:
    """Draw scenes.

    Args:
        scenes: one or more.
        side: of the image in pixels.
        device: of the result.

    Returns:
        fp32 [B, 3, side, side], values in [0, 1].
    """
    image = torch.stack([_ground(s.ground, side) for s in scenes]).to(device)[:, None].expand(-1, 3, -1, -1).clone()
    cover, owner, colours = coverage(scenes, side, device)
    # Objects do not overlap, so the order of painting does not matter, and one object per pass suffices.
    for place in range(max((len(s.objects) for s in scenes), default=0)):
        chosen = [i for i, (_, k) in enumerate(owner) if k == place]
        rows = torch.tensor([owner[i][0] for i in chosen], device=device)
        alpha = cover[chosen][:, None]
        image[rows] += alpha * (colours[chosen][:, :, None, None] - image[rows])
    return image


def coverage(
    scenes: Sequence[Scene], side: int = SIDE, device: str | torch.device = "cpu"
) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
    """How much of each pixel each object covers.

    Returns:
        coverage in [0, 1], fp32 [N, side, side] for the N objects of all scenes; for each object its (scene, place
        in the scene); and its colour [N, 3].
    """
    owner = [(b, k) for b, scene in enumerate(scenes) for k in range(len(scene.objects))]
    objects = [scenes[b].objects[k] for b, k in owner]
    x, y, r = (torch.tensor([getattr(o, name) for o in objects], device=device) for name in ("x", "y", "radius"))
    kinds = torch.tensor([SHAPES.index(o.shape) for o in objects], dtype=torch.long, device=device)
    colours = torch.tensor([COLOURS[o.colour] for o in objects], device=device).view(-1, 3)
    return cover(kinds, x, y, r, side), owner, colours


def cover(kinds: Tensor, x: Tensor, y: Tensor, radius: Tensor, side: int = SIDE) -> Tensor:
    """Coverage of single shapes: index into `SHAPES` [N], centre and radius in fractions [N] -> [N, side, side]."""
    out = torch.zeros(len(kinds), side, side, device=kinds.device)
    grid = (torch.arange(side, device=kinds.device) + 0.5) / side
    for kind, name in enumerate(SHAPES):
        chosen = (kinds == kind).nonzero().flatten()
        if len(chosen) == 0:
            continue
        dx = grid[None, None, :] - x[chosen, None, None]
        dy = grid[None, :, None] - y[chosen, None, None]
        out[chosen] = (0.5 - side * _distance(name, dx, dy, radius[chosen, None, None])).clamp(0, 1)
    return out


def _distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the border, negative inside; all shapes of one radius have the same area."""
    reach = REACH[shape] * radius
    if shape == "circle":
        return (dx**2 + dy**2).sqrt() - reach
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - reach / math.sqrt(2)
    if shape == "diamond":
        return (dx.abs() + dy.abs() - reach) / math.sqrt(2)
    if shape == "triangle":
        slanted = dx.abs() * math.cos(math.pi / 6) - dy * 0.5
        return torch.maximum(slanted, dy.expand_as(slanted)) - reach / 2
    if shape == "cross":
        arm = 1.1890 * radius
        width = arm / 3
        upright = torch.maximum(dx.abs() - width, dy.abs() - arm)
        return torch.minimum(upright, torch.maximum(dx.abs() - arm, dy.abs() - width))
    # Star: fold the plane onto one of its ten half points, whose border is one straight line.
    inner = STAR * reach
    turn = torch.atan2(dx.expand(-1, dy.shape[-2], -1), -dy.expand(-1, -1, dx.shape[-1]))
    fold = (torch.remainder(turn + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
    length = (dx**2 + dy**2).sqrt()
    px, py = length * torch.cos(fold), length * torch.sin(fold)
    qx, qy = inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
    ex, ey = qx - reach, qy
    return ((px - reach) * ey - py * ex) / (ex**2 + ey**2).sqrt()


# Radius of a star's inner corners over that of its points.
STAR = 0.452


def _ground(ground: Ground, side: int) -> Tensor:
    """The grey ground [side, side]."""
    if ground.texture == "plain":
        return torch.full((side, side), ground.level)
    g = np.random.default_rng(ground.seed)
    if ground.texture == "grain":
        coarse = torch.from_numpy(g.uniform(-1, 1, (1, 1, side // 4, side // 4))).float()
        pattern = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)[0, 0]
        return ground.level + ground.contrast * pattern
    turn, phase = float(g.uniform(0, math.pi)), g.uniform(0, 2 * math.pi, 2)
    at = (torch.arange(side) + 0.5) / side
    u = math.cos(turn) * at[None, :] + math.sin(turn) * at[:, None]
    v = -math.sin(turn) * at[None, :] + math.cos(turn) * at[:, None]
    waves = 2 * math.pi / ground.period
    pattern = torch.sin(waves * u + phase[0])
    if ground.texture == "checks":
        pattern = pattern * torch.sin(waves * v + phase[1])
    return ground.level + ground.contrast * pattern
