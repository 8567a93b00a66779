"""`shapley`: the Shapley value of every head, by truncated Monte Carlo over orders of removal.

Held, Yang, "Shapley Head Pruning" (EACL 2023, arXiv 2210.05709): phi_h = E_pi [V(S_pi(h) + h) - V(S_pi(h))], heads gated as in
Michel et al. (2019); heads with a value below zero hurt. No code was found; the truncation and the intervals are ours (the
paper's constants could not be read): empirical Bernstein intervals (Maurer, Pontil 2009, Theorem 4), heads whose interval
excludes zero are decided.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..errors import SelectionError
from ..evals.significance import Interval
from ..heads import HeadSet
from ..methods.headgate import HeadGate
from ..versions import library_versions
from .gradients import Metric, batches, described
from .scored import ScoredHeads, table
from .screen import measured, sites_of
from .state import model_digest

Pair = tuple[int, int]
DELTA = 0.05


def shapley(
    model: nn.Module | None,
    samples: Iterable[Any] | None = None,
    *,
    heads: HeadSet | None = None,
    metric: Metric = "choice",
    value: Callable[[frozenset[Pair]], float] | None = None,
    permutations: int = 100,
    floor: float | None = None,
    tolerance: float = 0.0,
    seed: int = 0,
    batch: int = 32,
    progress: bool = False,
) -> ScoredHeads:
    """Shapley values of heads: the mean over random orders of what a head adds to those that are still there.

    Args:
        samples, metric, batch: V(S) is the mean metric over the samples with all scored heads outside of S gated to 0.
        heads: the players; None: all heads of the model's main stack. The rest of the model stays.
        value: V itself, of the set of heads that are kept, in place of samples and model.
        permutations: orders drawn at most; the search stops when each head's interval excludes zero.
        floor: V at which nothing is left to lose, such as chance: the heads behind it in an order get 0 (truncation).
        tolerance: also stop where all intervals are narrower than this. seed: of the orders. progress: show a bar.

    Returns:
        A `ScoredHeads` with a row for each order in `samples`; the provenance has the table "interval" (95 %, empirical
        Bernstein, for each head by itself), V of all and of no head, the evaluations made and the share truncated. Without
        truncation each row sums to V(all) - V(none) (efficiency).

    Raises:
        SelectionError: neither samples nor a value, no head, or fewer than two orders.
    """
    if (value is None) == (samples is None) or permutations < 2:
        raise SelectionError(
            f"shapley: give samples, or value= of a set of heads; and permutations={permutations} of 2 or more."
        )
    facts: dict[str, Any] = {}
    if value is None:
        samples = list(samples)
        _, facts = batches(samples, metric, batch)
        facts |= {"metric": described(metric), "model": model_digest(model)}
        every, shape = sites_of(model, HeadGate(dict.fromkeys(heads, 0.0)) if heads else _all_heads(model), towers=True)
        players = sorted(heads) if heads is not None else sorted(every)
    else:
        if heads is None or not len(heads):
            raise SelectionError("shapley(value=...) needs heads=, the players.")
        players, shape = sorted(heads), heads.shape or (1 + max(p[0] for p in heads), 1 + max(p[1] for p in heads))
    known: dict[frozenset[Pair], float] = {}

    def worth(kept: frozenset[Pair]) -> float:
        if kept not in known:
            removed = [p for p in players if p not in kept]
            if value is not None:
                known[kept] = float(value(kept))
            else:
                gate = HeadGate(dict.fromkeys(removed, 0.0)) if removed else None
                known[kept] = float(measured(model, gate, samples, metric, batch).mean())
        return known[kept]

    draw, everyone = random.Random(seed), frozenset(players)
    column = {p: i for i, p in enumerate(players)}
    rows: list[list[float]] = []
    skipped = 0

    from tqdm import tqdm

    for _ in tqdm(range(permutations), desc="orders", disable=not progress):
        order = list(players)
        draw.shuffle(order)
        kept, before, row = everyone, worth(everyone), [0.0] * len(players)
        for i, player in enumerate(order):
            if floor is not None and before <= floor:
                skipped += len(order) - i
                break
            kept = kept - {player}
            after = worth(kept)
            row[column[player]] = before - after
            before = after
        rows.append(row)
        if len(rows) >= 2:
            bounds = [_bernstein([r[i] for r in rows]) for i in range(len(players))]
            if all(b.low > 0 or b.high < 0 or b.high - b.low < tolerance for b in bounds):
                break
    table_of = {p: _bernstein([r[i] for r in rows]) for p, i in column.items()}
    provenance = {
        "search": "shapley",
        "arxiv": "2210.05709",
        **facts,
        "orders": len(rows),
        "evaluations": len(known),
        "truncated": skipped / (len(rows) * len(players)),
        "floor": floor,
        "all": worth(everyone),
        "none": known.get(frozenset()),
        "low": table(shape, {p: b.low for p, b in table_of.items()}),
        "high": table(shape, {p: b.high for p, b in table_of.items()}),
        "versions": library_versions(),
    }
    return ScoredHeads(players, torch.tensor(rows, dtype=torch.float64), shape=shape, provenance=provenance)


def shapley_intervals(found: ScoredHeads) -> dict[Pair, Interval]:
    """The empirical Bernstein intervals of the values, 95 % for each head by itself."""
    return {p: _bernstein(column.tolist()) for p, column in zip(found.columns, found.samples.T, strict=True)}


def _all_heads(model: nn.Module) -> HeadGate:
    from ..steering import find_host

    host = find_host(model)
    return HeadGate({(s.layer, h): 0.0 for s in host.sites() if s.modality in host.main for h in range(s.heads)})


def _bernstein(values: list[float]) -> Interval:
    """Mean with half-width sqrt(2 var log(2/delta) / n) + 7 R log(2/delta) / (3 (n - 1)), R the range seen so far."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.inf
    spread, log = max(values) - min(values), math.log(4 / DELTA)
    half = math.sqrt(2 * variance * log / n) + 7 * spread * log / (3 * max(n - 1, 1))
    return Interval(mean, mean - half, mean + half)
