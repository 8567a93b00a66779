"""Scatterbrain: random features for all pairs of rows and keys, and the exact exponential for those that hashing puts together.

Chen et al., "Scatterbrain: Unifying Sparse and Low-rank Attention Approximation" (NeurIPS 2021, arXiv 2110.15343); official code
HazyResearch/fly (src/models/attention/sbsmyrf_attention.py, feature_maps_sb.py at 6b73449). There a pair that several rounds of
hashing find is weighed down, here it counts in the first of them, which comes to the same; features are drawn once there too. A
baseline: at the sizes of q and k that trained models have, its error is large (docs/efficiency.md).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import AttnCall
from ..edits import HeadOutputs
from ..errors import SelectionError, UnsupportedHost
from ..intervention import Intervention
from ..parameters import integer
from ..registry import register_method

# The least sum of a row, in units of its largest term, as in the official code: estimates may cancel.
LEAST = 1e-6


@register_method
@dataclass(frozen=True)
class Scatterbrain(Intervention):
    """A_ij = exp(t q_i.k_j) for hashed pairs and phi(q_i).phi(k_j) for the others, over its row sum; in the place of attention.

    Args:
        nb_features: m of phi(x) = exp(+-W sqrt(t) x - t |x|^2 / 2) / sqrt(m), even; None: d log d, as in the official code.
        n_hashes: rounds of hashing; 0: features alone (Performer).
        cluster_size: rows, and keys, that one round puts together. Not less than there are: nothing is edited.
        seed: of W and of the hashes; the same for all layers, heads and samples.

    Without masks, causality, soft-capping and learned sinks, where rows and keys are equally many; no map of it exists, so that
    other methods may only edit its outputs. Approximate: error grows with |q| |k|, and falls with the clusters, slowly with the
    features.
    """

    nb_features: int | None = integer(None, low=2)
    n_hashes: int = integer(2, low=0)
    cluster_size: int = integer(64, low=1)
    seed: int = integer(0, low=0)

    kinds = ("self", "joint")
    approximate = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nb_features is not None and self.nb_features % 2:
            raise SelectionError(
                f"Scatterbrain(nb_features={self.nb_features}): features come in pairs; give an even number."
            )

    def inputs(self, call: AttnCall) -> HeadOutputs | None:
        att, (_, _, n, m) = call.map.att, call.map.shape
        if call.site.causal or att.causal or att.mask is not None or att.key_bias is not None or n != m:
            raise UnsupportedHost(
                f"{call.site.path}: sums of random features run over all keys of equally many rows; this attention is causal, "
                "masked, or meets other keys. Leave it out of Where."
            )
        if att.softcap is not None or att.sinks is not None:
            raise UnsupportedHost(
                f"{call.site.path}: soft-capped scores and learned sinks have no random features. Leave it out of Where."
            )
        if self.n_hashes and self.cluster_size >= n:
            return None
        d = call.q.shape[-1]
        features = self.nb_features or max(2, int(d * math.log(d)))
        draw = torch.Generator().manual_seed(self.seed)
        W = orthogonal(features // 2, d, draw).to(call.q.device)
        wide = torch.promote_types(call.q.dtype, torch.float32)
        q, k, v = (t.to(wide) for t in (call.q, call.k, call.values))
        k = k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        hashes = [hashed(q, k, -(-n // self.cluster_size), draw) for _ in range(self.n_hashes)]
        return HeadOutputs(estimate(q, k, v, att.scale, W.to(wide), hashes).to(call.v.dtype))


def orthogonal(rows: int, d: int, draw: torch.Generator) -> Tensor:
    """Gaussian rows [rows, d], orthogonal within each d of them."""
    blocks = []
    for start in range(0, rows, d):
        basis = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64)).Q
        size = torch.randn(d, d, generator=draw, dtype=torch.float64).norm(dim=1)
        blocks.append((basis * size[:, None])[: rows - start])
    return torch.cat(blocks).float()


def hashed(q: Tensor, k: Tensor, clusters: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The cluster of each row and of each key, int64 [B, H, n]: equal parts of their order along a random direction.

    Rows and keys are brought to one norm first (XBOX+), so that a large product is a small distance.
    """
    size = lambda t: t.square().sum(dim=-1)  # noqa: E731
    a, b = size(q), size(k)
    most = a.amax(dim=-1, keepdim=True) + b.amax(dim=-1, keepdim=True)
    zero = torch.zeros_like(a)
    x = torch.cat([q, (most - a).clamp_min(0).sqrt()[..., None], zero[..., None]], dim=-1)
    y = torch.cat([k, zero[..., None], (most - b).clamp_min(0).sqrt()[..., None]], dim=-1)
    direction = torch.randn(x.shape[-1], generator=draw).to(q.device, q.dtype)
    n = q.shape[2]
    part = torch.arange(n, device=q.device) * clusters // n

    def of(points: Tensor) -> Tensor:
        order = (points @ direction).argsort(dim=-1)
        return torch.empty_like(order).scatter_(2, order, part.expand(order.shape))

    return of(x), of(y)


def estimate(q: Tensor, k: Tensor, v: Tensor, t: float, W: Tensor, hashes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The output [B, H, n, dv] for the support that `hashes` give; q, k, v [B, H, n, d], W [m / 2, d]."""
    log_q, log_k = _log_features(q, t, W), _log_features(k, t, W)
    top_q, top_k = log_q.amax(dim=-1), log_k.amax(dim=(-2, -1))[..., None]
    phi_q, phi_k = (log_q - top_q[..., None]).exp(), (log_k - top_k[..., None]).exp()
    ones = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    found = torch.matmul(phi_q, torch.matmul(phi_k.transpose(-1, -2), ones))
    # In logarithms, what `found` and later terms are to be multiplied by.
    scale = top_q + top_k
    for number, (rows, keys) in enumerate(hashes):
        found, scale = _exact(q, k, ones, t, log_q, log_k, hashes[:number], rows, keys, found, scale)
    return found[..., :-1] / found[..., -1:].clamp_min(LEAST)


def _log_features(x: Tensor, t: float, W: Tensor) -> Tensor:
    """log phi(x), [B, H, n, m]."""
    y = math.sqrt(t) * torch.matmul(x, W.T)
    half = 0.5 * t * x.square().sum(dim=-1, keepdim=True) + 0.5 * math.log(2 * len(W))
    return torch.cat([y, -y], dim=-1) - half


def _exact(
    q: Tensor,
    k: Tensor,
    ones: Tensor,
    t: float,
    log_q: Tensor,
    log_k: Tensor,
    earlier: list[tuple[Tensor, Tensor]],
    rows: Tensor,
    keys: Tensor,
    found: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """`found` with the pairs of one round at their exact exponential; pairs of an earlier round have it already."""
    order_q, order_k = rows.argsort(dim=-1, stable=True), keys.argsort(dim=-1, stable=True)
    n, clusters = q.shape[2], int(rows.max()) + 1
    new_found, new_scale = found.clone(), scale.clone()
    bounds = [-(-c * n // clusters) for c in range(clusters + 1)]
    for start, stop in itertools.pairwise(bounds):
        i, j = order_q[..., start:stop], order_k[..., start:stop]
        at = lambda x, index: x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))  # noqa: E731
        z = t * torch.matmul(at(q, i), at(k, j).transpose(-1, -2))
        for a, b in earlier:
            z = z.masked_fill(a.gather(2, i)[..., None] == b.gather(2, j)[:, :, None], -torch.inf)
        # phi(q).phi(k) of these pairs in logarithms, with the scale of its largest term.
        lq, lk = at(log_q, i), at(log_k, j)
        top_q, top_k = lq.amax(dim=-1, keepdim=True), lk.amax(dim=-1)[:, :, None]
        low = (
            torch.matmul((lq - top_q).exp(), (lk - top_k.transpose(-1, -2)).exp().transpose(-1, -2)).log()
            + top_q
            + top_k
        )
        low = low.masked_fill(torch.isneginf(z), -torch.inf)
        old = scale.gather(2, i)
        top = torch.maximum(old, torch.maximum(z, low).amax(dim=-1))
        change = torch.matmul((z - top[..., None]).exp() - (low - top[..., None]).exp(), at(ones, j))
        new = at(found, i) * (old - top).exp()[..., None] + change
        new_found = new_found.scatter(2, i[..., None].expand_as(new), new)
        new_scale = new_scale.scatter(2, i, top)
    return new_found, new_scale
