"""What heads do, beside what they look at: effects of gating them, retrieval, clusters of patterns."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..call import AttnCall
from ..errors import SelectionError
from ..intervention import Intervention
from ..methods.headgate import HeadGate
from ..search.gradients import Metric, batches
from ..search.importance import michel
from ..search.screen import measured, screen_heads, sites_of
from ..search.state import model_digest
from ..steering import steer
from ..versions import library_versions
from ..where import Where
from .projections import evaluating
from .table import Column, HeadTable

Pair = tuple[int, int]
# A needle counts as found where more than this share of its tokens is said (the official script: ROUGE-1 recall above 50 %).
FOUND = 0.5


def gating_effects(
    model: nn.Module,
    samples: Iterable[Any],
    *,
    metric: Metric = "choice",
    gate: float = 0.0,
    where: Where | None = None,
    exact: bool = True,
    batch: int = 32,
) -> HeadTable:
    """What the metric loses or gains when each head alone is gated, with paired values for each sample.

    Readings: prune_effect (metric gated less metric), deviation (mean |difference|), importance (Michel's, by example). Facts:
    "specialisation" is the mean over samples of the standard deviation of |difference| over heads, "alike" the mean Jaccard overlap
    between samples of their ten heads with the largest |difference|. Deviation and both facts are our definitions: the formulas
    of the paper that names them (DARTS-GT, arXiv 2510.14336) could not be read.

    Args:
        samples, metric, batch: of `screen_heads`. gate: 0 removes. where: the heads; None: all of the main stack.
        exact: measure each head in forwards of its own (layers times heads of them); False: to first order, by `screen_heads`.
    """
    samples = list(samples)
    probe = _Nothing(where=Where() if where is None else where)
    pairs, shape = sites_of(model, probe)
    heads = tuple(pairs)
    _, facts = batches(samples, metric, batch)
    if exact:
        plain = measured(model, None, samples, metric, batch)
        change = torch.stack(
            [measured(model, HeadGate({p: gate}), samples, metric, batch) - plain for p in heads], dim=1
        )
    else:
        change = screen_heads(model, HeadGate(dict.fromkeys(heads, gate)), samples, metric=metric, batch=batch).samples
    importance = michel(model, samples, metric=metric, normalise=False, where=where, batch=batch).samples
    one = torch.ones_like(change)
    size = change.abs()
    strongest = size.topk(min(10, len(heads)), dim=1).indices.tolist()
    overlaps = [
        len({*a} & {*b}) / len({*a} | {*b}) for a, b in itertools.islice(itertools.combinations(strongest, 2), 2000)
    ]
    columns = {
        "prune_effect": Column(
            change, one, f"{metric if isinstance(metric, str) else 'metric'} at gate {gate:g} less unedited"
        ),
        "deviation": Column(size, one, "mean size of the change when gated"),
        "importance": Column(importance, one, "gradient at the gate (Michel et al.)"),
    }
    said = {
        "search": "gating_effects",
        "model": model_digest(model),
        **facts,
        "exact": exact,
        "gate": gate,
        "specialisation": float(size.std(dim=1).mean()) if len(heads) > 1 else 0.0,
        "alike": sum(overlaps) / len(overlaps) if overlaps else 1.0,
        "versions": library_versions(),
    }
    return HeadTable(heads, shape, columns, said)


@dataclass(frozen=True)
class _Nothing(Intervention):
    """Selects sites; does nothing."""

    observes = True

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Nothing."""


@dataclass(frozen=True)
class _Strongest(Intervention):
    """Keeps the slot that each row of a range gives most, [B, H, rows]."""

    start: list[int] = field(default_factory=list, compare=False, repr=False)
    found: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    observes = True

    def output(self, call: AttnCall, out: Tensor) -> None:
        """The strongest key of each row from `start` on."""
        at = torch.arange(self.start[0], out.shape[2], device=out.device)
        self.found[call.site.layer] = call.map.rows(at).argmax(dim=-1).cpu()


@dataclass(frozen=True)
class Needle:
    """A retrieval test: prompt token ids, and the range of the prompt [start, stop) that is to be said again."""

    prompt: Sequence[int]
    needle: tuple[int, int]


@torch.no_grad()
def retrieval_scores(
    model: nn.Module,
    needles: Iterable[Needle | Mapping[str, Any]],
    *,
    new_tokens: int = 50,
    stop: Sequence[int] = (),
    released: bool = False,
    where: Where | None = None,
) -> HeadTable:
    """How often a head's strongest key is the very needle token that the model is about to say.

    Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality" (arXiv 2404.15574);
    nightdessert/Retrieval_Head at 1012272,
    retrieval_head_detection.py: for each greedy token y, in the row that predicts it: top-1 key in the needle and its
    token y; the score is the hits over the needle's length, averaged over the tests in which the model finds the needle.

    Args:
        needles: `Needle` objects or mappings with their names. new_tokens: at most; stop: token ids that end the answer
            (the script:
            the newline). released: count a needle token as often as it is copied, as the script does, so that a score may exceed 1;
            else each needle position once.
        where: the sites; None: the main stack's self-attention.

    Returns:
        A table with the reading "retrieval"; failed tests say nothing ("found" in the facts counts the others).

    Raises:
        SelectionError: no tests, or a needle outside of its prompt.
    """
    probe = _Strongest([0], where=Where(kinds="self") if where is None else where)
    pairs, shape = sites_of(model, probe)
    heads = tuple(pairs)
    rows, known = [], []
    device = next(model.parameters()).device
    for item in needles:
        test = item if isinstance(item, Needle) else Needle(**item)
        a, b = test.needle
        if not 0 <= a < b <= len(test.prompt):
            raise SelectionError(f"the needle {test.needle} is no range of a prompt of {len(test.prompt)} tokens.")
        said = _greedy(model, torch.tensor([list(test.prompt)], device=device), new_tokens, stop)
        own = list(test.prompt[a:b])
        found = len(set(own) & set(said)) / len(set(own)) > FOUND
        probe.start[0] = len(test.prompt) - 1
        ids = torch.tensor([[*test.prompt, *said[:-1]]], device=device)
        with evaluating(model), steer(model, probe, control=True):
            model(input_ids=ids, use_cache=False)
        row = []
        for layer, head in heads:
            keys = probe.found[layer][0, head].tolist()
            hits = [k for k, y in zip(keys, said, strict=True) if a <= k < b and test.prompt[k] == y]
            row.append(len(hits if released else set(hits)) / (b - a))
        rows.append(row)
        known.append(float(found))
    if not rows:
        raise SelectionError("retrieval_scores got no tests; give Needle(prompt, (start, stop)).")
    bottom = torch.tensor(known, dtype=torch.float64)[:, None].expand(-1, len(heads))
    top = torch.tensor(rows, dtype=torch.float64) * bottom
    facts = {
        "search": "retrieval_scores",
        "model": model_digest(model),
        "samples": len(rows),
        "found": int(sum(known)),
        "released": released,
    }
    column = Column(top, bottom, "needle tokens copied from where the head looks")
    return HeadTable(heads, shape, {"retrieval": column}, {**facts, "versions": library_versions()})


def _greedy(model: nn.Module, ids: Tensor, count: int, stop: Sequence[int]) -> list[int]:
    """The likeliest tokens one by one, at least one."""
    said: list[int] = []
    with evaluating(model):
        output = model(input_ids=ids, use_cache=True)
        for _ in range(count):
            said.append(int(output.logits[0, -1].argmax()))
            if said[-1] in stop or len(said) == count:
                break
            fed = torch.tensor([said[-1:]], device=ids.device)
            output = model(input_ids=fed, past_key_values=output.past_key_values, use_cache=True)
    return said


def clusters(
    table: HeadTable, count: int, readings: Sequence[str] | None = None, seed: int = 0, tries: int = 10
) -> tuple[dict[Pair, int], float]:
    """Groups of heads with like readings: k-means of the standardised columns (ours; the profile of Li et al. 2023 uses an
    autoencoder).

    Args:
        count: of groups. readings: columns; None: all that every head has a value of. seed, tries: of the starts; the best is kept.

    Returns:
        (head -> group, 0 the largest; inertia: mean squared distance to the group's middle, in standard deviations).

    Raises:
        SelectionError: more groups than heads, or no reading that all heads have.
    """
    names = list(table.columns) if readings is None else list(readings)
    X = torch.stack([table.column(n).values() for n in names], dim=1)
    X = X[:, X.isfinite().all(dim=0)]
    X = X[:, X.std(dim=0) > 1e-12]
    if not 1 <= count <= len(X) or not X.shape[1]:
        raise SelectionError(
            f"clusters: {count} groups of {len(X)} heads by {X.shape[1]} readings; give fewer groups or other readings."
        )
    X = (X - X.mean(dim=0)) / X.std(dim=0)
    g = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor] | None = None
    for _ in range(tries):
        middle = X[torch.randperm(len(X), generator=g)[:count]]
        for _ in range(100):
            group = torch.cdist(X, middle).argmin(dim=1)
            new = torch.stack(
                [X[group == k].mean(dim=0) if bool((group == k).any()) else middle[k] for k in range(count)]
            )
            if torch.equal(new, middle):
                break
            middle = new
        inertia = float((X - middle[group]).pow(2).sum(dim=1).mean())
        if best is None or inertia < best[0]:
            best = inertia, group
    inertia, group = best
    sizes = torch.bincount(group, minlength=count).argsort(descending=True).argsort()
    return dict(zip(table.heads, sizes[group].tolist(), strict=True)), inertia
