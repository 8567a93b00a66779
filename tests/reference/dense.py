"""Dense attention, written out: the definition that every fast path of the library is compared with.

Nothing here is fast and nothing here imports the library. Notation follows ``specs/llm.md`` 0.2: B batch, n
query rows, m key slots, H query heads, Hkv key/value heads, d head dimension. Query head h reads key/value
head ``h // (H // Hkv)``. Everything is computed in fp32, or in fp64 when an input is fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense_map", "dense_out", "dense_scores", "repeat_kv", "sink_share", "work_dtype"]

NEG_INF = float("-inf")


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any of the tensors is fp64, otherwise fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, m, d] -> [B, H, m, d]: each key/value head repeated for its group of query heads."""
    kv_heads = x.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
    return x.repeat_interleave(heads // kv_heads, dim=1)


def dense_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The scores z [B, H, n, m] before the softmax, -inf where a key is invisible.

    q [B, H, n, d], k [B, Hkv, m, d]. The order is that of Gemma 2: scale, soft-cap
    (``softcap * tanh(z / softcap)``), then mask, then bias.

    mask   None, bool (True = visible) or additive float, broadcastable to [B, H, n, m]. An additive entry at
           or below half of the most negative number of the mask's own dtype means "invisible" (transformers'
           eager masks use ``finfo.min``, ``specs/llm.md`` 0.5) and becomes -inf, so a row that is masked
           everywhere gets a zero map rather than transformers' uniform one.
    causal query row i sits at key position m - n + i and sees positions up to its own (bottom-right
           alignment; the usual triangle when n == m).
    bias   additive float, broadcastable to [B, H, n, m].
    """
    dtype = work_dtype(q, k)
    n, m = q.shape[2], k.shape[2]
    z = scale * (q.to(dtype) @ repeat_kv(k, q.shape[1]).to(dtype).transpose(-1, -2))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if mask is not None:
        if mask.dtype == torch.bool:
            z = z.masked_fill(~mask, NEG_INF)
        else:
            invisible = mask <= torch.finfo(mask.dtype).min / 2
            z = (z + mask.to(dtype).masked_fill(invisible, 0.0)).masked_fill(invisible, NEG_INF)
    if causal:
        if n > m:
            raise ValueError(f"causal attention needs n <= m, got n = {n}, m = {m}")
        for i in range(n):
            position = m - n + i
            z[:, :, i, position + 1 :] = NEG_INF
    if bias is not None:
        z = z + bias.to(dtype)
    return z


def _exponentials(z: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z - c) [B, H, n, m], the learned sink's exp(s - c) [B, H, n, 1], and their sum [B, H, n, 1]."""
    top = z.amax(dim=-1, keepdim=True)
    logits = torch.full_like(top, NEG_INF)
    if sinks is not None:
        logits = sinks.to(z.dtype).reshape(1, -1, 1, 1).expand_as(top)
    top = torch.maximum(top, logits)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    e, e_sink = torch.exp(z - top), torch.exp(logits - top)
    return e, e_sink, e.sum(dim=-1, keepdim=True) + e_sink


def _safe(total: Tensor) -> Tensor:
    """The denominator, with one in place of zero (a row that sees nothing)."""
    return torch.where(total > 0, total, torch.ones_like(total))


def dense_map(z: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The map A [B, H, n, m]: softmax of z over the keys.

    sinks [H]: learned sink logits (GPT-OSS's ``s_aux``). They take part in the denominator and are then
    dropped, so rows sum to less than one. A row without a visible key is all zero.
    """
    e, _, total = _exponentials(z, sinks)
    return e / _safe(total)


def sink_share(z: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The probability [B, H, n] that the learned sink takes; zero where there is no learned sink.

    With sinks: ``1 - dense_map(z, sinks).sum(-1)`` without the cancellation (one if a row sees no key).
    """
    _, e_sink, total = _exponentials(z, sinks)
    return (e_sink / _safe(total)).squeeze(-1)


def dense_out(A: Tensor, v: Tensor) -> Tensor:
    """The output o [B, H, n, d] = sum_j A_ij v_j, with A [B, H, n, m] and v [B, Hkv, m, d]."""
    dtype = work_dtype(A, v)
    return A.to(dtype) @ repeat_kv(v, A.shape[1]).to(dtype)
