"""Frechet distance between the features of images and those of a reference set (Heusel et al. 2017, arXiv 1706.08500, (6)).

    |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)),   S with N - 1

It is FID when the features are Inception's (`attnsteer.evals.features.inception`, extra `fid`); with others it has no
published counterpart. It is biased upwards in small sets: a thousand images say only which of two arms is nearer.

With the centred features X = Q R of a set, Tr (S1 S2)^(1/2) is the sum of the singular values of R1 R2^T over
sqrt((N1 - 1) (N2 - 1)): no matrix root, no rounding away of small eigenvalues, and cheap where N < d.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Metric


def metric(reference: str | Path | Tensor, features: str | None = None) -> Metric:
    """A sample is the record's `features` [d].

    Args:
        reference: features [N, d] of the reference images, or a file of `attnsteer.evals.features.save_reference`.
        features: name of what makes the features, for the report; a file with another name is refused.

    Raises:
        RecordError: the reference cannot be read or has other features.
    """
    from ..features import SetMetric, load_reference

    known, name = load_reference(reference, features)
    own = moments(known)

    def estimate(found: Tensor) -> dict[str, float]:
        return {"frechet_distance": distance(moments(found), own)}

    return SetMetric(
        "fid",
        ("features",),
        lambda record: {"features": list(record["features"])},
        note=f"features: {name}, {known.shape[1]} dimensions; reference of {len(known)} images",
        better={"frechet_distance": -1},
        estimate=estimate,
        dimensions=known.shape[1],
    )


Moments = tuple[Tensor, Tensor]


def moments(features: Tensor) -> Moments:
    """The mean [d], and R [min(N, d), d] with R^T R the covariance."""
    mean = features.mean(dim=0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    return mean, (torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred)


def distance(first: Moments, second: Moments) -> float:
    """The Frechet distance of two Gaussians."""
    (m1, r1), (m2, r2) = first, second
    shared = torch.linalg.svdvals(r1 @ r2.T).sum()
    found: Any = (m1 - m2).square().sum() + r1.square().sum() + r2.square().sum() - 2 * shared
    return max(0.0, float(found))
