"""PAINT: raises the scores of two sets of image patches, chosen by the vision encoder's own attention.

Arif et al., "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model" (2025, arXiv
2501.12206); official code hasanar1f/PAINT.
The abstract speaks of a strength for each head; the code has one for all, and so has this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError
from ..heads import HeadSet, head_set
from ..intervention import Intervention
from ..parameters import is_all, number
from ..registry import register_method
from ..site import Site
from ..tokens import Tokens
from ..where import Where
from ._images import check_some_image, image_bias, text_layers
from ._patches import patch_numbers


@register_method
@dataclass(frozen=True)
class PAINT(Intervention):
    """z'_ij = z_ij + alpha |z_ij| for local patches j, and z_ij + beta |z_ij| for summary patches, in the row of the prompt's last
    token and of each generated one.

    A patch is counted among the image's tokens of its sample, from 0 (of several images, on through all of them); a patch in both
    sets counts as summary (official code). `select_patches` has the authors' rule.

    Args:
        local, summary: one list of patch numbers per sample; an empty one leaves that set alone.
        alpha, beta: strengths of 0 or more; both 0 change nothing. 0.7 and 0.3 in the official code, 0.7 and 0.4 best in the paper;
            from alpha 0.7 on captions degenerate (recall falls), so look at that too.
        heads: the heads to act in (`HeadSet` or `{layer: [head, ...]}`); None: all that `where` selects.

    Without `where` it acts from the third layer on. Defined where each token of the image is a patch of one grid (LLaVA-1.5), not
    where tiles or merged patches are.

    Raises:
        SelectionError: a value out of range; a patch that an image does not have; no image in any prompt.
    """

    local: Any = patch_numbers()
    summary: Any = patch_numbers()
    alpha: float = number(0.7, low=0, per_sample=True, learnable=True)
    beta: float = number(0.3, low=0, per_sample=True, learnable=True)
    heads: HeadSet | None = head_set()

    kinds = ("self",)
    needs = ("tokens", "images")
    prefix_local = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.local) != len(self.summary):
            raise SelectionError(
                f"PAINT: local has {len(self.local)} samples and summary {len(self.summary)}; give a list for each sample to both."
            )

    def check_tokens(self, tokens: Tokens) -> None:
        check_some_image(tokens, "PAINT")
        samples = tokens.samples.rows(len(self.local))
        if tokens.more_to_come:
            return
        for row, size in enumerate(tokens.image_mask().sum(dim=-1).tolist()):
            most = max((*self.local[samples[row]], *self.summary[samples[row]]), default=-1)
            if most >= size:
                raise SelectionError(
                    f"PAINT: patch {most} of sample {samples[row]} does not exist; its image has {size} tokens, counted from 0."
                )

    def default_where(self, sites: Sequence[Site]) -> Where | None:
        return text_layers(sites, 2)

    def bias(self, call: AttnCall) -> Tensor | None:
        if is_all(self.alpha, 0.0) and is_all(self.beta, 0.0):
            return None
        summary = call.once("summary", lambda: self._keys(call, self.summary))
        local = call.once("local", lambda: self._keys(call, self.local) & ~summary)
        alpha, beta = (
            v[..., None] if isinstance(v, Tensor) else v for v in (call.each(self.alpha), call.each(self.beta))
        )

        def term(z: Tensor, keys: slice) -> Tensor:
            size = z.abs()
            return torch.where(local[:, :, None, keys], alpha * size, beta * size)

        return image_bias(call, term, local | summary)

    def _keys(self, call: AttnCall, chosen: tuple[tuple[int, ...], ...]) -> Tensor:
        """Patches as a key set [B, 1, m]."""
        image = call.image_tokens()
        samples = call.tokens.samples.rows(len(chosen), len(image))
        table = torch.zeros(len(image), image.shape[1] + 1, dtype=torch.bool)
        for row, sample in enumerate(samples):
            table[row, list(chosen[sample])] = True
        number = (image.cumsum(dim=-1) - 1).clamp_min(0)
        return call.at_keys(table.to(image.device).gather(1, number) & image)


def select_patches(first: Tensor, late: Tensor, ratio: float = 0.25) -> tuple[list[list[int]], list[list[int]]]:
    """(local, summary) patch numbers per image, by the authors' rule.

    Local: the int(ratio N) patches with the most attention from the class token in the encoder's first layer. Summary: those above
    the third quartile plus 1.5 interquartile ranges of the same in its last layer but one. A patch in both is summary.

    Args:
        first, late: attention of the class token to the N patches, summed over heads, [B, N], of these two layers.
        ratio: above 0 up to 1.

    Raises:
        SelectionError: shapes that differ, or a ratio out of range.
    """
    if first.ndim != 2 or first.shape != late.shape:
        raise SelectionError(
            f"first {list(first.shape)} and late {list(late.shape)}: give the class token's row of both layers, [B, N]."
        )
    if not 0 < ratio <= 1:
        raise SelectionError(f"ratio={ratio}: give a number above 0, up to 1.")
    local, summary = [], []
    for one, other in zip(first.double(), late.double(), strict=True):
        low, high = (other.quantile(q) for q in (0.25, 0.75))
        far = int((other > high + 1.5 * (high - low)).sum())
        own = other.topk(far).indices.tolist()
        summary.append(sorted(own))
        local.append(sorted(set(one.topk(int(ratio * len(one))).indices.tolist()) - set(own)))
    return local, summary
