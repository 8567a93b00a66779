"""What readers compute, in loops over rows, keys and layers; nothing here imports the library."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["flow", "gated", "rollout"]


def _joint(W: Tensor, residual: bool) -> Tensor:
    """attention_graph_util.compute_joint_attention of samiraabnar/attention_flow at 8044f53, one layer [n, n]."""
    if not residual:
        return W
    A = W + torch.eye(len(W), dtype=W.dtype)
    return A / A.sum(dim=-1, keepdim=True)


def rollout(maps: list[Tensor], residual: bool = True) -> Tensor:
    """[n, n] from head means [n, n] of each layer, the lowest first."""
    R = None
    for W in maps:
        A = _joint(W.double(), residual)
        R = A if R is None else A @ R
    return R


def flow(maps: list[Tensor], i: int, residual: bool = True, normalise: bool = True) -> Tensor:
    """[n]: by the cut that is smallest (Ford, Fulkerson), over all sets of nodes; for a handful of nodes."""
    layers = [_joint(W.double(), residual) for W in maps]
    n, top = len(layers[0]), len(layers)
    edges = [
        ((level, a), (level - 1, b), float(A[a, b]))
        for level, A in enumerate(layers, start=1)
        for a in range(n)
        for b in range(n)
        if A[a, b] > 0
    ]
    found = []
    for j in range(n):
        source, sink = (top, i), (0, j)
        others = [(level, a) for level in range(top + 1) for a in range(n) if (level, a) not in (source, sink)]
        # Of the lowest and the highest layer the other nodes have no way through.
        others = [node for node in others if 0 < node[0] < top]
        best = float("inf")
        for inside in itertools.product((False, True), repeat=len(others)):
            near = {source, *(node for node, there in zip(others, inside, strict=True) if there)}
            cut = sum(size for a, b, size in edges if a in near and b not in near and (b == sink or b[0] > 0))
            best = min(best, cut)
        found.append(best)
    total = torch.tensor(found, dtype=torch.float64)
    return total / total.sum() if normalise and total.sum() > 0 else total


def gated(parts: list[Tensor], gain: Tensor, eps: float, W_g: Tensor, W_u: Tensor, W_d: Tensor) -> list[Tensor]:
    """What W_d (silu(W_g N(y)) * W_u N(y)) makes of each part of y, N an RMSNorm frozen at y: integrated gradients along the
    straight path from zero, by 4,000 midpoints in float64."""
    parts, W_g, W_u, W_d = [p.double() for p in parts], W_g.double(), W_u.double(), W_d.double()
    y = sum(parts)
    scale = (y.pow(2).mean() + eps).sqrt()
    own = [gain.double() * p / scale for p in parts]
    a, u = W_g @ sum(own), W_u @ sum(own)
    count = 4000
    t = (torch.arange(count, dtype=torch.float64) + 0.5)[:, None] / count
    s = torch.sigmoid(t * a)
    slope = s + t * a * s * (1 - s)
    left, right = (slope * t * u).mean(dim=0), (t * a * s).mean(dim=0)
    return [(W_d @ (left * (W_g @ p) + right * (W_u @ p))).float() for p in own]
