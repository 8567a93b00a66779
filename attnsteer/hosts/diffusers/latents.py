"""The latent of a sampling loop: read before a denoiser call, moved, and given to the scheduler's step instead of the old.

The loop's own variable is out of reach, because most pipelines give the denoiser a copy. What it decides is where it goes:
into the denoiser, and into `scheduler.step`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...branches import BranchInputs
from ...errors import UnsupportedHost
from .rows import latent_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Arguments that another model computed from the latent before it could be moved.
STALE = (
    "down_block_additional_residuals", "mid_block_additional_residual", "block_controlnet_hidden_states",
    "controlnet_block_samples", "controlnet_single_block_samples",
)  # fmt: skip


class Latents:
    """What the scheduler is about to step from, in the sampling run of one pipeline.

    Attributes:
        index: calls of `scheduler.step` so far in this run. moved: the latent that takes the loop's place in this call.
    """

    def __init__(self, pipeline: DiffusionPipeline | None):
        self.pipeline = pipeline
        self.index = 0
        self.moved: Tensor | None = None
        self.acted: set[int] = set()
        self._raw: Tensor | None = None
        self._sample: Tensor | None = None
        self._scale: Callable[[Tensor], Tensor] | None = None

    def set_timesteps(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around `scheduler.set_timesteps`: a new sampling run."""
        self.index = 0
        self._next()
        return inner(*args, **kwargs)

    def _next(self) -> None:
        self.moved, self._raw, self._sample, self._scale = None, None, None, None
        self.acted.clear()

    @property
    def length(self) -> int:
        """Calls of `scheduler.step` in this run."""
        planned = getattr(self.pipeline.scheduler, "timesteps", ())
        running = getattr(self.pipeline, "_num_timesteps", None)
        return running if isinstance(running, int) and 0 < running <= len(planned) else max(1, len(planned))

    @property
    def blind(self) -> bool:
        """Whether the scheduler steps from a latent that it kept, so that this call's own has no effect on the sample."""
        scheduler = self.pipeline.scheduler
        if hasattr(scheduler, "pndm_order"):
            if scheduler.config.skip_prk_steps:
                return scheduler.counter == 1
            return scheduler.counter < len(scheduler.prk_timesteps) and scheduler.counter % 4 != 0
        return getattr(scheduler, "state_in_first_order", True) is False

    def scale_model_input(self, inner: Callable[..., Tensor], sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Around `scheduler.scale_model_input`: remembers what is scaled, and how."""
        self._sample = sample
        self._scale = lambda z: inner(z, *args, **kwargs)
        return inner(sample, *args, **kwargs)

    def substitute(self, scheduler: Any) -> Callable[..., Any]:
        """What goes around `scheduler.step`: the moved latent takes the place of the loop's."""
        names = list(inspect.signature(scheduler.step).parameters)
        place = names.index("sample") if "sample" in names else None

        def step(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.moved is not None:
                args, kwargs = self._substituted(args, kwargs, place)
            result = inner(*args, **kwargs)
            self.index += 1
            self._next()
            return result

        return step

    def _substituted(self, args: tuple[Any, ...], kwargs: dict[str, Any], place: int | None) -> tuple[Any, Any]:
        given = kwargs.get("sample") if place is None or place >= len(args) else args[place]
        if not isinstance(given, Tensor) or given.shape != self.moved.shape or not self._is_raw(given):
            raise UnsupportedHost(
                f"{type(self.pipeline).__name__} steps from another tensor than the one that its denoiser was given, so a moved "
                "latent cannot take its place exactly."
            )
        z = self.stepped(given)
        if place is not None and place < len(args):
            return (*args[:place], z, *args[place + 1 :]), kwargs
        return args, {**kwargs, "sample": z}

    def stepped(self, given: Tensor) -> Tensor:
        """The latent to step from, in the place of `given`."""
        if given.dtype == self.moved.dtype:
            return self.moved
        # The loop keeps more digits than the model was given: what was not moved stays as it was.
        return given + (self.moved - self._raw).to(given.dtype)

    def _is_raw(self, given: Tensor) -> bool:
        return torch.equal(given.to(self._raw.dtype), self._raw)

    def current(self, inputs: BranchInputs, name: str) -> Tensor:
        """The latent of this call, [b, ...]: as it was moved, or as the loop has it."""
        if self.moved is not None:
            return self.moved
        stale = [key for key in STALE if inputs.values.get(key) is not None]
        if stale:
            raise UnsupportedHost(
                f"{name} cannot act beside a ControlNet: {stale[0]} was computed from the latent before it moves."
            )
        source = self._sample if self._sample is not None else inputs.values[_input(inputs)]
        rows = inputs.part("cond") if source.shape[0] == inputs.batch else slice(None)
        self._raw = source[rows].detach()
        again = self.put(inputs, self._raw).values[_input(inputs)]
        if not torch.equal(again, inputs.values[_input(inputs)]):
            raise UnsupportedHost(
                f"{name}: the denoiser of {type(self.pipeline).__name__} was not given the scheduler's scaling of one latent per "
                "sample, so the latent cannot be moved exactly."
            )
        return self._raw

    def differs(self, z: Tensor) -> Tensor:
        """0-d bool: whether z is another latent than the one that this call is about."""
        before = self.moved if self.moved is not None else self._raw
        return torch.ones((), dtype=torch.bool) if before is None else (z != before).any()

    def put(self, inputs: BranchInputs, z: Tensor, scaled: bool = True) -> BranchInputs:
        """The same call of the model on the latent z [b, ...], scaled for each part of its rows."""
        name = _input(inputs)
        old = inputs.values[name]
        if old.shape[1:] != z.shape[1:]:
            raise UnsupportedHost(
                f"the denoiser of {type(self.pipeline).__name__} is given {tuple(old.shape[1:])} per row, its latent is "
                f"{tuple(z.shape[1:])}: it appends channels or tokens, so the latent cannot be moved exactly."
            )
        rows = z if len(inputs.layout) == 1 else torch.cat([z] * len(inputs.layout))
        if scaled and self._scale is not None:
            rows = self._scale(rows)
        return replace(inputs, values={**inputs.values, name: rows.to(old.dtype)}, latent=z)

    def applied(self, inputs: BranchInputs) -> BranchInputs:
        """`inputs` on the moved latent, unless they name one of their own."""
        return inputs if self.moved is None or inputs.latent is not None else self.put(inputs, self.moved)


def _input(inputs: BranchInputs) -> str:
    return latent_name(inputs.values)


def unet_scale(model: nn.Module, name: str) -> int | None:
    """How many times smaller than the latent, per side, the image of a UNet's attention is; None for other models."""
    if not hasattr(model, "down_blocks") or not hasattr(model, "up_blocks"):
        return None
    place, _, rest = name.partition(".")
    halves = [getattr(b, "downsamplers", None) is not None for b in model.down_blocks]
    if place == "down_blocks":
        return 2 ** sum(halves[: int(rest.split(".")[0])])
    doubles = [getattr(b, "upsamplers", None) is not None for b in model.up_blocks]
    return 2 ** (sum(halves) - (sum(doubles[: int(rest.split(".")[0])]) if place == "up_blocks" else 0))
