"""Pictures of a pipeline: whole ones, which can be given up between two steps, and previews, which take one step.

A preview begins at the latent that the unsteered run of the same prompt and seed has in its middle. From there one step is
taken, by the pipeline's own code, steered or not; what that step takes the finished latent to be is decoded in the place of a
finished one. So it shows what a method does in this step, not what it does in the steps before and behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NeverFired, UnsupportedHost
from ..intervention import Intervention
from ..steering import steer
from ..undo import Journal

# The share of a run's steps that lie before the previewed one. Earlier ones decide where things are, but what one of them takes
# the picture to be is a blur, with a guidance term in it that is too large for one step.
BEFORE = 0.7
# How far the previewed step's prediction may be from the run's own, over its size.
TOLERANCE = 1e-3
# Bytes of one step's blocks that are kept for the previews of it.
KEPT = 64 * 2**20


class Stale(Exception):
    """Nobody waits for this picture any more."""


@dataclass(frozen=True)
class Moment:
    """The step of an unsteered run from which previews are taken.

    Attributes:
        step: its number, from 0. steps: of the run. latent: what the scheduler stepped from. prediction: what it was given.
        texts: what `encode_prompt` gave, call by call. blocks: what the denoiser's blocks were given and gave in this step, as far
            as the unsteered preview kept it.
    """

    step: int
    steps: int
    latent: Tensor
    prediction: Tensor
    texts: tuple[Any, ...]
    blocks: dict[int, tuple[Any, Any]] = field(default_factory=dict, repr=False, compare=False)


def whole(
    pipe: Any, text: str, seed: int, steps: int, *methods: Intervention, wanted: Callable[[], bool] = lambda: True
) -> tuple[Any, bool, Moment | None]:
    """(picture, whether the methods changed anything, the moment for previews) of a whole run.

    Args:
        wanted: asked before each step of the scheduler and each block of the denoiser.

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

    def block(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not wanted():
            raise Stale
        return inner(*args, **kwargs)

    blocks = [(b, "forward", block) for b in _blocks(pipe)]
    encodes = [(pipe, "encode_prompt", encode)] if callable(getattr(pipe, "encode_prompt", None)) else []
    with _layers((pipe.scheduler, "step", step), *encodes, *blocks):
        image, changed = _called(pipe, text, seed, steps, methods)
    return image, changed, kept[0] if kept else None


def previewed(pipe: Any, text: str, seed: int, steps: int, moment: Moment, *methods: Intervention) -> tuple[Any, bool]:
    """(picture, whether the methods changed anything) of one step. Blocks that hold nothing steered, and are given what they were
    given without a method, are not run again: those of the strong pass of guidance, before the first edited one.

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
    blocks = [(b, "forward", partial(_block, moment.blocks, i, b, not methods)) for i, b in enumerate(_blocks(pipe))]
    with _layers(*layers, *([(pipe, "encode_prompt", encode)] if moment.texts else []), *blocks):
        return _called(pipe, text, seed, steps, methods)


def _blocks(pipe: Any) -> list[nn.Module]:
    """The blocks of its denoiser."""
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if not isinstance(denoiser, nn.Module):
        return []
    found: list[nn.Module] = []
    for name, child in denoiser.named_children():
        found += child if isinstance(child, nn.ModuleList) else [child] if name == "mid_block" else []
    return found


def _block(
    known: dict[int, tuple[Any, Any]],
    index: int,
    block: nn.Module,
    keep: bool,
    inner: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around a block: what it gave to the same inputs, unless something in it is steered."""
    given = (args, kwargs)
    if keep:
        output = inner(*args, **kwargs)
        size = sum(_bytes(pair) for pair in known.values())
        if index not in known and size + _bytes((given, output)) <= KEPT:
            known[index] = _copied((given, output))
        return output
    if index in known and not _steered(block):
        before, output = known[index]
        if _equal(given, before):
            return _copied(output)
    return inner(*args, **kwargs)


def _steered(block: nn.Module) -> bool:
    from ..hosts.diffusers.clock import STEERED

    every = (m for module in block.modules() for m in (module, vars(module).get("processor")))
    return any(hasattr(type(m), STEERED) for m in every)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return {k: _copied(v) for k, v in value.items()} if type(value) is dict else value


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return (
        sum(map(_bytes, value.values() if isinstance(value, dict) else value))
        if isinstance(value, (list, tuple, dict))
        else 0
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(v, other[k]) for k, v in one.items())
    return one is other or (isinstance(one, (bool, int, float, str)) and one == other)


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
