"""ADHH: switches off, in hallucination heads, the attention to the text behind the image where it dominates.

Yang et al., "Understanding and Mitigating Hallucination in Large Vision-Language Models via Modular Attribution and
Intervention" (ICLR 2025); official code TianyunYoung/Hallucination-Attribution, which sums the share over the batch (one
sample only) and has the image's place as constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..call import AttnCall, Reweight
from ..errors import SelectionError
from ..heads import HeadSet, head_set
from ..intervention import Intervention
from ..parameters import number
from ..registry import register_method
from ..site import Site
from ..tokens import Tokens
from ..where import Where
from ._images import behind_images, check_some_image, speaking

# Of the official code, as (layer, head).
LLAVA_15_7B = (
    *((16, 29), (26, 9), (13, 31), (15, 10), (20, 12), (30, 9), (19, 18), (17, 0), (18, 9), (26, 28)),
    *((19, 27), (18, 26), (15, 25), (14, 16), (31, 26), (15, 24), (31, 3), (22, 20), (27, 29), (17, 28)),
)


@register_method
@dataclass(frozen=True)
class ADHH(Intervention):
    """A'_ij = 0 for the tokens j behind the image (question, generated ones and the row's own), without renormalisation, in the row
    of the prompt's last token and of each generated one, where these tokens have at least the share `threshold` of the row.

    Args:
        heads: the hallucination heads (`HeadSet` or `{layer: [head, ...]}`); `ADHH.llava_15_7b()` has the authors' twenty. None:
            all that `where` selects.
        threshold: share above 0 from which the text counts as dominant; above 1 nothing is changed. 0.4 in the official code.

    A row loses what it gave to the text: its weights no longer sum to one. A sample without an image is left alone.

    Raises:
        SelectionError: a value out of range; no image in any prompt; neither heads nor `where`.
    """

    heads: HeadSet | None = head_set()
    threshold: float = number(0.4, above=0, per_sample=True)

    kinds = ("self",)
    needs = ("tokens", "images")
    prefix_local = True
    may_rest = True

    @classmethod
    def llava_15_7b(cls, threshold: float = 0.4) -> ADHH:
        """The twenty heads that the authors found for LLaVA-1.5-7B."""
        return cls(HeadSet(LLAVA_15_7B), threshold)

    def check_tokens(self, tokens: Tokens) -> None:
        check_some_image(tokens, "ADHH")

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        if self.heads is None:
            raise SelectionError(
                "ADHH: give the hallucination heads of this model, heads={layer: [head, ...]}, or a where."
            )
        return None

    def weights(self, call: AttnCall) -> Reweight | None:
        acts = speaking(call)
        text = call.once("text", lambda: behind_images(call))
        off = acts[:, None] & (call.map.mass(text) >= call.each(self.threshold))
        return Reweight(((text, torch.where(off, 0.0, 1.0).to(call.map.stat_dtype)),), normalise=False)
