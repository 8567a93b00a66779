"""HeadHunter: greedy choice of the heads whose perturbation guides a diffusion model best, by any score of images.

"Fine-Grained Perturbation Guidance via Attention Head Selection" (NeurIPS 2025, arXiv 2506.10978), section 4; official code
cvlab-kaist/HeadHunter at 3828d1c. Settings of the paper: general quality R = 1, k = 24, u = 0.25, 20 prompts; style R = 5,
k = 3, u = 1, 5 prompts; 20 Euler steps, w = 3, no classifier-free guidance during the search. The screened form is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import SelectionError, UnsupportedHost
from ..heads import HeadSet
from ..intervention import Intervention
from ..methods.softpag import SoftPAG
from ..steering import bind, find_host, steer
from ..versions import library_versions
from ..where import stack_shape
from .state import SearchState, digest, model_digest, refuse_overlap

Pair = tuple[int, int]
Sample = tuple[str, int]
# Images of a row in the picture of a round.
COLUMNS = 6


@dataclass(frozen=True)
class Rung:
    """One cheap stage before the full evaluation of a round.

    Args:
        prompts: how many of the first samples are used. steps: denoising steps.
        keep: the share of the candidates that goes on, above 0 and below 1.
    """

    prompts: int
    steps: int
    keep: float = 0.5

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.steps < 1 or not 0.0 < self.keep < 1.0:
            raise SelectionError(f"{self}: prompts and steps are above 0, keep is above 0 and below 1.")


def halving(prompts: int, steps: int, rungs: int = 2, keep: float = 0.5) -> tuple[Rung, ...]:
    """Successive halving before an evaluation on `prompts` samples of `steps` steps: each rung has half of the next one's
    samples, all have half of the steps."""
    return tuple(Rung(math.ceil(prompts / 2 ** (rungs - i)), max(1, math.ceil(steps / 2)), keep) for i in range(rungs))


def headhunter(
    pipe: Any,
    prompts: Iterable[str | Sample],
    score: Callable[[list[Any], list[str]], Sequence[float]],
    method: Intervention | None = None,
    *,
    rounds: int = 5,
    top: int = 3,
    steps: int = 20,
    screen: Sequence[Rung] = (),
    options: Mapping[str, Any] | None = None,
    generate: Callable[[Any, list[str], list[int], int], Sequence[Any]] | None = None,
    test: Iterable[str | Sample] | None = None,
    state: str | Path | None = None,
    grids: str | Path | None = None,
    batch: int = 8,
    progress: bool = True,
    every: float = 0.0,
) -> HeadSet:
    """Choose heads greedily: in each round, those that score best when they are perturbed together with the ones chosen.

    S = {}; `rounds` times: score the images made with S and one more head, for every other candidate; add the `top` best.
    All candidates get the same prompts, seeds and so the same first latents.

    Args:
        pipe: a text-to-image pipeline of diffusers.
        prompts: the samples to choose by: prompts, whose seed is then their place in the list, or pairs (prompt, seed).
        score: `score(images, prompts)` gives a number per image, more is better. A state file knows it by its name only.
        method: the guidance that will use the heads, `SoftPAG(scale=3.0)` by default. Its `where` or `heads` name the
            candidates, its `joint` what identity means in joint attention ("joint_identity" is the official code's).
        rounds, top: R and k. steps: denoising steps.
        screen: cheap stages in front of each round's full evaluation, e.g. `halving(len(prompts), steps)`; none is the
            exhaustive form of the paper.
        options: further arguments of the pipeline's call, such as `{"guidance_scale": 1.0}` (no classifier-free guidance, as
            in the paper).
        generate: makes the images in place of the pipeline's call: `generate(pipe, prompts, seeds, steps)`.
        test: samples that the heads will be tested on; one that is in both is an error, a bare prompt stands for all seeds.
        state: a file that keeps every score; a search that is started again with it makes no image twice.
        grids: a folder for one picture per round, `round-1.png` and so on: without guidance, with each chosen head, with all.
        batch: images made at once. progress: show a bar. every: seconds between two writes of the state.

    Returns:
        A `HeadSet` whose scores are those of the round in which each head was chosen; the provenance has the settings, the
        scores of every round, of the chosen sets, and without guidance, and how many images were scored.

    Raises:
        SelectionError: bad samples or options, a test split that overlaps, a score of the wrong length or not finite.
        UnsupportedHost: no pipeline, or one that the method cannot guide.
        SerializationError: `state` belongs to a search with other settings.
    """
    method = SoftPAG() if method is None else method
    _check(method, rounds, top, steps, batch)
    samples = _samples(prompts)
    if test is not None:
        test = list(test)
        bare = {item for item in test if isinstance(item, str)}
        known = [_name(s) for s in samples] + [s[0] for s in samples if s[0] in bare]
        refuse_overlap(known, [*bare, *(_name(_sample(0, s)) for s in test if not isinstance(s, str))], "samples")
    host = find_host(pipe)
    if generate is None and getattr(host, "pipeline", None) is None:
        raise UnsupportedHost(
            f"headhunter needs a pipeline of diffusers, not {type(pipe).__name__}; or give generate=."
        )
    every_site = host.sites()
    (bound,), plan = bind((method,), every_site, host)
    sites = [s for s in every_site if s.path in plan]
    candidates = sorted({(s.layer, h) for s in sites for h in plan[s.path][0][1] or range(s.heads)})
    if rounds * top > len(candidates):
        raise SelectionError(f"rounds={rounds} times top={top} heads are more than the {len(candidates)} candidates.")
    settings = {
        "search": "headhunter",
        "method": {"name": type(method).__name__, "parameters": digest(method.to_dict())},
        "model": model_digest(*getattr(host, "models", {}).values()),
        "samples": digest(samples),
        "options": digest({k: repr(v) for k, v in sorted((options or {}).items())}),
        "score": getattr(score, "__qualname__", type(score).__qualname__),
    }
    with SearchState(state, settings, every) as store:
        free = method.new(heads=None, where=replace(bound.where, layers=None, heads=None))
        painter = _Painter(pipe, free, dict(options or {}), generate, batch)
        hunt = _Hunt(painter, samples, score, store, steps, tuple(screen), top)
        hunt.run(candidates, rounds, progress, None if grids is None else Path(grids))
        shape = stack_shape(sites[0], every_site)
        facts = hunt.provenance(shape) | {"method": {"name": type(method).__name__, "parameters": method.to_dict()}}
        return HeadSet(list(hunt.scores), scores=hunt.scores, shape=shape, provenance=facts)


class _Painter:
    """Makes the images of some samples with some heads perturbed."""

    def __init__(self, pipe: Any, method: Intervention, options: dict[str, Any], generate: Any, batch: int):
        self.pipe, self.method, self.options, self.generate, self.batch = pipe, method, options, generate, batch

    def batches(
        self, heads: Sequence[Pair], samples: Sequence[Sample], steps: int
    ) -> Iterable[tuple[list[Any], list[str]]]:
        """(images, their prompts), a batch at a time; no heads: without guidance."""
        if not heads:
            yield from self._made(samples, steps)
            return
        with steer(self.pipe, self.method.new(heads=HeadSet(heads)), control=True):
            yield from self._made(samples, steps)

    def _made(self, samples: Sequence[Sample], steps: int) -> Iterable[tuple[list[Any], list[str]]]:
        for i in range(0, len(samples), self.batch):
            prompts = [p for p, _ in samples[i : i + self.batch]]
            seeds = [s for _, s in samples[i : i + self.batch]]
            images = list((self.generate or self._call)(self.pipe, prompts, seeds, steps))
            if len(images) != len(prompts):
                raise SelectionError(f"{len(prompts)} prompts gave {len(images)} images; one for each is needed.")
            yield images, prompts

    def _call(self, pipe: Any, prompts: list[str], seeds: list[int], steps: int) -> Sequence[Any]:
        import torch

        # One generator per image: the latents of a sample are the same in every batch and on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return pipe(prompt=prompts, num_inference_steps=steps, generator=generators, **self.options).images


class _Hunt:
    def __init__(
        self,
        painter: _Painter,
        samples: list[Sample],
        score: Callable[..., Sequence[float]],
        store: SearchState,
        steps: int,
        screen: tuple[Rung, ...],
        top: int,
    ):
        self.painter, self.samples, self.score, self.store = painter, samples, score, store
        self.steps, self.screen, self.top = steps, screen, top
        self.scores: dict[Pair, float] = {}
        self.rounds: list[dict[str, Any]] = []
        self.images: dict[str, int] = {}

    def run(self, candidates: list[Pair], rounds: int, progress: bool, grids: Path | None) -> None:
        """All rounds; scores that the state knows are not computed again."""
        from tqdm import tqdm

        with tqdm(desc="images", unit="", disable=not progress) as self.bar:
            self.plain = self.mean((), len(self.samples), self.steps)
            for number in range(1, rounds + 1):
                chosen, before = {}, tuple(self.scores)
                left = [c for c in candidates if c not in self.scores]
                stages = []
                for rung in self.screen:
                    found = self.rank(before, left, min(rung.prompts, len(self.samples)), rung.steps)
                    stages.append(found)
                    left = _best(found, max(self.top, math.ceil(rung.keep * len(found))))
                found = self.rank(before, left, len(self.samples), self.steps)
                chosen = {c: found[c] for c in _best(found, self.top)}
                self.scores |= chosen
                joint = self.mean(tuple(self.scores), len(self.samples), self.steps)
                self.rounds.append({"chosen": chosen, "joint": joint, "scores": found, "stages": stages})
                if grids is not None:
                    self.picture(grids / f"round-{number}.png", before, chosen, joint)

    def rank(self, before: tuple[Pair, ...], candidates: list[Pair], count: int, steps: int) -> dict[Pair, float]:
        """Mean scores of `before` with each candidate added."""
        return {c: self.mean((*before, c), count, steps) for c in candidates}

    def mean(self, heads: tuple[Pair, ...], count: int, steps: int) -> float:
        """Mean score of the first `count` samples with these heads perturbed."""
        key = f"{_key(heads)}@{steps}"
        known = self.store.data.setdefault(key, [])
        self.images[key] = max(count, self.images.get(key, 0))
        if len(known) < count:
            todo = self.samples[len(known) : count]
            for images, prompts in self.painter.batches(heads, todo, steps):
                known.extend(self._scored(heads, images, prompts))
                self.bar.update(len(images))
            self.store.tick()
        return math.fsum(known[:count]) / count

    def _scored(self, heads: tuple[Pair, ...], images: list[Any], prompts: list[str]) -> list[float]:
        values = [float(v) for v in self.score(images, prompts)]
        if len(values) != len(images) or not all(math.isfinite(v) for v in values):
            raise SelectionError(
                f"score(images, prompts) gave {values} for {len(images)} images ({_key(heads) or 'no guidance'}, "
                f"{prompts[0]!r}, ...); give one finite number per image."
            )
        return values

    def picture(self, path: Path, before: tuple[Pair, ...], chosen: dict[Pair, float], joint: float) -> None:
        """One row without guidance, one for each head chosen in this round, one for all heads chosen so far."""
        from ..viz import contact_sheet

        if path.exists():
            return
        shown = self.samples[:COLUMNS]
        rows = [((), f"no guidance  {self.plain:.4g}")]
        rows += [((*before, c), f"{'+ ' if before else ''}L{c[0]} H{c[1]}  {s:.4g}") for c, s in chosen.items()]
        rows += [(tuple(self.scores), f"all {len(self.scores)}  {joint:.4g}")]
        images = [[i for made, _ in self.painter.batches(heads, shown, self.steps) for i in made] for heads, _ in rows]
        contact_sheet(images, [label for _, label in rows], [p or f"seed {s}" for p, s in shown], path)

    def provenance(self, shape: tuple[int, int]) -> dict[str, Any]:
        """JSON-able facts about the search."""

        def table(scores: Mapping[Pair, float]) -> list[list[float | None]]:
            return [[scores.get((layer, head)) for head in range(shape[1])] for layer in range(shape[0])]

        return {
            **self.store.settings,
            "options": {k: repr(v) for k, v in sorted(self.painter.options.items())},
            "prompts": len(self.samples),
            "steps": self.steps,
            "screen": [[r.prompts, r.steps, r.keep] for r in self.screen],
            "unguided": self.plain,
            "rounds": [
                {
                    "chosen": [list(c) for c in r["chosen"]],
                    "joint": r["joint"],
                    "scores": table(r["scores"]),
                    "screened": [table(s) for s in r["stages"]],
                }
                for r in self.rounds
            ],
            "images": sum(self.images.values()),
            "versions": library_versions(),
        }


def _check(method: Intervention, rounds: int, top: int, steps: int, batch: int) -> None:
    if "around" not in method.doors() or not any(f.name == "heads" for f in fields(method)):
        raise SelectionError(f"headhunter got {method!r}; give a guidance method with heads, such as SoftPAG.")
    if min(rounds, top, steps, batch) < 1:
        raise SelectionError(f"rounds={rounds}, top={top}, steps={steps}, batch={batch}: all are 1 or more.")


def _samples(prompts: Iterable[str | Sample]) -> list[Sample]:
    if isinstance(prompts, str):
        raise SelectionError(f"headhunter got one string of prompts, {prompts!r}; give a list.")
    found = [_sample(i, item) for i, item in enumerate(prompts)]
    if not found or len(set(found)) < len(found):
        raise SelectionError("headhunter needs at least one prompt, and no (prompt, seed) twice.")
    return found


def _sample(place: int, item: Any) -> Sample:
    if isinstance(item, str):
        return item, place
    fits = isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], int)
    if not fits or isinstance(item[1], bool) or item[1] < 0:
        raise SelectionError(
            f"headhunter got the sample {item!r}; give a prompt, or (prompt, seed) with a seed from 0."
        )
    return item[0], item[1]


def _name(sample: Sample) -> str:
    return f"{sample[0]} (seed {sample[1]})"


def _key(heads: Sequence[Pair]) -> str:
    return ",".join(f"{layer}.{head}" for layer, head in sorted(heads))


def _best(scores: Mapping[Pair, float], k: int) -> list[Pair]:
    """The `k` best candidates, best first (ties: lower layer, then lower head)."""
    return sorted(scores, key=lambda c: (-scores[c], c))[:k]
