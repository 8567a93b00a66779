"""How good shapes-sd and shapes-mmdit are, and where their text-image attention means something."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...evals.significance import Interval, wilson
from ...steering import steer
from ...viz.record import PhraseRecorder
from ..shapes.detect import Detection, detect
from ..shapes.layouts import Layout, exact, layout, satisfied
from ..shapes.render import coverage
from ..shapes.world import Scene

BATCH, STEPS = 25, 25
# Places of the missing T5's tokens in pipelines that have them: fewer than the default of 256 are quicker to compute.
FILLERS = 32
# Of the tokens of "a red circle and a blue square": start, a, colour, shape, and, a, colour, shape, end.
WORDS = {"colour 1": 2, "shape 1": 3, "after 1": 4, "colour 2": 6, "shape 2": 7, "after 2": 8}


def generate(
    pipe: Any, prompts: Sequence[str], *, seeds: Sequence[int] | None = None, steps: int = STEPS, **options: Any
) -> Tensor:
    """Images in [0, 1], fp32 [B, 3, 64, 64]; each sample has its own seed, so batches do not matter.

    Args:
        pipe: the pipeline. prompts: one per image. seeds: one per image; 0, 1, ... unless given.
        steps: of the sampler. options: further arguments of the pipeline, such as `guidance_scale`.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    found = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        generators = [torch.Generator().manual_seed(s) for s in seeds[part]]
        found.append(
            pipe(
                list(prompts[part]), generator=generators, num_inference_steps=steps, output_type="pt", **options
            ).images.float()
        )
    return torch.cat(found).cpu()


def success(wanted: Sequence[Layout], read: Sequence[Detection]) -> dict[str, Interval]:
    """Share of the images that show what the prompt asks for.

    "all there": every object in its colour and shape; "right": that, in a wholly valid picture; "exact": and no other
    object (captions count, so "a red circle" means one).
    """
    pairs = list(zip(wanted, read, strict=True))
    there = [satisfied(w, d.objects) for w, d in pairs]
    just = [exact(w, d.objects) for w, d in pairs]
    found = {
        "all there": sum(there),
        "right": sum(t and d.valid for t, (_, d) in zip(there, pairs, strict=True)),
        "exact": sum(j and d.valid for j, (_, d) in zip(just, pairs, strict=True)),
    }
    return {name: wilson(n, len(pairs)) for name, n in found.items()}


def validity(read: Sequence[Detection]) -> Interval:
    """Share of the images in which every coloured patch is a clean known shape, and there is one."""
    return wilson(sum(d.valid for d in read), len(read))


def several(index: int, split: str = "test") -> Layout:
    """A prompt of two to four objects."""
    return layout(split, index, "objects", 2 + index % 3)


def measure(pipe: Any, count: int = 200, split: str = "test") -> dict[str, Any]:
    """All figures of a card; about 5 x `count` images."""
    quick = shorter(pipe)
    one, two = ([layout(split, i, "objects", n) for i in range(count)] for n in (1, 2))
    many = [several(i, split) for i in range(count)]
    out: dict[str, Any] = {}
    for name, wanted in (("one object", one), ("two objects", two), ("two to four objects", many)):
        read = detect(generate(pipe, [w.prompt for w in wanted], **quick))
        out[f"{name}, default guidance"] = {**success(wanted, read), "valid": validity(read)}
    if quick:
        read = detect(generate(pipe, [w.prompt for w in two]))
        out["two objects, default guidance and text length"] = {**success(two, read), "valid": validity(read)}
    read = detect(generate(pipe, [w.prompt for w in many], guidance_scale=1.0, **quick))
    out["two to four objects, no guidance"] = {**success(many, read), "valid": validity(read)}
    read = detect(generate(pipe, [""] * count, guidance_scale=1.0, **quick))
    out["empty prompt, no guidance"] = {"valid": validity(read)}
    return out


def shorter(pipe: Any) -> dict[str, int]:
    """What a pipeline with places for T5's tokens is called with, to be quicker."""
    return (
        {"max_sequence_length": FILLERS} if "max_sequence_length" in inspect.signature(pipe.__call__).parameters else {}
    )


def map_table(pipe: Any, count: int = 50, split: str = "calibration", **options: Any) -> dict[str, Any]:
    """Share of a word's attention inside its object, over the object's share of the image.

    The images are the pipeline's own; the objects are the detected ones, drawn by the renderer at the size of the map (a
    cell that an object covers in part counts in part). Phrases that were not drawn, or twice, are left out.

    Returns:
        {"ratios": {site: {word: [one per step]}}, "sizes": {site: [h, w]}, "objects": how many counted}.
    """
    wanted = [layout(split, i, "objects", 2) for i in range(count)]
    keys = tuple(WORDS.values())
    sums: dict[str, Tensor] = {}
    sizes: dict[str, list[int]] = {}
    counted = 0
    for start in range(0, count, BATCH):
        part = wanted[start : start + BATCH]
        recorder = PhraseRecorder(keys)
        with steer(pipe, recorder):
            images = generate(
                pipe, [w.prompt for w in part], seeds=range(start, start + len(part)), **{**shorter(pipe), **options}
            )
        read = detect(images)
        masks = [[_mask(p, d) for p in w.phrases] for w, d in zip(part, read, strict=True)]
        counted += sum(m is not None for pair in masks for m in pair)
        for record in recorder.records:
            sizes[record.site] = list(record.maps.shape[-2:])
            table = sums.setdefault(record.site, torch.zeros(STEPS, len(keys), 2))
            for row, pair in enumerate(masks):
                for k in range(len(keys)):
                    mask = pair[k // 3]
                    if mask is not None:
                        table[record.step, k, 0] += mask_ratio(record.maps[row, k], mask)
                        table[record.step, k, 1] += 1
    ratios = {
        site: {
            word: [round(v, 3) for v in (t[:, k, 0] / t[:, k, 1].clamp(min=1)).tolist()] for k, word in enumerate(WORDS)
        }
        for site, t in sums.items()
    }
    return {"ratios": ratios, "sizes": sizes, "objects": counted}


def middle(table: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each site's ratios at the middle third of the steps, by word: mean over both phrases."""
    out = {}
    for site, words in table["ratios"].items():
        rows = {}
        for kind in ("colour", "shape", "after"):
            values = [v for n in (1, 2) for v in words[f"{kind} {n}"][STEPS // 3 : 2 * STEPS // 3]]
            rows[kind] = round(sum(values) / len(values), 2)
        out[site] = rows
    return out


def mask_ratio(maps: Tensor, mask: Tensor) -> Tensor:
    """Share of a map's mass inside a mask, over the mask's share of the image: 1 means that the map ignores it.

    Args:
        maps: [..., h, w], not negative. mask: [H, W] in [0, 1], H and W multiples of h and w.
    """
    h, w = maps.shape[-2:]
    share = mask.unflatten(0, (h, -1)).unflatten(2, (w, -1)).mean(dim=(1, 3))
    return (maps * share).sum(dim=(-2, -1)) / maps.sum(dim=(-2, -1)).clamp(min=1e-12) / mask.mean()


def _mask(phrase: Any, read: Detection) -> Tensor | None:
    found = read.find(shape=phrase.shape, colour=phrase.colour)
    return coverage([Scene((found[0],))])[0][0] if len(found) == 1 else None
