"""`screen_heads`: what a method would do in each head alone, to first order, for all heads and several methods at once.

score_h = mean over samples of < d metric / d o_h , o'_h - o_h >, o'_h the head's output under the method itself: the method's
own edit is finite and exact, what lies behind it is linearised (attribution patching, with an attention edit for a donor).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SelectionError, brief
from ..evals.significance import paired_bootstrap
from ..heads import HeadSet
from ..intervention import Intervention
from ..site import Site
from ..steering import Steering, bind, find_host, steer
from ..versions import library_versions
from ..where import Where, shapes_of, stack_shape, tower_names
from .alone import Script, only
from .gradients import Batch, Leaves, Metric, Noted, Tap, as_list, batches, described, differentiable, keys, slopes
from .scored import ScoredHeads, table
from .state import model_digest, refuse_overlap

Pair = tuple[int, int]


def screen_heads(
    model: nn.Module,
    methods: Intervention | Mapping[str, Intervention],
    samples: Iterable[Any],
    *,
    metric: Metric = "choice",
    confirm: int = 0,
    confirm_on: Iterable[Any] | None = None,
    batch: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> ScoredHeads | dict[str, ScoredHeads]:
    """Score methods in every head alone, to first order: the cheap first stage of every other search.

    One recording forward for each method, and one forward and backward for all. The order of heads is good where a method moves
    maps (Spearman 0.97 and more against one head at a time); it is poor for far gates (-1, 5), and blind to what needs two heads
    at once.

    Args:
        model: a model whose attention is steered.
        methods: an inside method, or several by name. Their selections limit the search.
        samples: `Choice` objects (or mappings with prompt, candidates and answer), or keyword arguments of the model, a batch each.
        metric: more is better. Of choices: "choice" (log p of the right candidate among the candidates, nats),
            "log_likelihood" (log p of the right one), "difference" (its lead over the best wrong one, nats; does not saturate).
            Of model inputs: "log_likelihood" (mean of the text's tokens), or `metric(outputs, inputs)` -> [B], smooth.
        confirm: so many of the best heads, and as many random others, are measured alone on `confirm_on` afterwards.
        confirm_on: samples that no head was chosen by.
        batch: choices computed at once. seed: of the random heads. progress: show a bar.

    Returns:
        A `ScoredHeads` (a `HeadSet` with `samples` [N, heads], `errors()`, `t()`, `intervals()`, `significant()`), or one by name.
        `found.top(k)` are the best. The provenance has the tables "error" and "t", and "confirmed" with paired intervals.

    Raises:
        SelectionError: a method that calls the model itself, no samples, a metric that is not theirs, heads to confirm and no
            samples for it, or samples that are in both.
        UnsupportedHost: gradients under inference mode, or a metric without a gradient at the heads.
    """
    single = isinstance(methods, Intervention)
    if not single and not isinstance(methods, Mapping):
        raise SelectionError(f"screen_heads got {brief(methods)}; give a method, or methods by name.")
    named = {"": methods} if single else dict(methods)
    _check(named, confirm, confirm_on)
    samples = as_list(samples)
    parts, facts = batches(samples, metric, batch)
    if confirm:
        confirm_on = list(confirm_on)
        refuse_overlap(keys(samples), keys(confirm_on), "samples")
    search = _Screen(model, named, sum(len(places) for _, places in parts))
    search.run(parts, progress)
    found = {}
    for name, method in named.items():
        pairs, values = search.result(name)
        scored = ScoredHeads(pairs, values, shape=search.shape)
        provenance = {
            "search": "screen_heads",
            "method": {"name": type(method).__name__, "parameters": method.to_dict()},
            "model": model_digest(model),
            **facts,
            "metric": described(metric),
            "unedited": float(search.plain.mean()),
            "gains": {described(metric): table(search.shape, scored.scores)},
            "error": table(search.shape, scored.errors()),
            "t": table(search.shape, scored.t()),
            "versions": library_versions(),
        }
        if confirm:
            provenance["confirmed"] = _confirmed(model, method, scored, confirm, confirm_on, metric, batch, seed)
        found[name] = ScoredHeads(pairs, values, shape=search.shape, provenance=provenance)
    return found[""] if single else found


def _check(named: Mapping[str, Any], confirm: int, confirm_on: Any) -> None:
    wrong = [m for m in named.values() if not isinstance(m, Intervention)]
    if not named or wrong:
        raise SelectionError(
            f"screen_heads got {wrong[0]!r}; give a method, or methods by name." if wrong else "no method."
        )
    around = [type(m).__name__ for m in named.values() if "around" in m.doors()]
    if around:
        raise SelectionError(f"{around[0]} calls the model several times; heads are screened for inside methods.")
    if confirm < 0 or (confirm > 0) != (confirm_on is not None):
        raise SelectionError(
            f"confirm={confirm} measures the best heads on samples that did not choose them: give both confirm= (1 or more) and "
            "confirm_on=."
        )


def sites_of(
    model: nn.Module, method: Intervention, towers: bool = False
) -> tuple[dict[tuple[Any, ...], tuple[str, int]], Any]:
    """(head -> (site path, place among the site's heads), shape) of a method's selection.

    Args:
        towers: a head is called (tower, layer, head) where the selection spans several towers, and the shape is one by tower.

    Raises:
        SelectionError: two of its sites have the same layer (of one tower), so that a head has no name of its own.
    """
    host = find_host(model)
    every = host.sites()
    _, plan = bind((method,), every, host)
    chosen = [s for s in every if s.path in plan]
    names = tower_names(chosen) if towers else {s.path: "" for s in chosen}
    taken: dict[tuple[str, int], Site] = {}
    for site in chosen:
        at = names[site.path], site.layer
        if at in taken:
            raise SelectionError(
                f"{taken[at].path} and {site.path} are both layer {site.layer}; give the method a "
                "Where(kinds=...) or Where(modules=...) that selects one of them."
            )
        taken[at] = site
    called = lambda s, h: (names[s.path], s.layer, h) if names[s.path] else (s.layer, h)  # noqa: E731
    pairs = {called(s, h): (s.path, h) for s in chosen for h in plan[s.path][0][1] or range(s.heads)}
    return pairs, shapes_of(chosen, every) if towers else stack_shape(chosen[0], every)


class _Screen:
    def __init__(self, model: nn.Module, named: Mapping[str, Intervention], count: int):
        self.model, self.named = model, named
        self.pairs, shapes = {}, []
        for name, method in named.items():
            self.pairs[name], shape = sites_of(model, method, towers=True)
            shapes.append(shape)
        if any(shape != shapes[0] for shape in shapes):
            raise SelectionError(f"the methods act on stacks of shapes {shapes}; screen one stack at a time.")
        self.shape = shapes[0]
        self.heads = {s.path: s.heads for s in find_host(model).sites()}
        self.values = {name: torch.zeros(count, len(pairs), dtype=torch.float64) for name, pairs in self.pairs.items()}
        self.plain = torch.zeros(count, dtype=torch.float64)
        # One method is noted in the forward that gradients are of; several are noted one after the other before it.
        self.alone = len(named) == 1
        self.leaves, self.scripts = Leaves(), [Script() for _ in named]
        every = {m for method in named.values() for m in method.where.modalities or ()}
        noted = [
            Noted(method, script, self.leaves, number)
            for number, (method, script) in enumerate(zip(named.values(), self.scripts, strict=True))
        ]
        self.steering = [*noted, Tap(self.leaves, where=Where(modalities=tuple(every) or None))]

    def run(self, parts: list[tuple[Batch, list[int]]], progress: bool) -> None:
        """Fill the tables, batch by batch."""
        from tqdm import tqdm

        # That a head moves nothing is a result of the search, no error.
        with (
            tqdm(total=len(self.plain), desc="samples", disable=not progress) as bar,
            differentiable(self.model),
            steer(self.model, *self.steering, control=True) as run,
        ):
            for batch, places in parts:
                self._batch(run, batch, places)
                bar.update(len(places))

    def _batch(self, run: Steering, batch: Batch, places: list[int]) -> None:
        columns: dict[str, list[int]] = {path: [0] for path in self.heads}
        self.leaves.record = 0 if self.alone and batch.whole else None
        # Those of the batch before, where it was noted beforehand and this one is not.
        self.leaves.changes = {}
        script = self.scripts[0]
        if self.leaves.record is None:
            columns = self._note(run, batch)
        script.recording = self.leaves.record is not None
        try:
            plain, found = slopes(self.model, batch, self.leaves, run)
        finally:
            script.recording, script.edits = False, {}
        self.plain[places] = plain.double().cpu()
        for number, name in enumerate(self.named):
            for column, (path, head) in enumerate(self.pairs[name].values()):
                if path in found and number in columns.get(path, ()):
                    slope = found[path][columns[path].index(number), :, head]
                    self.values[name][places, column] = slope.double().cpu()

    def _note(self, run: Steering, batch: Batch) -> dict[str, list[int]]:
        """Note what each method would change, in a forward each; by site path the methods that have something there."""
        given: dict[str, list[Tensor]] = {}
        columns: dict[str, list[int]] = {}
        for number, script in enumerate(self.scripts):
            with torch.no_grad():
                edits = batch.changes(self.model, run, script)
            script.edits = {}
            for (path, heads), edit in edits.items():
                change = edit.edited - edit.plain
                whole = len(heads) == self.heads[path]
                if number not in columns.setdefault(path, []):
                    columns[path].append(number)
                    B, _, n, dv = change.shape
                    # Groups of heads are put together, those of the other methods left at zero.
                    given.setdefault(path, []).append(change if whole else change.new_zeros(B, self.heads[path], n, dv))
                if not whole:
                    given[path][-1][:, list(heads)] = change
        self.leaves.changes = {path: torch.stack(changes) for path, changes in given.items()}
        return columns

    def result(self, name: str) -> tuple[list[Pair], Tensor]:
        """The heads of a method, and the score of each sample [N, heads]."""
        return list(self.pairs[name]), self.values[name]


def measured(
    model: nn.Module, method: Intervention | None, samples: Iterable[Any], metric: Metric, batch: int = 32
) -> Tensor:
    """The metric of each sample under a method (None: unedited), [N]: what a screen estimates."""
    parts, facts = batches(samples, metric, batch)
    values = torch.zeros(facts["samples"], dtype=torch.float64)
    with torch.no_grad():
        if method is None:
            for part, places in parts:
                values[places] = part.values(model).double().cpu()
            return values
        with steer(model, method, control=True) as run:
            for part, places in parts:
                values[places] = part.values(model, run).double().cpu()
    return values


def _confirmed(
    model: nn.Module,
    method: Intervention,
    scored: ScoredHeads,
    count: int,
    samples: list[Any],
    metric: Metric,
    batch: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The best heads, and as many random others, measured one by one."""
    best = list(scored.top(min(count, len(scored))))
    best.sort(key=lambda p: -scored.scores[p])
    rest = sorted(set(scored) - set(best))
    drawn = random.Random(seed).sample(rest, min(count, len(rest)))
    plain = measured(model, None, samples, metric, batch).tolist()
    found = []
    for kind, pairs in (("best", best), ("random", drawn)):
        for pair in pairs:
            edited = measured(model, only(method, *pair), samples, metric, batch).tolist()
            gain = paired_bootstrap(plain, edited, draws=2000, seed=seed)
            found.append(
                {
                    **({"tower": pair[0]} if len(pair) == 3 else {}),
                    "layer": pair[-2],
                    "head": pair[-1],
                    "kind": kind,
                    "screened": scored.scores[pair],
                    "measured": gain.value,
                    "low": gain.low,
                    "high": gain.high,
                }
            )
    return found


def agreement(scored: HeadSet, effects: Mapping[Pair, float]) -> float:
    """Spearman's rank correlation between the scores of a set and measured effects of the same heads, -1 to 1."""
    pairs = [p for p in scored if p in effects and p in scored.scores]
    if len(pairs) < 3:
        raise SelectionError(
            f"a rank correlation of {len(pairs)} heads says nothing; give the effects of three or more."
        )
    a, b = (_ranks([source[p] for p in pairs]) for source in (scored.scores, effects))
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else math.nan


def _ranks(values: list[float]) -> Tensor:
    """Ranks, ties shared."""
    x = torch.tensor(values, dtype=torch.float64)
    _, place, counts = x.unique(sorted=True, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[place]
