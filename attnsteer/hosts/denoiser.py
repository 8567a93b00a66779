"""The clock of a denoiser: steps, guidance rows, token grid; and the middleware around its forward."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import CallContext, SiteRuntime
from ..errors import UnsupportedHost
from ..guidance.branches import BranchInputs, Prediction
from ..guidance.prefix import PrefixCache, way_to
from ..guidance.rescale import Rescale
from ..site import Site
from .pipelines import NORMALISED, layout
from .streams import segments


class Sampling:
    """What the sampling loop of a pipeline is doing now; shared by all of its denoisers.

    Attributes:
        step: 0-based index among the distinct timesteps of this run. steps: how many there will be, where known.
        turn: calls of a denoiser since the last step of the scheduler. latent_rows: rows of the pipeline's latents.
        context: name of the running cache context. memory: a dictionary that lives through one run.
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
        self._times: list[float] = []
        self._watched = False

    def tick(self, timestep: Any) -> None:
        """Read the timestep of one denoiser call."""
        if timestep is None:
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
            self.steps = self._length()
        self._times.append(t)
        self.step, self.timestep, self.turn = len(self._times) - 1, t, 0

    def _length(self) -> int | None:
        """Distinct timesteps of the run that starts now; image-to-image runs the last ones only."""
        planned = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        if not isinstance(planned, Tensor) or planned.ndim != 1 or not planned.numel():
            return None
        running = getattr(self.pipeline, "_num_timesteps", None)
        if isinstance(running, int) and 0 < running < planned.numel():
            planned = planned[-running:]
        return int(torch.unique_consecutive(planned).numel())

    def watch(self, models: list[nn.Module], journal: Any) -> None:
        """Learn rows, cache contexts and scheduler steps from the pipeline's own calls."""
        pipe = self.pipeline
        for model in models:
            if hasattr(model, "cache_context"):
                journal.set_attr(model, "cache_context", self._named(model.cache_context))
        if self._watched:
            return
        self._watched = True
        journal.add(self.rescale.release)
        if hasattr(pipe, "prepare_latents"):
            journal.set_attr(pipe, "prepare_latents", self._prepared(pipe.prepare_latents))
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is not None and hasattr(scheduler, "step"):
            journal.set_attr(scheduler, "step", self._stepped(scheduler.step))

    def _prepared(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            result = prepare(*args, **kwargs)
            self.latent_rows = (result[0] if isinstance(result, (tuple, list)) else result).shape[0]
            return result

        return prepare_latents

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


class DenoiserClock:
    """What one denoiser is doing now; shared by all of its sites.

    Attributes:
        layout: names of the equal parts of the batch, e.g. ("uncond", "cond"); None when not known.
        batch: rows in all. image_tokens: rows of an image in its sequences, where the input tells.
        size: (height, width) of the latent, in units whose ratio is that of the token grid.
    """

    def __init__(self, run: Any, name: str, model: nn.Module, sampling: Sampling):
        self.run, self.name, self.model, self.sampling = run, name, model, sampling
        self.layout: tuple[str, ...] | None = None
        self.batch = 0
        self.image_tokens: int | None = None
        self.size: tuple[int, int] | None = None

    def begin(self, values: dict[str, Any]) -> None:
        """Read the arguments of one forward of the denoiser."""
        sample = next((values[n] for n in ("sample", "hidden_states", "x") if values.get(n) is not None), None)
        self.batch = len(sample)
        patch = getattr(getattr(self.model, "config", None), "patch_size", 1)
        self.image_tokens = _image_tokens(sample, patch)
        self.size = _grid_size(sample, values)
        sampling = self.sampling
        sampling.tick(next((values[n] for n in ("timestep", "timesteps", "t") if values.get(n) is not None), None))
        self.layout = self.run.row_layout
        if self.layout is None and sampling.pipeline is not None:
            self.layout = layout(sampling.pipeline, sampling.context, self.batch, sampling.latent_rows, sampling.turn)
        sampling.turn += 1

    def active(self, runtime: SiteRuntime) -> tuple[int, ...]:
        """Which interventions act at a site now."""
        return runtime.active(None, self.sampling.step, self.sampling.steps)

    def context(self, site: Site, rows: int, batch: int, image: int | None) -> CallContext:
        """The context of one attention call with `rows` query rows of `batch` sequences; `image` as in `segments`."""
        roles = segments(site, rows, image, self.image_tokens)
        ctx = CallContext(step=self.sampling.step, steps=self.sampling.steps, segments=roles)
        if self.layout is not None and batch % max(self.batch, 1) == 0:
            ctx.branch_rows = self._branch_rows(batch, site.module)
        found = roles.get("image")
        if found is not None and self.size is not None:
            ctx.grid = _grid_of(found.stop - found.start, self.size)
        return ctx

    def _branch_rows(self, batch: int, module: nn.Module) -> dict[str, Tensor]:
        """Branch name -> bool [batch]; frames or positions folded into the batch follow their sample."""
        device = next(module.parameters()).device
        part = torch.arange(batch, device=device) // (batch // len(self.layout))
        return {
            name: torch.stack([part == i for i, n in enumerate(self.layout) if n == name]).any(dim=0)
            for name in set(self.layout)
        }


def _image_tokens(sample: Any, patch: Any) -> int | None:
    """Image rows per sample: of packed latents [B, N, C], or of [B, C, H, W] cut into patches."""
    if not isinstance(sample, Tensor) or sample.ndim not in (3, 4):
        return None
    if sample.ndim == 3:
        return int(sample.shape[1])
    return (sample.shape[2] // patch) * (sample.shape[3] // patch) if isinstance(patch, int) else None


def _grid_size(sample: Any, values: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the latent, in units whose ratio is that of the token grid."""
    ids = values.get("img_ids")
    if isinstance(ids, Tensor) and ids.shape[-1] in (3, 4):
        ids = ids.reshape(-1, ids.shape[-1]) if ids.ndim == 2 else ids[0]
        return int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
    shapes = values.get("img_shapes")
    if shapes and len(shapes[0]) == 1 and shapes[0][0][0] == 1:
        return int(shapes[0][0][1]), int(shapes[0][0][2])
    if not isinstance(sample, Tensor) or sample.ndim != 4:
        return None
    return int(sample.shape[-2]), int(sample.shape[-1])


def _grid_of(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """The token grid at a site: the latent's size over the down-sampling factor that gives `tokens`."""
    for factor in range(1, max(size) + 1):
        h, w = -(-size[0] // factor), -(-size[1] // factor)
        if h * w == tokens:
            return h, w
        if h * w < tokens:
            return None
    return None


def wrap_denoiser(clock: DenoiserClock, owner: nn.Module, journal: Any) -> None:
    """Put the clock and the `around` methods in front of a denoiser's forward, where anything needs them.

    Args:
        owner: the denoiser, or the module that `torch.compile` made of it.
    """
    run, model = clock.run, clock.model
    around = [b for b in run.bounds if "around" in b.doors and _edited(clock, b)]
    told = any(b.where.branches is not None for b in run.bounds)
    timed = told or any(b.where.steps is not None or b.where.rows is not None for b in run.bounds)
    if not (around or timed or any({"segments", "grid"} & set(b.method.needs) for b in run.bounds)):
        return
    _refuse_cache(model, around)
    if around or told:
        clock.sampling.watch([model], journal)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    place, original = _place(owner)
    compiled = owner is not model or any(m._compiled_call_impl is not None for m in model.modules())
    # Compiled code keeps the hooks that it was compiled with: nothing is replayed there.
    ways = {b.index: None if compiled else way_to(model, _edited(clock, b)) for b in around}
    live = [True]

    @torch.compiler.disable
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not live[0] or run._open:
            return original(*args, **kwargs)
        values = dict(zip(names, args, strict=False)) | kwargs
        clock.begin(values)
        sampling = clock.sampling
        working = [b for b in around if b.where.active(None, sampling.step, sampling.steps)]
        if not working:
            return original(*args, **kwargs)
        _refuse_cache(model, working)
        _check_rows(clock)
        bare = call = functools.partial(_predict, clock, original)
        for bound in reversed(working):
            call = _layer(clock, bound, call, bare, ways[bound.index])
        inputs = BranchInputs(values, clock.layout, clock.batch, sampling.timestep, sampling.memory)
        prediction = call(inputs)
        if prediction.shift is not None and len(clock.layout) > 1 and sampling.rescale.wanted:
            return sampling.rescale.hold(prediction, inputs).wrapped
        return prediction.wrapped

    vars(owner)[place] = forward

    def undo() -> None:
        live[0] = False
        # accelerate may have moved ours below its own, or back, meanwhile.
        for name in ("forward", "_old_forward", "_compiled_call_impl"):
            if vars(owner).get(name) is forward:
                if name == place == "forward" and owner is model:
                    del vars(owner)[name]
                else:
                    vars(owner)[name] = original

    journal.add(undo)


def _place(owner: nn.Module) -> tuple[str, Callable[..., Any]]:
    """The attribute through which the denoiser is called, below accelerate's hooks and above `torch.compile`."""
    if vars(owner).get("_compiled_call_impl") is not None:
        return "_compiled_call_impl", owner._compiled_call_impl
    place = "_old_forward" if "_old_forward" in vars(owner) else "forward"
    return place, vars(owner).get(place) or owner.forward


def _predict(clock: DenoiserClock, original: Callable[..., Any], inputs: BranchInputs) -> Prediction:
    """One pass of the model itself; containers are copied, because some models empty the lists that they get."""
    before = clock.layout, clock.batch
    clock.layout, clock.batch = inputs.layout, inputs.batch
    try:
        return Prediction(original(**{name: _copied(value) for name, value in inputs.values.items()}))
    finally:
        clock.layout, clock.batch = before


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
        with PrefixCache(run, clock.model, way, inputs) as prefix:

            def forward(given: BranchInputs) -> Prediction:
                if bound.index in run._open:
                    return prefix.replay(bare, given)
                return prefix.record(inner, given)

            run.audit.count(bound.index, "guided calls")
            return bound.method.around(forward, inputs, run)

    return outer


def _edited(clock: DenoiserClock, bound: Any) -> list[str]:
    """Names of the sites of this denoiser that an intervention edits."""
    return [
        r.site.name
        for r in clock.run.runtimes.values()
        if r.site.component == clock.name and any(b.index == bound.index for b, _ in r.entries)
    ]


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
    if NORMALISED.match(name) and not memory.get("warned"):
        memory["warned"] = True
        warnings.warn(
            f"{name} may normalise the combined prediction; the guidance term is added before that.", stacklevel=4
        )
