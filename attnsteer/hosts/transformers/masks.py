"""Whose token each slot is, read from what a forward is given: padding masks, 4-D masks, packed positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def padding_mask(mask: Any) -> Tensor | None:
    """A padding mask as bool [B, T]; anything else is none."""
    return mask.to(torch.bool) if isinstance(mask, Tensor) and mask.ndim == 2 else None


def whole_mask(mask: Any) -> Tensor | None:
    """A 4-D mask as bool [B, n, M], True where visible; of several, that of full attention. None: there is none."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next((m for m in mask.values() if isinstance(m, Tensor)), None))
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen[:, 0]


def roles_of_mask(seen: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(valid, request) of the slots of a whole prompt, bool and int [B, n], each None where there is nothing to say.

    Args:
        seen: bool [B, n, n], whether each row sees each key.

    A row is padding where it does not see itself, or sees a later row that does not see it back: padding that a library lets
    see everything, so that no row is empty. A row that sees nothing before itself starts a request.
    """
    n = seen.shape[1]
    later = torch.ones(n, n, dtype=torch.bool, device=seen.device).triu(1)
    alone = ~seen.diagonal(dim1=1, dim2=2)
    valid = ~(alone | (seen & later & ~seen.transpose(1, 2)).any(dim=-1))
    earlier = (seen & valid[:, None] & later.transpose(0, 1)).any(dim=-1)
    starts = valid & ~earlier
    request = None
    if bool((starts.sum(dim=-1) > 1).any()):
        request = (starts.long().cumsum(dim=-1) - 1).clamp_min(0)
    return (None if bool(valid.all()) else valid), request


def packed_requests(values: dict[str, Any], batch: int, new: int, uses_cache: bool) -> Tensor | None:
    """int [B, n] of the requests that `position_ids` pack into a row, or None.

    As the library does: only without a mask and without a cache; elsewhere it lets such rows see each other.
    """
    positions = values.get("position_ids")
    if values.get("attention_mask") is not None or uses_cache or not isinstance(positions, Tensor):
        return None
    if positions.ndim == 3 and positions.shape[0] == 4:
        # Multimodal rotary embeddings with an axis of their own for text; the others are no numbers of tokens.
        positions = positions[0]
    if positions.ndim != 2 or positions.shape[1] != new:
        return None
    request = torch.nn.functional.pad((positions.diff(dim=-1) != 1).long(), (1, 0)).cumsum(dim=-1)
    return request.expand(batch, -1) if bool((request[:, -1] > 0).any()) else None
