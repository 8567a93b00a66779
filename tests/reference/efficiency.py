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


def causal_share(q: Tensor, k: Tensor, size: int, share: float) -> list[list[int]]:
    """Blocks that each row of one causal head [n, d] keeps by `share`, from the keys that it may see and no others.

    The arithmetic of `vmoba_pairs` for one row at a time; of its own block a row knows the keys up to itself.
    """
    kept = []
    for i in range(len(q)):
        home = i // size
        means = [k[c * size : min((c + 1) * size, i + 1)].mean(0) for c in range(home + 1)]
        gate = torch.stack([q[i] @ m for m in means])[:, None, None]
        kept.append(sorted(c for c, _, _ in vmoba_pairs(gate, [home], "query_head", share)))
    return kept


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


def fastv_index(weights: Tensor, image: Tensor, last: list[int], keep: int) -> list[list[int]]:
    """Slots that FastV keeps, of each sample; pkunlp-icler/FastV modeling_llama.py at d165972, sample by sample.

    Args:
        weights: attention weights [B, H, n, n] of layer K - 1. image: bool [B, n]. last: the row of each prompt's last token.
    """
    out = []
    for b in range(len(weights)):
        average = weights[b].mean(dim=0)[last[b]]
        places = [j for j in range(image.shape[1]) if image[b, j]]
        best = sorted(places, key=lambda j: -float(average[j]))[:keep]
        out.append(sorted([j for j in range(image.shape[1]) if not image[b, j]] + best))
    return out


def clusters(x: Tensor, slots: list[int], count: int) -> list[tuple[int, Tensor]]:
    """k-means with ten steps from far-apart tokens: [(mean slot, mean)] by slot; x [N, D]."""
    away = [float((t - x.mean(0)).norm()) for t in x]
    chosen = [min(range(len(x)), key=lambda i: away[i])]
    while len(chosen) < count:
        least = [min(float((t - x[c]).norm()) for c in chosen) for t in x]
        chosen.append(max(range(len(x)), key=lambda i: least[i]))
    centres = [x[c].clone() for c in chosen]
    for _ in range(10):
        home = [min(range(count), key=lambda c: float((t - centres[c]).norm())) for t in x]
        for c in range(count):
            own = [i for i in range(len(x)) if home[i] == c]
            if own:
                centres[c] = x[own].mean(0)
    found = []
    for c in range(count):
        own = [i for i in range(len(x)) if home[i] == c]
        # Halves go up: the nearest even number would move with the padding in front.
        found.append((math.floor(sum(slots[i] for i in own) / len(own) + 0.5), centres[c]))
    return sorted(found, key=lambda pair: pair[0])


def visionzip_tokens(x: Tensor, score: Tensor, keys: Tensor, dominant: int, contextual: int) -> dict[int, Tensor]:
    """Place -> token, of one image; dvlab-research/VisionZip visionzip/clip_encoder.py at 3151f6d, without the class token."""
    order = sorted(range(len(x)), key=lambda i: -float(score[i]))
    out = {i: x[i] for i in order[:dominant]}
    rest = sorted(order[dominant:])
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    members: dict[int, list[int]] = {t: [] for t in targets}
    unit = {i: keys[i] / keys[i].norm() for i in rest}
    for i in rest:
        if i not in targets:
            members[max(targets, key=lambda t: float(unit[i] @ unit[t]))].append(i)
    for t, own in members.items():
        out[t] = x[t] + (x[own].mean(0) if own else 0.0)
    return out


def merged_groups(x: Tensor, destination: list[bool], source: list[bool], count: int) -> list[int]:
    """The root of each token: bipartite soft matching of ToMe by loops, x [n, d] compared by cosine."""
    unit = x / x.norm(dim=1, keepdim=True)
    targets = [j for j in range(len(x)) if destination[j]]
    best = {i: max(targets, key=lambda j: float(unit[i] @ unit[j])) for i in range(len(x)) if source[i]}
    gone = sorted(best, key=lambda i: -float(unit[i] @ unit[best[i]]))[:count]
    return [best[i] if i in gone else i for i in range(len(x))]


def merged_attention(q: Tensor, k: Tensor, v: Tensor, root: list[int], sizes: bool) -> Tensor:
    """Attention among the means of groups, given back to their tokens; one head [n, d]."""
    names = sorted(set(root))
    members = [[i for i, r in enumerate(root) if r == name] for name in names]
    mean = lambda t: torch.stack([t[own].mean(0) for own in members])  # noqa: E731
    z = mean(q) @ mean(k).T / math.sqrt(q.shape[1])
    if sizes:
        z = z + torch.tensor([float(len(own)) for own in members]).log()
    out = torch.softmax(z, dim=-1) @ mean(v)
    return torch.stack([out[names.index(r)] for r in root])


def scatterbrain(q: Tensor, k: Tensor, v: Tensor, W: Tensor, support: Tensor) -> Tensor:
    """One head [n, d] in fp64: exact exponentials on the support bool [n, n], products of random features elsewhere."""
    q, k, v, W = (t.double() for t in (q, k, v, W))
    t = 1.0 / math.sqrt(q.shape[1])
    both = torch.cat([W, -W])

    def phi(x: Tensor) -> Tensor:
        rows = [torch.exp(both @ row * math.sqrt(t) - t * float(row @ row) / 2) / math.sqrt(len(both)) for row in x]
        return torch.stack(rows)

    A = torch.where(support, torch.exp(t * q @ k.T), phi(q) @ phi(k).T)
    return (A @ v) / A.sum(1, keepdim=True)
