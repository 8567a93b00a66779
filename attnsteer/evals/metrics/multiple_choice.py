"""Accuracy of multiple choice by likelihood: the choice of the largest log-likelihood is the answer.

Source: the protocol of lm-evaluation-harness (`acc`, and `acc_norm`, which divides by the length of the choice in
bytes); ACT and ZeroTuning use the plain form over label tokens. Ties go to the first choice, as numpy's argmax.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RecordError
from .base import Mean, Metric, Ratio, Statistic


def metric(by: Sequence[str] = ()) -> Metric:
    """Columns: `right`, `right_by_bytes`, `confidence` (softmax over the choices at the answer), `loss` (its -log), `chance`.

    The record has `choices` (texts), `scores` (their log-likelihoods in nats) and `answer` (index of the right one).

    Args:
        by: categories with an accuracy and a confidence each of their own (`accuracy_NAME`, hyphens as underlines): the task and
            its guards in one report. The record then has `category`, one of them.

    Raises:
        RecordError: `by` is no list of names.
    """
    if isinstance(by, str) or not all(isinstance(name, str) and name for name in by):
        raise RecordError(f"choice: by={by!r}; give a list of the samples' categories.")
    names = {name: name.replace("-", "_") for name in by}

    def read(record: Mapping[str, Any]) -> dict[str, float]:
        found = _read(record)
        if not names:
            return found
        if record["category"] not in names:
            raise RecordError(f"choice: a sample's category is {record['category']!r}; by has {', '.join(names)}.")
        own = names[record["category"]]
        return found | {
            f"is_{own}": 1,
            f"right_{own}": found["right"],
            f"confidence_{own}": found["confidence"],
        }

    parts: dict[str, Statistic] = {}
    for own in names.values():
        parts[f"accuracy_{own}"] = Ratio((f"right_{own}",), (f"is_{own}",))
        parts[f"confidence_{own}"] = Ratio((f"confidence_{own}",), (f"is_{own}",))
    return Metric(
        "choice",
        ("choices", "scores", "answer", *(("category",) if names else ())),
        read,
        {
            "accuracy": Mean("right"),
            "accuracy_by_bytes": Mean("right_by_bytes"),
            "confidence": Mean("confidence"),
            "loss": Mean("loss"),
            "chance": Mean("chance"),
            **parts,
        },
        correct="right",
        when={f"{kind}_{own}": f"is_{own}" for own in names.values() for kind in ("accuracy", "confidence")},
        better={"accuracy": 1, "accuracy_by_bytes": 1, "confidence": 1, "loss": -1, **dict.fromkeys(parts, 1)},
    )


def _read(record: Mapping[str, Any]) -> dict[str, float]:
    choices, scores, answer = list(record["choices"]), [float(s) for s in record["scores"]], record["answer"]
    if len(choices) != len(scores) or not choices:
        raise RecordError(f"choice: {len(choices)} choices and {len(scores)} scores; give one score per choice.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise RecordError(f"choice: the answer {answer!r} is no index of the {len(choices)} choices (0 is the first).")
    # A likelihood of zero is a score of -inf; it may lose, but not be compared with another one, and NaN means nothing.
    if any(math.isnan(s) or s == math.inf for s in scores) or max(scores) == -math.inf:
        raise RecordError(f"choice: the scores {scores} cannot be ranked; log-likelihoods in nats are needed.")
    sizes = [max(1, len(str(c).encode())) for c in choices]
    by_bytes = [s / n for s, n in zip(scores, sizes, strict=True)]
    best = max(scores)
    log_sum = best + math.log(sum(math.exp(s - best) for s in scores))
    loss = log_sum - scores[answer]
    return {
        "right": int(scores.index(best) == answer),
        "right_by_bytes": int(by_bytes.index(max(by_bytes)) == answer),
        "confidence": math.exp(scores[answer] - log_sum),
        # An impossible answer costs as much as the least probability that a float can hold.
        "loss": loss if math.isfinite(loss) else -math.log(5e-324),
        "chance": 1 / len(choices),
    }
