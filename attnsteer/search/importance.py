"""`michel`: importance of heads by the gradient at their gates, and the pruning curve along it.

Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?" (NeurIPS 2019, arXiv 1905.10650), section 4:
I_h = E_x |d L(x) / d xi_h| = E_x |sum_i <o_hi, dL/do_hi>|. The official code (pmichel31415/pytorch-pretrained-BERT, branch paul
at 18a86a7, examples/classifier_eval.py) takes the absolute value of each token's product and divides by the number of tokens,
padding included in the sum; both conventions are offered, padding is left out in both.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SelectionError
from ..evals.significance import Interval, paired_bootstrap
from ..heads import HeadSet
from ..methods.headgate import HeadGate
from ..steering import steer
from ..versions import library_versions
from ..where import Where
from .gradients import Leaves, Metric, Tap, batches, described, differentiable, slopes
from .scored import ScoredHeads, table
from .screen import measured, sites_of
from .state import model_digest

CONVENTIONS = ("example", "token")
# The official scripts prune five to a hundred per cent in such steps; the paper's figures have ten.
FRACTIONS = tuple(i / 10 for i in range(10))


def michel(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    metric: Metric = "log_likelihood",
    abs_over: str = "example",
    normalise: bool = True,
    where: Where | None = None,
    batch: int = 32,
    progress: bool = False,
) -> ScoredHeads:
    """Importance of every head: how strongly the metric reacts to its gate, from one forward and backward.

    Args:
        samples, metric, batch, progress: of `screen_heads`; the loss of the paper is the negative metric, which has the same
            absolute gradient.
        abs_over: "example": |sum over tokens| for each sample (the paper's formula); "token": sum over tokens of |.|, over the
            number of tokens that have a gradient (the official code: by tokens, and by examples in the last layer, where
            only one has).
        normalise: divide each layer by its L2 norm (recommended by the authors; the scores are then no means of the samples).
        where: the heads to score; None: all of the model's main stack.

    Returns:
        A `ScoredHeads`, all scores 0 or more; `samples` has the values of each sample before normalisation.

    Raises:
        SelectionError, UnsupportedHost: as `screen_heads`.
    """
    if abs_over not in CONVENTIONS:
        raise SelectionError(f"abs_over={abs_over!r} is one of {CONVENTIONS}.")
    parts, facts = batches(samples, metric, batch)
    leaves = Leaves(outputs=True, by_row=True)
    tap = Tap(leaves, where=Where() if where is None else where)
    pairs, shape = sites_of(model, tap, towers=True)
    values = torch.zeros(facts["samples"], len(pairs), dtype=torch.float64)
    plain = torch.zeros(facts["samples"], dtype=torch.float64)

    from tqdm import tqdm

    with (
        tqdm(total=len(values), desc="samples", disable=not progress) as bar,
        differentiable(model),
        steer(model, tap, control=True) as run,
    ):
        for part, places in parts:
            found, products = slopes(model, part, leaves, run)
            plain[places] = found.double().cpu()
            for column, (path, head) in enumerate(pairs.values()):
                if path in products:
                    values[places, column] = _absolute(products[path][0, :, head], abs_over).double().cpu()
            bar.update(len(places))
    means = dict(zip(pairs, values.mean(dim=0).tolist(), strict=True))
    scores = _by_layer(means) if normalise else means
    provenance = {
        "search": "michel",
        "arxiv": "1905.10650",
        "model": model_digest(model),
        **facts,
        "metric": described(metric),
        "abs_over": abs_over,
        "normalised": normalise,
        "unedited": float(plain.mean()),
        "importance": table(shape, means),
        "versions": library_versions(),
    }
    return ScoredHeads(list(pairs), values, scores=scores, shape=shape, provenance=provenance)


def _absolute(products: Tensor, abs_over: str) -> Tensor:
    """<o_i, g_i> by token [N, n] -> [N]; padding, and rows that nothing reads, have products of exactly zero."""
    if abs_over == "example":
        return products.sum(dim=-1).abs()
    return products.abs().sum(dim=-1) / products.ne(0).sum(dim=-1).clamp_min(1)


def _by_layer(scores: dict[tuple[Any, ...], float]) -> dict[tuple[Any, ...], float]:
    norms: dict[tuple[Any, ...], float] = {}
    for (*layer, _), score in scores.items():
        norms[tuple(layer)] = norms.get(tuple(layer), 0.0) + score * score
    # The official code's guard against a layer without any.
    return {p: s / (norms[p[:-1]] ** 0.5 + 1e-20) for p, s in scores.items()}


@dataclass(frozen=True)
class CurvePoint:
    """One point of a pruning curve: `removed` heads have gate 0; their value, and the paired change against all heads."""

    fraction: float
    removed: tuple[tuple[Any, ...], ...]
    value: float
    change: Interval
    random: tuple[float, ...] = ()


def pruning_curve(
    model: nn.Module,
    scored: HeadSet,
    samples: Iterable[Any],
    *,
    fractions: Sequence[float] = FRACTIONS,
    metric: Metric = "choice",
    keep_per_layer: int = 0,
    random_draws: int = 0,
    seed: int = 0,
    batch: int = 32,
) -> list[CurvePoint]:
    """The metric with the least important heads removed, a growing share of them, without retraining (Michel et al., Fig. 3).

    Args:
        scored: heads with a score each; those with the least are removed first. A gate of 0 is `HeadGate`, and `bake` folds it.
        samples: other ones than those that scored the heads. metric: of `screen_heads`.
        fractions: of the scored heads, 0 to 1. keep_per_layer: so many best heads of each layer are never removed.
        random_draws: so many random orders beside it, for the control. seed: of these.

    Raises:
        SelectionError: a head without a score, or a fraction outside of 0 to 1.
    """
    missing = [p for p in scored if p not in scored.scores]
    bad = [f for f in fractions if not 0 <= f <= 1]
    if missing or bad or not len(scored):
        raise SelectionError(
            f"pruning_curve: heads without a score {missing[:3]}, fractions outside of 0 to 1 {bad[:3]}."
        )
    samples = list(samples)
    spared = {p for layer in {p[:-1] for p in scored} for p in _best(scored, layer, keep_per_layer)}
    candidates = [p for p in sorted(scored, key=lambda p: (scored.scores[p], p)) if p not in spared]
    draw, orders = random.Random(seed), []
    for _ in range(random_draws):
        order = sorted(candidates)
        draw.shuffle(order)
        orders.append(order)
    plain = measured(model, None, samples, metric, batch).tolist()

    def value(removed: Sequence[tuple[int, int]]) -> list[float]:
        return (
            measured(model, HeadGate(dict.fromkeys(removed, 0.0)), samples, metric, batch).tolist()
            if removed
            else plain
        )

    curve = []
    for fraction in fractions:
        count = min(round(fraction * len(scored)), len(candidates))
        found = value(candidates[:count])
        others = tuple(sum(v) / len(v) for v in (value(order[:count]) for order in orders))
        change = paired_bootstrap(plain, found, draws=2000, seed=seed)
        curve.append(CurvePoint(fraction, tuple(candidates[:count]), sum(found) / len(found), change, others))
    return curve


def _best(scored: HeadSet, layer: tuple[Any, ...], count: int) -> list[tuple[Any, ...]]:
    own = [p for p in scored if p[:-1] == layer]
    return sorted(own, key=lambda p: (-scored.scores[p], p))[:count]
