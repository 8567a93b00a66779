"""VisualHighlight: multiplies the scores among an image's tokens, and those of generated tokens on the image.

Bi et al., "Unveiling Visual Perception in Language Models: An Attention Head Analysis Approach" (CVPR 2025, arXiv 2412.18108);
official code jing-bi/visual-head, `modify` with the map "center" in llava/model/forward.py at 843e00a. Its settings are not in the
repository, so that `value` has no default. What it calls masking a head (`maskout`) sets a head's scores to zero behind the causal
mask, future tokens included; over the keys that a row sees it is `InjectMap("all", heads)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..call import AttnCall
from ..heads import HeadSet, head_set
from ..intervention import Intervention
from ..parameters import choice, is_all, number
from ..registry import register_method
from ..tokens import Tokens
from ._images import check_some_image, image_bias


@register_method
@dataclass(frozen=True)
class VisualHighlight(Intervention):
    """z'_ij = value z_ij for the image's tokens j in the rows of the image's tokens and of generated ones.

    Scores are multiplied, not attention: a factor above one sharpens what a row gives the image, and raises it only where the
    scores are positive. The prompt's own text, its last token included, is left as it is, as in the official code.

    Args:
        value: factor of 0 or more; 1 changes nothing. heads: the heads to edit (`HeadSet` or `{layer: [head, ...]}`; the official
            code takes all); None: all that `where` selects. step: "all", or "once": the prompt alone.

    A prompt's bias is held for all of its rows and keys. A sample without an image is left alone.

    Raises:
        SelectionError: a value out of range; no image in any prompt.
    """

    value: float = number(low=0, per_sample=True, learnable=True)
    heads: HeadSet | None = head_set()
    step: str = choice("all", ("all", "once"), kw_only=True)

    kinds = ("self",)
    needs = ("tokens", "images")
    prefix_local = True

    def check_tokens(self, tokens: Tokens) -> None:
        check_some_image(tokens, "VisualHighlight")

    def bias(self, call: AttnCall) -> Tensor | None:
        if is_all(self.value, 1.0) or (call.phase == "decode" and self.step == "once"):
            return None
        value: Any = call.each(self.value)
        value = value[..., None] if isinstance(value, Tensor) else value
        return image_bias(call, lambda z, _: (value - 1.0) * z, rows=self._rows)

    def _rows(self, call: AttnCall) -> Tensor:
        """bool [B, n]: the rows of image tokens, and of generated ones."""
        image = call.at_rows(call.image_tokens())
        return image if self.step == "once" else image | call.generates
