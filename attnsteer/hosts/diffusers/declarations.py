"""What the methods of a run ask of one denoiser, and how it is called: worked out once, when the run is attached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ...bound import Bound
from ...engine import SiteRuntime

if TYPE_CHECKING:
    from ...steering import Steering

# What a method may need of a call that only the denoiser's own arguments tell.
OF_ARGUMENTS = frozenset({"segments", "grid", "steps", "contrast", "prompt"})


@dataclass(frozen=True)
class Declarations:
    """What a run asks of one denoiser.

    Attributes:
        edits: per intervention that has sites here, the names of those, by its number.
        contrast: those of them that compare with a negative prompt.
        around: those of them that call the denoiser several times, in order. latent: those of these that move the latent.
        watched: whether the arguments of the denoiser must be read at each call.
        steps: whether a method reads the step. branches: whether a selection is by branch.
        prompt: whether a method reads the prompt, and keeps its state from step to step.
        sampled: whether a method has values per sample. rows: whether it matters which rows of a call are conditional.
        latent_moves: whether a method of the run moves the latent, at this denoiser or at another one of the pipeline.
        compiled: whether the denoiser was compiled, as a whole or in parts. whole: as a whole, so that none of its blocks is
            called by itself.
    """

    edits: dict[int, list[str]]
    contrast: tuple[Bound, ...]
    around: tuple[Bound, ...]
    latent: tuple[Bound, ...]
    watched: bool
    steps: bool
    branches: bool
    prompt: bool
    sampled: bool
    rows: bool
    latent_moves: bool
    compiled: bool
    whole: bool

    @classmethod
    def of(cls, run: Steering, runtimes: Iterable[SiteRuntime], owner: nn.Module, model: nn.Module) -> Declarations:
        """The declarations of `run` for one denoiser.

        Args:
            runtimes: of the steered sites of `model`. owner: `model`, or what `torch.compile` made of it.
        """
        edits: dict[int, list[str]] = {}
        for runtime in runtimes:
            for bound, _ in runtime.entries:
                edits.setdefault(bound.index, []).append(runtime.site.name)
        around = tuple(b for b in run.bounds if "around" in b.doors and b.index in edits)
        needs = {need for b in run.bounds for need in b.method.needs}
        selects = {f for b in run.bounds for f in ("steps", "branches", "rows") if getattr(b.where, f) is not None}
        sampled = any(b.method.sample_values for b in run.bounds)
        whole = owner is not model or model._compiled_call_impl is not None
        return cls(
            edits=edits,
            contrast=tuple(b for b in run.bounds if "contrast" in b.method.needs and b.index in edits),
            around=around,
            latent=tuple(b for b in around if "latent" in b.method.needs),
            watched=bool(around or selects or needs & OF_ARGUMENTS or sampled),
            steps="steps" in needs,
            branches="branches" in selects or "prompt" in needs,
            prompt="prompt" in needs,
            sampled=sampled,
            rows=bool(around or sampled or "branches" in selects or needs & {"prompt", "contrast"}),
            latent_moves="latent" in needs,
            compiled=whole or any(m._compiled_call_impl is not None for m in model.modules()),
            whole=whole,
        )
