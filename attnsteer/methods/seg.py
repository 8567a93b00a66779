"""SEG: guidance away from a branch whose self-attention queries are blurred over the image grid.

Hong, "Smoothed Energy Guidance" (NeurIPS 2024, arXiv 2408.00760); official code SusungHong/SEG-SDXL at cf8256d. It
handles square grids only; the kernel size follows it. The mean-query form for joint attention is HeadHunter's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import AttnCall
from ..errors import UnsupportedHost
from ..heads import HeadSet, head_set
from ..parameters import number
from ..registry import register_method
from .bases.weak_branch import WeakBranch
from .softpag import image_text, mean_query

# The official code takes the token mean instead of a blur above this.
INFINITE = 9999.0


@register_method
@dataclass(frozen=True)
class SEG(WeakBranch):
    """Smoothed energy guidance: Q <- blur2d(Q) for image rows, in the weak branch only.

    Args:
        scale: s; 3.0 in the official code, 0 is off.
        sigma: standard deviation of the blur in tokens of the site's grid; above 9999 (default: infinite) every
            image row takes the mean query.
        heads: the heads to perturb; None: all that `where` selects.

    The blur acts on the queries that the kernel sees, after any query norm and rotary embedding.
    """

    sigma: float = number(math.inf, above=0, infinite=True, per_sample=True)
    heads: HeadSet | None = head_set(kw_only=True)

    needs = ("segments", "grid")

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor] | None:
        sigmas = call.listed(self.sigma)
        blurred = sorted({s for s in sigmas if s is not None and s <= INFINITE})
        if not blurred:
            return None
        if not call.gives("grid"):
            raise UnsupportedHost(
                f"{call.site.path}: its token grid is not known; use sigma=math.inf, which needs none."
            )
        image = image_text(call)[0] if call.site.kind == "joint" else slice(0, call.q.shape[2])
        q = call.q.clone()
        for sigma in blurred:
            rows = slice(None) if sigmas.count(sigma) == len(sigmas) else [s == sigma for s in sigmas]
            q[rows, :, image] = blur(call.q[rows, :, image], call.grid, sigma)
        return q, call.k, call.v

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        infinite = [s is not None and s > INFINITE for s in call.listed(self.sigma)]
        if not any(infinite):
            return None
        edited = mean_query(call, out)
        if all(infinite):
            return edited
        return torch.where(torch.tensor(infinite, device=out.device)[:, None, None, None], edited, out)


def blur(q: Tensor, grid: tuple[int, int], sigma: float) -> Tensor:
    """Gaussian blur of q [B, H, h*w, d] over its grid (h, w): separable, reflected borders, odd kernels."""
    B, H, _, d = q.shape
    image = q.transpose(2, 3).reshape(B * H * d, 1, *grid)
    for axis, side in ((2, grid[0]), (3, grid[1])):
        size = kernel_size(sigma, side)
        x = torch.linspace(-(size // 2), size // 2, size, dtype=torch.float32, device=q.device)
        weight = torch.exp(-0.5 * (x / sigma) ** 2)
        weight = (weight / weight.sum()).to(q.dtype)
        half = size // 2
        pad = (0, 0, half, half) if axis == 2 else (half, half, 0, 0)
        shape = (1, 1, size, 1) if axis == 2 else (1, 1, 1, size)
        image = F.conv2d(F.pad(image, pad, mode="reflect"), weight.reshape(shape))
    return image.reshape(B, H, d, -1).transpose(2, 3)


def kernel_size(sigma: float, side: int) -> int:
    """Odd size about six sigma, at most the side of the grid (one more where that is even)."""
    wanted = math.ceil(6 * sigma)
    size = wanted + 1 - wanted % 2
    limit = side if side % 2 else side + 1
    # Reflection needs half a kernel below the side: with an even side of two or more this holds.
    return max(1, min(size, limit, 2 * side - 1))
