"""Metrics, one per file: a function of one record, and aggregates that are functions of all samples.

A record is a flat dict that can be written as JSON. `sample(record)` turns it into a few numbers, which can be stored
beside it; `aggregate(samples)` turns the numbers of all samples into estimates with intervals; `compare(before, after)`
gives the paired differences of the same estimates. Importing this package loads neither torch nor a metric.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from ...errors import RecordError, UnknownName, did_you_mean

if TYPE_CHECKING:
    from .base import Metric

# Name -> (module, its function that builds the metric), so that asking for the list imports nothing.
METRICS: dict[str, str] = {
    "attention_iou": "attnsteer.evals.metrics.attention_iou",
    "binding": "attnsteer.evals.metrics.binding",
    "chair": "attnsteer.evals.metrics.chair",
    "choice": "attnsteer.evals.metrics.multiple_choice",
    "clip_score": "attnsteer.evals.metrics.clip_score",
    "contains": "attnsteer.evals.metrics.contains",
    "fid": "attnsteer.evals.metrics.fid",
    "fluency": "attnsteer.evals.metrics.fluency",
    "given": "attnsteer.evals.metrics.given",
    "grounding": "attnsteer.evals.metrics.grounding",
    "hrs": "attnsteer.evals.metrics.hrs",
    "instructions": "attnsteer.evals.metrics.instructions",
    "label_bias": "attnsteer.evals.metrics.label_bias",
    "layout": "attnsteer.evals.metrics.layout",
    "letter": "attnsteer.evals.metrics.letter",
    "mme": "attnsteer.evals.metrics.mme",
    "perplexity": "attnsteer.evals.metrics.perplexity",
    "pointing": "attnsteer.evals.metrics.pointing",
    "pope": "attnsteer.evals.metrics.pope",
    "precision_recall": "attnsteer.evals.metrics.precision_recall",
    "vqa": "attnsteer.evals.metrics.vqa",
}


def metrics() -> tuple[str, ...]:
    """The names of all metrics, sorted."""
    return tuple(sorted(METRICS))


def get_metric(name: str, **options: Any) -> Metric:
    """The metric called `name`, with its options (each module's `metric` function documents them).

    Raises:
        UnknownName: there is no such metric, or it has no such option; the message lists what exists.
        RecordError: an option has a value that the metric does not take, or names a file that it cannot read.
    """
    if name not in METRICS:
        raise UnknownName(
            f"there is no metric {name!r}; there are {', '.join(metrics())}.{did_you_mean(name, METRICS)}"
        )
    build = importlib.import_module(METRICS[name]).metric
    known = inspect.signature(build).parameters
    for option in options:
        if option not in known:
            there = ", ".join(known) or "none"
            raise UnknownName(
                f"the metric {name} has no option {option!r}; there are: {there}.{did_you_mean(option, known)}"
            )
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise RecordError(f"the metric {name} needs the option {option!r}; its other options: {', '.join(known)}.")
    try:
        return build(**options)
    except (TypeError, AttributeError) as error:
        raise RecordError(f"the metric {name} does not take the options {options!r}: {error}.") from error


def __getattr__(name: str) -> Any:
    if name in ("Metric", "Ratio", "Mean", "UndefinedMetric"):
        return getattr(importlib.import_module(".base", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
