"""CONFORM written out: NT-Xent pair by pair, and the authors' loop with the maps of the step before.

Read in gemlab-vt/CONFORM at 4ad0e37 (pipeline_conform.py); the losses are those of pytorch-metric-learning that it calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .latent_loops import smooth


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def ntxent(vectors: Sequence[Tensor], labels: Sequence[int], tau: float) -> Tensor | float:
    n, losses = len(vectors), []
    for a in range(n):
        others = [torch.exp(cosine(vectors[a], vectors[k]) / tau) for k in range(n) if labels[k] != labels[a]]
        for p in range(n):
            if p != a and labels[p] == labels[a] and others:
                top = torch.exp(cosine(vectors[a], vectors[p]) / tau)
                losses.append(-torch.log(top / (top + sum(others))))
    return sum(losses) / len(losses) if losses else 0.0


def contrastive(vectors: Sequence[Tensor], labels: Sequence[int]) -> Tensor | float:
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    for a in range(len(vectors)):
        for b in range(len(vectors)):
            if a != b:
                s, same = cosine(vectors[a], vectors[b]), labels[a] == labels[b]
                value = 1 - s if same else s
                if value > 0:
                    found[same].append(value)
    return sum(sum(values) / len(values) for values in found.values() if values)


class Loop:
    """The updates of one sample, one call after another.

    Args:
        tokens: of each group. maps: (z) -> A [h, w, M] of a fresh forward, with its graph.
    """

    def __init__(self, groups: Sequence[Sequence[int]], refine: Sequence[int], most: int, until: int, tau: float = 0.5):
        self.groups, self.refine, self.most, self.until, self.tau = groups, refine, most, until, tau
        self.before: Tensor | None = None

    def loss(self, A: Tensor) -> Tensor | float:
        vectors, labels = [], []
        for label, group in enumerate(self.groups):
            for token in group:
                for source in (A,) if self.before is None else (A, self.before):
                    vectors.append(smooth(source[:, :, token]).flatten())
                    labels.append(label)
        return ntxent(vectors, labels, self.tau)

    def moved(self, z: Tensor, maps: Callable[[Tensor], Tensor], size: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().clone().requires_grad_(True)
            A = maps(z)
            loss = self.loss(A)
            if isinstance(loss, float):
                return z.detach(), A.detach()
            (gradient,) = torch.autograd.grad(loss, z)
        return (z - size * gradient).detach(), A.detach()

    def __call__(self, z: Tensor, maps: Callable[[Tensor], Tensor], i: int, n: int) -> Tensor:
        size = 20 * math.sqrt(np.linspace(1.0, 0.5, n)[i])
        for _ in range(self.most if i in self.refine else 0):
            z, _ = self.moved(z, maps, size)
        moved, A = self.moved(z, maps, size)
        self.before = A
        return moved if i < self.until else z
