"""InstABoost: multiplies the attention that every row pays to an instruction, and renormalises.

Guardieiro et al., "Instruction Following by Boosting Attention of Large Language Models" (arXiv 2506.13734, 2025); official code
BrachioLab/InstABoost (src/model_interaction_utils.py at 1df1b5d), where the factor is 3 by default, and is searched over 1, 3,
..., 19 on validation prompts. There a learned sink keeps its share of a row; here it is renormalised with the other keys, as a bias
of the scores does. GUIDE (Silva et al., arXiv 2409.19001, 2024; netop-team/pay_attention_experiment) adds a constant to the scores
of the marked tokens, which is the same with the constant's exponential as the factor: `InstABoost.guide`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall, Reweight
from ..intervention import Intervention
from ..parameters import PerSample, flag, is_all, number
from ..registry import register_method
from ..tokens import Tokens
from ._spans import check_spans, marked, span_keys

# The constant of GUIDE, as others quote it; its paper's own default was not readable.
GUIDE_DELTA = 2.0


@register_method
@dataclass(frozen=True)
class InstABoost(Intervention):
    """A'_ij = M A_ij / C_i for the tokens of the instruction, A_ij / C_i for all others: log M is added to their scores.

    Args:
        spans: the instruction: strings to find in the text (then give a tokenizer), or per sample a list of (start, stop) token
            ranges counted from the sample's first valid token.
        factor: M > 0; 1 changes nothing.
        exclude_first_token: leave the first token of the sample out of the spans, in models with a start token the one that
            takes what no other token does (see `released_prefix`).
        tokenizer: for spans that are strings; not saved.

    The same rule for the rows of the prompt and of generated tokens, in all heads that `where` selects (the paper: all).
    """

    spans: Any = marked()
    factor: float = number(3.0, above=0, per_sample=True, learnable=True)
    exclude_first_token: bool = flag(True, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, repr=False, compare=False, metadata={"save": False})

    kinds = ("self",)
    needs = ("tokens",)
    row_local = True
    steady = True

    @classmethod
    def guide(cls, spans: Any, delta: Any = GUIDE_DELTA, **other: Any) -> InstABoost:
        """GUIDE: `delta` is added to the scores of the marked tokens, the first one of a sample included if it is marked.

        Args:
            delta: a number, one per sample, or a tensor that needs a gradient; 0 changes nothing.
        """
        value = PerSample(delta) if isinstance(delta, (list, tuple, Tensor)) else delta
        factor = value.mapped(torch.exp) if isinstance(value, PerSample) else math.exp(value)
        return cls(spans, factor, **{"exclude_first_token": False, **other})

    @classmethod
    def released_prefix(cls, lengths: Any, factor: float = 3.0, **other: Any) -> InstABoost:
        """What the code of the paper's first version boosts: all up to the instruction's end, start token and chat header too.

        Args:
            lengths: for each sample, how many of its first tokens. There: the tokens of the instruction alone in the chat
                template, less five, which fits one template; later versions mark the instruction itself.
        """
        return cls([[(0, length)] for length in lengths], factor, **{"exclude_first_token": False, **other})

    def check_tokens(self, tokens: Tokens) -> None:
        check_spans(tokens, self.spans, self.tokenizer)

    def weights(self, call: AttnCall) -> Reweight | None:
        if is_all(self.factor, 1.0):
            return None
        return call.once("edit", lambda: Reweight(((self._keys(call), call.each(self.factor)),), positive=True))

    def _keys(self, call: AttnCall) -> Tensor:
        keys = span_keys(call, self.spans, self.tokenizer)
        return keys & (call.keys.index != call.keys.start)[:, None] if self.exclude_first_token else keys
