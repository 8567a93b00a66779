"""Decode rows over a paged cache, their attention split at a set of keys: one pass over the keys as they lie, nothing gathered.

For each row and head the pass gives output and log-sum-exp of the keys inside a set and of those outside, from which every
reweighting of two groups is one interpolation (as in `attnsteer.forms`). Compiled by numba, which vLLM brings; float32 on CPU.
"""

from __future__ import annotations

import math
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np

# exp(z) = 2^n 2^f with f from -1/2 to 1/2: 2^f as a polynomial, which is done for many keys at a time.
LOG2E = np.float32(1.4426950408889634)
LEAST = np.float32(-126.0)
HALF = np.float32(0.5)
POLYNOMIAL = tuple(np.float32(math.log(2.0) ** i / math.factorial(i)) for i in range(8))


@cache
def compiled() -> Any:
    """The pass as machine code: compiled for the one form in which it is called (some seconds), and kept on disk."""
    from numba import boolean, float32, float64, int32, int64, njit, types

    fast = {"contract", "reassoc", "nsz", "arcp"}
    options = {"nogil": True, "fastmath": fast, "boundscheck": False, "error_model": "numpy"}
    parts = {f.__name__: njit(**options)(f) for f in (_scores, _scores_along, _largest, _exponentials, _add_values)}
    outs, sums, counts = float32[:, :, ::1], float32[:, ::1], int64[::1]
    form = types.void(
        outs, float32[::1], types.UniTuple(int64, 3), boolean, int32[:, ::1], counts, counts, counts, boolean[:, :, ::1], counts,
        float64, int64, outs, outs, sums, sums,
    )  # fmt: skip
    # The pass sees the compiled parts under their names, and nothing else of this module.
    own = types_of(_split, {**globals(), **parts})
    return njit(form, **options)(own)


def types_of(function: Any, names: dict[str, Any]) -> Any:
    """A copy of a function that finds `names`."""
    return FunctionType(function.__code__, names, function.__name__)


def _scores(q, keys, z):  # type: ignore[no-untyped-def]
    """z = q K of one block whose keys [d, size] lie lane by lane."""
    d, size = keys.shape
    for t in range(size):
        z[t] = 0.0
    for lane in range(0, d, 4):
        q0, q1, q2, q3 = q[lane], q[lane + 1], q[lane + 2], q[lane + 3]
        for t in range(size):
            z[t] += q0 * keys[lane, t] + q1 * keys[lane + 1, t] + q2 * keys[lane + 2, t] + q3 * keys[lane + 3, t]


def _scores_along(q, keys, z):  # type: ignore[no-untyped-def]
    """The same for keys [size, d] that lie token by token."""
    size, d = keys.shape
    for t in range(size):
        total = np.float32(0.0)
        for lane in range(d):
            total += q[lane] * keys[t, lane]
        z[t] = total


def _largest(z, start, stop):  # type: ignore[no-untyped-def]
    top = z[start]
    for t in range(start + 1, stop):
        top = z[t] if z[t] > top else top
    return top


def _exponentials(z, power, factor, top, start, stop):  # type: ignore[no-untyped-def]
    """z = exp(z - top), and their sum; `factor` is `power` read as floats."""
    c0, c1, c2, c3, c4, c5, c6, c7 = POLYNOMIAL
    for t in range(start, stop):
        x = (z[t] - top) * LOG2E
        x = x if x > LEAST else LEAST
        n = np.floor(x + HALF)
        f = x - n
        z[t] = ((((((c7 * f + c6) * f + c5) * f + c4) * f + c3) * f + c2) * f + c1) * f + c0
        power[t] = np.int32(np.int32(np.int32(n) + np.int32(127)) << np.int32(23))
    total = np.float32(0.0)
    for t in range(start, stop):
        z[t] *= factor[t]
        total += z[t]
    return total


def _add_values(p, values, out, start, stop):  # type: ignore[no-untyped-def]
    """out += p V over some tokens of a block, values [size, d]."""
    d = values.shape[1]
    t = start
    while t + 4 <= stop:
        p0, p1, p2, p3 = p[t], p[t + 1], p[t + 2], p[t + 3]
        for lane in range(d):
            out[lane] += (
                p0 * values[t, lane] + p1 * values[t + 1, lane] + p2 * values[t + 2, lane] + p3 * values[t + 3, lane]
            )
        t += 4
    while t < stop:
        p0 = p[t]
        for lane in range(d):
            out[lane] += p0 * values[t, lane]
        t += 1


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
    factor = power.view(np.float32)
    scaled = np.empty((h, d), np.float32)
    sums = np.empty((h, 2, d), np.float32)
    totals = np.empty((h, 2), np.float32)
    tops = np.empty((h, 2), np.float32)
    held = member.shape[2]
    for b in range(B):
        mb = b if member.shape[0] > 1 else 0
        for i in range(h):
            for lane in range(d):
                scaled[i, lane] = q[b, i, lane] * scale
        sums[:] = 0.0
        totals[:] = 0.0
        tops[:] = -np.inf
        begin = 0
        while begin < h:
            # The heads that read the same keys, block by block, so that each block is fetched once.
            after = begin + 1
            while after < h and kv[after] == kv[begin]:
                after += 1
            for j in range(first[b] // size, (length[b] + size - 1) // size):
                at = table[b, j] * strides[0] + kv[begin] * strides[1]
                keys = cache[at : at + size * d]
                at += strides[2]
                values = cache[at : at + size * d].reshape(size, d)
                for i in range(begin, after):
                    mh = i if member.shape[1] > 1 else 0
                    if across:
                        _scores(scaled[i], keys.reshape(d, size), z)
                    else:
                        _scores_along(scaled[i], keys.reshape(size, d), z)
                    start, stop = max(0, first[b] - j * size), min(size, length[b] - j * size)
                    # Runs of keys that are all inside, or all outside.
                    while start < stop:
                        slot = j * size + start + pad[b]
                        own = slot < held and member[mb, mh, slot]
                        end = start + 1
                        if slot >= held:
                            end = stop
                        while end < stop:
                            slot += 1
                            if (slot < held and member[mb, mh, slot]) != own:
                                break
                            end += 1
                        which = 1 if own else 0
                        old = tops[i, which]
                        top = max(old, _largest(z, start, end))
                        keep = np.float32(math.exp(old - top)) if totals[i, which] > 0.0 else np.float32(0.0)
                        total = _exponentials(z, power, factor, top, start, end)
                        out = sums[i, which]
                        if keep != 1.0:
                            for lane in range(d):
                                out[lane] *= keep
                        _add_values(z, values, out, start, end)
                        totals[i, which] = totals[i, which] * keep + total
                        tops[i, which] = top
                        start = end
            begin = after
        for i in range(h):
            for lane in range(d):
                inside[b, i, lane] = sums[i, 1, lane] / totals[i, 1] if totals[i, 1] > 0.0 else 0.0
                outside[b, i, lane] = sums[i, 0, lane] / totals[i, 0] if totals[i, 0] > 0.0 else 0.0
            lse_in[b, i] = tops[i, 1] + math.log(totals[i, 1]) if totals[i, 1] > 0.0 else -np.inf
            lse_out[b, i] = tops[i, 0] + math.log(totals[i, 0]) if totals[i, 0] > 0.0 else -np.inf
