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
from ..guidance.maps import Capture, Enough
from ..guidance.prefix import PrefixCache, way_to
from ..site import Site
from .latents import INPUTS, Loop, unet_scale
from .pipelines import NORMALISED, caller, layout
from .sampling import TIMES, Sampling
from .streams import order_of, segments


class DenoiserClock:
    """What one denoiser is doing now; shared by all of its sites.

    Attributes:
        layout: names of the equal parts of the batch, e.g. ("uncond", "cond"); None when not known.
        batch: rows in all. image_tokens: rows of an image in its sequences, where the input tells.
        size: (height, width) of the latent, in units whose ratio is that of the token grid.
        capture: where the maps of the running pass go. cut: whether that pass ends as soon as all are there.
    """

    def __init__(self, run: Any, name: str, model: nn.Module, sampling: Sampling):
        self.run, self.name, self.model, self.sampling = run, name, model, sampling
        self.runtimes = {path: r for path, r in run.runtimes.items() if r.site.component == name}
        self._orders = {path: order_of(r.site) for path, r in self.runtimes.items()}
        # Compiled code is compiled anew for each value that it reads here, so it reads no more than is needed.
        self._acting: dict[str, tuple[int, ...]] = {}
        self._stepwise = any("steps" in b.method.needs for b in run.bounds)
        self._branched = any(b.where.branches is not None for b in run.bounds)
        self.layout: tuple[str, ...] | None = None
        self.batch = 0
        self.image_tokens: int | None = None
        self.size: tuple[int, int] | None = None
        self.capture: Capture | None = None
        self.cut = False

    def begin(self, values: dict[str, Any]) -> None:
        """Read the arguments of one forward of the denoiser."""
        sample = next(values[n] for n in INPUTS if values.get(n) is not None)
        self.batch = len(sample)
        patch = getattr(getattr(self.model, "config", None), "patch_size", 1)
        self.image_tokens = _image_tokens(sample, patch)
        self.size = _grid_size(sample, values)
        sampling = self.sampling
        sampling.tick(next((values[n] for n in TIMES if values.get(n) is not None), None))
        self.layout = self.run.row_layout
        if self.layout is None and sampling.pipeline is not None:
            self.layout = layout(sampling.pipeline, sampling.context, self.batch, sampling.latent_rows, sampling.turn)
        sampling.turn += 1

    def refresh(self) -> None:
        """Find out which interventions act in the pass that starts now."""
        step, steps = self.sampling.step, self.sampling.steps
        self._acting = {path: runtime.active(None, step, steps) for path, runtime in self.runtimes.items()}
        self.prepare()

    def prepare(self) -> None:
        """Fill the tables that a first call would fill: compiled code would be compiled anew after that."""
        for runtime in self.runtimes.values():
            runtime._partition(self.active(runtime))

    @contextlib.contextmanager
    def of(self, layout: tuple[str, ...] | None, batch: int) -> Iterator[None]:
        """One pass of the model on rows with this layout."""
        before = self.layout, self.batch, self._acting
        self.layout, self.batch = layout, batch
        self.refresh()
        try:
            yield
        finally:
            self.layout, self.batch, self._acting = before

    def active(self, runtime: SiteRuntime) -> tuple[int, ...]:
        """Which interventions act at a site now."""
        found = self._acting.get(runtime.site.path)
        return runtime.active(None, None, None) if found is None else found

    def finished(self) -> None:
        """A site's attention is done: end the pass if it was run for its maps, and all are there."""
        if self.cut and self.capture is not None and self.capture.complete:
            raise Enough

    def grid_at(self, site: Site) -> tuple[int, int] | None:
        """(height, width) of the image rows of a site in this call, where it can be told before it runs."""
        if self.size is None:
            return None
        scale = unet_scale(self.model, site.name)
        if scale is not None:
            return -(-self.size[0] // scale), -(-self.size[1] // scale)
        return None if self.image_tokens is None else _grid_of(self.image_tokens, self.size)

    def context(self, site: Site, rows: int, batch: int, image: int | None) -> CallContext:
        """The context of one attention call with `rows` query rows of `batch` sequences.

        Args:
            image: rows of the stream that the processor got apart from its text; None when it got one sequence.
        """
        roles = segments(self._orders[site.path], rows, self.image_tokens if image is None else image)
        ctx = CallContext(segments=roles, context={} if self.capture is None else {"capture": self.capture})
        if self._stepwise or not torch.compiler.is_compiling():
            ctx.step, ctx.steps = self.sampling.step, self.sampling.steps
        if self._branched and self.layout is not None and batch % max(self.batch, 1) == 0:
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
    timed = any(getattr(b.where, f) is not None for b in run.bounds for f in ("steps", "branches", "rows"))
    needed = any({"segments", "grid", "steps"} & set(b.method.needs) for b in run.bounds)
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
    clock.sampling.watch(model, journal, any("latent" in b.method.needs for b in run.bounds))
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

            def forward(given: BranchInputs) -> Prediction:
                if bound.index in run._open:
                    return prefix.replay(bare, given)
                return prefix.record(inner, given)

            run.audit.count(bound.index, "guided calls")
            return bound.method.around(forward, inputs, run)

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
