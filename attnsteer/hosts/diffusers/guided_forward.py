"""The layer around a denoiser's forward: it reads the arguments into the clock, and runs the `around` methods."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...audit import mark_of, unchanged
from ...bound import Bound
from ...branches import BranchInputs, Prediction
from ...edits import Check
from ...errors import ContractError, UnsupportedHost, listing
from ...site import Site
from .bypass import Bypass, blocks_of
from .caches import Bank, unseen
from .clock import DenoiserClock
from .contrast import ContrastPasses
from .latent_loop import Loop
from .prefix import PrefixReuse, modules_down_to
from .steps import TIMES

if TYPE_CHECKING:
    from ...undo import Journal

# ControlNets and adapters do not predict: what they give is added inside another model.
PREDICTS = re.compile(r"^(UNet|(?!.*(ControlNet|Adapter)))")
# From the arguments of one pass to what the denoiser predicts.
Predict = Callable[[BranchInputs], Prediction]


def _codes(model: nn.Module) -> bool:
    """Whether a model is an autoencoder. It is called by `encode` and `decode`, where nothing would be guided."""
    return callable(getattr(model, "decode", None)) and not {*TIMES} & {
        *inspect.signature(type(model).forward).parameters
    }


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
    if declared.around and not PREDICTS.search(type(model).__name__):
        raise UnsupportedHost(
            f"{declared.around[0].name} guides predictions, and what {type(model).__name__} gives are residuals for another model. "
            "Steer the denoiser."
        )
    if declared.around and _codes(model):
        raise UnsupportedHost(
            f"{declared.around[0].name} guides the predictions of a denoiser, and {type(model).__name__} encodes and decodes: it "
            f"is given no timestep ({', '.join(TIMES)}). Steer the denoiser, or the pipeline."
        )
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
        # How arguments are cut, as far as it had to be found out.
        self._cuts: dict[str, str] = {}
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
        with self.sampling.alone(type(self.model).__name__):
            try:
                return self._forward(inner, *args, **kwargs)
            except UnsupportedHost as error:
                if self.clock.unlooked:
                    error.add_note(f"attnsteer: whose rows are whose was not found out: {self.clock.unlooked}.")
                raise

    def _forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        clock, sampling = self.clock, self.sampling
        if self.run.branch is not None:
            with clock.on_rows(clock.layout, clock.batch):
                return inner(*args, **kwargs)
        values = dict(zip(self._names, args, strict=False)) | kwargs
        if clock.unknown:
            clock.look(functools.partial(self._plainly, inner), values)
        if sampling.bystander:
            return inner(*args, **kwargs)
        if sampling.apart is not None and sampling.apart():
            # Of no branch: no guidance, nor an edit of one branch.
            with clock.on_rows(("apart",), 1):
                return inner(*args, **kwargs)
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
        inputs.cuts.update(self._cuts)
        prediction = call(inputs)
        if prediction.shift is not None and len(clock.layout) > 1 and sampling.rescales:
            return sampling.rescale.hold(prediction, inputs).wrapped
        if prediction.shift is not None and sampling.stepping and self.run.scope.layout is None:
            prediction = sampling.formula.see(prediction, inputs, sampling.turn)
        return prediction.wrapped

    def _plainly(self, inner: Callable[..., Any], values: dict[str, Any]) -> Any:
        """A dry run of the model itself."""
        with self.bank.branch("look"):
            return inner(**{name: self.bank.own(value) for name, value in values.items()})

    def predict(self, inner: Callable[..., Any], inputs: BranchInputs) -> Prediction:
        """One pass of the model itself; containers are copied, because some models empty the lists that they get."""
        if self.declared.latent_moves:
            inputs = self.sampling.latents.applied(inputs)
        if self.contrast is not None:
            return self.contrast.predict(functools.partial(self._predict, inner), inputs)
        return self._predict(inner, inputs)

    def _predict(self, inner: Callable[..., Any], inputs: BranchInputs) -> Prediction:
        self.clock.forget_calls()
        with self.clock.on_rows(inputs.layout, inputs.batch):
            given = inner(**{name: _copied(self.bank.own(value)) for name, value in inputs.values.items()})
        self.check_reached(inputs)
        return Prediction(given, inputs.batch)

    def guided(self, bound: Bound, strong: Predict, weak: Predict, inputs: BranchInputs) -> Prediction:
        """One `around` method's prediction.

        Args:
            strong: its passes with inside edits off: with the methods after it. weak: its passes with inside edits on: of
                the bare model, so that several weak branches add up; they reuse the unedited prefix of a strong one.

        Raises:
            ContractError: it calls `forward` with something else than inputs, returns something else than a prediction of the
                model's form for all rows, or changes inputs or a strong prediction in place.
        """
        plain: list[Prediction] = []
        asked: list[BranchInputs] = []
        marks: list[Any] = []
        weaks: list[BranchInputs] = []
        bank = self.bank
        # A block that is replayed would not reach the hooks that remember the weak passes.
        prefix = PrefixReuse(self.run, None if bank.caching else self._ways.get(bound.index), inputs)
        first, bypass = bound.index not in self._checked, self._bypasses.get(bound.index)
        shown: list[tuple[str, Tensor, Any]] = []

        def show() -> None:
            """Mark what the method sees; a pass of the model is free to change it."""
            shown[:] = [(k, v, mark_of(v, first)) for k, v in inputs.values.items() if isinstance(v, Tensor)]

        def check_shown() -> None:
            altered = [name for name, value, marked in shown if not unchanged(value, marked)]
            if altered:
                raise self.refuse(
                    bound, f"changed inputs.values of {listing(altered)} in place, which the pipeline still reads."
                )

        def weak_pass(given: BranchInputs) -> Prediction:
            if bank.whole and given.layout != inputs.layout:
                return weak(inputs).rows(inputs.part(given.layout[0]))
            return prefix.replay(weak, given)

        def forward(given: Any = None) -> Prediction:
            if not isinstance(given, BranchInputs):
                raise self.refuse(bound, f"called forward with {_kind(given)}; give it `inputs`, or inputs.only(name).")
            check_shown()
            try:
                return one_pass(given)
            finally:
                show()

        def one_pass(given: BranchInputs) -> Prediction:
            if self.run.is_open(bound):
                weaks.append(given)
                skipping = contextlib.nullcontext() if bypass is None else bypass.on()
                with bank.branch((bound.index, len(weaks)), self.sampling.step), skipping:
                    return weak_pass(given)
            if given is inputs and not plain:
                plain.append(prefix.record(strong, given))
                self.settle(given, plain[-1], weak)
            else:
                # Not the pipeline's own call: what a cache remembers of it is its own.
                with bank.branch(("strong", bound.index, len(plain))):
                    plain.append(strong(given))
            asked.append(given)
            marks.append(mark_of(plain[-1].sample, first))
            return plain[-1]

        self.run.audit.count(bound.index, "guided calls")
        show()
        try:
            result = bound.method.around(forward, inputs, self.run)
        except Exception as error:
            error.add_note(f"attnsteer: raised in {bound.name}.around of {type(self.model).__name__}.")
            raise
        if any(not unchanged(p.sample, marked) for p, marked in zip(plain, marks, strict=True)):
            raise self.refuse(bound, "changed a strong prediction in place; give with_sample a new tensor.")
        check_shown()
        if not isinstance(result, Prediction):
            raise self.refuse(bound, f"returned {_kind(result)}; return a prediction, e.g. p.with_sample(tensor).")
        of_rows = next((given.batch for p, given in zip(plain, asked, strict=True) if result is p), None)
        if of_rows is not None and of_rows != inputs.batch:
            raise self.refuse(
                bound,
                f"returned the prediction of a pass over {of_rows} of {inputs.batch} rows; give one for all of them.",
            )
        if of_rows is None:
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

    def settle(self, inputs: BranchInputs, whole: Prediction, plain: Predict) -> None:
        """Find out how the arguments that no table has are cut: some rows alone must give what they gave among the others.

        Args:
            whole: the prediction of all rows. plain: a pass of the bare model.

        Raises:
            UnsupportedHost: no way of cutting them does.
        """
        doubts = inputs.doubts() if len(inputs.layout) > 1 else {}
        if not doubts:
            return
        name = inputs.layout[-1]
        expected = whole.raw[inputs.part(name)]
        # Other batches take other kernels; what is cut wrongly is off by far more.
        bound = (1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2) * (
            1.0 + float(expected.abs().max())
        )
        likely = {key: ways[0] for key, ways in doubts.items()}
        others = [(key, way) for key, ways in doubts.items() for way in ways[1:]]
        tries = [{}, *({key: way} for key, way in others)]
        tries += [dict(pair) for pair in itertools.combinations(others, 2) if pair[0][0] != pair[1][0]]
        for changed in tries[:40]:
            how = {**likely, **changed}
            found = self._alone(inputs.cut(name, how), plain)
            if found is not None and found.shape == expected.shape and float((found - expected).abs().max()) <= bound:
                self._cuts.update(how)
                inputs.cuts.update(how)
                return
        raise UnsupportedHost(
            f"{type(self.model).__name__}: the rows of one branch alone do not give what they give beside the others, however its "
            f"arguments {listing(doubts)} are cut, so a weak pass on the conditional rows cannot be made."
        )

    def _alone(self, inputs: BranchInputs, plain: Predict) -> Tensor | None:
        """What a bare pass gives for some rows; None where the model cannot take them."""
        with torch.no_grad(), self.bank.branch("rows alone"), unseen(self.model):
            try:
                return plain(inputs).raw
            except (RuntimeError, ValueError, IndexError, UnsupportedHost):
                # Arguments that do not fit each other: not the way.
                return None

    @property
    def bank(self) -> Bank:
        """What feature caches remember of the passes of this run that are not the pipeline's own."""
        # There are thousands of modules: their hooks are looked at once a run, and when a cache is switched on or off.
        enabled = bool(getattr(self.model, "is_cache_enabled", False))
        found = self.sampling.memory.get(("bank", self.clock.name))
        if found is None or found[0] != enabled:
            found = self.sampling.memory["bank", self.clock.name] = (enabled, Bank(self.model))
        return found[1]

    def check_cache(self, around: Sequence[Bound]) -> None:
        """Refuse methods that take gradients where a feature cache would answer for the model."""
        moving = [b for b in around if b in self.declared.latent]
        if around and self.bank.caching and moving:
            raise UnsupportedHost(
                f"{type(self.model).__name__} has a feature cache, and {moving[0].name} takes gradients through passes that it "
                "would answer. Call disable_cache(), or take the cache's hooks off, first."
            )

    def check_reached(self, inputs: BranchInputs) -> None:
        """Raise where a site that is edited, or that ran in the run's first pass of this kind, did not run in this pass.

        Something answered for it. Of the caches of diffusers this is known, and counted; of anything else it is not, so that
        strong and weak pass would share what it remembers.
        """
        reached = self.clock.reached()
        opened = self.run.opened[-1] if self.run.opened else None
        key = ("reached", self.clock.name, inputs.layout)
        before: set[str] = (
            self.sampling.memory.setdefault(key, set()) if opened is None else self.sampling.memory.get(key, set())
        )
        wanted = before if opened is None else before & self.clock.paths_of(opened)
        missed = wanted - reached
        if opened is None:
            before |= reached
        if not missed or opened in self._bypasses:
            # Blocks that a method leaves out run in none of its passes.
            return
        if not self.bank.caching:
            raise UnsupportedHost(
                f"{min(missed)} ran in the first pass of this run and not in this one: something keeps outputs of "
                f"{type(self.model).__name__} from call to call, and guidance would be answered from it. Take it off first."
            )
        if opened is not None:
            self.run.audit.count(opened, "answered from a cache")

    def check_rows(self) -> None:
        """Refuse a call whose rows are not known."""
        clock, sampling = self.clock, self.sampling
        name = type(sampling.pipeline if sampling.pipeline is not None else self.model).__name__
        if clock.layout is None:
            raise UnsupportedHost(
                f"which of the {clock.batch} rows of this call are conditional is not known for {name} (its latents have "
                f"{sampling.latent_rows} rows): steer a pipeline with known rows rather than its model, and use no other "
                'guidance that adds denoiser calls or rows; or enter run.branches("uncond", "cond") around the calls.'
            )


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return list(value) if type(value) is list else value
