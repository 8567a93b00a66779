"""`WeakBranch`: guidance away from a prediction whose attention was damaged; base of PAG, SoftPAG and SEG."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...branches import BranchInputs, Prediction, add_to_rows
from ...errors import SelectionError, UnsupportedHost
from ...intervention import Intervention
from ...parameters import PerSample, number
from ...site import Site
from ...where import Where

if TYPE_CHECKING:
    from ...engine import Run


@dataclass(frozen=True)
class WeakBranch(Intervention):
    """eps_u + g (eps_c - eps_u) + s (eps_c - eps_w): a weak prediction eps_w on the conditional rows, extrapolated from.

    The term s (eps_c - eps_w) is added to every guidance row inside the denoiser's forward; the pipeline's own
    combination then carries it exactly once, for any guidance scale, solver and prediction type.

    Args:
        scale: s; 0 turns the method off and computes no weak pass.
        adaptive: a in s_t = max(0, s - a (1000 - t)), the community's adaptive form, with t as the scheduler counts;
            0 keeps s constant.
    """

    scale: float = number(3.0, per_sample=True, learnable=True)
    adaptive: float = number(0.0, low=0, kw_only=True)

    kinds = ("self", "joint")
    needs = ("segments",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.where.branches is not None and "cond" not in self.where.branches:
            raise SelectionError(
                f"{type(self).__name__}: the weak branch is made of the conditional rows; Where(branches=...) cannot leave "
                "them out."
            )

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        """The UNet's middle block, as published; a transformer has no such default, so its layers must be named."""
        if any(re.fullmatch(r"mid_block\..*attn1", s.name) for s in sites):
            return Where(modules=r"(.*\.)?mid_block\..*attn1", kinds=("self",))
        raise SelectionError(
            f"{type(self).__name__} needs where= on this model: it has no UNet middle block, and no layer choice carries over "
            "between transformers. Give e.g. Where(layers=[...]); attnsteer.sites(pipe) lists them."
        )

    def scale_at(self, timestep: float | None) -> float | PerSample:
        """s_t at a timestep of the scheduler (1000 to 0); of each sample, where they have values of their own."""
        if not self.adaptive or timestep is None:
            return self.scale
        fall = self.adaptive * (1000.0 - timestep)
        if isinstance(self.scale, PerSample):
            return self.scale.mapped(lambda s: (s - fall).clamp_min(0.0))
        return max(0.0, self.scale - fall)

    def around(self, forward: Callable[[BranchInputs], Prediction], inputs: BranchInputs, run: Run) -> Prediction:
        """One strong pass, one weak pass on the conditional rows, and the combination."""
        strong = forward(inputs)
        scale = self.scale_at(inputs.timestep)
        if scale == 0.0:
            return strong
        if "cond" in inputs.layout:
            with run.inside(self):
                weak = forward(inputs.only("cond"))
            # Differences of the model's own outputs: several weak branches add up.
            raw = strong.raw[inputs.part("cond")]
            own, apart = inputs.only("cond"), raw - weak.raw
            term = (own.each(scale, apart) * apart).to(apart.dtype)
            acting = own.acting(self, apart)
            term = term if acting is None else torch.where(acting, term, torch.zeros_like(term))
            # The unconditional rows may come in a call of their own, after this one.
            inputs.memory[id(self)] = (inputs.timestep, term)
        else:
            when, term = inputs.memory.get(id(self), (None, None))
            if when != inputs.timestep:
                raise UnsupportedHost(
                    f"{type(self).__name__}: the unconditional rows of timestep {inputs.timestep} came before the conditional "
                    "ones, so the guidance term is not known yet. Call the conditional branch first."
                )
        return add_to_rows(strong, term, len(inputs.layout))
