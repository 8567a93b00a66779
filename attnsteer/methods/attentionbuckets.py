"""AttentionBuckets: the same context under several bases of the rotary embedding, the streams' predictions mixed by confidence.

Chen et al., "Fortify the Shortest Stave in Attention" (ACL 2024, arXiv 2312.04455); official code Fiorina1212/Attention-buckets
at d7018a6 (modeling_llama.py, inference/config.py). There the last position's logits alone are mixed, of one sample; here those of
each position, of any batch. The paper's text was not readable; that it mixes distributions, where the code mixes logits, is from a
figure's caption as quoted by others, so that `mix="probs"` and its weights are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SelectionError
from ..intervention import Intervention
from ..parameters import choice, parsed, plain
from ..registry import register_method
from ..where import Where

TOOLS = (10000.0, 17500.0, 18000.0, 19000.0, 20000.0, 25000.0)
RETRIEVAL = (10000.0, 13000.0, 16000.0, 19000.0, 22000.0, 25000.0, 28000.0)


def _bases(value: Any) -> tuple[float, ...]:
    given = plain(value)
    if not isinstance(given, (list, tuple)) or not given:
        raise SelectionError("give one base or more, e.g. (10000, 18000).")
    if any(isinstance(b, bool) or not isinstance(b, (int, float)) or not 1 < b < 1e12 for b in given):
        raise SelectionError("give numbers above 1, e.g. (10000, 18000).")
    return tuple(float(b) for b in given)


@register_method
@dataclass(frozen=True)
class AttentionBuckets(Intervention):
    """L = sum_s omega_s L_s with omega = softmax_s(max_v L_s[v]): L_s are the logits of the stream whose rotary base is b_s.

    Args:
        bases: b_s, one for each stream; by default the list of the official code for tool use. `RETRIEVAL` is its list for
            retrieved documents; `attnsteer.search.rotary_bases` searches for others. The model's own base alone changes nothing.
        mix: "logits" as above, the official code; "probs": the distributions are averaged, weighted by their largest
            probabilities, and their logarithm takes the place of the logits.

    All layers and heads, at N times the computation and N caches (two bases: 1.97 times a prefill of 4,096 tokens, 2.08 times a
    decode step, docs/capture.md): each stream keeps its own, with keys rotated by its base. Streams run one after the other. Scaled
    rotary embeddings are scaled as the model's are, from the other base; models whose frequencies do not follow from one base are
    refused.
    """

    bases: tuple[float, ...] = parsed(_bases, "numbers above 1", TOOLS)
    mix: str = choice("logits", ("logits", "probs"))

    kinds = ("self",)
    needs = ("bases",)
    row_local = True

    def prepared(self, target: Any) -> AttentionBuckets:
        """The same; a part of the model cannot have streams of its own."""
        if self.where != Where():
            raise SelectionError(
                f"AttentionBuckets runs the whole model for each base; {self.where} selects a part of it."
            )
        return self

    def around(self, forward: Callable[..., Any], inputs: Any, run: Any) -> Any:
        streams = [forward(inputs.with_base(base)) for base in self.bases]
        if len(streams) == 1:
            return streams[0]
        return streams[0].with_logits(mixed([stream.logits for stream in streams], self.mix))


def mixed(logits: list[Tensor], mix: str) -> Tensor:
    """One tensor [..., V] of the streams' [..., V], each position by itself; statistics in fp32, in the dtype that came."""
    every = torch.stack([x if x.dtype == torch.float64 else x.float() for x in logits])
    if mix == "logits":
        weight = torch.softmax(every.amax(dim=-1, keepdim=True), dim=0)
        return (weight * every).sum(dim=0).to(logits[0].dtype)
    log_p = torch.log_softmax(every, dim=-1)
    top = log_p.amax(dim=-1, keepdim=True)
    return torch.logsumexp(log_p + top - torch.logsumexp(top, dim=0), dim=0).to(logits[0].dtype)
