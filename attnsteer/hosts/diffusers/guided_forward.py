"""The layer around a denoiser's forward: it reads the arguments into the clock, and runs the `around` methods."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...audit import mark_of, unchanged
from ...bound import Bound
from ...branches import BranchInputs, Prediction
from ...edits import Check
from ...errors import ContractError, UnsupportedHost
from ...site import Site
from .bypass import Bypass, blocks_of
from .clock import DenoiserClock
from .contrast import ContrastPasses
from .latent_loop import Loop
from .prefix import PrefixReuse, modules_down_to

if TYPE_CHECKING:
    from ...undo import Journal

# From the arguments of one pass to what the denoiser predicts.
Predict = Callable[[BranchInputs], Prediction]


def guide(clock: DenoiserClock, sites: Sequence[Site], journal: Journal) -> None:
    """Put a `GuidedForward` around the denoiser of `clock`, where a method of its run needs one; `sites`: all of the denoiser."""
    declared, model = clock.declared, clock.model
    # Compiled code, whenever it comes, counts in place; what would come into being at its first call would compile the second anew.
    for path, runtime in clock.runtimes.items():
        device = next(runtime.site.module.parameters(), torch.empty(0)).device
        for bound, _ in runtime.entries:
            clock.run.audit.record(bound.index, path).place(device)
    clock.prepare()
    if not declared.watched:
        return
    if declared.latent and declared.compiled:
        raise UnsupportedHost(
            f"{declared.latent[0].name} takes gradients through {type(model).__name__} and cuts its forward short, which "
            "compiled code does not allow. Steer the model before it is compiled, or without torch.compile."
        )
    skipping = [b.name for b in declared.around if b.method.skips_blocks]
    if skipping and declared.whole:
        raise UnsupportedHost(
            f"{skipping[0]} leaves blocks of {type(model).__name__} out, which it cannot inside a model that is compiled as a "
            "whole. Compile its blocks instead (compile_repeated_blocks), or steer it uncompiled."
        )
    guided = GuidedForward(clock, sites)
    guided.check_cache(declared.around)
    prompts = declared.sampled or declared.prompt or bool(declared.contrast)
    clock.sampling.watch(model, journal, declared.latent_moves, prompts)
    clock.sampling.prompts.listeners += [b.method.prepare for b in declared.latent]
    readers = [b for b in clock.run.bounds if "prompt" in b.method.needs and b.index in declared.edits]
    clock.sampling.prompts.listeners += [b.method.prepare for b in readers]
    if readers and declared.compiled:
        raise UnsupportedHost(
            f"{readers[0].name} keeps what it found from step to step, which compiled code of {type(model).__name__} does not "
            "allow. Steer the model uncompiled."
        )
    # A whole model that is compiled is entered by this name.
    compiled = vars(clock.owner).get("_compiled_call_impl") is not None
    journal.add(clock.stop)
    journal.wrap(clock.owner, "_compiled_call_impl" if compiled else "forward", torch.compiler.disable(guided.forward))


class GuidedForward:
    """What runs in place of one denoiser's forward.

    One call of it may be several passes of the model:

        forward                  reads the arguments
          guided (first method)    the method's `around`, which asks for passes
            guided (second method)
              predict                the model, every block of it: the strong pass
            predict                  the model with the inside edits on, from the first edited block on: a weak pass
    """

    def __init__(self, clock: DenoiserClock, sites: Sequence[Site]):
        self.clock, self.run, self.model, self.declared = clock, clock.run, clock.model, clock.declared
        self.sampling = clock.sampling
        self.contrast = ContrastPasses(clock, sites, self.declared.contrast) if self.declared.contrast else None
        # Methods whose first prediction has been checked.
        self._checked: set[int] = set()
        self._names = list(inspect.signature(type(clock.model).forward).parameters)[1:]
        # What a weak pass leaves out, by method.
        left_out = {
            b.index: blocks_of(self.declared.edits[b.index]) for b in self.declared.around if b.method.skips_blocks
        }
        self._bypasses = {index: Bypass(clock.model, names) for index, names in left_out.items()}
        # Nothing is replayed inside a model that is compiled as a whole, nor is a pass for gradients shared.
        self._ways: dict[int, list[nn.Module]] = {
            b.index: modules_down_to(clock.model, left_out.get(b.index, self.declared.edits[b.index]))
            for b in self.declared.around
            if not self.declared.whole and b not in self.declared.latent
        }

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One call of the denoiser by its pipeline; `inner` is the forward that this one is around."""
        clock, sampling = self.clock, self.sampling
        if self.run.branch is not None:
            with clock.on_rows(clock.layout, clock.batch):
                return inner(*args, **kwargs)
        values = dict(zip(self._names, args, strict=False)) | kwargs
        clock.begin(values)
        clock.check_samples()
        working = [
            b for b in self.declared.around if not b.timed or b.where.active(None, sampling.step, sampling.steps)
        ]
        contrasts = self.contrast is not None and self.contrast.acts
        if not working and not contrasts:
            return inner(*args, **kwargs)
        self.check_cache([*working, *self.declared.contrast])
        self.check_rows()
        predict = call = functools.partial(self.predict, inner)
        for bound in reversed(working):
            call = functools.partial(self.guided, bound, call, predict)
        loop = Loop(clock) if self.declared.latent else None
        inputs = BranchInputs(
            values,
            clock.layout,
            clock.batch,
            sampling.timestep,
            sampling.memory,
            loop,
            prompts=sampling.prompts.count,
            step=sampling.step,
            steps=sampling.steps,
        )
        prediction = call(inputs)
        if prediction.shift is not None and len(clock.layout) > 1 and sampling.rescales:
            return sampling.rescale.hold(prediction, inputs).wrapped
        return prediction.wrapped

    def predict(self, inner: Callable[..., Any], inputs: BranchInputs) -> Prediction:
        """One pass of the model itself; containers are copied, because some models empty the lists that they get."""
        if self.declared.latent_moves:
            inputs = self.sampling.latents.applied(inputs)
        if self.contrast is not None:
            return self.contrast.predict(functools.partial(self._predict, inner), inputs)
        return self._predict(inner, inputs)

    def _predict(self, inner: Callable[..., Any], inputs: BranchInputs) -> Prediction:
        with self.clock.on_rows(inputs.layout, inputs.batch):
            return Prediction(inner(**{name: _copied(value) for name, value in inputs.values.items()}))

    def guided(self, bound: Bound, strong: Predict, weak: Predict, inputs: BranchInputs) -> Prediction:
        """One `around` method's prediction.

        Args:
            strong: its passes with inside edits off: with the methods after it. weak: its passes with inside edits on: of
                the bare model, so that several weak branches add up; they reuse the unedited prefix of a strong one.

        Raises:
            ContractError: it calls `forward` with something else than inputs, returns something else than a prediction of the
                model's form, or changes a strong one in place.
        """
        plain: list[Prediction] = []
        asked: list[BranchInputs] = []
        marks: list[Any] = []
        prefix = PrefixReuse(self.run, self._ways.get(bound.index), inputs)
        first, bypass = bound.index not in self._checked, self._bypasses.get(bound.index)

        def forward(given: Any = None) -> Prediction:
            if not isinstance(given, BranchInputs):
                raise self.refuse(bound, f"called forward with {_kind(given)}; give it `inputs`, or inputs.only(name).")
            if self.run.is_open(bound):
                with contextlib.nullcontext() if bypass is None else bypass.on():
                    return prefix.replay(weak, given)
            plain.append(prefix.record(strong, given))
            asked.append(given)
            marks.append(mark_of(plain[-1].sample, first))
            return plain[-1]

        self.run.audit.count(bound.index, "guided calls")
        try:
            result = bound.method.around(forward, inputs, self.run)
        except Exception as error:
            error.add_note(f"attnsteer: raised in {bound.name}.around of {type(self.model).__name__}.")
            raise
        if any(not unchanged(p.sample, marked) for p, marked in zip(plain, marks, strict=True)):
            raise self.refuse(bound, "changed a strong prediction in place; give with_sample a new tensor.")
        if not isinstance(result, Prediction):
            raise self.refuse(bound, f"returned {_kind(result)}; return a prediction, e.g. p.with_sample(tensor).")
        if not any(result is p for p in plain):
            if first:
                self.check(bound, result, plain, inputs.batch, asked)
                self._checked.add(bound.index)
            # Of a prediction that a pass gave itself there is nothing to say: the latent may have been moved.
            same = plain and plain[-1].sample.shape == result.sample.shape
            moved = (result.sample != plain[-1].sample).any() if same else torch.ones((), dtype=torch.bool)
            self.run.audit.moved(bound.index, moved)
        return result

    def refuse(self, bound: Bound, what: str) -> ContractError:
        """The error that says what is wrong with a method's `around`."""
        return Check(bound.name, "around", type(self.model).__name__, torch.empty(0)).refuse(what)

    def check(
        self, bound: Bound, result: Prediction, plain: Sequence[Prediction], batch: int, asked: Sequence[BranchInputs]
    ) -> None:
        """Refuse a prediction that has not the form of the model's own; it reads values, so it runs once for each method.

        Args:
            plain: the strong predictions that the method was given, each for the rows that are `asked`. batch: rows in all.
        """
        if not plain:
            raise self.refuse(bound, "returned a prediction and asked for no strong one; call forward(inputs) first.")
        sample, model = getattr(result, "sample", None), plain[-1].sample
        if not isinstance(sample, Tensor):
            raise self.refuse(
                bound, f"returned a prediction of {_kind(sample)}; expected a tensor {list(model.shape)}."
            )
        # A pass for one part of the rows tells the form of all of them.
        rows = torch.arange(len(model) * batch // asked[-1].batch, device=model.device) % len(model)
        with torch.no_grad():
            Check(bound.name, "around", type(self.model).__name__, model[rows]).output(sample)

    def check_cache(self, around: Sequence[Bound]) -> None:
        """Refuse `around` methods where a feature cache would answer for the model."""
        memory = self.sampling.memory
        # There are thousands of modules: their hooks are looked at once a run.
        hooked = "hooks seen" not in memory and _caching_hooks(self.model)
        memory["hooks seen"] = True
        if around and (hooked or getattr(self.model, "is_cache_enabled", False)):
            raise UnsupportedHost(
                f"{type(self.model).__name__} has a feature cache: the weak pass would be answered from it and guidance would "
                "silently vanish. Call disable_cache(), or take the cache's hooks off, first."
            )

    def check_rows(self) -> None:
        """Refuse a call whose rows are not known; warn where the combination is not a plain one."""
        clock, sampling = self.clock, self.sampling
        name = type(sampling.pipeline if sampling.pipeline is not None else self.model).__name__
        if clock.layout is None:
            raise UnsupportedHost(
                f"which of the {clock.batch} rows of this call are conditional is not known for {name} (its latents have "
                f"{sampling.latent_rows} rows): steer a pipeline with known rows rather than its model, and use no other "
                'guidance that adds denoiser calls or rows; or enter run.branches("uncond", "cond") around the calls.'
            )
        if sampling.convention.normalised and not sampling.memory.get("warned"):
            sampling.memory["warned"] = True
            warnings.warn(
                f"{name} may normalise the combined prediction; the guidance term is added before that.", stacklevel=5
            )


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return list(value) if type(value) is list else value


def _caching_hooks(model: nn.Module) -> bool:
    """Whether hooks of diffusers keep outputs from call to call; `apply_...` functions put them on without a flag."""
    registries = (vars(m).get("_diffusers_hook") for m in model.modules())
    return any(getattr(hook, "_is_stateful", False) for r in registries if r is not None for hook in r.hooks.values())
