"""`LatentLoss`: gradient steps on the latent, before the noise is predicted, along a loss on attention maps.

At a call of the sampler's loop: z* = z - eta dL/dz (once or several times), then noise = model(z*) and
scheduler.step(noise, z*). The loss reads the conditional rows; each sample has its own loss and its own stop.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...branches import BranchInputs, Prediction
from ...call import AttnCall
from ...errors import NotFinite, SelectionError, UnsupportedHost
from ...intervention import Intervention
from ...maps.phrases import INCLUDE, Prompt
from ...maps.words_to_image import Capture, Maps, MapsComplete, MapSite
from ...parameters import Number, Refused, choice, flag, integer, number, parsed, plain
from ...site import Site
from ...where import Where

if TYPE_CHECKING:
    from ...engine import Run

# Of the 60 cross-attentions of SDXL with 32 x 32 maps, those of the blocks that Bounded Attention reads.
SDXL = re.compile(r"up_blocks\.0\.attentions\.0\.transformer_blocks\.[1-6]\.attn[12]")


@dataclass(frozen=True)
class Plan:
    """What to do at one call of the loop, for each sample by itself.

    Attributes:
        size: step size eta. refine: at most that many updates, until the loss before one of them was at or below
            `target`; with `at_once`, the first of them is made whatever the loss. updates: further ones after these.
    """

    size: float
    refine: int = 0
    target: float = 0.0
    at_once: bool = False
    updates: int = 0


def calls(given: Any) -> int | float:
    """A number of calls (int) or a fraction of the loop (float), checked.

    Raises:
        SelectionError: it is neither.
    """
    given = plain(given)
    form = Number(low=0, high=1) if isinstance(given, float) else Number(low=0, whole=True)
    try:
        return form.convert(given)
    except Refused:
        raise SelectionError("give a number of calls, or a fraction from 0.0 to 1.0.") from None


@dataclass(frozen=True)
class LatentLoss(Intervention):
    """Base of methods that move the latent along a loss on attention maps. A subclass defines `loss`.

    Args:
        step_size: eta of the first call. decay: eta falls with the square root of a line from 1 to this, at the last call.
        until: calls of the loop from which on nothing is done: a number of calls, or a fraction (float, 0 to 1).
        updates: gradient steps per call (one in the papers, apart from refinement).
        relative: eta is a fraction of the latent's norm and the gradient is normalised, per sample (not from a paper; a
            step that carries over between models).
        stop_loss: a sample whose loss is at or below this is left alone at this call; None: no such rule.
        size: shorter side to which larger maps are averaged down. Where `where` names neither layers nor modules, a UNet's
            sites are those with the smallest side that is not below it, else those with the largest side; of SDXL's, blocks
            1 to 6 of up_blocks.0.attentions.0. None: no averaging, and the largest side.
        include: which tokens of a phrase count: "words", "last", "last+1" (see `Prompt.terms`). A causal text encoder
            gathers a phrase in its last word and the token after it.
        scaled: the model is asked on the latent as the scheduler scales it; False: on the bare latent, as the official
            codes do (the same for DDIM, PNDM and DPM++, another model input for Euler).
        blind_calls: also act at calls whose latent the scheduler does not use (PNDM's second, every second one of Heun):
            there only the noise prediction feels it.
        early_stop: cut the forward after the last needed site. checkpointing: recompute activations in the backward pass.
            Neither changes the result.

    On SD3 the default site is block 9 of 24 (the same depth in other sizes), on Flux the last double block. A step size of 0
    turns the method off.
    """

    step_size: float = number(20.0, low=0, per_sample=True, kw_only=True)
    decay: float = number(0.5, low=0, high=1, kw_only=True)
    until: float = parsed(calls, "number of calls, or fraction (float) from 0 to 1", 0.5, kw_only=True)
    updates: int = integer(1, low=1, kw_only=True)
    relative: bool = flag(False, kw_only=True)
    stop_loss: float | None = number(None, per_sample=True, kw_only=True)
    size: int | None = integer(16, low=2, optional=True, kw_only=True)
    include: str = choice("words", INCLUDE, kw_only=True)
    scaled: bool = flag(True, kw_only=True)
    blind_calls: bool = flag(False, kw_only=True)
    early_stop: bool = flag(True, kw_only=True)
    checkpointing: bool = flag(False, kw_only=True)

    kinds = ("cross", "joint")
    needs = ("segments", "grid", "latent")
    # The maps that `loss` reads: "text" (image rows over text keys) and/or "image" (over image keys).
    reads: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.where.rows is not None or self.where.branches is not None:
            raise SelectionError(f"{name}: it reads the image rows of the conditional branch; leave out {self.where}.")

    def loss(self, maps: Maps) -> Tensor:
        """The loss of each sample, [B]; differentiable in `maps`."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss(maps).")

    def phrases(self) -> list[list[Any]]:
        """The phrases that the loss will look up, per prompt or one list for all: checked before the first step."""
        return []

    def plan(self, index: int, length: int) -> Plan:
        """What to do at call `index` of `length` of the loop; by default `updates` steps at each call before `until`."""
        return Plan(self.step_at(index, length), updates=self.updates if index < at(self.until, length) else 0)

    def satisfied(self, maps: Maps, loss: Tensor) -> Tensor | None:
        """bool [B]: samples that are left alone at this call, also before their first update; None: no such rule."""
        return None if self.stop_loss is None else loss <= self.stop_loss

    def reached(self, maps: Maps, loss: Tensor, target: float) -> Tensor:
        """bool [B]: samples that need no more refinement after this update."""
        return loss <= target

    def step_at(self, index: int, length: int) -> float:
        """eta of one call: step_size * sqrt(1 ... decay)."""
        line = 1.0 + (self.decay - 1.0) * (index / (length - 1) if length > 1 else 0.0)
        return self.step_size * math.sqrt(line)

    def prepare(self, prompt: Prompt) -> None:
        """Check what can be checked once the prompt is known: called before the first step."""
        phrases = self.phrases()
        if phrases:
            prompt.terms(phrases, self.include)

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        """All sites that have maps; `choose` takes those of the right size, once the latent's is known."""
        self._block([MapSite(s, None, None) for s in sites if s.kind in self.kinds])
        return None

    def choose(self, sites: Sequence[MapSite]) -> list[MapSite]:
        """The sites to read among those that `where` selects."""
        if self.where.layers is not None or self.where.modules is not None:
            return list(sites)
        pool = self._block(sites)
        sides = {min(s.grid) for s in pool if s.grid is not None}
        if not sides or len(sides) == 1:
            return pool
        enough = [side for side in sides if self.size is not None and side >= self.size]
        found = [s for s in pool if s.grid is not None and min(s.grid) == (min(enough) if enough else max(sides))]
        deep = [s for s in found if SDXL.fullmatch(s.site.name)]
        return deep if len({s.site.layer for s in deep}) == 6 else found

    def _block(self, sites: Sequence[MapSite]) -> list[MapSite]:
        """All sites of a UNet; of SD3 and Flux the one block in which words are found best."""
        if any(s.site.name.startswith(("down_blocks.", "up_blocks.")) for s in sites):
            return list(sites)
        joint = [s for s in sites if s.site.kind == "joint" and s.site.name.startswith("transformer_blocks.")]
        if not joint:
            raise SelectionError(
                f"{type(self).__name__} needs where= on this model: which of its layers find words is not known. Give e.g. "
                "Where(layers=[...]); attnsteer.sites(pipe) lists them."
            )
        # Flux: the last double block (FreeFuse); SD3: block 9 of 24 (Seg4Diff), at the same depth in other sizes.
        flux = any(s.site.name.startswith("single_transformer_blocks.") for s in sites)
        return [joint[-1] if flux else joint[min(len(joint) - 1, round(0.375 * len(joint)))]]

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        """Hands the map to the capture of the running pass; the output stays as it is."""
        if not call.gives("capture") or call.site.path not in call.capture.wanted:
            return None
        call.capture.add(call)
        return out

    def around(self, forward: Callable[[BranchInputs], Prediction], inputs: BranchInputs, run: Run) -> Prediction:
        """The updates of this call, then the prediction at the moved latent."""
        loop = inputs.loop
        if self.step_size == 0.0 or loop.acted(self) or (loop.blind and not self.blind_calls):
            return forward(inputs)
        plan = self.plan(loop.index, loop.length)
        if plan.refine or plan.updates:
            if "cond" not in inputs.layout:
                raise UnsupportedHost(
                    f"{type(self).__name__}: the unconditional rows of call {loop.index} came before the conditional ones. Call "
                    "the conditional branch first."
                )
            loop.move(self, _Optimiser(self, forward, inputs, plan).run())
        return forward(inputs)


class _Optimiser:
    """The updates of one call of the loop."""

    def __init__(self, method: LatentLoss, forward: Callable[..., Prediction], inputs: BranchInputs, plan: Plan):
        self.method, self.forward, self.plan = method, forward, plan
        self.loop, self.inputs = inputs.loop, inputs.only("cond")
        self.z = self.loop.latent(inputs, type(method).__name__)
        self.capture = Capture(method.choose(self.loop.sites(method)), method.reads)
        self.memory = inputs.memory.setdefault(("latent", id(method)), {})

    def run(self) -> Tensor:
        """z*, [b, ...]."""
        method, plan = self.method, self.plan
        rows = self.z.shape[0]
        refining = torch.full((rows,), plan.refine > 0, device=self.z.device)
        refined, left = torch.zeros(rows, device=self.z.device), torch.full((rows,), plan.updates, device=self.z.device)
        first = True
        with self.loop.differentiating(method, self.inputs, self.capture):
            while bool((refining | (left > 0)).any()):
                z = self.z.detach().requires_grad_(True)
                maps = self._maps(z)
                loss = self._checked(method.loss(maps), maps)
                left_alone = method.satisfied(maps, loss.detach())
                if left_alone is not None:
                    refining, left = refining & ~left_alone, left * ~left_alone
                done = method.reached(maps, loss.detach(), plan.target)
                if first and not plan.at_once:
                    refining = refining & ~done
                moving = refining | (left > 0)
                if bool(moving.any()):
                    self._update(z, loss, moving)
                left = left - (moving & ~refining).to(left.dtype)
                refined = refined + refining.to(refined.dtype)
                refining = refining & ~done & (refined < plan.refine)
                first = False
        return self.z

    def _maps(self, z: Tensor) -> Maps:
        """One pass of the denoiser, up to the last needed site."""
        method, loop = self.method, self.loop
        self.capture.begin()
        try:
            self.forward(loop.put(self.inputs, z, scaled=method.scaled))
        except MapsComplete:
            pass
        loop.count(method, "gradient passes")
        sites = self.capture.end()
        return Maps(sites, loop.prompt, loop.index, loop.length, method.size, method.include, self.memory)

    def _update(self, z: Tensor, loss: Tensor, moving: Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss[moving].sum(), z)
        gradient, wide = gradient.detach(), moving.view(-1, *[1] * (z.ndim - 1))
        if not bool(torch.isfinite(gradient[moving]).all()):
            raise self._broken("the gradient of the loss")
        step = self.plan.size * gradient
        if self.method.relative:
            norm = lambda t: torch.linalg.vector_norm(t.flatten(1).float(), dim=1).view(wide.shape)  # noqa: E731
            length = norm(gradient)
            # A gradient of zero has no direction: the sample stays where it is.
            step = step * torch.where(length > 0, norm(z.detach()) / length, 0.0).to(z.dtype)
        moved = torch.where(wide, z.detach() - step, z.detach())
        if not bool(torch.isfinite(moved).all()):
            raise self._broken("the moved latent")
        self.z = moved
        self.loop.count(self.method, "latent updates", int(moving.sum()))

    def _checked(self, loss: Any, maps: Maps) -> Tensor:
        """`loss` itself, if it is one finite, differentiable number per sample."""
        name, rows = type(self.method).__name__, self.z.shape[0]
        if not isinstance(loss, Tensor) or loss.shape != (rows,):
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise SelectionError(
                f"{name}.loss returned {found}; it must return one number per sample, a tensor [{rows}]."
            )
        if not loss.requires_grad:
            raise SelectionError(f"{name}.loss does not depend on the maps, or was detached: it has no gradient.")
        if not bool(torch.isfinite(loss).all()):
            pairs = [(m.site.path, t) for m in maps.sites for t in (m.text, m.image) if t is not None]
            bad = [path for path, t in pairs if not bool(torch.isfinite(t).all())]
            raise self._broken(f"the map of {bad[0]}" if bad else "the loss (all of its maps are finite)")
        return loss

    def _broken(self, what: str) -> NotFinite:
        sites = ", ".join(self.capture.wanted)
        return NotFinite(
            f"{type(self.method).__name__}: {what} is not finite at call {self.loop.index} of {self.loop.length} (sites: "
            f"{sites}). Try a smaller step_size, or float32; the error's `latent` is the last good one.",
            self.z.detach(),
            self.loop.index,
        )


def at(when: float, length: int) -> int:
    """A number of calls as it is; a fraction (float) of `length` calls, rounded down."""
    return math.floor(when * length + 1e-9) if isinstance(when, float) else when
