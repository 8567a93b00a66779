"""Dense definitions of the vision-language methods, from the papers' equations.

Sources: ``specs/lvlm.md`` 1.2 (VAR) and 2.2 (VHR). Batch, heads and rows are explicit loops, arithmetic is fp64 inside, nothing
is edited in place and nothing here imports the library.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dense import work_dtype

__all__ = ["placebo", "sinks", "var", "vhd", "vhr_heads"]


def sinks(x: Tensor, dims: tuple[int, ...], tau: float) -> Tensor:
    """S, bool [B, n]: tokens with max_{d in dims} |x_d| / sqrt(mean(x^2) + 1e-6) > tau; x [B, n, D] enters the layer."""
    flags = torch.zeros(x.shape[:2], dtype=torch.bool)
    for b in range(x.shape[0]):
        for j in range(x.shape[1]):
            row = x[b, j].double().tolist()
            rms = math.sqrt(sum(v * v for v in row) / len(row) + 1e-6)
            flags[b, j] = max(abs(row[d]) for d in dims) / rms > tau
    return flags


def var(
    A: Tensor,
    S: Tensor,
    V: Tensor,
    rows: Tensor,
    rho: float,
    min_image_mass: float,
    c: float,
    released: bool = False,
    counts: dict[str, int] | None = None,
) -> Tensor:
    """The edited map; A [B, H, n, m], S and V bool [B, m], rows bool [B, n]: text rows behind an image token.

    released: as the official code, with 1e-6 added to each image token's attention in the sinks' share, and only for rows
    that see a visual sink. counts: "edited" and "left" eligible rows are added up here.
    """
    dtype, out = work_dtype(A), A.double().clone()
    batch, heads, n, m = A.shape
    for b in range(batch):
        in_s = [bool(S[b, j]) for j in range(m)]
        in_v = [bool(V[b, j]) for j in range(m)]
        for h in range(heads):
            for i in range(n):
                if not rows[b, i]:
                    continue
                a = A[b, h, i].double().tolist()
                a_s = sum(a[j] for j in range(m) if in_s[j])
                a_v = sum(a[j] for j in range(m) if in_v[j])
                a_n = sum(a[j] for j in range(m) if in_v[j] and not in_s[j])
                a_sv = sum(a[j] for j in range(m) if in_v[j] and in_s[j])
                if released:
                    share = a_sv / sum(a[j] + 1e-6 for j in range(m) if in_v[j])
                    image_centric = a_v >= min_image_mass and share <= 1.0 - rho and a_sv > 0
                else:
                    image_centric = a_v >= min_image_mass and a_n > 0 and a_n / a_v >= rho
                if counts is not None:
                    counts["edited" if image_centric else "left"] += 1
                if not image_centric:
                    continue
                budget = c * a_s
                for j in range(m):
                    if in_s[j]:
                        out[b, h, i, j] = (1.0 - c) * a[j]
                    elif in_v[j]:
                        out[b, h, i, j] = a[j] + budget * a[j] / a_n
    return out.to(dtype)


def placebo(S: Tensor, V: Tensor, seed: int) -> Tensor:
    """For each run of image tokens of V, as many of its tokens outside S as it has in S: those with the smallest hash of (seed,
    place in the run), lowbias32 of 32 bits; S and V bool [B, m]."""
    out = torch.zeros_like(S)
    for b in range(S.shape[0]):
        runs: list[list[int]] = []
        for j in range(S.shape[1]):
            if V[b, j]:
                if j == 0 or not V[b, j - 1]:
                    runs.append([])
                runs[-1].append(j)
        for run in runs:
            count = sum(bool(S[b, j]) for j in run)
            free = [(_lowbias32((2654435761 * place + 2246822519 * seed) % 2**32), j) for place, j in enumerate(run)]
            for _, j in sorted(pair for pair in free if not S[b, pair[1]])[:count]:
                out[b, j] = True
    return out


def _lowbias32(x: int) -> int:
    for shift, factor in ((16, 2146121005), (15, 2221713035)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


def vhd(seen: Tensor, free: Tensor, outliers: bool = True) -> Tensor:
    """VHD [B, H] of head outputs at the last token, with (seen) and without (free) the image, each [B, H, d]."""
    batch, heads, _ = seen.shape
    out = torch.zeros(batch, heads, dtype=torch.float64)
    for b in range(batch):
        change = [math.dist(seen[b, h].double().tolist(), free[b, h].double().tolist()) for h in range(heads)]
        energy = [sum(v * v for v in free[b, h].double().tolist()) for h in range(heads)]
        for h in range(heads):
            outlier = change[h] > _mean_and_deviation(change) and energy[h] > _mean_and_deviation(energy)
            out[b, h] = 0.0 if outliers and outlier else change[h]
    return out


def vhr_heads(scores: Tensor) -> Tensor:
    """H_l, bool [B, H]: heads whose score is above the median over the layer's heads."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    for b in range(scores.shape[0]):
        values = sorted(scores[b].tolist())
        half = len(values) // 2
        median = values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2
        chosen[b] = torch.tensor([float(v) > median for v in scores[b]])
    return chosen


def _mean_and_deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return mean + math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
