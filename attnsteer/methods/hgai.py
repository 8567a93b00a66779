"""HGAI: raises the scores of the image's tokens by what the heads of a layer give them together.

Jiang et al., "Devils in Middle Layers of Large Vision-Language Models" (CVPR 2025, arXiv 2411.16724), heads guided attention
intervention; official code ZhangqiJiang07/middle_layers_indicating_hallucinations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..call import AttnCall
from ..intervention import Intervention
from ..parameters import is_all, number
from ..registry import register_method
from ..site import Site
from ..tokens import Tokens
from ..where import Where
from ._images import check_some_image, image_bias, text_layers


@register_method
@dataclass(frozen=True)
class HGAI(Intervention):
    """z'_hij = z_hij + alpha mean_g |z_gij| for the image's tokens j, in the row of the prompt's last token and of each generated
    one; the mean is over the selected heads of the layer, so that all of them get the same increment. One head alone is PAI.

    Args:
        alpha: strength of 0 or more; 0 changes nothing. The paper has 0.5, and 0.55 for Shikra.

    Without `where` it acts in the layers 5 to 18 (LLaVA-1.5; Shikra 3 to 13, MiniGPT-4 3 to 14). A sample without an image is left
    alone.

    Raises:
        SelectionError: a value out of range; no image in any prompt.
    """

    alpha: float = number(0.5, low=0, per_sample=True, learnable=True)

    kinds = ("self",)
    needs = ("tokens", "images")
    prefix_local = True
    pools_heads = True

    def check_tokens(self, tokens: Tokens) -> None:
        check_some_image(tokens, "HGAI")

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        return text_layers(sites, 5, 19)

    def bias(self, call: AttnCall) -> Tensor | None:
        if is_all(self.alpha, 0.0):
            return None
        alpha: Any = call.each(self.alpha)
        alpha = alpha[..., None] if isinstance(alpha, Tensor) else alpha
        return image_bias(call, lambda z, _: (alpha * call.over_heads(z.abs(), "mean")).expand_as(z))
