"""SPIN: scales down the outputs of the heads that look least at the image, anew for each token.

Sarkar et al., "Mitigating Hallucinations in Vision-Language Models through Image-Guided Head Suppression" (EMNLP 2025, arXiv
2505.16411); official code YUECHE77/SPIN, which ranks by raw scores where the text speaks of attention. Both are offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import AttnCall
from ..intervention import Intervention
from ..parameters import choice, is_all, number
from ..registry import register_method
from ..site import Site
from ..tokens import Tokens
from ..where import Where
from ._images import check_some_image, speaking, text_layers

RANKS = ("scores", "attention")


@register_method
@dataclass(frozen=True)
class SPIN(Intervention):
    """o_h <- m o_h for the heads that are not among the int(r H) with the largest score, in the row of the prompt's last token and
    of each generated one; the score of a head is sum_j z_hij (or A_hij) over the image's tokens j.

    Args:
        keep: r, the share of the layer's heads that stay as they are, above 0 up to 1; 1 changes nothing. The official code has
            0.95 for captions, 0.8 for POPE.
        scale: m, from 0 to 1; 1 changes nothing. 0.08 for captions, 0.1 for POPE.
        by: "scores": the scaled scores before the softmax, as the official code; "attention": their softmax, as the text.

    Without `where` it acts in all layers of the language model. Heads are ranked among those selected. A sample without an image
    is left alone.

    Raises:
        SelectionError: a value out of range; no image in any prompt.
    """

    keep: float = number(0.95, above=0, high=1)
    scale: float = number(0.08, low=0, high=1, per_sample=True, learnable=True)
    by: str = choice("scores", RANKS, kw_only=True)

    kinds = ("self",)
    needs = ("tokens", "images")
    prefix_local = True
    whole_heads = True

    def check_tokens(self, tokens: Tokens) -> None:
        check_some_image(tokens, "SPIN")

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        return text_layers(sites, 0)

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        heads = out.shape[1]
        kept = int(self.keep * heads)
        if is_all(self.scale, 1.0) or kept == heads:
            return None
        image = call.once("image keys", call.image_keys)
        score = self._score(call, image)
        if score is None:
            return None
        score, index = score
        # Ranks instead of a threshold: two equal heads are told apart as a sort tells them.
        rank = score.argsort(dim=1, descending=True).argsort(dim=1)
        acts = (speaking(call)[:, index] & image.any(dim=-1))[:, None]
        scale = call.each(self.scale, like=out)
        factor = torch.where(acts & (rank >= kept), scale, torch.ones((), dtype=out.dtype, device=out.device))
        return out.index_copy(2, index, out[:, :, index] * factor[..., None].to(out.dtype))

    def _score(self, call: AttnCall, image: Tensor) -> tuple[Tensor, Tensor] | None:
        """(score [B, H, r], the r rows that speak)."""
        acts = speaking(call)
        n = acts.shape[1]
        index = (
            call.once("speaking", lambda: acts.any(dim=0).nonzero()[:, 0])
            if n > 1
            else acts.new_zeros(1, dtype=torch.long)
        )
        if not len(index):
            return None
        if self.by == "attention":
            return call.map.mass(image)[:, :, index], index
        scores = call.map.scores(index)
        return scores.masked_fill(scores.isneginf() | ~image[:, :, None], 0.0).sum(dim=-1), index
