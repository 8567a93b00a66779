"""AttendAndExcite: moves the latent so that each chosen word of the prompt has a place in the image that attends to it.

Chefer et al., "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models" (SIGGRAPH 2023,
arXiv 2301.13826), algorithm 1; official code yuval-alaluf/Attend-and-Excite at 163efdf, of which diffusers has a pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SelectionError, brief
from ..maps.phrases import checked, per_prompt
from ..maps.words_to_image import COMPETE, Maps
from ..parameters import Number, choice, flag, integer, number, parsed
from ..registry import register_method
from .bases.latent_loss import LatentLoss, Plan, at, calls


def _thresholds(given: Any) -> dict[int | float, float]:
    if not isinstance(given, Mapping):
        raise SelectionError("give {call: attention to reach}, calls by number or as fractions of the loop.")
    share = Number(low=0, high=1)
    return {calls(when): share.check("thresholds", brief(when), attention) for when, attention in given.items()}


def competing(compete: str | None, maps: Maps) -> str:
    """The published choice for cross-attention; in joint attention padding takes mass, so only the prompt's own tokens."""
    if compete is not None:
        return compete
    return "prompt" if any(m.site.kind == "joint" for m in maps.sites) else "inner"


@register_method
@dataclass(frozen=True)
class AttendAndExcite(LatentLoss):
    """L = max over the words of max(0, 1 - max over the image of A_word), with A blurred and sharpened over tokens.

    Args:
        words: words or phrases of the prompt (each word of a phrase counts by itself, unless `include` says otherwise), or
            one list per prompt; ("cat", 2) is the second "cat" of the prompt, (5, 6) a range of token positions.
        thresholds: call -> max attention to reach by refinement there: numbers of calls, or fractions of the loop (the
            paper's 0, 10, 20 of 50). max_refinements: updates of one refinement at most.
        sharpness: c in the softmax over tokens of c A (100 in the official code); None: no such softmax.
        compete: the tokens of that softmax: "inner", all but the first and last (official code); "prompt", those that
            stand for text; "all". None: "inner" for cross-attention, "prompt" for joint attention.
        smooth: blur the maps (3 x 3). The rest, and the step size (20, falling to 20 sqrt(1/2)): see `LatentLoss`.

    The paper acts in the first half of 50 steps on 16 x 16 maps of Stable Diffusion 1.4. Step sizes and thresholds for other
    models are not published.
    """

    words: Any = parsed(lambda words: checked("words", words), "words of the prompt, or one list of them per prompt")
    thresholds: Mapping[Any, float] = parsed(
        _thresholds,
        "{number of calls or fraction of the loop: attention from 0 to 1}",
        default_factory=lambda: {0.0: 0.05, 0.2: 0.5, 0.4: 0.8},
    )
    max_refinements: int = integer(20, low=0)
    sharpness: float | None = number(100.0, above=0, optional=True, kw_only=True)
    compete: str | None = choice(None, COMPETE, kw_only=True)
    smooth: bool = flag(True, kw_only=True)

    @classmethod
    def released_code(cls, words: Any, **changes: Any) -> AttendAndExcite:
        """What the official code and diffusers' pipeline compute: the latent unscaled, every call of the loop, 25 calls."""
        fixed = {"thresholds": {0: 0.05, 10: 0.5, 20: 0.8}, "until": 25, "scaled": False, "blind_calls": True}
        return cls(words, **{**fixed, **changes})

    def phrases(self) -> list[list[Any]]:
        return per_prompt(self.words)

    def plan(self, index: int, length: int) -> Plan:
        """Refinement at the calls of `thresholds`, and the updates of every call before `until`."""
        plan = super().plan(index, length)
        for when, attention in reversed(list(self.thresholds.items())):
            if at(when, length) == index:
                return replace(plan, refine=self.max_refinements, target=1.0 - attention)
        return plan

    def loss(self, maps: Maps) -> Tensor:
        A, valid = maps.words(
            self.phrases(), sharpness=self.sharpness, compete=competing(self.compete, maps), smooth=self.smooth
        )
        missing = torch.relu(1.0 - A.amax(dim=(-2, -1)))
        return missing.masked_fill(~valid, 0.0).max(dim=-1).values
