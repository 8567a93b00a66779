"""Whether a kernel computes what its arguments say: looked at with a few rows, before an edit relies on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import kernels
from ..errors import UnsupportedHost
from ..kernels import Attention
from ..site import Site


def check_exact(site: Site, att: Attention, base_rows: Callable[[Tensor], Tensor], why: str | None = None) -> None:
    """A few rows of our own definition against the model's kernel: a transform we do not know must raise.

    Args:
        why: what to say of a difference, where the cause is known.
    """
    n = att.shape[2]
    index = torch.unique(torch.tensor([0, n // 3, (2 * n) // 3, n - 1], device=att.q.device))
    with torch.no_grad():
        given = base_rows(index).detach()
        out = given.to(att.stat_dtype)
        sub = att.take(index)
        if not bool(torch.stack([t.isfinite().all() for t in (sub.q, sub.k, sub.v)]).all()):
            raise UnsupportedHost(
                f"{site.path}: the queries, keys or values that enter this attention have NaN or infinite values; the model "
                "itself overflows here (half precision, or its weights). Load it in bfloat16 or float32."
            )
        A = kernels.dense(sub)
        b, h, r, m = A.shape
        ours = torch.matmul(A.reshape(b, h // att.groups, att.groups * r, m), att.v.detach().to(A.dtype))
        ours = ours.reshape(b, h, r, -1)
    # What a kernel gives a row that sees nothing is its own business: zeros, a mean, NaN.
    blind = A.sum(dim=-1, keepdim=True) <= 0
    error = (ours - out).abs().masked_fill(blind, 0.0).amax()
    size = out.abs().masked_fill(blind, 0.0).amax().clamp_min(1e-3)
    # The kernel runs in the dtype of an autocast, whatever q is.
    half = (torch.float16, torch.bfloat16)
    kind = att.q.device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) in half
    limit = 5e-2 if cast or att.q.dtype in half or given.dtype in half else 1e-3
    if not bool(error <= limit * size):
        raise UnsupportedHost(
            f"{site.path}: the model's attention is not softmax(q k^T * scale + mask) v as its arguments say "
            f"(relative difference {float(error / size):.2g}); "
            + (why or "it does something else inside, so an edit could not be exact. Please report the model type.")
        )
