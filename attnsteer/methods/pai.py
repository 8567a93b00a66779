"""PAI: raises the scores of the image's tokens in the rows that a token is generated from.

Liu, Zheng, Chen, "Paying More Attention to Image" (ECCV 2024, arXiv 2407.21771), section 3.2; official code LALBJ/PAI
(attention.py). Its second part, a contrast of the logits with those of a prompt without the image, is decoding and not attention:
`attnsteer.evals.text_contrast.TextContrast`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..call import AttnCall
from ..heads import HeadSet, head_set
from ..intervention import Intervention
from ..parameters import is_all, number
from ..registry import register_method
from ..site import Site
from ..tokens import Tokens
from ..where import Where
from ._images import check_some_image, image_bias, text_layers


@register_method
@dataclass(frozen=True)
class PAI(Intervention):
    """z'_ij = z_ij + alpha |z_ij| for the image's tokens j, in the row of the prompt's last token and of each generated one.

    z are the scaled and masked scores before the softmax. |z| is no property of the map, which ignores a constant added to a
    row, so the effect of one alpha differs from model to model.

    Args:
        alpha: strength of 0 or more; 0 changes nothing. The paper has 0.5 for LLaVA, 0.6 for Shikra, 0.2 for MiniGPT-4; the
            command line of the official code has 0.2, which does not reproduce the paper.
        heads: the heads to act in (`HeadSet` or `{layer: [head, ...]}`); None: all that `where` selects.

    Without `where` it acts from the third layer on (official code). A sample without an image is left alone. A chunk of a prompt
    that is not its last has no such row. Scoring a text at once is not what generating it is: its rows are all prompt there.

    Raises:
        SelectionError: a value out of range; no image in any prompt.
    """

    alpha: float = number(0.5, low=0, per_sample=True, learnable=True)
    heads: HeadSet | None = head_set()

    kinds = ("self",)
    needs = ("tokens", "images")
    prefix_local = True

    def check_tokens(self, tokens: Tokens) -> None:
        check_some_image(tokens, "PAI")

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        return text_layers(sites, 2)

    def bias(self, call: AttnCall) -> Tensor | None:
        if is_all(self.alpha, 0.0):
            return None
        alpha: Any = call.each(self.alpha)
        alpha = alpha[..., None] if isinstance(alpha, Tensor) else alpha
        return image_bias(call, lambda z, _: alpha * z.abs())
