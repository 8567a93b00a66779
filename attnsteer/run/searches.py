"""Runs the searches of `attnsteer.recipe.search_specs` over the samples of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError, listing
from ..heads import HeadSet
from ..intervention import Intervention
from ..recipe.parameters import Sample
from ..recipe.schema import Recipe
from .tasks.prompts import continuations, positions

# Batches of samples -> what the model is called with.
Inputs = Callable[[Sequence[Sample]], Mapping[str, Any]]


@dataclass(frozen=True)
class Subject:
    """What is searched.

    Attributes:
        target: the model or pipeline. tokenizer: of a language model. inputs: makes a model's inputs from samples with
            images; needed by the searches over vision-language models.
    """

    target: Any
    tokenizer: Any = None
    inputs: Inputs | None = None


@dataclass(frozen=True)
class Task:
    """One search: what to search, for which method, on which samples."""

    recipe: Recipe
    subject: Subject
    samples: list[Sample]
    progress: bool = True
    method: Intervention | None = None
    state: Path | None = None

    def options(self) -> dict[str, Any]:
        """A copy of the recipe's options."""
        return dict(self.recipe.calibration.options)


def _choices(subject: Subject, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Samples with prompt, choices and answer, as token ids."""
    out = []
    for sample in samples:
        missing = [k for k in ("prompt", "choices", "answer") if k not in sample]
        if missing:
            raise RecipeError(
                f"calibration: sample {sample.get('id')!r} has no {listing(missing)}; heads are calibrated on samples with "
                "choices."
            )
        prompt, candidates = continuations(subject.tokenizer, sample["prompt"], sample["choices"])
        out.append({"prompt": prompt, "candidates": candidates, "answer": sample["answer"]})
    return out


def _calibrate_heads(task: Task) -> HeadSet:
    from ..search import calibrate_act, calibrate_heads

    model, split = task.subject.target, _choices(task.subject, task.samples)
    options = {
        **task.options(),
        "state": task.state,
        "progress": task.progress,
    }
    if task.recipe.calibration.search == "calibrate_act":
        return calibrate_act(model, split, task.method, **options)
    return calibrate_heads(model, task.method, split, **options)


def _headhunter(task: Task) -> HeadSet:
    from ..search import halving, headhunter

    recipe, options = task.recipe, task.options()
    call = {k: v for k, v in recipe.decoding.items() if k != "num_inference_steps"} | {"output_type": "pt"}
    name = options.pop("score", "valid")
    if name not in SCORES:
        raise RecipeError(f"calibration.options.score: {name!r}; there are {', '.join(SCORES)}.")
    rungs = options.pop("rungs", 0)
    prompts = [(s["prompt"], i) for i, s in enumerate(task.samples)]
    options.setdefault("steps", recipe.decoding.get("num_inference_steps", 20))
    if recipe.calibration.top is not None:
        options["top"] = recipe.calibration.top
    screen = halving(len(prompts), options["steps"], rungs) if rungs else ()
    return headhunter(
        task.subject.target,
        prompts,
        SCORES[name],
        task.method,
        screen=screen,
        options=call,
        state=task.state,
        progress=task.progress,
        **options,
    )


def _screen_heads(task: Task) -> HeadSet:
    from ..search import screen_heads

    split = _choices(task.subject, task.samples)
    return screen_heads(task.subject.target, task.method, split, progress=task.progress, **task.options())


def _michel(task: Task) -> HeadSet:
    from ..search import michel

    options = task.options()
    least = options.pop("least", False)
    found = michel(task.subject.target, _choices(task.subject, task.samples), progress=task.progress, **options)
    if not least:
        return found
    # The best of these are the least important.
    scores = {p: -s for p, s in found.scores.items()}
    return HeadSet(list(found), scores=scores, shape=found.shape, provenance={**found.provenance, "least": True})


def _vhd(task: Task) -> HeadSet:
    from ..search import vhd
    from ..where import Where

    options = task.options()
    size, layers = options.pop("batch", 8), options.pop("layers", None)
    where = None if layers is None else Where(layers=layers, kinds="self")
    return vhd(task.subject.target, _batches(task, size), where=where, **options)


def _hallucination_heads(task: Task) -> HeadSet:
    """Of questions that the model answers with yes, where that is right and where it is not."""
    import torch

    from ..search import Said, hallucination_heads

    options = task.options()
    size, model, parts = options.pop("batch", 32), task.subject.target, []
    start = 0
    for inputs in _batches(task, size):
        labels = [str(s.get("label", "")).lower() for s in task.samples[start : start + size]]
        start += size
        with torch.no_grad():
            tokens = model(**inputs).logits[:, -1].argmax(dim=-1).tolist()
        words = [task.subject.tokenizer.decode([t]).strip().lower() for t in tokens]
        said = [i for i, w in enumerate(words) if w == "yes" and labels[i] in ("yes", "no")]
        if said:
            own = {k: v[said] if isinstance(v, torch.Tensor) and len(v) == len(words) else v for k, v in inputs.items()}
            parts.append(Said(own, [tokens[i] for i in said], [labels[i] == "no" for i in said]))
    if not parts:
        raise RecipeError(
            "calibration (hallucination_heads): the model answers no sample with yes; give questions with a label yes or no."
        )
    return hallucination_heads(model, parts, progress=task.progress, **options)


def _find_sink_dims(task: Task) -> tuple[int, ...]:
    from ..search import find_sink_dims

    options = task.options()
    size = options.pop("batch", 8)
    found = find_sink_dims(task.subject.target, _batches(task, size), **options)
    if not found.dims:
        raise RecipeError(f"calibration (find_sink_dims): {found.reason}.")
    return tuple(found.dims)


def _batches(task: Task, size: int) -> Iterator[Mapping[str, Any]]:
    subject = task.subject
    for start in range(0, len(task.samples), size):
        part = task.samples[start : start + size]
        if subject.inputs is not None:
            yield subject.inputs(part)
        else:
            texts = [s["prompt"] for s in part]
            batch = subject.tokenizer(texts, padding=len(texts) > 1, return_tensors="pt")
            device = next(subject.target.parameters()).device
            batch = {k: v.to(device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
            yield {**batch, **positions(subject.target, batch["attention_mask"])}


def valid(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """1 for a picture of the shapes world that has objects and nothing else, else 0."""
    return [float(d.valid) for d in _detected(images)]


def there(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """The share of a prompt's phrases whose object is in the picture."""
    from ..zoo.shapes.language import parse

    scores = []
    for found, prompt in zip(_detected(images), prompts, strict=True):
        seen = {(o.colour, o.shape) for o in found.objects}
        wanted = {(p.colour, p.shape) for p in parse(prompt)}
        scores.append(len(wanted & seen) / max(len(wanted), 1))
    return scores


def right(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """1 for a valid picture with all of the prompt's objects, plus their share: a finer score than either."""
    shares = there(images, prompts)
    return [(v * (s == 1.0) + s) / 2 for v, s in zip(valid(images, prompts), shares, strict=True)]


def _detected(images: Sequence[Any]) -> list[Any]:
    import torch

    from ..zoo.shapes.detect import detect

    return detect(torch.stack(list(images)).float().cpu())


# Scores of images that need nothing but the exact detector; heads keep the function's name as provenance.
SCORES = {"valid": valid, "there": there, "right": right}
RUNNERS: dict[str, Callable[[Task], Any]] = {
    "calibrate_act": _calibrate_heads,
    "calibrate_heads": _calibrate_heads,
    "headhunter": _headhunter,
    "screen_heads": _screen_heads,
    "michel": _michel,
    "hallucination_heads": _hallucination_heads,
    "vhd": _vhd,
    "find_sink_dims": _find_sink_dims,
}
