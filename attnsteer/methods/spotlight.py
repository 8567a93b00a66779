"""SpotLight: lifts a row's attention on user spans towards a target share when it is below it.

Venkateswaran, Contractor, "SpotLight Your Instructions" (EACL 2026, arXiv 2505.12025). The authors' toolkit
(AgentToolkit/agent-lifecycle-toolkit at 8f0ab75) pools one share per sample over all heads and rows: `released_code`. Its span
finder takes the token before a span as well where that token ends at the span's first character; give the ranges to do the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall, Reweight, Share
from ..intervention import Intervention
from ..parameters import flag, is_all, number
from ..registry import register_method
from ..tokens import Tokens
from ._spans import check_spans, marked, span_keys


@register_method
@dataclass(frozen=True)
class SpotLight(Intervention):
    """Where the share psi of a row on the spans is below the target t, add log(t / psi) to their scores.

    The new share is t / (1 + t - psi), at most t. Rows that see no marked token are left alone.

    Args:
        spans: strings to find in the text (then give a tokenizer), or per sample a list of (start, stop) token
            ranges counted from the sample's first valid token.
        target: share t in (0, 1); 0 changes nothing.
        pooled: one psi per sample (of packed ones, for each), the mean over the selected heads and the valid rows of the call.
            The rows of a prompt then look ahead; generated tokens, which may come several in a call, have one each.
        tokenizer: for spans that are strings; not saved.
    """

    spans: Any = marked()
    target: float = number(0.2, low=0, below=1, per_sample=True, learnable=True)
    pooled: bool = flag(False)
    tokenizer: Any = field(default=None, kw_only=True, repr=False, compare=False, metadata={"save": False})

    kinds = ("self",)
    needs = ("tokens",)

    @classmethod
    def released_code(cls, spans: Any, target: float = 0.2, **other: Any) -> SpotLight:
        """The authors' toolkit: one share per sample and layer, over all heads and valid rows of the call.

        Left out are its faults: 1e-10 on every weight, future keys included, and NaN where no row sees a span.
        """
        return cls(spans, target, pooled=True, **other)

    @property
    def looks_ahead(self) -> bool:  # type: ignore[override]
        """One share is a mean over the prompt's rows."""
        return self.pooled

    @property
    def pools_heads(self) -> bool:  # type: ignore[override]
        """One share is a mean over heads."""
        return self.pooled

    @property
    def row_local(self) -> bool:  # type: ignore[override]
        """One share is a mean over rows."""
        return not self.pooled

    @property
    def steady(self) -> bool:  # type: ignore[override]
        """The marked tokens and the target stay; one share over heads is that of the step."""
        return not self.pooled

    def check_tokens(self, tokens: Tokens) -> None:
        check_spans(tokens, self.spans, self.tokenizer)

    def weights(self, call: AttnCall) -> Reweight | Share | None:
        keys = call.once("keys", lambda: span_keys(call, self.spans, self.tokenizer))
        if is_all(self.target, 0.0):
            return None
        target = call.each(self.target)
        if not self.pooled:
            return Share(keys, lambda share: _lifted(share, target), scale_sinks=True)
        share = call.map.mass(keys)
        share = self._pooled(call, share)
        low = (share > 0) & (share < target)
        weight = torch.where(low, target / share.clamp_min(torch.finfo(share.dtype).tiny), 1.0)
        return Reweight(((keys, weight),))

    @staticmethod
    def _pooled(call: AttnCall, share: Tensor) -> Tensor:
        """The mean of `share` [B, H, n] over heads, and over the rows of the prompt, in the same shape."""
        own = call.over_heads(share, "mean")
        if call.phase == "decode":
            return own.expand_as(share)
        prompt = call.rows.prompt[:, None].to(share.dtype)
        whole = _sums(call, own * prompt) / _sums(call, prompt).clamp_min(1.0)
        return torch.where(call.rows.generated[:, None], own, whole).expand_as(share)


def _sums(call: AttnCall, values: Tensor) -> Tensor:
    """`values` [B or 1, 1, n] summed over the rows of each request, for each row of it [B or 1, 1, n or 1]."""
    if not call.packed:
        return values.sum(dim=2, keepdim=True)
    request = call.rows.request[:, None].expand(max(len(values), len(call.rows.request)), -1, -1)
    sums = values.new_zeros(len(request), 1, int(request.max()) + 1)
    return sums.scatter_add(2, request, values.expand(len(request), -1, -1)).gather(2, request)


def _lifted(share: Tensor, target: float | Tensor) -> Tensor:
    """psi t / psi of psi t / psi + (1 - psi), where psi is below t."""
    return torch.where(share < target, target / (1.0 + target - share), share)
