"""Queries and keys of a head in one plane, so that near means a high score.

AttentionViz (Yeh et al., "AttentionViz: A Global View of Transformer Attention", IEEE VIS 2023, arXiv 2305.03210) has two free
parameters: one vector added to every key moves all scores of a query alike, and queries times c with keys over c leave every
score as it is. Here the keys' centroid is put on the queries', behind the scaling, and c makes distance fall with the score as
plainly as it can (the correlation of both nearest to -1). The paper's own rule for c could not be read, and its t-SNE and UMAP
are a plain PCA here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Factors that are tried, around the one that makes queries and keys of one size, and again around the best of them; queries and
# keys that a correlation is taken over.
FACTORS, PAIRS = 17, 96
REACH = 8.0


@dataclass(frozen=True)
class Projection:
    """One plane a head.

    Attributes:
        queries: [H, n, 2]. keys: [H, m, 2]. factor: [H], the c of each head.
        correlation: [H], of distance and score over pairs, before the plane is taken. explained: [H], share of the variance in it.
    """

    queries: Tensor
    keys: Tensor
    factor: Tensor
    correlation: Tensor
    explained: Tensor


def joint_projection(q: Tensor, k: Tensor) -> Projection:
    """Project queries [H, n, d] and keys [H or fewer, m, d] of heads (key heads that several heads read are repeated)."""
    q = q.double()
    k = k.double().repeat_interleave(len(q) // len(k), dim=0)
    k = k - k.mean(dim=1, keepdim=True)
    middle = q.mean(dim=1, keepdim=True)
    size = lambda t: t.pow(2).sum(dim=-1).mean(dim=1).sqrt().clamp_min(1e-12)  # noqa: E731
    c = (size(k) / size(q - middle)).sqrt()
    at = torch.arange(len(q), device=q.device)
    few = _some(q), _some(k)
    for reach in (REACH, REACH ** (2 / (FACTORS - 1))):
        factors = c[:, None] * torch.logspace(-1, 1, FACTORS, dtype=q.dtype, base=reach, device=q.device)
        found = _correlations(*few, middle, factors)
        best = found.argmin(dim=1)
        c, correlation = factors[at, best], found[at, best]
    pooled = torch.cat([(q - middle) * c[:, None, None], k / c[:, None, None]], dim=1)
    values, vectors = torch.linalg.eigh(pooled.transpose(1, 2) @ pooled)
    plane = vectors[..., -2:].flip(-1)
    # Eigenvectors have no sign; the largest entry is made positive, so that a page does not depend on the machine.
    largest = plane.gather(1, plane.abs().argmax(dim=1, keepdim=True))
    points = pooled @ (plane * largest.sign())
    share = values[:, -2:].clamp_min(0).sum(dim=1) / values.clamp_min(0).sum(dim=1).clamp_min(1e-30)
    n = q.shape[1]
    return Projection(points[:, :n], points[:, n:], c, correlation, share)


def _some(t: Tensor) -> Tensor:
    """At most `PAIRS` evenly spaced rows."""
    n = t.shape[1]
    return t if n <= PAIRS else t[:, torch.linspace(0, n - 1, PAIRS).round().long()]


def _correlations(q: Tensor, k: Tensor, middle: Tensor, factors: Tensor) -> Tensor:
    """Pearson's, of |c (q - middle) - k / c| and q . k over all pairs, [H, factors]; zero where either is constant."""
    z = (q @ k.transpose(1, 2)).flatten(1)
    z = z - z.mean(dim=1, keepdim=True)
    q = q - middle
    both = q @ k.transpose(1, 2)
    qq, kk = q.pow(2).sum(dim=-1)[:, :, None], k.pow(2).sum(dim=-1)[:, None]
    found = []
    for c in factors.T:
        c2 = c.pow(2)[:, None, None]
        d = (c2 * qq + kk / c2 - 2 * both).clamp_min(0).sqrt().flatten(1)
        d = d - d.mean(dim=1, keepdim=True)
        found.append((d * z).sum(dim=1) / (d.norm(dim=1) * z.norm(dim=1)).clamp_min(1e-30))
    return torch.stack(found, dim=1)
