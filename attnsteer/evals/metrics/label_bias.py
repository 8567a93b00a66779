"""Whether a model of two labels does not know, or only says one of them too often.

AUC is the chance that a sample of the second label has a larger lead of that label than one of the first has (ties count half): the
Mann-Whitney statistic, which no threshold moves. `balanced` is the accuracy with the threshold at the median of the leads, so that
each label is said equally often (the batch calibration of Zhou et al. 2023, arXiv 2309.17249, has the mean there).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import RecordError
from .base import Metric


def metric() -> Metric:
    """Estimates: `auc`, `balanced`, `accuracy`, `says_first` and `first` (how often the first label is said, and is right).

    The record has two `choices`, the same in all records, their `scores` and the index of the right one, `answer`.
    """
    from ..features import SetMetric

    return SetMetric(
        "label_bias",
        ("choices", "scores", "answer"),
        _read,
        better={"auc": 1, "balanced": 1, "accuracy": 1},
        estimate=estimates,
        dimensions=2,
    )


def _read(record: Mapping[str, Any]) -> dict[str, Any]:
    scores, answer = [float(s) for s in record["scores"]], record["answer"]
    if len(scores) != 2 or len(record["choices"]) != 2:
        raise RecordError(
            f"label_bias: {len(scores)} scores of {len(record['choices'])} choices; it is about two labels."
        )
    if isinstance(answer, bool) or answer not in (0, 1):
        raise RecordError(f"label_bias: the answer {answer!r} is no index of two labels (0 is the first).")
    lead = scores[1] - scores[0]
    if not math.isfinite(lead):
        raise RecordError(
            f"label_bias: the scores {scores} have no finite difference; log-likelihoods in nats are needed."
        )
    return {"features": [lead, float(answer)]}


def estimates(found: Tensor) -> dict[str, float]:
    """The figures of leads of the second label and answers, [N, 2]; the AUC of samples of one label alone is one half."""
    lead, second = found[:, 0], found[:, 1] == 1
    pairs = lead[second][:, None] - lead[~second]
    auc = float(((pairs > 0).double() + (pairs == 0).double() / 2).mean()) if pairs.numel() else 0.5
    said = lead > 0
    above = lead > lead.median()
    return {
        "auc": auc,
        "balanced": float((above == second).double().mean()),
        "accuracy": float((said == second).double().mean()),
        "says_first": float((~said).double().mean()),
        "first": float((~second).double().mean()),
    }
