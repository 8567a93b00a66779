"""What readers compute, in loops over rows, keys and layers; nothing here imports the library."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "adam",
    "carve",
    "carve_mask",
    "controlled",
    "flow",
    "gated",
    "prompting",
    "refam",
    "rollout",
    "soft_or",
    "tag_boxes",
    "tag_map",
]


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


def carve(query: list[list[Tensor]], general: list[list[Tensor]], size: tuple[int, int], lam: float) -> Tensor:
    """S [height, width] of maps [steps][layers] [h, w], as fuse_contrastive_attention of YuyaoGe/CARVE at a1f0442 adds them up;
    each map is brought to the image's size (width, height) by PIL, as there."""
    import numpy as np
    from PIL import Image

    S = np.zeros((size[1], size[0]))
    for step in range(min(len(query), len(general))):
        for q, g in zip(query[step], general[step], strict=True):
            hat = (q / (g + lam)).numpy().astype(np.float32)
            S += (step + 1) * np.asarray(Image.fromarray(hat, mode="F").resize(size, Image.BILINEAR))
    return torch.tensor(S)


def carve_mask(S: Tensor, share: float, regions: int, floor: bool) -> Tensor:
    """create_attention_mask of the same (strategy "attention_sum"), with a flood fill for scipy's labels."""
    import numpy as np

    s = S.numpy()
    kept = s >= np.percentile(s, (1.0 - share) * 100)
    parts, seen = [], np.zeros_like(kept)
    for y, x in itertools.product(*map(range, kept.shape)):
        if kept[y, x] and not seen[y, x]:
            part, waiting = [], [(y, x)]
            while waiting:
                a, b = waiting.pop()
                if 0 <= a < kept.shape[0] and 0 <= b < kept.shape[1] and kept[a, b] and not seen[a, b]:
                    seen[a, b] = True
                    part.append((a, b))
                    waiting += [(a + 1, b), (a - 1, b), (a, b + 1), (a, b - 1)]
            parts.append(part)
    parts.sort(key=lambda part: -sum(s[p] for p in part))
    mask = torch.zeros(S.shape, dtype=torch.bool)
    for part in parts[: max(regions, int(len(parts) * share)) if floor else regions]:
        for p in part:
            mask[p] = True
    return mask


def tag_boxes(found: Tensor, threshold: float, side: int = 14) -> list[tuple[list[int], float]]:
    """find_connected_regions_with_confidence of HeimingX/TAG at 1c6236f on patches repeated to `side` pixels: ([x0, y0, x1, y1],
    ends included, and the largest value), in the order in which they are found."""
    image = (found / found.max()).T.repeat_interleave(side, 0).repeat_interleave(side, 1)
    image = image * (image >= threshold)
    width, height = image.shape
    on, value = (image > 0).tolist(), image.tolist()
    visited = [[False] * height for _ in range(width)]
    boxes = []
    for i, j in itertools.product(range(width), range(height)):
        if not on[i][j] or visited[i][j]:
            continue
        part, waiting = [], [(i, j)]
        while waiting:
            a, b = waiting.pop()
            if not (0 <= a < width and 0 <= b < height) or visited[a][b] or not on[a][b]:
                continue
            visited[a][b] = True
            part.append((a, b))
            waiting += [(a + da, b + db) for da in (-1, 0, 1) for db in (-1, 0, 1)]
        x0, x1 = min(p[0] for p in part), max(p[0] for p in part)
        y0, y1 = min(p[1] for p in part), max(p[1] for p in part)
        for a, b in itertools.product(range(x0, x1 + 1), range(y0, y1 + 1)):
            visited[a][b] = True
        boxes.append(([x0, y0, x1, y1], max(value[a][b] for a in range(x0, x1 + 1) for b in range(y0, y1 + 1))))
    return boxes


def tag_map(rows: Tensor, keep: int) -> Tensor:
    """token_to_learnable_query of the same without slices: [N] of rows [tokens, pairs, N]."""
    made = []
    for row in rows:
        order = sorted(range(len(row)), key=lambda h: float(row[h].sum()), reverse=True)[:keep]
        made.append(sum(row[h] for h in order) / keep)
    return sum(made) / len(made)


def prompting(found: Tensor, contrast: float) -> Tensor:
    """revise_mask of yu-rp/apiprompting at eed9978, in loops."""
    z = (found - found.min()) / (found.max() - found.min())
    z = torch.sigmoid(contrast * (z - z.mean()) / z.std())
    return _mean3(z)


def soft_or(own: Tensor, patches: Tensor, contrast: float) -> Tensor:
    """merge_mask of the same."""
    a = prompting(own, contrast)
    b = _mean3((patches.max() - patches) / (patches.max() - patches.min()))
    m = a + b - a * b
    return (m - m.min()) / (m.max() - m.min())


def _mean3(z: Tensor) -> Tensor:
    h, w = z.shape
    out = torch.zeros_like(z)
    for y, x in itertools.product(range(h), range(w)):
        near = [z[min(max(y + a, 0), h - 1), min(max(x + b, 0), w - 1)] for a in (-1, 0, 1) for b in (-1, 0, 1)]
        out[y, x] = sum(near) / 9
    return out


def controlled(
    loss: Callable[[Tensor], Tensor],
    tokens: int,
    width: int,
    steps: int,
    lr: float,
    beta: float,
    stop: float,
    accumulate: bool,
) -> tuple[list[Tensor], Tensor]:
    """The loop of llava_rtc.py of mrwu-mac/ControlMLLM at 57e16e7, aliased embeddings and all: (offset of each pass, final one).

    loss: of embeddings' offset [tokens, width] -> number. accumulate=False: the written algorithm, without the aliasing.
    """
    base = torch.zeros(tokens, width)
    visual_prompt = torch.zeros(tokens, width, requires_grad=True)
    history, vprompt_history, seen = [], visual_prompt, []
    for _ in range(steps):
        new = base if accumulate else base.clone()
        vprompt_cur = beta * visual_prompt + (1 - beta) * vprompt_history
        new += vprompt_cur
        seen.append(new.detach().clone())
        value = loss(new)
        history.append(value.item())
        if len(history) >= 2 and abs((history[-1] - history[0]) / history[0]) * 100 > stop:
            break
        vprompt_history = vprompt_cur
        (grad,) = torch.autograd.grad(value, [visual_prompt], retain_graph=True)
        visual_prompt = visual_prompt - lr * grad
    new = base if accumulate else base.clone()
    new = new + (beta * visual_prompt + (1 - beta) * vprompt_history)
    return seen, new.detach()


def adam(gradients: list[Tensor], lr: float) -> Tensor:
    """The hand-written Adam of controlmllm++ at the same commit."""
    p, m, s = torch.zeros_like(gradients[0]), 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * g
        s = 0.999 * s + 0.001 * g**2
        p = p - lr * (m / (1 - 0.9**t)) / (torch.sqrt(s / (1 - 0.999**t)) + 1e-3)
    return p


def refam(
    P: list[list[float]], content: list[int], magnets: list[int], mass: float, flat: float, sinks: str
) -> tuple[list[float], list[float], list[int]]:
    """Our reconstruction of RefAM's reading in loops, rows renormalised: (content map, magnet map, sinks), of P [N][M]."""
    N, M = len(P), len(P[0])
    columns = [[P[i][j] for i in range(N)] for j in range(M)]
    means = [sum(c) / N for c in columns]
    middle = sorted(means)[(M - 1) // 2]
    found = []
    for j, c in enumerate(columns):
        spread = (sum((x - means[j]) ** 2 for x in c) / N) ** 0.5
        if sinks != "keep" and means[j] > mass * middle and spread / means[j] < flat:
            found.append(j)
    own = [j for j in content if j not in found] or content
    kept = [j for j in range(M) if j not in found or j in own]
    maps, away = [], []
    for i in range(N):
        lost = sum(P[i][j] for j in range(M) if j not in kept)
        total = sum(P[i][j] for j in kept) + (lost if sinks == "redirect" else 0.0)
        maps.append(sum(P[i][j] for j in own) / len(own) / total)
        away.append((sum(P[i][j] for j in magnets if j in kept) + (lost if sinks == "redirect" else 0.0)) / total)
    return maps, away, found
