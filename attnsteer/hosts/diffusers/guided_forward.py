"""The clock of a denoiser: steps, guidance rows, token grid; and the middleware around its forward."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...branches import BranchInputs, Prediction
from ...errors import UnsupportedHost
from .clock import DenoiserClock
from .latent_loop import Loop
from .pipelines import NORMALISED, caller
from .prefix import PrefixCache, way_to


def wrap_denoiser(clock: DenoiserClock, owner: nn.Module, journal: Any) -> None:
    """Put the clock and the `around` methods in front of a denoiser's forward, where anything needs them.

    Args:
        owner: the denoiser, or the module that `torch.compile` made of it.
    """
    run, model = clock.run, clock.model
    around = [b for b in run.bounds if "around" in b.doors and _edited(clock, b)]
    timed = any(getattr(b.where, f) is not None for b in run.bounds for f in ("steps", "branches", "rows"))
    needed = any({"segments", "grid", "steps"} & set(b.method.needs) or b.method.sample_values for b in run.bounds)
    compiled = owner is not model or any(m._compiled_call_impl is not None for m in model.modules())
    if compiled:
        # A record that comes into being at the first call would compile the second anew.
        for path, runtime in clock.runtimes.items():
            for bound, _ in runtime.entries:
                run.audit.record(bound.index, path)
        clock.prepare()
    if not (around or timed or needed):
        return
    _refuse_cache(model, around)
    latent = [b for b in around if "latent" in b.method.needs]
    if latent and compiled:
        raise UnsupportedHost(
            f"{type(latent[0].method).__name__} takes gradients through {type(model).__name__} and cuts its forward short, which "
            "compiled code does not allow. Steer the model before it is compiled, or without torch.compile."
        )
    prompts = any(b.method.sample_values for b in run.bounds)
    clock.sampling.watch(model, journal, any("latent" in b.method.needs for b in run.bounds), prompts)
    clock.sampling.prompts.listeners += [b.method.prepare for b in latent]
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    place, original = _place(owner)
    # A model that is compiled as a whole runs no block of its own: nothing is replayed there.
    whole = owner is not model or model._compiled_call_impl is not None
    # A pass for gradients shares nothing with the one that is stepped from.
    ways = {b.index: None if whole or b in latent else way_to(model, _edited(clock, b)) for b in around}
    had, live = place in vars(owner), [True]

    @torch.compiler.disable
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not live[0]:
            return original(*args, **kwargs)
        if run._open:
            with clock.of(clock.layout, clock.batch):
                return original(*args, **kwargs)
        values = dict(zip(names, args, strict=False)) | kwargs
        clock.begin(values)
        clock.refresh()
        clock.check_samples()
        sampling = clock.sampling
        working = [b for b in around if b.where.active(None, sampling.step, sampling.steps)]
        if not working:
            return original(*args, **kwargs)
        _refuse_cache(model, working)
        _check_rows(clock)
        bare = call = functools.partial(_predict, clock, original)
        for bound in reversed(working):
            call = _layer(clock, bound, call, bare, ways[bound.index])
        inputs = BranchInputs(values, clock.layout, clock.batch, sampling.timestep, sampling.memory, Loop(clock))
        inputs = replace(inputs, prompts=sampling.prompts.count)
        prediction = call(inputs)
        if prediction.shift is not None and len(clock.layout) > 1 and sampling.rescale.factor:
            return sampling.rescale.hold(prediction, inputs).wrapped
        return prediction.wrapped

    vars(owner)[place] = forward

    def undo() -> None:
        live[0] = False
        # accelerate may have moved ours below its own, or back, meanwhile.
        clock._acting = {}
        for name in ("forward", "_old_forward", "_compiled_call_impl"):
            if vars(owner).get(name) is forward:
                if had or name != "forward":
                    vars(owner)[name] = original
                else:
                    del vars(owner)[name]

    journal.add(undo)


def _place(owner: nn.Module) -> tuple[str, Callable[..., Any]]:
    """The attribute through which the denoiser is called, below accelerate's hooks and above `torch.compile`."""
    if vars(owner).get("_compiled_call_impl") is not None:
        return "_compiled_call_impl", owner._compiled_call_impl
    place = "_old_forward" if "_old_forward" in vars(owner) else "forward"
    return place, vars(owner).get(place) or owner.forward


def _predict(clock: DenoiserClock, original: Callable[..., Any], inputs: BranchInputs) -> Prediction:
    """One pass of the model itself; containers are copied, because some models empty the lists that they get."""
    inputs = clock.sampling.latents.applied(inputs)
    with clock.of(inputs.layout, inputs.batch):
        return Prediction(original(**{name: _copied(value) for name, value in inputs.values.items()}))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return list(value) if type(value) is list else value


def _layer(
    clock: DenoiserClock,
    bound: Any,
    inner: Callable[[BranchInputs], Prediction],
    bare: Callable[[BranchInputs], Prediction],
    way: list[nn.Module] | None,
) -> Callable[[BranchInputs], Prediction]:
    """One `around` method as a middleware.

    Its passes with inside edits on are passes of the bare model, so that several weak branches add up, and they reuse
    the unedited prefix of its other pass.
    """
    run = clock.run

    def outer(inputs: BranchInputs) -> Prediction:
        with PrefixCache(run, way, inputs) as prefix:
            plain: list[Prediction] = []

            def forward(given: BranchInputs) -> Prediction:
                if bound.index in run._open:
                    return prefix.replay(bare, given)
                plain.append(prefix.record(inner, given))
                return plain[-1]

            run.audit.count(bound.index, "guided calls")
            result = bound.method.around(forward, inputs, run)
            if not any(result is p for p in plain):
                # Of a prediction that a pass gave itself there is nothing to say: the latent may have been moved.
                same = plain and plain[-1].sample.shape == result.sample.shape
                moved = (result.sample != plain[-1].sample).any() if same else torch.ones((), dtype=torch.bool)
                run.audit.moved(bound.index, moved)
            return result

    return outer


def _edited(clock: DenoiserClock, bound: Any) -> list[str]:
    """Names of the sites of this denoiser that an intervention edits."""
    return [r.site.name for r in clock.runtimes.values() if any(b.index == bound.index for b, _ in r.entries)]


def _refuse_cache(model: nn.Module, around: list[Any]) -> None:
    if around and getattr(model, "is_cache_enabled", False):
        raise UnsupportedHost(
            f"{type(model).__name__} has a feature cache enabled: the weak pass would be answered from it and guidance would "
            "silently vanish. Call disable_cache() first."
        )


def _check_rows(clock: DenoiserClock) -> None:
    """Refuse a call whose rows are not known; warn where the combination is not a plain one."""
    pipe, memory = clock.sampling.pipeline, clock.sampling.memory
    name = type(pipe if pipe is not None else clock.model).__name__
    if clock.layout is None:
        raise UnsupportedHost(
            f"which of the {clock.batch} rows of this call are conditional is not known for {name} (its latents have "
            f"{clock.sampling.latent_rows} rows): steer a pipeline with known rows rather than its model, and use no other "
            'guidance that adds denoiser calls or rows; or enter run.branches("uncond", "cond") around the calls.'
        )
    if NORMALISED.match(caller(pipe)) and not memory.get("warned"):
        memory["warned"] = True
        warnings.warn(
            f"{name} may normalise the combined prediction; the guidance term is added before that.", stacklevel=4
        )
