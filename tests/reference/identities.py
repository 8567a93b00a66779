"""Dense counterparts of what a lazy map answers without building it (``specs/llm.md`` 0.4, F1 to F9).

Each function takes the full map A [B, H, n, m] and sums over it. Nothing here imports the library.
Results are fp32, or fp64 when A is fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import dense_out, work_dtype

__all__ = ["column_mass", "entropy", "mass", "partial"]


def _key_set(S: Tensor, A: Tensor) -> Tensor:
    """A key set [m] or [B or 1, H or 1, m] as [B, H, 1, m] bool."""
    batch, heads, _, m = A.shape
    if S.dim() not in (1, 3) or S.shape[-1] != m:
        raise ValueError(f"a key set is [m] or [B or 1, H or 1, m] with m = {m}, got {tuple(S.shape)}")
    return S.to(torch.bool).expand(batch, heads, m).unsqueeze(2)


def mass(A: Tensor, S: Tensor) -> Tensor:
    """F1: m_iS = sum_{j in S} A_ij, [B, H, n]. S is a bool mask [m] or [B or 1, H or 1, m]."""
    A = A.to(work_dtype(A))
    return torch.where(_key_set(S, A), A, torch.zeros_like(A)).sum(dim=-1)


def partial(A: Tensor, v: Tensor, S: Tensor) -> Tensor:
    """F1: the un-normalised partial output u_iS = sum_{j in S} A_ij v_j, [B, H, n, d]; v [B, Hkv, m, d]."""
    A = A.to(work_dtype(A, v))
    return dense_out(torch.where(_key_set(S, A), A, torch.zeros_like(A)), v)


def column_mass(A: Tensor, row_valid: Tensor | None = None) -> Tensor:
    """F6: c_j = sum over the valid query rows of A_ij, [B, H, m]. row_valid [B, n] bool, None: every row."""
    A = A.to(work_dtype(A))
    total = A.new_zeros(A.shape[0], A.shape[1], A.shape[3])
    for b in range(A.shape[0]):
        for i in range(A.shape[2]):
            if row_valid is None or bool(row_valid[b, i]):
                total[b] += A[b, :, i]
    return total


def entropy(A: Tensor) -> Tensor:
    """-sum_j A_ij log A_ij in nats, [B, H, n], with 0 log 0 = 0.

    Over the keys only and without renormalising: where a learned sink takes part of a row, its own term
    ``-p_sink log p_sink`` is not included. A row without a visible key has entropy zero.
    """
    A = A.to(work_dtype(A))
    logs = torch.log(torch.where(A > 0, A, torch.ones_like(A)))  # 0 where A = 0
    return -(A * logs).sum(dim=-1)
