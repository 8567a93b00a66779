"""Perplexity: exp of the mean negative log-likelihood per token, over all tokens of all texts.

As in lm-evaluation-harness, whose `word_perplexity` and `bits_per_byte` divide by words and bytes instead, and so allow
models with different tokenizers to be compared. What counts as context (a stride, a first token) is the caller's choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import RecordError
from .base import Metric, Statistic, Totals

UNITS = ("tokens", "words", "bytes")


def metric() -> Metric:
    """Columns: `tokens` and `log_likelihood_tokens` (nats), and where the record has them the same of `words`, `bytes`.

    The record has `log_likelihood`, the sum over the text's scored tokens, and `tokens`, their number; perhaps `words` and
    `bytes`, the numbers of the same text.
    """
    return Metric(
        "perplexity",
        ("log_likelihood", "tokens"),
        _read,
        {
            "perplexity": _per("tokens", lambda nats: nats.exp()),
            "word_perplexity": _per("words", lambda nats: nats.exp()),
            "bits_per_byte": _per("bytes", lambda nats: nats / math.log(2)),
        },
        when={"word_perplexity": "words", "bits_per_byte": "bytes"},
        better={"perplexity": -1, "word_perplexity": -1, "bits_per_byte": -1},
    )


def _per(unit: str, scale: Any) -> Statistic:
    def statistic(totals: Totals) -> Tensor:
        return scale(-totals[f"log_likelihood_{unit}"] / totals[unit])

    return statistic


def _read(record: Mapping[str, Any]) -> dict[str, float]:
    total = record["log_likelihood"]
    if not total <= 0:
        raise RecordError(f"perplexity: log_likelihood = {total}; a sum of logarithms <= 0 is needed.")
    found: dict[str, float] = {}
    for unit in UNITS:
        number = record.get(unit)
        if unit != "tokens" and number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise RecordError(f"perplexity: {unit} = {number!r}; a whole number, at least 1, is needed.")
        # Each unit has its own sum, so that texts without it do not count.
        found |= {unit: number, f"log_likelihood_{unit}": total}
    return found
