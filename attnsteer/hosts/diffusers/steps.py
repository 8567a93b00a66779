"""The sampling loop of a pipeline: which step it is at, whose rows a denoiser call holds, what the scheduler steps from."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedHost
from .formula import Formula
from .guiders import BRANCHES
from .latents import Latents
from .pipelines import UNCOND_COND, convention_of, one_branch
from .prompt_words import Prompts
from .rescale import Rescale
from .rows import ENCODES, Conditions, fingerprint, layout_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ...undo import Journal

# What the denoisers call their timestep.
TIMES = ("timestep", "timesteps", "t", "timestep_ratio", "decoder_noise_time")


class Sampling:
    """What the sampling loop of a pipeline is doing now; shared by all of its denoisers.

    Attributes:
        step: 0-based index among the distinct timesteps of this run. steps: how many there will be, where known.
        timestep: the scheduler's for this step, where a pipeline is steered, else what the model was given.
        turn: calls of a denoiser since the last step of the scheduler. latent_rows: rows of the pipeline's latents.
        asked: the layouts of these calls.
        context: name of the running cache context. memory: a dictionary that lives through one run.
        convention: how the pipeline calls its denoiser for guidance.
        latents: what the scheduler is about to step from. prompts: what the pipeline was asked for.
    """

    def __init__(self, pipeline: DiffusionPipeline | None):
        self.pipeline = pipeline
        self.convention = convention_of(pipeline)
        self.step: int | None = None
        self.steps: int | None = None
        self.timestep: float | None = None
        self.turn = 0
        self.asked: list[tuple[str, ...]] = []
        # (step, steps, timestep) as a guider says them, and whether the running call belongs to a method of its own.
        self.told: tuple[int, int, float] | None = None
        self.bystander = False
        # Whether the running call is made apart from the batches of the pipeline's guider; None: there is no guider.
        self.apart: Callable[[], bool] | None = None
        # Raises where parts of the pipeline were exchanged; asked at each denoiser call.
        self.guard: Callable[[], None] | None = None
        self.conditions = Conditions(pipeline)
        self.latent_rows: int | None = None
        self.context: str | None = None
        self.memory: dict[Any, Any] = {}
        self.rescale = Rescale(pipeline)
        self.formula = Formula(pipeline)
        self.latents = Latents(pipeline)
        self.prompts = Prompts(pipeline)
        # The scheduler whose steps are watched; None: none is.
        self.scheduler: Any = None
        self._times: list[float] = []
        self._plan: list[float] = []
        self._watched = False
        # Steps that the scheduler made in this run, where that is seen; whether no denoiser call has come since it began.
        self._made: int | None = None
        self._fresh = True
        self._running = threading.RLock()

    @contextlib.contextmanager
    def alone(self, denoiser: str) -> Iterator[None]:
        """One call of a denoiser: where a loop is, and what acts in a pass, is said for one thread at a time.

        Raises:
            UnsupportedHost: another thread is in such a call.
        """
        if not self._running.acquire(blocking=False):
            raise UnsupportedHost(
                f"two threads call a steered {denoiser} at once, and its sampling loop is at one step only. Give "
                "each thread a pipeline and a steering of its own, or let them take turns."
            )
        try:
            yield
        finally:
            self._running.release()

    def begin(self, timestep: Any) -> None:
        """Read the timestep of one denoiser call."""
        if self.guard is not None:
            self.guard()
        step = vars(self.scheduler).get("step") if self.scheduler is not None else None
        if getattr(step, "__self__", self.scheduler) is not self.scheduler:
            # What we put around the step went into a copy with the rest, and would make steps of that copy.
            raise UnsupportedHost(
                f"{type(self.pipeline).__name__} exchanges what its scheduler holds for copies, so its steps cannot be followed: "
                "no guidance, steps or branches here. Steer its denoiser, without them."
            )
        if self.told is not None:
            self._begin_told(*self.told)
            return
        if timestep is None:
            self._begin_counted()
            return
        # Frames or tokens that are given have timestep zero: the largest is that of the step.
        t = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        if self._times and t == self._times[-1]:
            return
        # A new run starts when the times turn round, or where the last run started.
        turned = len(self._times) > 1 and (t - self._times[-1]) * (self._times[-1] - self._times[-2]) < 0
        over = self.steps is not None and len(self._times) >= self.steps
        if not self._times or turned or over or t == self._times[0]:
            self._times = []
            self.memory.clear()
            self.formula.restart()
            self._plan = self._planned(t)
            self.steps = len(self._plan) if self._plan else None
        self._times.append(t)
        self.step, self.turn = len(self._times) - 1, 0
        self.asked.clear()
        # Some models are given t / 1000, 1000 - t or the like: the scheduler's own number counts.
        self.timestep = self._plan[self.step] if self.step < len(self._plan) else t

    def _begin_told(self, step: int, steps: int, timestep: float) -> None:
        """As `begin`, where a guider says what step it is."""
        if (step == 0 and self.step != 0) or self.steps != steps:
            self.memory.clear()
            self.formula.restart()
        if step != self.step:
            self.turn = 0
            self.asked.clear()
        self.step, self.steps, self.timestep = step, steps, timestep

    def _begin_counted(self) -> None:
        """As `begin`, where the model is given no timestep and the scheduler's steps are counted."""
        if self._made is None:
            raise UnsupportedHost(
                f"a denoiser call without a timestep argument ({', '.join(TIMES)}) has no known step. Steer the pipeline rather "
                "than its model: its scheduler's steps are counted."
            )
        if self._fresh:
            self.memory.clear()
            self.formula.restart()
            self._plan = self._planned(math.nan)
            self.steps = len(self._plan) or None
        if self._fresh or self._made != self.step:
            self.turn = 0
            self.asked.clear()
        self._fresh, self.step = False, self._made
        self.timestep = self._plan[self.step] if self.step < len(self._plan) else None

    def _planned(self, start: float) -> list[float]:
        """Distinct timesteps of the run that begins with the denoiser call at `start`.

        A pipeline may run only some of the scheduler's: image-to-image the last ones, one of two experts the first ones.
        """
        planned = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        if not isinstance(planned, Tensor) or planned.ndim != 1 or not planned.numel():
            return []
        running = getattr(self.pipeline, "_num_timesteps", None)
        if isinstance(running, int) and 0 < running < planned.numel():
            times, first = planned.tolist(), planned.numel() - running
            # A model that is given other numbers than the scheduler's does not tell: then it is the last ones, too.
            if times[first] != start and start in times:
                first = times.index(start)
            planned = planned[first : first + running]
        return torch.unique_consecutive(planned).tolist()

    def layout(self, rows: int, values: dict[str, Any], latent: str) -> tuple[str, ...] | None:
        """Names of the equal parts of the `rows` of the running denoiser call; None where they are not known.

        The pipeline's own word counts first (a cache context that it names), then what its values say, then, where they say
        nothing (equal prompts, class labels), the table of pipelines that were read.

        Args:
            values: the arguments of the call. latent: the name of the one that holds the latent.
        """
        found = (self.context,) if self.context in UNCOND_COND else None
        if found is not None and self.told is not None:
            self.asked.append(found)
            return found
        if found is None and self.pipeline is not None:
            found = self._measured(rows, values, latent)
        if found is None:
            found = self._listed(rows, values)
        if found is None or (self.latent_rows is not None and rows != len(found) * self.latent_rows):
            return None
        if found.count("cond") > 1 or self._other_guidance(found):
            return None
        if self.conditions.unguided and "cond" in [name for parts in self.asked for name in parts]:
            # A second call in one step, though nothing was seen that is negative: not what it seemed.
            return None
        self.asked.append(found)
        return found

    def _other_guidance(self, found: tuple[str, ...]) -> bool:
        """Whether the conditional rows of this step have come before, so that this call belongs to another guidance."""
        if found != ("cond",):
            return False
        before = [name for parts in self.asked for name in parts]
        return "cond" in before and "uncond" in before

    def _measured(self, rows: int, values: dict[str, Any], latent: str) -> tuple[str, ...] | None:
        key, kept = fingerprint(values, latent)
        known = self.memory.setdefault("rows", {})
        if key not in known:
            labels = self.conditions.labels(values, rows, latent)
            # The tensors are kept, so that no other one can take the place of theirs.
            layout = None if labels is None else layout_of(labels, self.latent_rows)
            if layout is not None and len(layout) > 1 and set(layout) == {"cond"}:
                # A latent has one conditional row: what tells the sides apart here is none of the values that were compared.
                layout = None
            known[key] = (layout, kept, self.conditions.unguided)
        found, _, self.conditions.unguided = known[key]
        return found

    def _listed(self, rows: int, values: dict[str, Any]) -> tuple[str, ...] | None:
        calls = self.convention.calls
        if calls == "turns":
            return (UNCOND_COND[1 - self.turn],) if self.turn < 2 else None
        if calls == "batch" and self.latent_rows is not None:
            guided = getattr(self.pipeline, "do_classifier_free_guidance", None)
            guided = rows != self.latent_rows if guided is None else guided
            return self.convention.parts if guided else ("cond",)
        if calls != "contexts" and self.latent_rows == rows and not self.asked and self._unguided():
            return ("cond",)
        return ("cond",) if calls is None and one_branch(self.pipeline, values) else None

    def _unguided(self) -> bool:
        """Whether the running pipeline says itself that it does not guide."""
        return getattr(self.pipeline, "do_classifier_free_guidance", None) is False

    @property
    def stepping(self) -> bool:
        """Whether the steps of the pipeline's scheduler are seen."""
        return self.told is not None or callable(getattr(self.scheduler, "step", None))

    @property
    def rescales(self) -> bool:
        """Whether the pipeline rescales the combined prediction in the running call, or a term is held for it already."""
        if self.rescale.held is not None:
            return True
        if self.rescale.in_attribute:
            return bool(getattr(self.pipeline, "guidance_rescale", 0.0))
        return self.pipeline is not None and bool(self.rescale.argument())

    def watch(self, model: nn.Module, journal: Journal, latent: bool, prompts: bool = False) -> None:
        """Learn rows, cache contexts, runs and scheduler steps from the pipeline's own calls; with `prompts`, what it was asked
        for, with `latent`, its latent too."""
        if hasattr(model, "cache_context"):
            journal.wrap(model, "cache_context", self._enter_context)
        if self._watched:
            return
        self._watched = True
        pipe = self.pipeline
        self.scheduler = scheduler = getattr(pipe, "scheduler", None)
        journal.add(self.rescale.release)
        seams: list[tuple[Any, str, Callable[..., Any]]] = [
            (pipe, "prepare_latents", self._prepare_latents),
            (scheduler, "set_timesteps", self._set_timesteps),
            (scheduler, "step", self._step),
        ]
        encoders = [name for name in dir(type(pipe)) if ENCODES.fullmatch(name)] if pipe is not None else []
        seams += [(pipe, name, self.conditions.encoding) for name in encoders]
        if latent or prompts:
            seams += [
                (pipe, "check_inputs", self.prompts.check_inputs),
                (pipe, "encode_prompt", self.prompts.encode_prompt),
            ]
        if latent:
            seams += [
                (scheduler, "set_timesteps", self.latents.set_timesteps),
                (scheduler, "scale_model_input", self.latents.scale_model_input),
                # Around the step above: what is substituted is what the other one passes on.
                (scheduler, "step", self.latents.substitute(scheduler)),
            ]
        for owner, name, around in seams:
            if callable(getattr(owner, name, None)):
                journal.wrap(owner, name, around)

    def _prepare_latents(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        latents = result[0] if isinstance(result, (tuple, list)) else result
        self.latent_rows = latents.shape[0] if isinstance(latents, Tensor) else None
        return result

    def _set_timesteps(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # A new run, also where the last one was broken off.
        self._times, self._made, self._fresh = [], 0, True
        return inner(*args, **kwargs)

    def _step(self, inner: Callable[..., Any], model_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.turn = 0
        self.asked.clear()
        output = self.formula.step(model_output) if self.rescale.held is None else self.rescale.apply(model_output)
        result = inner(output, *args, **kwargs)
        if self._made is not None:
            self._made += 1
        return result

    @contextlib.contextmanager
    def _enter_context(self, inner: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        # Pipelines with a guider name the context by what it calls the batch.
        before, self.context = self.context, BRANCHES.get(name, name)
        try:
            with inner(name, *args, **kwargs) as value:
                yield value
        finally:
            self.context = before


def watch_parts(pipe: DiffusionPipeline, steered: dict[str, nn.Module], sampling: Sampling, journal: Journal) -> None:
    """Refuse to run a pipeline whose denoiser or scheduler was exchanged since it was steered: the edit would vanish.

    Args:
        steered: component name -> denoiser with steered sites.
    """

    def check(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for name, model in steered.items():
            now = getattr(pipe, name, None)
            _same_part(pipe, name, getattr(now, "_orig_mod", now) is model)
        if sampling.scheduler is not None:
            _same_part(pipe, "scheduler", getattr(pipe, "scheduler", None) is sampling.scheduler)
        return inner(*args, **kwargs)

    # Every loop begins with a progress bar; most pipelines prepare latents before.
    for name in ("prepare_latents", "progress_bar"):
        if callable(getattr(pipe, name, None)):
            journal.wrap(pipe, name, check)


def _same_part(pipe: DiffusionPipeline, name: str, same: bool) -> None:
    if not same:
        raise UnsupportedHost(
            f"{type(pipe).__name__}.{name} was exchanged while the pipeline is steered, so the edit would vanish. Detach first "
            "(leave the `with` block or call remove()), exchange it, then steer again."
        )
