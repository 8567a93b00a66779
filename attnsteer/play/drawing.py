"""Pictures of a pipeline: whole ones, which can be given up between two steps, and previews, which take one step.

A preview begins at the latent that the unsteered run of the same prompt and seed has in its middle. From there one step is
taken, by the pipeline's own code, steered or not; what that step takes the finished latent to be is decoded in the place of a
finished one. So it shows what a method does in this step, not what it does in the steps before and behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NeverFired, UnsupportedHost
from ..intervention import Intervention
from ..steering import steer
from ..undo import Journal

# The share of a run's steps that lie before the previewed one. Earlier ones decide where things are, but what one of them takes
# the picture to be is a blur, with a guidance term in it that is too large for one step.
BEFORE = 0.7
# How far the previewed step's prediction may be from the run's own, over its size.
TOLERANCE = 1e-3


class Stale(Exception):
    """Nobody waits for this picture any more."""


@dataclass(frozen=True)
class Moment:
    """The step of an unsteered run from which previews are taken.

    Attributes:
        step: its number, from 0. steps: of the run. latent: what the scheduler stepped from. prediction: what it was given.
        texts: what `encode_prompt` gave, call by call.
    """

    step: int
    steps: int
    latent: Tensor
    prediction: Tensor
    texts: tuple[Any, ...]


def whole(
    pipe: Any, text: str, seed: int, steps: int, *methods: Intervention, wanted: Callable[[], bool] = lambda: True
) -> tuple[Any, bool, Moment | None]:
    """(picture, whether the methods changed anything, the moment for previews) of a whole run.

    Args:
        wanted: asked before each step of the scheduler.

    Raises:
        Stale: the picture is not wanted any more.
    """
    kept: list[Moment] = []
    texts: list[Any] = []
    made = inside = 0

    def encode(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        inside += 1
        try:
            found = inner(*args, **kwargs)
        finally:
            inside -= 1
        if not inside:
            texts.append(found)
        return found

    def step(inner: Callable[..., Any], output: Tensor, t: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if not wanted():
            raise Stale
        times = len(pipe.scheduler.timesteps)
        if made == int(BEFORE * times):
            kept.append(Moment(made, times, sample.clone(), output.clone(), tuple(texts)))
        made += 1
        return inner(output, t, sample, *args, **kwargs)

    encodes = [(pipe, "encode_prompt", encode)] if callable(getattr(pipe, "encode_prompt", None)) else []
    with _layers((pipe.scheduler, "step", step), *encodes):
        image, changed = _called(pipe, text, seed, steps, methods)
    return image, changed, kept[0] if kept else None


def previewed(pipe: Any, text: str, seed: int, steps: int, moment: Moment, *methods: Intervention) -> tuple[Any, bool]:
    """(picture, whether the methods changed anything) of one step.

    Raises:
        UnsupportedHost: this pipeline's runs cannot be entered in the middle, or its scheduler does not say what a step takes the
            finished latent to be.
    """
    scheduler, at, texts = pipe.scheduler, moment.step, iter(moment.texts)

    def encode(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The same prompt, which need not be read again.
        known = next(texts, None)
        return inner(*args, **kwargs) if known is None else known

    def set_timesteps(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps[at : at + 1]
        if callable(getattr(scheduler, "set_begin_index", None)):
            scheduler.set_begin_index(at)
        return result

    def prepare_latents(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        first, rest = (found[0], found[1:]) if isinstance(found, tuple) else (found, None)
        if not isinstance(first, Tensor) or first.shape != moment.latent.shape:
            raise UnsupportedHost(f"{type(pipe).__name__}: its latents are not those of its scheduler; no previews.")
        latent = moment.latent.to(first)
        return latent if rest is None else (latent, *rest)

    def step(inner: Callable[..., Any], output: Tensor, t: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not methods:
            _same(pipe, output, sample, moment)
        return (_finished(scheduler, at, inner, output, t, sample, *args, **kwargs),)

    layers = [
        (scheduler, "set_timesteps", set_timesteps),
        (pipe, "prepare_latents", prepare_latents),
        (scheduler, "step", step),
    ]
    with _layers(*layers, *([(pipe, "encode_prompt", encode)] if moment.texts else [])):
        return _called(pipe, text, seed, steps, methods)


def _finished(scheduler: Any, at: int, inner: Callable[..., Any], output: Tensor, t: Any, sample: Tensor, *args: Any,
              **kwargs: Any) -> Tensor:  # fmt: skip
    """The finished latent as this step sees it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return (sample - scheduler.sigmas[at].to(sample.device) * output).to(sample.dtype)
    kwargs["return_dict"] = True
    found = getattr(inner(output, t, sample, *args, **kwargs), "pred_original_sample", None)
    if found is None:
        raise UnsupportedHost(
            f"{type(scheduler).__name__} does not say what a step takes the finished latent to be; no previews."
        )
    return found


def _same(pipe: Any, output: Tensor, sample: Tensor, moment: Moment) -> None:
    """Raise where an unsteered preview's step is not that of the run."""
    for ours, theirs in ((output, moment.prediction), (sample, moment.latent)):
        apart = (ours - theirs).norm() / theirs.norm().clamp_min(1e-12) if ours.shape == theirs.shape else torch.inf
        if not apart <= TOLERANCE:
            raise UnsupportedHost(
                f"{type(pipe).__name__}: a run that begins in the middle is another one; no previews."
            )


def _called(pipe: Any, text: str, seed: int, steps: int, methods: tuple[Intervention, ...]) -> tuple[Any, bool]:
    image, generator = None, torch.Generator().manual_seed(seed)
    call = lambda: pipe(text, num_inference_steps=steps, generator=generator).images[0].convert("RGB")  # noqa: E731
    if not methods:
        return call(), True
    try:
        with steer(pipe, *methods):
            image = call()
    except NeverFired:
        if image is None:
            raise
        return image, False
    return image, True


@contextmanager
def _layers(*wanted: tuple[Any, str, Callable[..., Any]]) -> Iterator[None]:
    """Layers around methods, below those of a steering that comes later."""
    journal = Journal()
    try:
        for owner, name, around in wanted:
            if not callable(getattr(owner, name, None)):
                raise UnsupportedHost(f"{type(owner).__name__} has no {name}; no previews.")
            journal.wrap(owner, name, around)
        yield
    finally:
        journal.undo()
