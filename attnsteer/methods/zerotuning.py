"""ZeroTuning: scales the attention that chosen heads pay to the first token, and renormalises.

Han et al., "ZeroTuning" (ICLR 2026, arXiv 2505.11739); official code FeijiangHan/ZeroTuning. There the scaled key
is slot 0, a padding slot under left padding; here it is the first valid token of each row. Scaling the key state
instead (the paper's fused variant) scales the logit, which is another operation, so it is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..call import AttnCall, Reweight
from ..heads import HeadSet, head_set
from ..intervention import Intervention
from ..parameters import is_all, number
from ..registry import register_method


@register_method
@dataclass(frozen=True)
class ZeroTuning(Intervention):
    """A'_i0 = gamma A_i0 / D_i and A'_ij = A_ij / D_i with D_i = 1 + (gamma - 1) A_i0.

    Args:
        heads: the heads to tune (`HeadSet` or `{layer: [head, ...]}`); None: all that `where` selects.
        gamma: factor > 0; above 1 flattens the other tokens' attention, below 1 sharpens it, 1 changes nothing.

    Stateless: the same rule at prefill and at every decode step. A model without a start token has a content
    token in first place; the method then scales that one.
    """

    heads: HeadSet | None = head_set()
    gamma: float = number(1.0, above=0, per_sample=True, learnable=True)

    kinds = ("self",)
    needs = ("tokens",)
    row_local = True
    steady = True

    def weights(self, call: AttnCall) -> Reweight | None:
        if is_all(self.gamma, 1.0):
            return None
        return call.once("edit", lambda: Reweight(((call.first_key(), call.each(self.gamma)),), positive=True))
