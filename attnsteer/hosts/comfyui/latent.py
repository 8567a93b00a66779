"""Methods that move the latent, in ComfyUI: before a prediction, the sampler's own tensor is moved in place.

The samplers of that program hold the latent in a variable and call the model on that very tensor; those of which this was read are
listed. At the model calls of a sampler in between two steps nothing is done.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...branches import BranchInputs, Prediction
from ...errors import UnsupportedHost
from ...maps.phrases import Prompt
from ...maps.words_to_image import Capture, MapSite
from .passes import step_of

if TYPE_CHECKING:
    from ...bound import Bound
    from .install import Sampling

# They call the model once a step, on the tensor from which they step.
SAMPLERS = (
    "sample_euler",
    "sample_euler_ancestral",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_lms",
    "sample_ddpm",
)


class LatentMoves:
    """The methods of one steering that move the latent."""

    def __init__(self, sampling: Sampling, bounds: list[Bound]):
        self.sampling, self.bounds = sampling, bounds

    def check(self, sampler: Any, mask: Tensor | None) -> None:
        """Raise where the tensor that the model is called on is not the one that the sampler steps from."""
        function = getattr(sampler, "sampler_function", None)
        name = getattr(function, "__name__", type(sampler).__name__)
        who = self.bounds[0].name
        if self.sampling.run.host.layout.family == "sd3":
            raise UnsupportedHost(
                f"{who} follows a gradient through the maps, and the blocks of SD3 compute theirs anew behind it in this program. "
                "Use a UNet or Flux, or steer SD3 in diffusers."
            )
        if name not in SAMPLERS:
            raise UnsupportedHost(
                f"{who} moves the latent of {name}, which steps from another tensor than the model sees, or nobody has looked. "
                f"Use one of {', '.join(n.removeprefix('sample_') for n in SAMPLERS)}."
            )
        if mask is not None:
            raise UnsupportedHost(
                f"{who}: with a noise mask the model is called on a copy of the latent. Leave the mask out."
            )

    def act(
        self, guider: Any, x: Tensor, sigma: Tensor, options: dict[str, Any] | None = None, *_: Any, **__: Any
    ) -> None:
        """The updates of one call of the sampler, written into `x`."""
        options = {} if options is None else options
        sigmas = options.get("transformer_options", {}).get("sample_sigmas")
        step, steps = step_of(float(sigma.flatten()[0]), sigmas)
        if step is None:
            raise UnsupportedHost(f"{self.bounds[0].name}: the sampler does not tell its steps.")
        for bound in self.bounds:
            if bound.timed and not bound.where.active(None, step, steps):
                continue
            loop = Loop(self.sampling, bound, guider, sigma, options, x, step, steps)
            inputs = BranchInputs({}, ("cond",), len(x), None, self.sampling.memory, loop=loop, step=step, steps=steps)
            bound.method.around(loop.forward, inputs, self.sampling.run)


class Loop:
    """What such a method sees of the sampling loop, in one call; the form is that of `hosts/diffusers/latent_loop.py`."""

    blind = False

    def __init__(
        self,
        sampling: Sampling,
        bound: Bound,
        guider: Any,
        sigma: Tensor,
        options: dict[str, Any],
        x: Tensor,
        step: int,
        steps: int,
    ):
        self._sampling, self._bound, self._guider, self._sigma = sampling, bound, guider, sigma
        self._options, self._x, self.index, self.length = options, x, step, steps
        self._z: Tensor | None = None

    @property
    def prompt(self) -> Prompt:
        """What the positive prompt was."""
        return self._sampling.prompt or Prompt(unknown="the node was given no prompt text")

    def acted(self, method: Any) -> bool:
        """Whether the method has had its turn in this step."""
        key = ("acted", id(method))
        return self._sampling.memory.get(key) == self.index

    def latent(self, inputs: BranchInputs, name: str) -> Tensor:
        """The latent of this call, [b, ...]."""
        with torch.inference_mode(False):
            return self._x.clone()

    def put(self, inputs: BranchInputs, z: Tensor, scaled: bool = True) -> BranchInputs:
        """The same call on another latent."""
        if not scaled:
            raise UnsupportedHost("scaled=False asks the model on the bare latent, which ComfyUI's models do not take.")
        self._z = z
        return inputs

    def forward(self, inputs: BranchInputs) -> Prediction:
        """One pass on the positive conditioning, for its maps; outside of that the latent itself, which nobody reads."""
        if self._z is None or self._sampling.capture is None:
            return Prediction(self._x)
        calc = sys.modules["comfy.samplers"].calc_cond_batch
        conds = [plain(self._guider.conds["positive"])]
        (out,) = calc(self._guider.inner_model, conds, self._z, self._sigma.clone(), self._options)
        return Prediction(out)

    def move(self, method: Any, z: Tensor) -> None:
        """From here on the sampler's latent is z."""
        self._sampling.memory["acted", id(method)] = self.index
        with torch.no_grad():
            before = self._x.clone()
            self._x.copy_(z)
            self._sampling.run.audit.moved(self._bound.index, (self._x != before).any())
            self._sampling.report.guided(self._bound.index, self._x, before)

    def count(self, method: Any, what: str, by: int = 1) -> None:
        """Count in the audit."""
        self._sampling.run.audit.count(self._bound.index, what, by)

    def sites(self, method: Any) -> list[MapSite]:
        """The selected sites with their grids: those of the latent over the levels of the UNet, halved at each."""
        found, (h, w) = [], self._x.shape[-2:]
        patched = self._sampling.run.host.layout.family != "unet"
        levels = sum(type(p).__name__.startswith("Downsample") for b in self._blocks() for p in b)
        for runtime in self._sampling.run.runtimes.values():
            for bound, heads in runtime.entries:
                if bound is not self._bound:
                    continue
                halvings = 1 if patched else level_of(runtime.site.name, levels)
                grid = h, w
                for _ in range(halvings):
                    grid = tuple(-(-side // 2) for side in grid)
                found.append(MapSite(runtime.site, heads, grid))
        return found

    def _blocks(self) -> Any:
        return getattr(self._guider.inner_model.diffusion_model, "input_blocks", ())

    @contextlib.contextmanager
    def differentiating(self, method: Any, inputs: BranchInputs, capture: Capture) -> Iterator[None]:
        """In this block passes keep their graph and their maps are taken; all is put back at its end."""
        model = self._guider.inner_model.diffusion_model
        with torch.inference_mode(False), torch.enable_grad(), usable(model), self._sampling.run.inside(method):
            self._sampling.capture = capture
            self._sigma = self._sigma.clone()
            try:
                yield
            finally:
                self._sampling.capture = None


def level_of(name: str, levels: int) -> int:
    """How many times the side of the latent is halved at a site of a UNet."""
    block, number = name.split(".")[:2]
    return {"down_blocks": int(number) if number.isdigit() else 0, "mid_block": levels}.get(
        block, levels - int(number) if number.isdigit() else 0
    )


@contextlib.contextmanager
def usable(model: nn.Module) -> Iterator[None]:
    """Weights that gradients may pass through: that program loads them in inference mode, which forbids it; copies stand in."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    if value is None or not (value.is_inference() or value.requires_grad):
                        continue
                    changed.append((table, name, value))
                    copy = value.clone().detach() if value.is_inference() else value.detach()
                    table[name] = nn.Parameter(copy, False) if isinstance(value, nn.Parameter) else copy
        yield
    finally:
        for table, name, value in changed:
            table[name] = value


def plain(conds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Conditionings whose tensors may be kept for a gradient."""
    return [{**cond, "model_conds": dict(map(_plain_cond, cond.get("model_conds", {}).items()))} for cond in conds]


def _plain_cond(pair: tuple[str, Any]) -> tuple[str, Any]:
    name, cond = pair
    inner = getattr(cond, "cond", None)
    if not isinstance(inner, Tensor):
        return pair
    return name, type(cond)(inner.clone())
