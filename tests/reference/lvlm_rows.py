"""Dense definitions of the methods that act in the rows that speak, and of the knock-out, from ``specs/lvlm.md`` 3, 5 and 6.

Loops over batch, heads, rows and keys; nothing is edited in place and nothing here imports the library. Arguments: z scores and A
map, [B, H, n, m]; V, T bool [B, m]; rows bool [B, n].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["adhh", "hgai", "highlight", "knockout", "pai", "paint", "spin"]


def pai(z: Tensor, V: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """l_j += alpha |l_j| on V."""
    return paint(z, V, torch.zeros_like(V), rows, alpha, 0.0)


def paint(z: Tensor, local: Tensor, summary: Tensor, rows: Tensor, alpha: float, beta: float) -> Tensor:
    """l_j += alpha |l_j| on local \\ summary, l_j += beta |l_j| on summary."""
    out = z.clone()
    batch, heads, n, m = z.shape
    for b in range(batch):
        for i in range(n):
            if not rows[b, i]:
                continue
            for h in range(heads):
                for j in range(m):
                    value = float(z[b, h, i, j])
                    strength = beta if summary[b, j] else alpha if local[b, j] else 0.0
                    if strength and value > -1e30:
                        out[b, h, i, j] = value + strength * abs(value)
    return out


def hgai(z: Tensor, V: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """l_hj += alpha mean_g |l_gj| on V."""
    out = z.clone()
    batch, heads, n, m = z.shape
    for b in range(batch):
        for i in range(n):
            for j in range(m):
                if rows[b, i] and V[b, j] and float(z[b, 0, i, j]) > -1e30:
                    mean = sum(abs(float(z[b, h, i, j])) for h in range(heads)) / heads
                    for h in range(heads):
                        out[b, h, i, j] = float(z[b, h, i, j]) + alpha * mean
    return out


def highlight(z: Tensor, V: Tensor, rows: Tensor, value: float) -> Tensor:
    """l_j *= value on V."""
    out = z.clone()
    batch, heads, n, m = z.shape
    for b in range(batch):
        for i in range(n):
            for j in range(m):
                for h in range(heads):
                    if rows[b, i] and V[b, j] and float(z[b, h, i, j]) > -1e30:
                        out[b, h, i, j] = value * float(z[b, h, i, j])
    return out


def adhh(A: Tensor, T: Tensor, rows: Tensor, threshold: float, counts: dict[str, int]) -> Tensor:
    """A_j = 0 on T where the row's mass there reaches the threshold; nothing is renormalised."""
    out = A.clone()
    batch, heads, n, m = A.shape
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                if not rows[b, i]:
                    continue
                own = [j for j in range(m) if T[b, j]]
                far = sum(float(A[b, h, i, j]) for j in own) >= threshold
                counts["edited" if far else "left"] += 1
                for j in own if far else ():
                    out[b, h, i, j] = 0.0
    return out


def spin(o: Tensor, score: Tensor, rows: Tensor, keep: float, scale: float) -> Tensor:
    """o [B, H, n, d] times `scale` in the heads behind the int(keep H) with the largest score [B, H, n]."""
    out = o.clone()
    batch, heads, n, _ = o.shape
    for b in range(batch):
        for i in range(n):
            order = sorted(range(heads), key=lambda h: -float(score[b, h, i]))
            for h in order[int(keep * heads) :] if rows[b, i] else ():
                out[b, h, i] = o[b, h, i] * scale
    return out


def knockout(
    z: Tensor, part_of_row: list[list[str]], part_of_key: list[list[str]], blocks: list[tuple[str, str]]
) -> Tensor:
    """l_ij = -inf where (part of i, part of j) is blocked."""
    out = z.clone()
    batch, _, n, m = z.shape
    for b in range(batch):
        for i in range(n):
            for j in range(m):
                if (part_of_row[b][i], part_of_key[b][j]) in blocks:
                    out[b, :, i, j] = -math.inf
    return out
