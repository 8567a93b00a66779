"""Slow definitions of the methods that approximate attention, written from the papers' equations and the official arithmetic.

Loops over rows and blocks, one head at a time; nothing here is shared with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_attention(q: Tensor, k: Tensor, v: Tensor, size: int, best: int, causal: bool) -> Tensor:
    """Mixture-of-block attention of one head, [n, d]: own block, and the `best` - 1 others by q . mean key."""
    n, d = q.shape
    blocks = [list(range(s, min(s + size, n))) for s in range(0, n, size)]
    out = torch.zeros_like(v)
    for i in range(n):
        home = i // size
        others = [c for c in range(len(blocks)) if c != home and not (causal and c > home)]
        fit = {c: float(q[i] @ k[blocks[c]].mean(0)) for c in others}
        chosen = {home, *sorted(others, key=lambda c: -fit[c])[: best - 1]}
        keys = [j for c in chosen for j in blocks[c] if not (causal and j > i)]
        out[i] = torch.softmax(q[i] @ k[keys].T / math.sqrt(d), 0) @ v[keys]
    return out


def vmoba_pairs(gate: Tensor, home: list[int], kind: str, share: float) -> set[tuple[int, int, int]]:
    """The (block, head, row) triples that VMoBA keeps by threshold; KwaiVGI/VMoBA src/vmoba.py at 4da72ff.

    Args:
        gate: [C, H, S]. home: the block of each row. kind: its `threshold_type`. share: its `simsum_threshold`.
    """
    C, H, S = gate.shape
    every = [(c, h, s) for c in range(C) for h in range(H) for s in range(S)]
    group_of = {
        "query_head": lambda t: (t[1], t[2]),
        "head_global": lambda t: t[1],
        "overall": lambda t: 0,
        "block": lambda t: t[0],
    }[kind]
    kept = {(home[s], h, s) for h in range(H) for s in range(S)}
    for group in {group_of(t) for t in every}:
        own = [t for t in every if group_of(t) == group]
        values = [float(gate[t]) for t in own]
        low, width = min(values), max(values) - min(values)
        width = 1.0 if width <= 1e-6 else width
        level = {t: (x - low) / width for t, x in zip(own, values, strict=True)}
        total = sum(level.values()) + 1e-6
        mine = sum(x for t, x in level.items() if home[t[2]] == t[0])
        wanted = max(0.0, share - mine / total)
        others = sorted((t for t in own if home[t[2]] != t[0]), key=lambda t: -level[t])
        had = 0.0
        for t in others:
            kept.add(t)
            had += level[t]
            if had / total >= wanted:
                break
    return kept
