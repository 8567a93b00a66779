"""What a score is made of: singular directions of a head's query-key form, and the ledger of what wrote it upstream.

After Franco, Crovella, "Sparse Attention Decomposition Applied to Circuit Tracing" (2024, arXiv 2410.00340;
gaabrielfranco/sparse-attention-decomposition), with two changes: the ledger is complete (embedding, every head, the rest of each
block, biases) and adds up to the score; and rotations are of the pair of positions, not of one singular value decomposition for
all. With rotary positions there is no single W_QK: the form is W_Q R W_K^T, R the rotation between the two rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..call import AttnCall
from ..errors import SelectionError, UnsupportedHost
from ..intervention import Intervention
from ..steering import steer
from ..where import Where
from .projections import HeadWeights, evaluating, head_weights

# Of the ledger's sum against the score, relative to the largest part.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Rows(Intervention):
    """Keeps q, k, outputs and what enters each layer, of one text."""

    found: dict[int, dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    observes = True
    needs = ("tokens", "residual")

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Keep what a ledger needs."""
        self.found[call.site.layer] = {
            "q": call.q[0].double(),
            "k": call.k[0].double(),
            "out": out[0].double(),
            "residual": call.residual[0].double(),
        }


@dataclass(frozen=True)
class Ledger:
    """A score q_i . k_j (before scaling, soft-cap and softmax), as a sum over what wrote row i (or j).

    Attributes:
        score: the sum. parts: ("embedding",), ("head", layer, head), ("block", layer) (what the block adds beside its heads: MLP,
            biases), ("bias",): the biases of query or key and the norm's shift. directions: of each direction of the form, largest
            singular value first: sigma_k (x_i . u_k)(v_k . x_j), their sum is the part of the score without biases.
    """

    score: float
    parts: Mapping[tuple[Any, ...], float]
    directions: Tensor

    def top(self, count: int = 5) -> list[tuple[tuple[Any, ...], float]]:
        """The largest parts by size."""
        return sorted(self.parts.items(), key=lambda p: -abs(p[1]))[:count]


@torch.no_grad()
def trace(
    model: nn.Module, inputs: Mapping[str, Any], layer: int, head: int, i: int, j: int, side: str = "query"
) -> Ledger:
    """What in the residual makes head (layer, head) look from row i at key j: one level upstream, norms frozen.

    Args:
        inputs: keyword arguments of the model: one text without padding. i, j: token indices, j seen by i.
        side: "query": row i is taken apart; "key": row j.

    Raises:
        SelectionError: a head or index that does not exist, or more than one text.
        UnsupportedHost: scores that are not bilinear (norms of q and k), or a ledger that does not add up.
    """
    if side not in ("query", "key"):
        raise SelectionError(f'side={side!r} is "query" or "key".')
    weights, _ = head_weights(model, where=Where(kinds="self"))
    if layer not in weights or not 0 <= head < weights[layer].site.heads:
        raise SelectionError(f"there is no head {(layer, head)}; layers {sorted(weights)}.")
    w = weights[layer]
    if w.query is None:
        raise UnsupportedHost(
            f"scores of {w.site.path} are not bilinear in its input (norms of q and k); they have no ledger."
        )
    probe = _Rows(where=Where(kinds="self"))
    with evaluating(model), steer(model, probe, control=True):
        model(**inputs)
    rows = probe.found
    n = rows[layer]["residual"].shape[0]
    if not (0 <= i < n and 0 <= j < n) or len(next(v for v in inputs.values() if isinstance(v, Tensor))) != 1:
        raise SelectionError(f"rows i={i} and j={j} are of one text of {n} tokens.")
    q, k = rows[layer]["q"][head, i], rows[layer]["k"][w.kv(head), j]
    Q, K = w.query[head].double(), w.key[w.kv(head)].double()
    b_q = 0.0 if w.query_bias is None else w.query_bias[head].double()
    b_k = 0.0 if w.key_bias is None else w.key_bias[w.kv(head)].double()
    x_i, x_j = (_normed(w, rows[layer]["residual"][at]) for at in (i, j))
    R_i, R_j = _rotation(x_i @ Q + b_q, q), _rotation(x_j @ K + b_k, k)
    row, W, bias, other, R = (i, Q, b_q, k, R_i) if side == "query" else (j, K, b_k, q, R_j)
    # score = (x W + bias) . back, in the frame before rotation.
    back = R.T @ other
    parts: dict[tuple[Any, ...], float] = {}
    direction = W @ back
    fixed = direction if w.norm is None or w.norm.shift is None else w.norm.shift.double() @ direction
    parts["bias",] = float((bias * back).sum()) if isinstance(bias, Tensor) else 0.0
    if w.norm is not None and w.norm.shift is not None:
        parts["bias",] += float(fixed)
    scale = None if w.norm is None else w.norm.scale(rows[layer]["residual"][row])

    def reads(part: Tensor) -> float:
        return float((part if w.norm is None else _frozen(w, part, scale)) @ direction)

    below = [n for n in sorted(rows) if n < layer]
    parts["embedding",] = reads(rows[min(rows)]["residual"][row])
    for n, after in zip(below, [*below[1:], layer], strict=True):
        written = _written(weights[n], rows[n]["out"][:, row])
        for h, part in enumerate(written):
            parts["head", n, h] = reads(part)
        parts["block", n] = reads(rows[after]["residual"][row] - rows[n]["residual"][row] - written.sum(dim=0))
    score, total = float(q @ k), sum(parts.values())
    if abs(score - total) > TOLERANCE * max(1.0, *(abs(p) for p in parts.values())):
        raise UnsupportedHost(
            f"the parts of the score of head {(layer, head)} at ({i}, {j}) add up to {total:.4f}, and it is {score:.4f}: its "
            "input is more than a norm of the residual."
        )
    U, S, V = directions(Q, R_i.T @ R_j, K)
    return Ledger(score, parts, S * (x_i @ U) * (x_j @ V))


def directions(Q: Tensor, R: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [D, d], S [d], V [D, d] of Q R K^T = U diag(S) V^T, by QR of Q and K and one [d, d] decomposition."""
    a, b = torch.linalg.qr(Q), torch.linalg.qr(K)
    U, S, Vh = torch.linalg.svd(a.R @ R @ b.R.T)
    return a.Q @ U, S, b.Q @ Vh.T


def _normed(w: HeadWeights, x: Tensor) -> Tensor:
    if w.norm is None:
        return x
    y = _frozen(w, x, w.norm.scale(x))
    return y if w.norm.shift is None else y + w.norm.shift.double()


def _frozen(w: HeadWeights, x: Tensor, scale: Tensor) -> Tensor:
    x = x - x.mean(dim=-1, keepdim=True) if w.norm.centred else x
    return x / scale * w.norm.gain.double()


def _written(w: HeadWeights, out: Tensor) -> Tensor:
    """What each head adds to the residual at one row, [H, D]; a norm behind is frozen at what the heads together have."""
    parts = torch.einsum("hd,hdD->hD", out, w.output.double())
    return parts if w.post is None else parts / w.post.scale(parts.sum(dim=0)) * w.post.gain.double()


def _rotation(before: Tensor, after: Tensor) -> Tensor:
    """R [d, d] with after = R before, made of plane rotations: which dimensions are pairs, their lengths tell.

    Raises:
        UnsupportedHost: it is no rotation of pairs (i, i + r / 2) or (2 i, 2 i + 1), r the rotated dimensions.
    """
    d = len(before)
    if torch.allclose(before, after, rtol=1e-4, atol=1e-5 * float(before.abs().max())):
        return torch.eye(d, dtype=before.dtype)
    for rotated in range(d, 1, -2):
        half = rotated // 2
        for a, b in (
            (torch.arange(half), torch.arange(half) + half),
            (2 * torch.arange(half), 2 * torch.arange(half) + 1),
        ):
            was, now = before[a].pow(2) + before[b].pow(2), after[a].pow(2) + after[b].pow(2)
            rest = torch.arange(rotated, d)
            close = {"rtol": 1e-3, "atol": 1e-5 * float(before.pow(2).max())}
            if not torch.allclose(was, now, **close) or not torch.allclose(before[rest], after[rest], **close):
                continue
            angle = torch.atan2(after[b], after[a]) - torch.atan2(before[b], before[a])
            R = torch.eye(d, dtype=before.dtype)
            R[a, a], R[b, b], R[a, b], R[b, a] = angle.cos(), angle.cos(), -angle.sin(), angle.sin()
            return R
    raise UnsupportedHost(
        "queries or keys are not rotations of what the projections give (a norm, a scale or another encoding stands between)."
    )
