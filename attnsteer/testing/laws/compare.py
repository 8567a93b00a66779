"""Comparisons of the laws. What does not hold is raised as `Broken`, with the difference and the tolerance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cases import HostCase

EXACT = 1e-5
# bf16 carries 8 bits: the kernel's own output and the merged one are each off by up to half of the last.
HALF = 2e-2


class Broken(AssertionError):
    """What does not hold, in words; the largest absolute difference and the tolerance, where numbers were compared."""

    def __init__(self, what: str, difference: float | None = None, tolerance: float | None = None):
        super().__init__(what)
        self.what, self.difference, self.tolerance = what, difference, tolerance


def require(condition: bool, what: str) -> None:
    """Raise `Broken` unless the condition holds."""
    if not condition:
        raise Broken(what)


def gap(a: Tensor, b: Tensor, where: Tensor | None = None, what: str = "the output") -> float:
    """Largest absolute difference, over the rows `where` (bool [B, T]) only, if given; `what`: the name of both in errors."""
    if a.shape != b.shape:
        raise Broken(f"the shapes differ, {tuple(a.shape)} and {tuple(b.shape)}")
    far = (a.float() - b.float()).abs()
    far = far if where is None else far[where]
    require(bool(torch.isfinite(far).all()), f"{what}: NaN or infinity in it")
    return float(far.max()) if far.numel() else 0.0


def close(a: Tensor, b: Tensor, tolerance: float, what: str, where: Tensor | None = None) -> None:
    """`what` must be the same up to the tolerance."""
    far = gap(a, b, where, what)
    if far > tolerance:
        raise Broken(what, far, tolerance)


def same(a: Tensor, b: Tensor, what: str) -> None:
    """`what` must be the same bit for bit."""
    if not torch.equal(a, b):
        raise Broken(f"{what}, bit for bit", gap(a, b, what=what), 0.0)


def moved(a: Tensor, b: Tensor, what: str, by: float = 0.0) -> None:
    """`what` must differ by more than `by`."""
    far = gap(a, b, what=what)
    if far <= by:
        raise Broken(f"{what}: it moved by {far:.2g}, and more than {by:.2g} was expected")


def scale(host: HostCase, plain: Tensor) -> float:
    """Latents are compared relative to their size, logits as they are."""
    return 1.0 if host.family == "transformers" else max(1.0, float(plain.abs().max()))


def valid_rows(inputs: dict[str, Any], out: Tensor) -> Tensor:
    """bool [B, T] of the rows whose outputs mean something; rows behind the mask's columns were decoded."""
    mask = inputs.get("attention_mask")
    if mask is None or "decoder_input_ids" in inputs or out.ndim != 3:
        return torch.ones(out.shape[:2], dtype=torch.bool)
    more = out.shape[1] - mask.shape[1]
    return torch.nn.functional.pad(mask.bool(), (0, more), value=True)
