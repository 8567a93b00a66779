"""CLIPScore (Hessel et al. 2021, arXiv 2104.08718, section 3) with a model that the user gives, and its minimum over parts.

`cosine` is the mean cosine of image and prompt (what T2I-CompBench calls CLIPScore), `clip_score` the paper's
2.5 max(cosine, 0); torchmetrics' figure of that name is 100 max(cosine, 0). `min_object` is Attend-and-Excite's: the smaller
cosine of the two halves of the prompt, split at " and " or " with "; that code averages text embeddings over templates,
which is left to the given model. Figures of two models cannot be compared, so the model is part of the note.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import RecordError
from .base import Mean, Metric, Ratio

WEIGHT = 2.5


def metric(model: str = "not stated") -> Metric:
    """Columns: `cosine`, `clip_score`, and for prompts of several parts `min_object`, `has_parts`.

    The record has `similarity`, the cosine of image and prompt, and perhaps `part_similarities`; `attnsteer.evals.clip.Similarity`
    computes them from a model while the images are there.

    Args:
        model: name and revision of the model, for the report.
    """
    return Metric(
        "clip_score",
        ("similarity",),
        _read,
        {
            "cosine": Mean("cosine"),
            "clip_score": Mean("clip_score"),
            "min_object": Ratio(("min_object",), ("has_parts",)),
        },
        when={"min_object": "has_parts"},
        note=f"model: {model}",
        better={"cosine": 1, "clip_score": 1, "min_object": 1},
    )


def _read(record: Mapping[str, Any]) -> dict[str, float]:
    cosine, parts = record["similarity"], list(record.get("part_similarities") or ())
    # Rounding may carry a cosine a little over one.
    if not all(-1.001 <= c <= 1.001 for c in (cosine, *parts)):
        raise RecordError(f"clip_score: the similarities {[cosine, *parts]} are no cosines in [-1, 1].")
    found = {"cosine": cosine, "clip_score": WEIGHT * max(cosine, 0.0)}
    return found | ({"min_object": min(parts), "has_parts": 1} if parts else {})
