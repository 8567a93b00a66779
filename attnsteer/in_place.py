"""What tells whether a tensor was changed where it stands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mark(tensor: Tensor, values: bool) -> Any:
    """What `same` compares with: the tensor's version.

    Args:
        values: whether to copy a tensor that counts no versions (of inference mode); without, nothing is noticed of it.
    """
    if tensor.is_inference():
        return tensor.clone() if values else None
    return tensor._version


def same(tensor: Tensor, marked: Any) -> bool:
    """Whether a tensor is as it was when it was marked."""
    if marked is None:
        return True
    if not isinstance(marked, Tensor):
        return tensor._version == marked
    if torch.equal(tensor, marked):
        return True
    # NaN, as in rows of a model that see no key, equals nothing.
    return tensor.is_floating_point() and torch.allclose(tensor, marked, rtol=0.0, atol=0.0, equal_nan=True)
