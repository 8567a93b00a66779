"""Bases of the rotary embedding whose waveforms fill each other's troughs, for `AttentionBuckets`.

Chen et al., ACL 2024, arXiv 2312.04455; the search is that of basic.py in Fiorina1212/Attention-buckets at d7018a6, rule for rule.
From its own beginning it finds 10000, 18000, 19000, 20500, 24000, 24500; the lists that are released with it are others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import SelectionError, brief
from ..parameters import whole

# Extrema of one base that count; tokens that peaks, and troughs, are apart at least; how near a peak fills a trough.
EXTREMA, PEAKS_APART, TROUGHS_APART, NEAR = 6, 50, 60, 3
# A peak is the highest point of the next 500 offsets, and this near to it.
AHEAD, EQUAL = 500, 1e-3


def waveform(base: float, offsets: Tensor, head_dim: int = 128) -> Tensor:
    """g(delta) = (2 / sqrt d) sum_k cos(delta base^(-2k/d)) in float64: the score of a pair of equal tokens, delta apart."""
    k = torch.arange(head_dim // 2, dtype=torch.float64)
    angle = offsets.double()[:, None] * base ** (-2.0 * k / head_dim)
    return 2.0 * torch.cos(angle).sum(dim=1) / math.sqrt(head_dim)


def rotary_bases(
    count: int = 6,
    start: Sequence[float] = (10000, 18000, 19000),
    *,
    candidates: Iterable[float] = range(10000, 30001, 500),
    offsets: tuple[int, int] = (1000, 4090),
    head_dim: int = 128,
) -> tuple[float, ...]:
    """`count` bases, ascending: `start`, and one after the other that whose peaks lie in most of the troughs that are left.

    Args:
        start: bases to begin with; empty: the best pair of candidates is looked for first. candidates: the others to choose from.
        offsets: first and last distance between tokens that matters, both included. head_dim: width of the model's heads.

    A peak fills a trough that it is up to three tokens from, and a trough a peak; ties go to the smaller mean squared distance.
    Peaks and troughs at the very same offset cancel.

    Raises:
        SelectionError: fewer than two extrema in the offsets, or fewer candidates than bases.
    """
    if whole(count) is None or any(whole(o) is None for o in offsets):
        raise SelectionError(f"rotary_bases(count={brief(count)}, offsets={brief(offsets)}): give whole numbers.")
    pool = [float(b) for b in candidates]
    if not 0 < offsets[0] < offsets[1] or count < max(1, len(start)) or any(b <= 1 for b in pool):
        raise SelectionError(
            f"rotary_bases(count={count}, start={brief(start)}, offsets={offsets}): give a range of distances above 0, "
            "candidates above 1, and at least as many bases as there are to begin with."
        )
    waves = _Waves(torch.arange(offsets[0], offsets[1] + 1), head_dim)
    found = [float(b) for b in start] or list(_best_pair(waves, pool))
    peaks, troughs = waves.extrema(found[0])
    for base in found[1:]:
        peaks, troughs = _joined(waves, base, peaks, troughs)
    while len(found) < count:
        chosen = _best(waves, [b for b in pool if b not in found], peaks, troughs)[0]
        if chosen is None:
            raise SelectionError(
                f"rotary_bases found {found}, and no candidate is left that fills a trough; give more candidates."
            )
        found.append(chosen)
        peaks, troughs = _joined(waves, chosen, peaks, troughs)
    return tuple(sorted(found))


class _Waves:
    """Peaks and troughs of each base, found once."""

    def __init__(self, offsets: Tensor, head_dim: int):
        self.offsets, self.head_dim = offsets, head_dim
        self._known: dict[float, tuple[list[int], list[int]]] = {}

    def extrema(self, base: float) -> tuple[list[int], list[int]]:
        """(offsets of the peaks, of the troughs), ascending."""
        if base not in self._known:
            g = waveform(base, self.offsets, self.head_dim)
            left, middle, right = g[:-2], g[1:-1], g[2:]
            tops = (((middle > left) & (middle > right)).nonzero()[:, 0] + 1).tolist()
            dips = (((middle < left) & (middle < right)).nonzero()[:, 0] + 1).tolist()
            if len(tops) < 2 or len(dips) < 2:
                raise SelectionError(
                    f"rotary_bases: the waveform of base {base:g} has {len(tops)} peaks and {len(dips)} troughs at offsets "
                    f"{int(self.offsets[0])} to {int(self.offsets[-1])}; give a longer range."
                )
            first = int(self.offsets[0])
            self._known[base] = (
                [first + i for i in _peaks(g, tops)],
                [first + i for i in _troughs(g, dips)],
            )
        return self._known[base]


def _peaks(g: Tensor, tops: list[int]) -> list[int]:
    """From left to right: the highest of all, then each time the highest of the next `AHEAD` offsets, at least 50 apart."""
    kept: list[int] = []
    level = float(g[tops].max())
    for place, at in enumerate(tops):
        if len(kept) == EXTREMA:
            break
        if abs(float(g[at]) - level) > EQUAL:
            continue
        if not kept or at - kept[-1] > PEAKS_APART:
            kept.append(at)
        if place + 1 == len(tops):
            break
        begin = min(at + PEAKS_APART, tops[place + 1])
        level = float(g[begin : begin + AHEAD].max())
    return kept


def _troughs(g: Tensor, dips: list[int]) -> list[int]:
    """From right to left: the lowest of all, then each time the lowest of what is left before it, more than 60 apart."""
    kept: list[int] = []
    level = float(g[dips].min())
    for place in range(len(dips) - 1, -1, -1):
        if len(kept) == EXTREMA:
            break
        at = dips[place]
        if abs(float(g[at]) - level) > EQUAL:
            continue
        if not kept or kept[-1] - at > TROUGHS_APART:
            kept.append(at)
        if place == 0:
            break
        end = min(at - PEAKS_APART, dips[place - 1])
        if end <= 0:
            break
        level = float(g[:end].min())
    return kept[::-1]


def _cover(peaks: list[int], troughs: list[int]) -> tuple[int, float]:
    """(pairs that are near each other, the sum of their squared distances)."""
    near = [(p - t) ** 2 for p in peaks for t in troughs if abs(p - t) <= NEAR]
    return len(near), float(sum(near))


def _best(
    waves: _Waves, pool: Sequence[float], peaks: list[int], troughs: list[int]
) -> tuple[float | None, int, float]:
    """(the candidate that covers most, how much, mean squared distance); None where none covers anything."""
    best: tuple[float | None, int, float] = (None, 0, math.inf)
    for base in pool:
        own_peaks, own_troughs = waves.extrema(base)
        (a, far), (b, wide) = _cover(own_peaks, troughs), _cover(peaks, own_troughs)
        cover = a + b
        distance = (far + wide) / cover if cover else math.inf
        if cover > best[1] or (cover == best[1] and distance < best[2]):
            best = (base, cover, distance)
    return best


def _best_pair(waves: _Waves, pool: Sequence[float]) -> tuple[float, float]:
    best: tuple[tuple[float, float] | None, int, float] = (None, 0, math.inf)
    for base in pool:
        peaks, troughs = waves.extrema(base)
        other, cover, distance = _best(waves, [b for b in pool if b > base], peaks, troughs)
        if other is not None and (cover > best[1] or (cover == best[1] and distance < best[2])):
            best = ((base, other), cover, distance)
    if best[0] is None:
        raise SelectionError(
            "rotary_bases: no two candidates fill each other's troughs; give more, or a longer range of offsets."
        )
    return best[0]


def _joined(waves: _Waves, base: float, peaks: list[int], troughs: list[int]) -> tuple[list[int], list[int]]:
    """Peaks and troughs with those of a base, without those that fall on each other."""
    more_peaks, more_troughs = waves.extrema(base)
    peaks, troughs = sorted(peaks + more_peaks), sorted(troughs + more_troughs)
    return [p for p in peaks if p not in troughs], [t for t in troughs if t not in peaks]
