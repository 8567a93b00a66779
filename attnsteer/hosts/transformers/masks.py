"""Whose token each slot is, read from what a forward is given: padding masks, 4-D masks, packed positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedHost

# A float mask holds zeros, biases of any size above this, and what hides a key: half of the dtype's minimum, or less.
LEAST_BIAS = -1e4


def padding_mask(mask: Any) -> Tensor | None:
    """A padding mask as bool [B, T]; anything else is none."""
    return mask.to(torch.bool) if isinstance(mask, Tensor) and mask.ndim == 2 else None


def whole_mask(mask: Any) -> Tensor | None:
    """A mask of rows and keys as bool [B, n, M], True where visible; of several, that of full attention. None: there is none.

    Raises:
        UnsupportedHost: whether it shows a key to a row cannot be said: it differs by head, or hides with numbers such as -1e9.
    """
    if isinstance(mask, dict):
        known = {name: m for name, m in mask.items() if m is not None}
        mask = known.get("full_attention", next(iter(known.values()), None))
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        mask = _of_blocks(mask)
    if mask.ndim != 4:
        raise UnsupportedHost(
            f"attention_mask has {mask.ndim} axes; give [B, T] for padding or [B, 1, n, m] for the rows and keys themselves."
        )
    if mask.dtype == torch.bool:
        seen = mask
    else:
        seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
        if mask.is_floating_point() and bool((seen & (mask <= LEAST_BIAS)).any()):
            raise UnsupportedHost(
                f"attention_mask has values such as {float(mask[seen].min()):.3g}, which neither show a key nor surely hide it. "
                "Give a bool mask, or torch.finfo(dtype).min where a key is hidden."
            )
    if seen.shape[1] > 1 and not bool((seen == seen[:, :1]).all()):
        raise UnsupportedHost(
            "attention_mask hides other keys from other heads, so whose token a row is cannot be said. Give one mask for all heads."
        )
    return seen[:, 0]


def _of_blocks(mask: Any) -> Tensor:
    """A block mask of flex attention as bool [B, 1, n, M]."""
    if not hasattr(mask, "mask_mod"):
        raise UnsupportedHost(
            f"attention_mask is a {type(mask).__name__}, which cannot be read. Give a tensor [B, T] or [B, 1, n, m]."
        )
    from torch.nn.attention.flex_attention import create_mask

    B, _, n, m = mask.shape
    return create_mask(mask.mask_mod, B, 1, n, m, device=mask.kv_num_blocks.device)


def roles_of_mask(
    seen: Tensor,
    past: int = 0,
    valid: Tensor | None = None,
    request: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(valid, request) of all slots so far, bool and int [B, T], each None where there is nothing to say.

    Args:
        seen: bool [B, n, past + n], whether each row sees each key. valid, request: of the `past` slots, as returned before.
        positions: int [B or 1, n], `position_ids` of a model in which a window may hide all that a token has before it.

    A row is padding where it does not see itself, or sees a later row that does not see it back: padding that a library lets
    see everything, so that no row is empty. A row that sees nothing before itself starts a request; others belong to that of the
    last token before them that they see.

    Raises:
        UnsupportedHost: a row sees tokens of several requests, or the requests are interleaved, or a request would begin where
            positions do not.
    """
    B, n, length = seen.shape
    like: dict[str, Any] = {"dtype": torch.bool, "device": seen.device}
    own, later = seen[:, :, past:], torch.ones(n, n, **like).triu(1)
    new = own.diagonal(dim1=1, dim2=2) & ~(own & later & ~own.transpose(1, 2)).any(dim=-1)
    old = torch.ones(B, past, **like) if valid is None else valid[:, :past].expand(B, -1)
    valid = torch.cat([old, new], dim=1)
    slot = torch.arange(length, device=seen.device)
    earlier = seen & valid[:, None] & (slot < slot[past:, None])
    starts = new & ~earlier.any(dim=-1)
    told = None if bool(valid.all()) else valid
    if request is None and bool((starts.sum(dim=-1) + old.any(dim=-1) <= 1).all()):
        return told, None
    if positions is not None:
        # Padding that sees itself only is no sequence that others go on with; before the first one anything may stand.
        begun = old.any(dim=-1, keepdim=True) | ((new & ~starts).long().cumsum(dim=-1) > 0)
        if bool((starts & begun & (positions.to(seen.device) != 0)).any()):
            raise UnsupportedHost(
                "attention_mask shows some token nothing before itself, as if a sequence began there, but its position is not 0: a "
                "window hides what it belongs to (behind a hole, or in a tree). Give a padding mask [B, T], or begin the positions "
                "of each sequence with 0."
            )
    before = torch.zeros(B, past, dtype=torch.long, device=seen.device) if request is None else request[:, :past]
    top = before.amax(dim=-1, keepdim=True) if past else before.new_full((B, 1), -1)
    named = torch.cat([before.expand(B, -1), top + starts.long().cumsum(dim=-1)], dim=1)
    # Each row points at the last token before it that it sees; following the pointers ends at a known slot.
    parent = torch.where(earlier, slot, -1).amax(dim=-1)
    link = torch.cat([slot[:past].expand(B, -1), torch.where((parent >= 0) & new, parent, slot[past:])], dim=1)
    for _ in range(n.bit_length()):
        link = link.gather(1, link)
    request = torch.where(valid, named.gather(1, link), 0)
    # Padding is counted to the request before it.
    filled = request.cummax(dim=-1).values
    other = seen & (valid[:, None] & new[:, :, None]) & (filled[:, None] != filled[:, past:, None])
    if bool((valid & (request != filled)).any()) or bool(other.any()):
        raise UnsupportedHost(
            "attention_mask packs several sequences into a row and interleaves them, or lets a token see several of them. Put each "
            "sequence in one piece, or in a batch row of its own; let padding inside and behind sequences see nothing."
        )
    return told, filled


def looks_both_ways(seen: Tensor, valid: Tensor | None) -> bool:
    """Whether a token sees a later token, in a call with the mask `seen` [B, n, n]; `valid`: bool [B, n], None: no padding."""
    later = seen.triu(1)
    return bool((later if valid is None else later & valid[:, None] & valid[:, :, None]).any())


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
