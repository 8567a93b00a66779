"""Precision and recall of image sets by nearest neighbours (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2), and
density and coverage (Naeem et al. 2020, arXiv 2002.09797, equations 4 and 5), over given features.

A ball around a vector reaches to its k-th nearest neighbour within its own set (itself not counted).

    precision  share of the images inside of a ball of the reference     (quality)
    recall     share of the reference inside of a ball of the images     (variety)
    density    balls of the reference that an image is in, over k, on average
    coverage   share of the balls of the reference that hold an image

Coverage and recall grow with the number of images: compare sets of one size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import RecordError
from .base import Metric


def metric(reference: str | Path | Tensor, features: str | None = None, k: int = 3) -> Metric:
    """A sample is the record's `features` [d].

    Args:
        reference, features: see `attnsteer.evals.metrics.fid`. k: 3 in the first paper, 5 in the second.

    Raises:
        RecordError: the reference cannot be read, or has no k neighbours.
    """
    from ..features import SetMetric, load_reference

    known, name = load_reference(reference, features)
    own = radii(known, k)

    def estimate(found: Tensor) -> dict[str, float]:
        return compare(found, radii(found, k), known, own, k)

    return SetMetric(
        "precision_recall",
        ("features",),
        lambda record: {"features": list(record["features"])},
        note=f"features: {name}, {known.shape[1]} dimensions; reference of {len(known)} images; k = {k}",
        better=dict.fromkeys(("precision", "recall", "density", "coverage"), 1),
        estimate=estimate,
        dimensions=known.shape[1],
    )


def radii(features: Tensor, k: int) -> Tensor:
    """The distance of each vector to its k-th nearest neighbour in the set: [N, d] -> [N]."""
    if not 1 <= k < len(features):
        raise RecordError(
            f"precision_recall: k = {k} with {len(features)} images; k is at least 1 and less than the images."
        )
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    # Oneself is the nearest of all, also among equal vectors.
    return distances.kthvalue(k + 1, dim=1).values


def compare(found: Tensor, found_radii: Tensor, known: Tensor, known_radii: Tensor, k: int) -> dict[str, float]:
    """The four figures of `found` [N, d] against `known` [M, d]."""
    distances = torch.cdist(found, known, compute_mode="donot_use_mm_for_euclid_dist")
    inside = distances <= known_radii
    return {
        "precision": float(inside.any(dim=1).double().mean()),
        "recall": float((distances <= found_radii[:, None]).any(dim=0).double().mean()),
        "density": float(inside.double().sum(dim=1).mean() / k),
        "coverage": float(inside.any(dim=0).double().mean()),
    }
