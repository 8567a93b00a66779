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

from ..engine import CallContext
from ..errors import UnsupportedHost
from ..guidance.branches import BranchInputs, Prediction
from ..guidance.prefix import PrefixCache, first_edited
from ..site import Site

# One call on a doubled batch, unconditional rows first (specification of each pipeline's own code).
DOUBLED = (
    "StableDiffusion", "AltDiffusion", "Kolors", "Sana", "PixArt", "HunyuanDiT", "AuraFlow", "CogVideoX", "Mochi",
    "LTX", "AnimateDiff", "Allegro", "Latte", "Amused", "TextToVideo", "LEdits",
)  # fmt: skip
# Two calls a step, in the cache contexts "cond" and then "uncond".
TWO_CALLS = ("Flux", "Wan", "SkyReels", "QwenImage", "CogView4", "HunyuanVideo", "Ovis", "LongCat", "Kandinsky", "Lucy")
COND_FIRST = ("DiTPipeline",)
# These rescale the combined prediction by norms, so a term added to every row is added before, not after, that.
NOT_AFFINE = ("QwenImage", "Lumina2")


class DenoiserClock:
    """What a denoiser is doing now; shared by all of its sites.

    Attributes:
        step: 0-based index among the distinct timesteps of this sampling run. steps: how many there will be.
        layout: names of the equal parts of the batch, e.g. ("uncond", "cond"); None when not known.
        text_length: tokens of `encoder_hidden_states` in this forward.
    """

    def __init__(self, run: Any, name: str, model: nn.Module, pipeline: Any):
        self.run, self.name, self.model, self.pipeline = run, name, model, pipeline
        self.step: int | None = None
        self.steps: int | None = None
        self.timestep: float | None = None
        self.layout: tuple[str, ...] | None = None
        self.batch = 0
        self.text_length: int | None = None
        self.latent_rows: int | None = None
        self.context_name: str | None = None
        self.size: tuple[int, int] | None = None
        self.memory: dict[Any, Any] = {}
        self._times: list[float] = []

    def begin(self, values: dict[str, Any]) -> None:
        """Read the arguments of one forward of the denoiser."""
        sample = values.get("sample", values.get("hidden_states"))
        if isinstance(sample, (list, tuple)):
            sample = sample[0]
        self.batch = sample.shape[0]
        text = values.get("encoder_hidden_states")
        self.text_length = text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else None
        self.size = _grid_size(sample, values)
        self._tick(values.get("timestep"))
        self.layout = self._find_layout()

    def _tick(self, timestep: Any) -> None:
        scheduler = getattr(self.pipeline, "scheduler", None)
        planned = getattr(scheduler, "timesteps", None)
        if isinstance(planned, Tensor) and planned.ndim == 1 and planned.numel():
            self.steps = int(torch.unique_consecutive(planned).numel())
        if timestep is None:
            return
        t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        if self._times and t == self._times[-1]:
            return
        # A new run starts when the times turn round, or where the last run started.
        turned = len(self._times) > 1 and (t - self._times[-1]) * (self._times[-1] - self._times[-2]) < 0
        over = self.steps is not None and len(self._times) >= self.steps
        if not self._times or turned or over or t == self._times[0]:
            self._times = []
            self.memory.clear()
        self._times.append(t)
        self.step, self.timestep = len(self._times) - 1, t

    def _find_layout(self) -> tuple[str, ...] | None:
        if self.run.row_layout is not None:
            return self.run.row_layout
        if self.pipeline is None:
            return None
        kind = type(self.pipeline).__name__
        if kind.startswith(TWO_CALLS):
            name = self.context_name
            return (name,) if name in ("cond", "uncond") else ("cond",) if name is None else None
        guided = getattr(self.pipeline, "do_classifier_free_guidance", None)
        if guided is None and self.latent_rows:
            guided = self.batch == 2 * self.latent_rows
        if guided is None:
            return None
        if kind.startswith(COND_FIRST):
            return ("cond", "uncond") if guided else ("cond",)
        if kind.startswith(DOUBLED) and "Pix2Pix" not in kind:
            return ("uncond", "cond") if guided else ("cond",)
        return None

    def branch_rows(self) -> dict[str, Tensor] | None:
        """Branch name -> bool [B]; in a weak pass all rows are conditional."""
        if self.layout is None:
            return None
        parts = len(self.layout)
        part = torch.arange(self.batch) // max(1, self.batch // parts)
        return {
            name: sum(
                (part == i for i, n in enumerate(self.layout) if n == name), torch.zeros(self.batch, dtype=torch.bool)
            ).bool()
            for name in set(self.layout)
        }

    def context(self, site: Site, segments: dict[str, slice]) -> CallContext:
        """The context of one attention call."""
        ctx = CallContext(step=self.step, steps=self.steps, segments=segments)
        if self.layout is not None:
            device = next(iter(site.module.parameters())).device
            ctx.branch_rows = {k: v.to(device) for k, v in self.branch_rows().items()}
        image = segments.get("image")
        if image is not None and self.size is not None:
            ctx.grid = _grid_of(image.stop - image.start, self.size)
        return ctx


def _grid_size(sample: Tensor, values: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the latent, in units whose ratio is that of the token grid."""
    ids = values.get("img_ids")
    if isinstance(ids, Tensor) and ids.shape[-1] == 3:
        ids = ids.reshape(-1, 3) if ids.ndim == 2 else ids[0]
        return int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
    return (int(sample.shape[-2]), int(sample.shape[-1])) if sample.ndim == 4 else None


def _grid_of(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """The token grid at a site: the latent's size over the down-sampling factor that gives `tokens`."""
    for factor in range(1, max(size) + 1):
        h, w = -(-size[0] // factor), -(-size[1] // factor)
        if h * w == tokens:
            return h, w
        if h * w < tokens:
            return None
    return None


def wrap_denoiser(clock: DenoiserClock, model: nn.Module, journal: Any, run: Any) -> None:
    """Put the clock and the `around` methods in front of a denoiser's forward, where anything needs them."""
    around = [b for b in run.bounds if "around" in b.doors and _touches(run, b, clock.name)]
    timed = any(
        b.where.steps is not None or b.where.branches is not None or b.where.rows is not None for b in run.bounds
    )
    needs = any({"segments", "grid"} & set(b.method.needs) for b in run.bounds)
    if not (around or timed or needs):
        return
    if around and getattr(model, "is_cache_enabled", False):
        raise UnsupportedHost(
            f"{type(model).__name__} has a feature cache enabled: the weak pass would be answered from it and guidance would "
            "silently vanish. Call disable_cache() first."
        )
    if around:
        _watch_pipeline(clock, journal)
    names = list(inspect.signature(model.forward).parameters)
    place = "_old_forward" if "_old_forward" in vars(model) else "forward"
    original = getattr(model, place)
    live = [True]
    first = {b.index: first_edited(model, _edited(run, b, clock.name)) for b in around}

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not live[0] or clock.run._open:
            return original(*args, **kwargs)
        values = dict(zip(names, args, strict=False)) | kwargs
        clock.begin(values)
        working = [b for b in around if b.where.active(None, clock.step, clock.steps)]
        if not working:
            return original(**values)
        if clock.layout is None:
            raise UnsupportedHost(
                f"which rows of the batch are conditional is not known for {type(clock.pipeline or model).__name__}: steer the "
                'pipeline rather than its model, or enter run.branches("uncond", "cond") around the calls.'
            )
        _check_post_processing(clock)
        call = functools.partial(_predict, clock, original)
        for bound in reversed(working):
            call = _layer(run, bound, call, model, first[bound.index])
        inputs = BranchInputs(values, clock.layout, clock.batch, clock.timestep, clock.memory)
        return call(inputs).wrapped

    vars(model)[place] = forward

    def undo() -> None:
        live[0] = False
        for name in ("forward", "_old_forward"):
            if vars(model).get(name) is forward:
                if name == "forward" and place == "forward":
                    del vars(model)[name]
                else:
                    vars(model)[name] = original

    journal.add(undo)


def _predict(clock: DenoiserClock, original: Callable[..., Any], inputs: BranchInputs) -> Prediction:
    # A weak pass has some of the rows only, and Where(branches=...) must see the rows that are there.
    before = clock.layout, clock.batch
    clock.layout, clock.batch = inputs.layout, inputs.batch
    try:
        return Prediction(original(**inputs.values))
    finally:
        clock.layout, clock.batch = before


def _layer(
    run: Any, bound: Any, inner: Callable[..., Prediction], model: nn.Module, first: Any
) -> Callable[..., Prediction]:
    """One `around` method as a middleware; its passes with inside edits on reuse the unedited prefix."""

    def outer(inputs: BranchInputs) -> Prediction:
        with PrefixCache(model, first, inputs) as prefix:

            def forward(given: BranchInputs) -> Prediction:
                return inner(given) if bound.index not in run._open else prefix.replay(inner, given)

            def strong(given: BranchInputs) -> Prediction:
                return forward(given) if bound.index in run._open else prefix.record(inner, given)

            run.audit.count(bound.index, "guided calls")
            return bound.method.around(strong, inputs, run)

    return outer


def _edited(run: Any, bound: Any, component: str) -> list[str]:
    return [
        r.site.name
        for r in run.runtimes.values()
        if r.site.component == component and any(b.index == bound.index for b, _ in r.entries)
    ]


def _touches(run: Any, bound: Any, component: str) -> bool:
    return bool(_edited(run, bound, component))


def _check_post_processing(clock: DenoiserClock) -> None:
    pipe = clock.pipeline
    if pipe is None:
        return
    if getattr(pipe, "guidance_rescale", 0.0) and len(clock.layout) > 1:
        raise UnsupportedHost(
            f"guidance_rescale={pipe.guidance_rescale} rescales by the conditional row's spread, which guidance on every row "
            "changes; the result would not be the published one. Set guidance_rescale=0."
        )
    if type(pipe).__name__.startswith(NOT_AFFINE) and not clock.memory.get("warned"):
        warnings.warn(
            f"{type(pipe).__name__} normalises the combined prediction; the guidance term is added before that.",
            stacklevel=3,
        )
        clock.memory["warned"] = True


def _watch_pipeline(clock: DenoiserClock, journal: Any) -> None:
    """Learn the latents' batch size and the running cache context from the pipeline's own calls."""
    pipe, model = clock.pipeline, clock.model
    if pipe is not None and hasattr(pipe, "prepare_latents"):
        prepare = pipe.prepare_latents

        @functools.wraps(prepare)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = prepare(*args, **kwargs)
            latents = result[0] if isinstance(result, tuple) else result
            clock.latent_rows = latents.shape[0]
            return result

        journal.set_attr(pipe, "prepare_latents", watched)
    if hasattr(model, "cache_context"):
        context = model.cache_context

        @functools.wraps(context)
        @contextlib.contextmanager
        def named(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            before, clock.context_name = clock.context_name, name
            try:
                with context(name, *args, **kwargs) as value:
                    yield value
            finally:
                clock.context_name = before

        journal.set_attr(model, "cache_context", named)
