"""Decode rows over a paged cache, their attention split at a set of keys: one pass over the keys as they lie, nothing gathered.

For each row and head the pass gives output and log-sum-exp of the keys inside a set and of those outside, from which every
reweighting of two groups is one interpolation (as in `attnsteer.forms`). Compiled by numba, which vLLM brings; float32 on CPU.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np


@cache
def compiled() -> Any:
    """The pass as machine code; the first call compiles it (some seconds, kept on disk)."""
    from numba import njit

    return njit(nogil=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, boundscheck=False, error_model="numpy")(
        _split
    )


def _split(
    q, cache, strides, across, table, length, first, pad, member, kv, scale, size, inside, outside, lse_in, lse_out
):  # type: ignore[no-untyped-def]
    """Fill the last four arrays.

    Args:
        q: [B, h, d]. cache: the whole cache, flat. strides: of a block and of a kv head in it, and where the values begin.
        across: whether keys lie as [lane, token]; else [token, lane]. table: [B, blocks]. length, first: keys of a row, the first
        one that it sees. pad: what slot its first key has in `member`: bool [B or 1, h or 1, slots], behind which no key is inside.
        kv: [h]. size: tokens of a block. inside, outside: [B, h, d]. lse_in, lse_out: [B, h].
    """
    B, h, d = q.shape
    z = np.empty(size, np.float32)
    power = np.empty(size, np.int32)
    scaled = np.empty(d, np.float32)
    held = member.shape[2]
    for b in range(B):
        mb = b if member.shape[0] > 1 else 0
        for i in range(h):
            mh = i if member.shape[1] > 1 else 0
            for lane in range(d):
                scaled[lane] = q[b, i, lane] * scale
                inside[b, i, lane] = 0.0
                outside[b, i, lane] = 0.0
            top_in, top_out = np.float32(-np.inf), np.float32(-np.inf)
            sum_in, sum_out = np.float32(0.0), np.float32(0.0)
            for j in range(first[b] // size, (length[b] + size - 1) // size):
                at = table[b, j] * strides[0] + kv[i] * strides[1]
                start = max(0, first[b] - j * size)
                stop = min(size, length[b] - j * size)
                if across:
                    for t in range(size):
                        z[t] = 0.0
                    for lane in range(0, d, 4):
                        q0, q1, q2, q3 = scaled[lane], scaled[lane + 1], scaled[lane + 2], scaled[lane + 3]
                        row = at + lane * size
                        k0 = cache[row : row + size]
                        k1 = cache[row + size : row + 2 * size]
                        k2 = cache[row + 2 * size : row + 3 * size]
                        k3 = cache[row + 3 * size : row + 4 * size]
                        for t in range(size):
                            z[t] += q0 * k0[t] + q1 * k1[t] + q2 * k2[t] + q3 * k3[t]
                else:
                    for t in range(start, stop):
                        key = cache[at + t * d : at + t * d + d]
                        total = np.float32(0.0)
                        for lane in range(d):
                            total += scaled[lane] * key[lane]
                        z[t] = total
                values = at + strides[2]
                # Runs of keys that are all inside, or all outside.
                t = start
                while t < stop:
                    slot = j * size + t + pad[b]
                    is_in = slot < held and member[mb, mh, slot]
                    end = t + 1
                    while end < stop:
                        slot = j * size + end + pad[b]
                        if (slot < held and member[mb, mh, slot]) != is_in:
                            break
                        end += 1
                    top = z[t]
                    for u in range(t + 1, end):
                        top = max(top, z[u])
                    old = top_in if is_in else top_out
                    new = max(old, top)
                    keep = np.float32(math.exp(old - new)) if old > -np.inf else np.float32(0.0)
                    # exp(z) = 2^n 2^f, f from -1/2 to 1/2: a polynomial, which is done for many keys at a time.
                    for u in range(t, end):
                        x = max((z[u] - new) * np.float32(1.4426950408889634), np.float32(-126.0))
                        n = np.floor(x + np.float32(0.5))
                        f = x - n
                        y = np.float32(1.5252734e-05)
                        y = y * f + np.float32(1.5403530e-04)
                        y = y * f + np.float32(1.3333558e-03)
                        y = y * f + np.float32(9.6181291e-03)
                        y = y * f + np.float32(5.5504109e-02)
                        y = y * f + np.float32(2.4022651e-01)
                        y = y * f + np.float32(6.9314718e-01)
                        y = y * f + np.float32(1.0)
                        z[u] = y
                        power[u] = (np.int32(n) + 127) << 23
                    factor = power.view(np.float32)
                    out = inside[b, i] if is_in else outside[b, i]
                    total = np.float32(0.0)
                    for u in range(t, end):
                        z[u] *= factor[u]
                        total += z[u]
                    for lane in range(d):
                        out[lane] *= keep
                    u = t
                    while u + 4 <= end:
                        p0, p1, p2, p3 = z[u], z[u + 1], z[u + 2], z[u + 3]
                        v0 = cache[values + u * d : values + u * d + d]
                        v1 = cache[values + (u + 1) * d : values + (u + 1) * d + d]
                        v2 = cache[values + (u + 2) * d : values + (u + 2) * d + d]
                        v3 = cache[values + (u + 3) * d : values + (u + 3) * d + d]
                        for lane in range(d):
                            out[lane] += p0 * v0[lane] + p1 * v1[lane] + p2 * v2[lane] + p3 * v3[lane]
                        u += 4
                    while u < end:
                        p0 = z[u]
                        v0 = cache[values + u * d : values + u * d + d]
                        for lane in range(d):
                            out[lane] += p0 * v0[lane]
                        u += 1
                    if is_in:
                        sum_in = sum_in * keep + total
                        top_in = new
                    else:
                        sum_out = sum_out * keep + total
                        top_out = new
                    t = end
            for lane in range(d):
                if sum_in > 0.0:
                    inside[b, i, lane] /= sum_in
                if sum_out > 0.0:
                    outside[b, i, lane] /= sum_out
            lse_in[b, i] = top_in + math.log(sum_in) if sum_in > 0.0 else -np.inf
            lse_out[b, i] = top_out + math.log(sum_out) if sum_out > 0.0 else -np.inf
