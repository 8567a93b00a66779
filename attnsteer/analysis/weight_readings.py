"""What weights say of heads, without an input: copying scores, and how many directions OV and QK have."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .projections import HeadWeights, Readout
from .table import Column, of_scores

Pair = tuple[int, int]


def weight_readings(
    weights: Mapping[int, HeadWeights], readout: Readout | None, heads: tuple[Pair, ...], fold: bool = True
) -> dict[str, Column]:
    """Readings from weights alone, each through a [dv, dv] matrix: no [D, D] or [V, V] product is formed.

    Args:
        fold: gains of the norms in front of the values and of the unembedding are part of the copying score.
    """
    copying, ov_rank, ov_largest, qk_rank = {}, {}, {}, {}
    middle = None
    if readout is not None:
        E, U = readout.embedding.double(), readout.unembedding.double()
        if fold and readout.norm is not None:
            U = readout.norm.gain.double()[:, None] * U
        # W_U W_E, [D, D] of the model's width, once.
        middle = U @ E
    for layer, head in heads:
        w = weights[layer]
        V, O = w.value[w.kv(head)].double(), w.output[head].double()
        O = O if w.post is None else O * w.post.gain.double()
        gain = w.norm.gain.double()[:, None] if fold and w.norm is not None else 1.0
        if middle is not None:
            values = torch.linalg.eigvals(O @ middle @ (gain * V))
            size = float(values.abs().sum())
            copying[layer, head] = float(values.real.sum()) / size if size else math.nan
        spectrum = _singular(gain * V, O.T)
        ov_rank[layer, head], ov_largest[layer, head] = _participation(spectrum), float(spectrum.max())
        if w.query is not None:
            Q, K = w.query[head].double(), w.key[w.kv(head)].double()
            qk_rank[layer, head] = _participation(_singular(gain * Q, gain * K))
    columns = {
        "ov_rank": of_scores(ov_rank, heads, "participation ratio of OV's singular values"),
        "ov_largest": of_scores(ov_largest, heads, "largest singular value of OV"),
    }
    if qk_rank:
        columns["qk_rank"] = of_scores(qk_rank, heads, "participation ratio of QK's singular values, offset 0")
    if copying:
        columns["copying"] = of_scores({p: v for p, v in copying.items() if v == v}, heads, "copying score of OV")
    return columns


def _singular(A: Tensor, B: Tensor) -> Tensor:
    """Singular values of A B^T, for tall A and B, by QR: a [d, d] problem."""
    return torch.linalg.svdvals(torch.linalg.qr(A).R @ torch.linalg.qr(B).R.T)


def _participation(s: Tensor) -> float:
    p = s.pow(2)
    return float(p.sum().pow(2) / p.pow(2).sum()) if float(p.sum()) else 0.0
