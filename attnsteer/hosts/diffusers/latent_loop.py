"""`Loop`: what a method that moves the latent sees of the sampling loop, and how it takes gradients through the denoiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...bound import Bound
from ...branches import BranchInputs
from ...errors import UnsupportedHost
from ...maps.phrases import Prompt
from ...maps.words_to_image import Capture, MapSite

if TYPE_CHECKING:
    from .clock import DenoiserClock


class Loop:
    """What an `around` method that needs "latent" sees of the sampling loop, in one call of a denoiser."""

    def __init__(self, clock: DenoiserClock):
        self._clock, self._latents = clock, clock.sampling.latents

    @property
    def index(self) -> int:
        """This call of `scheduler.step`, from 0."""
        return self._latents.index

    @property
    def length(self) -> int:
        """How many calls there will be."""
        return self._latents.length

    @property
    def blind(self) -> bool:
        """See `Latents.blind`."""
        return self._latents.blind

    @property
    def prompt(self) -> Prompt:
        """What the pipeline was asked for."""
        return self._clock.sampling.prompts.current

    def acted(self, method: Any) -> bool:
        """Whether `method` has had its turn in this call of the loop: a second pass (true CFG) finds the latent moved."""
        return id(method) in self._latents.acted

    def latent(self, inputs: BranchInputs, name: str) -> Tensor:
        """The latent of this call, [b, ...]."""
        if torch.is_inference_mode_enabled():
            raise UnsupportedHost(
                f"{name} needs gradients, which torch.inference_mode() forbids. Call the pipeline outside it (it uses no_grad "
                "by itself)."
            )
        return self._latents.current(inputs, name)

    def put(self, inputs: BranchInputs, z: Tensor, scaled: bool = True) -> BranchInputs:
        """The same call of the model on another latent."""
        return self._latents.put(inputs, z, scaled)

    def move(self, method: Any, z: Tensor) -> None:
        """From here on, this call of the loop is about z: further passes, and the scheduler's step."""
        self._clock.run.audit.moved(self._bound(method).index, self._latents.differs(z))
        self._latents.acted.add(id(method))
        self._latents.moved = z

    def count(self, method: Any, what: str, by: int = 1) -> None:
        """Count in the audit."""
        self._clock.run.audit.count(self._bound(method).index, what, by)

    def _bound(self, method: Any) -> Bound:
        return next(b for b in self._clock.run.bounds if b.method is method)

    def sites(self, method: Any) -> list[MapSite]:
        """The sites of this denoiser that `where` selects, in the order of execution, with their grids."""
        clock, found = self._clock, []
        for runtime in clock.runtimes.values():
            for bound, heads in runtime.entries:
                if bound.method is method:
                    found.append(MapSite(runtime.site, heads, clock.grid_at(runtime.site)))
        return found

    @contextlib.contextmanager
    def differentiating(self, method: Any, inputs: BranchInputs, capture: Capture) -> Iterator[None]:
        """In this block passes keep their graph, and the maps of `capture` are taken; all is put back at its end.

        The backward pass belongs inside too: with checkpointing it computes parts of the model again.
        """
        clock = self._clock
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_frozen(clock.model))
            if method.checkpointing:
                stack.enter_context(_checkpointed(clock.model))
            stack.enter_context(clock.run.inside(method))
            stack.enter_context(clock.on_rows(inputs.layout, inputs.batch))
            before = clock.capture, clock.cut
            clock.capture, clock.cut = capture, method.early_stop and not _hooked(clock.model)
            try:
                yield
            finally:
                clock.capture, clock.cut = before


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters: they cost memory and time, and nobody asks for them."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


@contextlib.contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing is on in this block."""
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise UnsupportedHost(f"{type(model).__name__} has no gradient checkpointing; leave checkpointing=True out.")
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    modules = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    before = [(m, {n: vars(m)[n] for n in names if n in vars(m)}) for m in modules]
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module, old in before:
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(old)


def _hooked(model: nn.Module) -> bool:
    """Whether hooks move weights about: they count on a forward that ends."""
    return any("_hf_hook" in vars(m) or getattr(vars(m).get("_diffusers_hook"), "hooks", None) for m in model.modules())
