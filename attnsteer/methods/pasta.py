"""PASTA: scales down, in chosen heads, the attention to all prompt tokens that the user did not highlight.

Zhang et al., "Tell Your Model Where to Attend" (ICLR 2024, arXiv 2311.02262), section 3; official code
QingruZhang/PASTA (pastalib/pasta.py at 56a9138). There several spans penalise each other; here they are one set, unless
`released_code` asks for the former. Its span finder takes the token before a span as well where that token ends at the span's
first character (the special token before the text counts as such); give the ranges to do the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall, Reweight
from ..heads import HeadSet, head_set
from ..intervention import Intervention
from ..parameters import choice, flag, is_all, number
from ..registry import register_method
from ..tokens import Tokens
from ._spans import check_prompt, check_spans, marked, span_counts, span_keys


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
        released: several spans as in the official code: with "exclude" a prompt token gets alpha once for each span that it
            is not in, with "include" alpha for each that it is in and 1 / alpha for all. One span is the same either way.
        tokenizer: for spans that are strings; not saved.

    Generated tokens keep weight one, at prefill and at every decode step.
    """

    spans: Any = marked()
    heads: HeadSet | None = head_set()
    alpha: float = number(0.01, above=0, per_sample=True, learnable=True)
    scale_position: str = choice("exclude", ("exclude", "include"))
    released: bool = flag(False, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, repr=False, compare=False, metadata={"save": False})

    kinds = ("self",)
    needs = ("tokens",)
    row_local = True
    steady = True

    @classmethod
    def released_code(
        cls,
        spans: Any,
        heads: HeadSet | None = None,
        alpha: float = 0.01,
        scale_position: str = "exclude",
        **other: Any,
    ) -> PASTA:
        """What pastalib computes: several spans penalise each other."""
        return cls(spans, heads, alpha, scale_position, released=True, **other)

    def check_tokens(self, tokens: Tokens) -> None:
        check_spans(tokens, self.spans, self.tokenizer)

    def weights(self, call: AttnCall) -> Reweight | None:
        check_prompt(call)
        return None if is_all(self.alpha, 1.0) else call.once("edit", lambda: self._edit(call))

    def _edit(self, call: AttnCall) -> Reweight:
        generated, alpha = call.keys.generated[:, None], call.each(self.alpha)
        if self.released:
            return self._each_span(call, generated, alpha)
        alpha = alpha if self.scale_position == "exclude" else 1.0 / alpha
        return Reweight(((span_keys(call, self.spans, self.tokenizer) | generated, 1.0),), alpha, positive=True)

    def _each_span(self, call: AttnCall, generated: Tensor, alpha: float | Tensor) -> Reweight:
        """Keys by the number of spans that they are in."""
        inside, spans = span_counts(call, self.spans, self.tokenizer)
        inside = inside.masked_fill(generated, 0)
        power = (lambda k: spans - k) if self.scale_position == "exclude" else (lambda k: torch.full_like(spans, k - 1))
        weight = lambda k: (alpha ** power(k).double()).to(call.map.att.stat_dtype)  # noqa: E731
        groups = [(inside == k, weight(k)) for k in range(1, int(inside.max()) + 1)]
        return Reweight(((generated.expand_as(inside), 1.0), *groups), weight(0), positive=True)
