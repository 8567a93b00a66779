"""SLG: guidance away from a branch that leaves whole blocks out, or some of their heads.

Stability AI, skip-layer guidance of Stable Diffusion 3.5 Medium (2024, no paper); official code Stability-AI/sd3.5, of which
diffusers' StableDiffusion3Pipeline has a form. Switching single heads off is HeadHunter's zero target (arXiv 2506.10978).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..branches import BranchInputs, Prediction
from ..call import AttnCall
from ..errors import SelectionError, UnsupportedHost
from ..heads import HeadSet, head_set
from ..parameters import number
from ..registry import register_method
from ..site import Site
from ..where import Where
from .bases.weak_branch import WeakBranch

if TYPE_CHECKING:
    from ..engine import Run


@register_method
@dataclass(frozen=True)
class SLG(WeakBranch):
    """Skip-layer guidance: x_(l+1) = x_l in the weak branch, for all streams of the chosen blocks; or O'_h = 0 for heads of them.

    Args:
        scale: s; 2.8 in diffusers, 2.5 in the official preset, 0 is off.
        start, stop: the steps i of N with start N < i < stop N are guided, as in both codes: the first step never is, and of
            8 steps none is by default. None: no bound.
        heads: the heads to switch off, instead of leaving out whole blocks; None: whole blocks, those that hold a site that
            `where` selects (the block that a layer's number counts).

    Which blocks help is known for SD3.5-medium only (see `released_code`); without the first or the last ones nothing
    sensible is predicted. In a model that is compiled as a whole only heads can be switched off.
    """

    scale: float = number(2.8, per_sample=True, learnable=True)
    start: float | None = number(0.01, low=0, high=1, optional=True)
    stop: float | None = number(0.2, low=0, high=1, optional=True)
    heads: HeadSet | None = head_set(kw_only=True)

    linear = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None and self.stop is not None and self.start >= self.stop:
            raise SelectionError(f"SLG(start={self.start}, stop={self.stop}): no step lies between; give start < stop.")

    @classmethod
    def released_code(cls, **changes: Any) -> SLG:
        """The preset of Stability-AI/sd3.5 for SD3.5-medium; it goes with a guidance scale of 4."""
        return cls(**{"scale": 2.5, "where": Where(layers=[7, 8, 9]), **changes})

    @property
    def skips_blocks(self) -> bool:
        """Whole blocks are left out where no heads are named."""
        return self.selection().heads is None

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        raise SelectionError(
            f"{type(self).__name__} needs where=: no choice of blocks carries over between models. For SD3.5-medium it is "
            "Where(layers=[7, 8, 9]); attnsteer.sites(pipe) lists the layers."
        )

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        return None if self.skips_blocks else torch.zeros_like(out)

    def around(self, forward: Callable[[BranchInputs], Prediction], inputs: BranchInputs, run: Run) -> Prediction:
        """The weak branch in the steps of the window, the plain prediction in all others."""
        return super().around(forward, inputs, run) if self.guides(inputs) else forward(inputs)

    def guides(self, inputs: BranchInputs) -> bool:
        """Whether the step of this call lies in the window."""
        if self.start is None and self.stop is None:
            return True
        if inputs.step is None or inputs.steps is None:
            raise UnsupportedHost(
                f"{type(self).__name__}(start={self.start}, stop={self.stop}): how many steps there will be is not known here. "
                "Steer the pipeline rather than its model, or give start=None, stop=None."
            )
        first = -1.0 if self.start is None else self.start * inputs.steps
        return first < inputs.step < inputs.steps * (1.0 if self.stop is None else self.stop)
