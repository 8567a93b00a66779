"""Attention Buckets in loops: the waveform, its extrema, the greedy search, the mix of streams; nothing here imports the library.

Fiorina1212/Attention-buckets at d7018a6: basic.py (`qmkn`, `find_peak_points`, `find_trough_points`, `select_cover_max`, `fliter`,
`base_choose_method1`) and modeling_llama.py (the mix at the end of the forward of the language model).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["OFFICIAL", "mix", "waveform"]

# What the official functions print, run as they are: peaks and troughs of base 10000 at offsets 1000 to 4090, and the bases that
# `base_choose_method1` ends with.
OFFICIAL = {
    "peaks": [1030, 1189, 1375, 1589, 1835, 2118],
    "troughs": [1970, 2290, 2629, 3044, 3515, 4060],
    "bases": (10000, 18000, 19000, 20500, 24000, 24500),
}


def waveform(offset: int, base: float, d: int) -> float:
    """(2 / sqrt d) sum over the pairs of channels of cos(offset base^(-2k/d))."""
    total = 0.0
    for k in range(d // 2):
        total += 2 * math.cos(offset * base ** (-2 * k / d))
    return total / math.sqrt(d)


def mix(streams: list[Tensor]) -> Tensor:
    """The logits of one position from those of each stream, [V] each: weights are the softmax of the largest logits."""
    top = [float(x.max()) for x in streams]
    weights = [math.exp(t - max(top)) for t in top]
    total = sum(weights)
    out = torch.zeros_like(streams[0], dtype=torch.float64)
    for weight, x in zip(weights, streams, strict=True):
        out += weight / total * x.double()
    return out
