"""What the sampling loop of a pipeline is doing: steps, turns, cache contexts, rows of the latents."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedHost
from .latents import Latents
from .prompt_words import Prompts
from .rescale import Rescale

# What the denoisers call their timestep.
TIMES = ("timestep", "timesteps", "t", "timestep_ratio")


class Sampling:
    """What the sampling loop of a pipeline is doing now; shared by all of its denoisers.

    Attributes:
        step: 0-based index among the distinct timesteps of this run. steps: how many there will be, where known.
        timestep: the scheduler's for this step, where a pipeline is steered, else what the model was given.
        turn: calls of a denoiser since the last step of the scheduler. latent_rows: rows of the pipeline's latents.
        context: name of the running cache context. memory: a dictionary that lives through one run.
        latents: what the scheduler is about to step from. prompts: what the pipeline was asked for.
    """

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.step: int | None = None
        self.steps: int | None = None
        self.timestep: float | None = None
        self.turn = 0
        self.latent_rows: int | None = None
        self.context: str | None = None
        self.memory: dict[Any, Any] = {}
        self.rescale = Rescale(pipeline)
        self.latents = Latents(pipeline)
        self.prompts = Prompts(pipeline)
        self._times: list[float] = []
        self._plan: list[float] = []
        self._watched = False

    def tick(self, timestep: Any) -> None:
        """Read the timestep of one denoiser call."""
        if timestep is None:
            raise UnsupportedHost(
                f"a denoiser call without a timestep argument ({', '.join(TIMES)}) has no known step."
            )
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
            self._plan = self._planned()
            self.steps = len(self._plan) if self._plan else None
        self._times.append(t)
        self.step, self.turn = len(self._times) - 1, 0
        # Some models are given t / 1000, 1000 - t or the like: the scheduler's own number counts.
        self.timestep = self._plan[self.step] if self.step < len(self._plan) else t

    def _planned(self) -> list[float]:
        """Distinct timesteps of the run that starts now; image-to-image runs the last ones only."""
        planned = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        if not isinstance(planned, Tensor) or planned.ndim != 1 or not planned.numel():
            return []
        running = getattr(self.pipeline, "_num_timesteps", None)
        if isinstance(running, int) and 0 < running < planned.numel():
            planned = planned[-running:]
        return torch.unique_consecutive(planned).tolist()

    def watch(self, model: nn.Module, journal: Any, latent: bool = False, prompts: bool = False) -> None:
        """Learn rows, cache contexts, runs and scheduler steps from the pipeline's own calls; with `latent`, its latent too,
        with `prompts` or `latent`, its prompts."""
        pipe = self.pipeline
        if hasattr(model, "cache_context"):
            journal.set_attr(model, "cache_context", self._named(model.cache_context))
        if self._watched:
            return
        self._watched = True
        journal.add(self.rescale.release)
        scheduler = getattr(pipe, "scheduler", None)
        seams = (
            (pipe, "prepare_latents", self._prepared),
            (scheduler, "set_timesteps", self._planning),
            (scheduler, "step", self._stepped),
            *(self._prompt_seams(pipe) if latent or prompts else ()),
            *(self._latent_seams(scheduler) if latent else ()),
        )
        for owner, name, wrap in seams:
            if callable(getattr(owner, name, None)):
                journal.set_attr(owner, name, wrap(getattr(owner, name)))

    def _prompt_seams(self, pipe: Any) -> tuple[tuple[Any, str, Callable[..., Any]], ...]:
        return (pipe, "check_inputs", self.prompts.checking), (pipe, "encode_prompt", self.prompts.encoding)

    def _latent_seams(self, scheduler: Any) -> tuple[tuple[Any, str, Callable[..., Any]], ...]:
        return (
            (scheduler, "scale_model_input", self.latents.scaling),
            # Around the step above: what is substituted is what the other one passes on.
            (scheduler, "step", self.latents.stepping),
        )

    def _prepared(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            result = prepare(*args, **kwargs)
            latents = result[0] if isinstance(result, (tuple, list)) else result
            self.latent_rows = latents.shape[0] if isinstance(latents, Tensor) else None
            return result

        return prepare_latents

    def _planning(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            # A new run, also where the last one was broken off.
            self._times = []
            self.latents.restart()
            return original(*args, **kwargs)

        return set_timesteps

    def _stepped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(model_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.turn = 0
            return original(self.rescale.apply(model_output), *args, **kwargs)

        return step

    def _named(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        @contextlib.contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            before, self.context = self.context, name
            try:
                with original(name, *args, **kwargs) as value:
                    yield value
            finally:
                self.context = before

        return cache_context
