"""Calibration of heads: a method in every head alone, scored on choice samples; the residual below is computed once.

Head filtering of ACT: Yu et al., ICML 2024, arXiv 2406.15765 (utils/data_utils.py and scripts/calibration.sh of
GATECH-EIC/ACT at a267af7). The repository has the search over heads, not the rule that accepts one; "accuracy above that of
the unedited model" is unverified.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SelectionError, UnsupportedHost
from ..heads import HeadSet
from ..hosts.transformers.replay import Decoder, Pass
from ..intervention import Intervention
from ..methods.act import ACT
from ..steering import Steering, steer
from ..versions import library_versions
from ..where import stack_shape
from .alone import EachHeadAlone, Edit, Script, only
from .samples import Choice, candidate_log_likelihoods, choices, padded, split_digest, token_sums
from .state import SearchState, digest, model_digest, refuse_overlap

METRICS = ("accuracy", "log_likelihood")
KEEP = ("improved", "all")
# What one more forward costs, in rows of tokens: variants that share fewer are not computed together.
CALL = 128
# A recomputed log-likelihood against that of the steered model itself; half precision rounds differently in a batch.
TOLERANCE, TOLERANCE_HALF = 2e-3, 0.1


def calibrate_act(model: nn.Module, samples: Iterable[Any], method: ACT | None = None, **options: Any) -> HeadSet:
    """The heads in which ACT alone improves a calibration split.

    Args:
        method: the ACT to calibrate for, `ACT()` by default; its `heads` and `where` limit the search (the official code
            leaves out the layers 0 and 1).
        model, samples, options: of `calibrate_heads`.
    """
    method = ACT() if method is None else method
    if not isinstance(method, ACT):
        raise SelectionError(f"calibrate_act got {method!r}; give an ACT, or use calibrate_heads for another method.")
    return calibrate_heads(model, method, samples, **options)


@torch.no_grad()
def calibrate_heads(
    model: nn.Module,
    method: Intervention,
    samples: Iterable[Any],
    *,
    metric: str = "accuracy",
    keep: str = "improved",
    test: Iterable[Any] | None = None,
    state: str | Path | None = None,
    batch: int = 32,
    progress: bool = True,
    every: float = 5.0,
) -> HeadSet:
    """Score `method` in every head alone on choice samples, as one steered forward per head and sample would.

    Each prompt is computed once without edits. For each layer, the heads that the method moves there become rows of a batch
    that is computed from that layer on, and from the first row of tokens that moves on; heads that it does not move have the
    plain score. Some variants are compared with the steered model itself before the search goes on.

    Args:
        model: a causal language model of transformers, in eval mode.
        method: an inside method; its selection limits the search.
        samples: `Choice` objects, or dictionaries with prompt, candidates and answer.
        metric: the score of a head is its gain over the unedited model in "accuracy" (share of samples whose right
            candidate has the highest log-likelihood, -1 to 1) or in "log_likelihood" (mean of the right candidate's, nats).
        keep: "improved": the heads with a gain above 0; "all": every head with its score, e.g. for `HeadSet.top`.
        test: the samples that the heads will be tested on; a prompt that is in both is an error.
        state: a file that keeps the progress; a search that is started again with it goes on where it was.
        batch: rows computed at once. progress: show a bar. every: seconds between two writes of the state.

    Returns:
        A `HeadSet` with the scores, the shape of the model, and a provenance with the split's hash, the unedited score, and
        the tables (layer by head) of both gains.

    Raises:
        SelectionError: bad samples or options, a test split that overlaps, or "improved" and no head improves.
        UnsupportedHost: the model's blocks cannot be recomputed one by one exactly.
        SerializationError: `state` belongs to a search with other settings.
    """
    if metric not in METRICS or keep not in KEEP or batch < 1:
        raise SelectionError(
            f"metric={metric!r} is one of {METRICS}, keep={keep!r} one of {KEEP}, batch={batch} above 0."
        )
    if "around" in method.doors():
        raise SelectionError(
            f"{type(method).__name__} calls the model several times; heads are calibrated for inside methods."
        )
    split = choices(samples)
    if test is not None:
        refuse_overlap((s.key() for s in split), (s.key() for s in choices(test)), "samples")
    settings = {
        "search": "calibrate_heads",
        "method": {"name": type(method).__name__, "parameters": digest(method.to_dict())},
        "model": model_digest(model),
        "split": split_digest(split),
    }
    with SearchState(state, settings, every) as store:
        search = _Search(model, method, split, batch, store)
        search.run(progress)
        gains, plain = search.gains()
    chosen = [pair for pair in search.pairs if keep == "all" or gains[metric][pair] > 0]
    if not chosen:
        raise SelectionError(
            f"{type(method).__name__} improves {metric} in none of {len(search.pairs)} heads (unedited: {plain[metric]:.4f}, "
            f'{len(split)} samples). Take other hyper-parameters, more samples, or keep="all" to see the scores.'
        )
    provenance = {
        **settings,
        "method": {"name": type(method).__name__, "parameters": method.to_dict()},
        "metric": metric,
        "keep": keep,
        "samples": len(split),
        "unedited": plain,
        "gains": {name: _table(search.shape, table) for name, table in gains.items()},
        "versions": library_versions(),
    }
    return HeadSet(chosen, scores=gains[metric], shape=search.shape, provenance=provenance)


@dataclass
class _Group:
    """Samples with prompts of one length, and what the plain pass gave for them.

    Attributes:
        ids: [B, n]. longer: (sample, candidate) of each candidate of more than one token. fed: all but the last token of
            these, [C, k]. prompt, rest: the plain passes and edits, over the prompts and over `fed`.
    """

    samples: list[Choice]
    ids: Tensor
    longer: list[tuple[int, int]]
    fed: Tensor | None
    prompt: tuple[Pass, dict[str, Edit]]
    rest: tuple[Pass, dict[str, Edit]] | None

    def candidates(self) -> list[tuple[int, ...]]:
        """The longer candidates."""
        return [self.samples[b].candidates[c] for b, c in self.longer]


@dataclass
class _Variant:
    """One sample with one head edited: the first row of tokens that has to be computed."""

    sample: int
    place: int
    first: int


class _Search:
    def __init__(self, model: nn.Module, method: Intervention, split: list[Choice], batch: int, store: SearchState):
        self.model, self.method, self.split, self.batch, self.store = model, method, split, batch, store
        self.script = Script()
        self.alone = EachHeadAlone(method, self.script)
        # That a head moves nothing is a result of the search, no error.
        run = steer(model, self.alone, control=True)
        run.remove()
        self.decoder = Decoder(run.host.model, run.host.sites())
        self.sites = {s.path: s for s in run.sites}
        chosen = {path: runtime.entries[0][1] for path, runtime in run.runtimes.items()}
        self.heads = {p: tuple(range(s.heads)) if chosen[p] is None else chosen[p] for p, s in self.sites.items()}
        self.pairs = [(self.sites[p].layer, h) for p, heads in self.heads.items() for h in heads]
        self.column = {pair: i for i, pair in enumerate(self.pairs)}
        self.shape = stack_shape(run.sites[0], run.host.sites())
        n, p = len(split), len(self.pairs)
        if not store.tensors:
            store.tensors = {
                "done": torch.zeros(n, dtype=torch.bool),
                "plain": torch.zeros(n, 2, dtype=torch.float64),
                "edited": torch.zeros(n, p, 2, dtype=torch.float32),
            }

    def run(self, progress: bool) -> None:
        """Score all samples that are not done."""
        from tqdm import tqdm

        todo = [i for i in range(len(self.split)) if not self.store.tensors["done"][i]]
        bar = tqdm(total=len(self.split), initial=len(self.split) - len(todo), desc="samples", disable=not progress)
        groups = list(self._groups(todo))
        if not groups:
            return
        with bar:
            # The first group on its own, because the comparison steers the model itself.
            with steer(self.model, self.alone, control=True) as run:
                self._score(run, groups[0])
            run.check_fired(changed=False)
            self._check(groups[0])
            self._done(groups[0], bar)
            if len(groups) > 1:
                with steer(self.model, self.alone, control=True) as run:
                    for group in groups[1:]:
                        self._score(run, group)
                        self._done(group, bar)

    def gains(self) -> tuple[dict[str, dict[tuple[int, int], float]], dict[str, float]]:
        """Metric -> head -> mean gain, and the means of the unedited model."""
        plain = self.store.tensors["plain"]
        edited = self.store.tensors["edited"].double()
        gain = (edited - plain[:, None]).mean(dim=0)
        # Exact zeros where nothing moved: a mean of equal numbers may round.
        gain[(edited == plain.float().double()[:, None]).all(dim=0)] = 0.0
        table = {m: {pair: float(gain[i, k]) for i, pair in enumerate(self.pairs)} for k, m in enumerate(METRICS)}
        return table, dict(zip(METRICS, plain.mean(dim=0).tolist(), strict=True))

    def _groups(self, todo: list[int]) -> Iterator[list[int]]:
        """Samples of one prompt length, a few at a time."""
        by_length: dict[int, list[int]] = {}
        for i in todo:
            by_length.setdefault(len(self.split[i].prompt), []).append(i)
        for same in by_length.values():
            yield from (same[k : k + self.batch] for k in range(0, len(same), self.batch))

    def _done(self, group: list[int], bar: Any) -> None:
        self.store.tensors["done"][group] = True
        self.store.tick()
        bar.update(len(group))

    def _score(self, run: Steering, indices: list[int]) -> None:
        group = self._record(run, [self.split[i] for i in indices])
        plain = [_values(s, t) for s, t in zip(group.samples, self._totals(group), strict=True)]
        store = self.store.tensors
        store["plain"][indices] = torch.tensor(plain, dtype=torch.float64)
        store["edited"][indices] = store["plain"][indices].float()[:, None]
        for path in self.heads:
            for variants in self._variants(group, path):
                totals = self._replay(run, group, path, variants)
                for variant, total in zip(variants, totals, strict=True):
                    pair = (self.sites[path].layer, self.heads[path][variant.place])
                    value = torch.tensor(_values(group.samples[variant.sample], total))
                    store["edited"][indices[variant.sample], self.column[pair]] = value

    def _record(self, run: Steering, samples: list[Choice]) -> _Group:
        """The plain pass over prompts and candidates, and all edits that the method would make in it."""
        device = self.decoder.device
        ids = torch.tensor([s.prompt for s in samples], device=device)
        longer = [(b, c) for b, s in enumerate(samples) for c, ids in enumerate(s.candidates) if len(ids) > 1]
        prompt = self._recorded(ids, None, True)
        fed = rest = None
        if longer:
            fed = padded([samples[b].candidates[c][:-1] for b, c in longer], device)
            cache = prompt[0].cache
            # The statistics that the prompt left follow.
            cache.batch_select_indices(torch.tensor([b for b, _ in longer], device=device))
            with run.freeze():
                rest = self._recorded(fed, cache, False)
        return _Group(samples, ids, longer, fed, prompt, rest)

    def _recorded(self, ids: Tensor, cache: Any, last: bool) -> tuple[Pass, dict[str, Edit]]:
        self.script.recording, self.script.edits = True, {}
        try:
            done = self.decoder.run(ids, cache, last)
        finally:
            self.script.recording = False
        return done, self.script.edits

    def _totals(self, group: _Group) -> list[list[float]]:
        """Log-likelihoods of all candidates of all samples, unedited."""
        first = group.prompt[0].logits[:, -1].float().log_softmax(-1)
        totals = [[float(first[b, c[0]]) for c in s.candidates] for b, s in enumerate(group.samples)]
        if group.rest is not None:
            for (b, c), more in zip(group.longer, token_sums(group.rest[0].logits, group.candidates()), strict=True):
                totals[b][c] += more
        return totals

    def _variants(self, group: _Group, path: str) -> Iterator[list[_Variant]]:
        """Samples and heads that the method moves at a site, in batches that are worth one forward each."""
        n = group.ids.shape[1]
        moved = _changed(group.prompt, path, (len(group.samples), len(self.heads[path]), n))
        if self.decoder.position[path] == len(self.decoder.blocks) - 1:
            # No later block mixes rows: only the row that predicts counts.
            moved[..., :-1] = False
        first = torch.where(moved.any(dim=-1), moved.int().argmax(dim=-1), n)
        if group.rest is not None:
            rest = _changed(group.rest, path, (len(group.longer), len(self.heads[path]), group.fed.shape[1])).any(
                dim=-1
            )
            for row, (b, _) in enumerate(group.longer):
                first[b] = torch.where(rest[row], first[b].clamp_max(n - 1), first[b])
        found = [_Variant(b, h, int(first[b, h])) for b, h in (first < n).nonzero().tolist()]
        found.sort(key=lambda v: -v.first)
        batch: list[_Variant] = []
        for variant in found:
            wasted = len(batch) * (batch[0].first - variant.first) if batch else 0
            if batch and (len(batch) == self.batch or wasted > CALL):
                yield batch
                batch = []
            batch.append(variant)
            batch[0].first = variant.first
        if batch:
            yield batch

    def _replay(self, run: Steering, group: _Group, path: str, variants: list[_Variant]) -> list[list[float]]:
        """Log-likelihoods of all candidates of each variant: its layer and those above are computed anew."""
        plain, edits = group.prompt
        block, first = self.decoder.position[path], variants[0].first
        rows = torch.tensor([v.sample for v in variants], device=group.ids.device)
        hidden = plain.hidden[block - 1][rows, first:] if block else None
        upper = [(k[:, :, :first], v[:, :, :first]) for k, v in plain.keys_values]
        cache = self.decoder.cache(
            [(k[:1], v[:1]) if i < block else (k[rows], v[rows]) for i, (k, v) in enumerate(upper)]
        )
        self._put(path, variants, edits, [v.sample for v in variants], first)
        with run.chunked_prefill():
            logits = self.decoder.resume(group.ids[rows, first:], block, hidden, cache, last=True)
        p = logits[:, -1].float().log_softmax(-1)
        totals = [[float(p[r, c[0]]) for c in group.samples[v.sample].candidates] for r, v in enumerate(variants)]
        if group.rest is not None:
            self._replay_rest(run, group, path, variants, cache, totals)
        return totals

    def _replay_rest(
        self, run: Steering, group: _Group, path: str, variants: list[_Variant], cache: Any, totals: list[list[float]]
    ) -> None:
        """The candidates of more than one token, over the variants' own caches."""
        # (variant, row of `fed`): one row of the batch each.
        rows = [(r, f) for r, v in enumerate(variants) for f, (b, _) in enumerate(group.longer) if b == v.sample]
        if not rows:
            return
        plain, edits = group.rest
        block, device = self.decoder.position[path], group.ids.device
        which = torch.tensor([r for r, _ in rows], device=device)
        fed = torch.tensor([f for _, f in rows], device=device)
        below = group.prompt[0].keys_values
        layers = [
            (below[i][0][:1], below[i][1][:1]) if i < block else (k[which], v[which])
            for i, (k, v, *_) in enumerate(cache)
        ]
        self._put(path, [variants[r] for r, _ in rows], edits, [f for _, f in rows], 0)
        with run.freeze():
            logits = self.decoder.resume(
                group.fed[fed], block, plain.hidden[block - 1][fed] if block else None, self.decoder.cache(layers)
            )
        candidates = group.candidates()
        for (r, f), more in zip(rows, token_sums(logits, [candidates[f] for _, f in rows]), strict=True):
            totals[r][group.longer[f][1]] += more

    def _put(
        self, path: str, variants: Sequence[_Variant], edits: dict[str, Edit], source: list[int], first: int
    ) -> None:
        """Let the next forward have these heads' edited outputs, from row `first` on."""
        edit, heads = edits.get(path), [v.place for v in variants]
        self.script.path = None if edit is None else path
        if edit is not None:
            self.script.heads = torch.tensor([self.heads[path][h] for h in heads])
            self.script.values = edit.edited[source, heads][:, first:]

    def _check(self, indices: list[int]) -> None:
        """One moved head of the lowest and of the highest layer, by the steered model itself.

        Raises:
            UnsupportedHost: the recomputation does not give what the steered model gives.
        """
        edited, plain = self.store.tensors["edited"][indices], self.store.tensors["plain"][indices]
        moved = (edited[..., 1] != plain.float()[:, None, 1]).nonzero().tolist()
        half = next(self.model.parameters()).dtype in (torch.float16, torch.bfloat16)
        limit = TOLERANCE_HALF if half else TOLERANCE
        for row, column in (
            {tuple(min(moved, key=lambda m: m[1])), tuple(max(moved, key=lambda m: m[1]))} if moved else ()
        ):
            sample, (layer, head) = self.split[indices[row]], self.pairs[column]
            with steer(self.model, only(self.method, layer, head), control=True) as run:
                value = candidate_log_likelihoods(self.model, sample, run)[sample.answer]
            ours = float(edited[row, column, 1])
            if not abs(value - ours) <= limit * max(1.0, abs(value)):
                raise UnsupportedHost(
                    f"{type(self.model).__name__}: recomputed from layer {layer} on, the answer of sample {indices[row]} has "
                    f"log-likelihood {ours:.5f}, the steered model gives {value:.5f}. Its blocks depend on more than the "
                    "output of the one before; please report the model type."
                )


def _changed(recorded: tuple[Pass, dict[str, Edit]], path: str, shape: tuple[int, int, int]) -> Tensor:
    """Rows that the method moves, bool [B, H, n]; none where its phases left the site out."""
    edit = recorded[1].get(path)
    return torch.zeros(shape, dtype=torch.bool) if edit is None else edit.changed().cpu()


def _values(sample: Choice, totals: list[float]) -> tuple[float, float]:
    """(1 if the right candidate is the likeliest, its log-likelihood), as `METRICS` has them.

    Raises:
        UnsupportedHost: a log-likelihood is not a number.
    """
    if any(math.isnan(t) for t in totals):
        raise UnsupportedHost(
            f"the log-likelihoods of a sample with {len(sample.prompt)} prompt tokens are {totals}: the model gives NaN there. "
            "Check it unsteered, and in fp32."
        )
    right = totals[sample.answer]
    return float(all(right > t for i, t in enumerate(totals) if i != sample.answer)), right


def _table(shape: tuple[int, int], scores: dict[tuple[int, int], float]) -> list[list[float | None]]:
    return [[scores.get((layer, head)) for head in range(shape[1])] for layer in range(shape[0])]
