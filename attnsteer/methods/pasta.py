"""PASTA: scales down, in chosen heads, the attention to all prompt tokens that the user did not highlight.

Zhang et al., "Tell Your Model Where to Attend" (ICLR 2024, arXiv 2311.02262), section 3; official code
QingruZhang/PASTA (pastalib/pasta.py at 56a9138). There several spans penalise each other; here they are one set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..call import AttnCall, Reweight
from ..heads import HeadSet, head_set
from ..intervention import Intervention
from ..parameters import choice, number
from ..registry import register_method
from ..tokens import Tokens
from ._spans import check_prompt, check_spans, marked, span_keys


@register_method
@dataclass(frozen=True)
class PASTA(Intervention):
    """A'_ij = alpha A_ij / C_i for prompt tokens that are not highlighted, A_ij / C_i for all others.

    Args:
        spans: strings to find in the text (then give a tokenizer), or per sample a list of (start, stop) token
            ranges counted from the sample's first valid token.
        heads: the heads to steer (`HeadSet` or `{layer: [head, ...]}`); None: all that `where` selects (the paper
            advises against all heads).
        alpha: factor > 0 (the paper avoids 0 too); 0.01 in the paper, 1 changes nothing.
        scale_position: "exclude" as above; "include" is the official code's other mode, whose net effect is
            `exclude` with 1 / alpha.
        tokenizer: for spans that are strings; not saved.

    Generated tokens keep weight one, at prefill and at every decode step.
    """

    spans: Any = marked()
    heads: HeadSet | None = head_set()
    alpha: float = number(0.01, above=0, per_sample=True)
    scale_position: str = choice("exclude", ("exclude", "include"))
    tokenizer: Any = field(default=None, kw_only=True, repr=False, compare=False, metadata={"save": False})

    kinds = ("self",)
    needs = ("tokens",)

    def check_tokens(self, tokens: Tokens) -> None:
        check_spans(tokens, self.spans, self.tokenizer)

    def weights(self, call: AttnCall) -> Reweight | None:
        highlighted = span_keys(call, self.spans, self.tokenizer)
        check_prompt(call)
        generated = call.keys.generated[:, None]
        alpha = self.alpha if self.scale_position == "exclude" else 1.0 / self.alpha
        if alpha == 1.0:
            return None
        return Reweight(((highlighted | generated, 1.0),), alpha)
