"""Patterns of attention by name: which keys a row may look at, drawn up for some rows of a call at a time."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError, did_you_mean
from ..kernels.problem import visible

# Those that end in a number, and what it is; the others have none.
NUMBERED = {"offset": "how many tokens back", "block": "tokens in a block"}
NAMES = (
    "all",
    "previous",
    "next",
    "self",
    "first",
    "same_token",
    "other_same_token",
    "after_same_token",
    "sentence",
    "span",
)
OF_IDS = ("same_token", "other_same_token", "after_same_token", "sentence")


def checked_pattern(name: str) -> tuple[str, int]:
    """(name, number) of "previous", "offset:3" and the like.

    Raises:
        SelectionError: there is no such pattern.
    """
    kind, _, number = name.partition(":")
    # Beyond ten digits no tensor of token numbers has it.
    if kind in NUMBERED and re.fullmatch(r"-?\d{1,10}", number) and (kind == "offset" or int(number) > 0):
        return kind, int(number)
    if kind in NAMES and not number:
        return kind, 0
    known = [*NAMES, *(f"{k}:N" for k in NUMBERED)]
    raise SelectionError(f"pattern {name!r}: one of {known}.{did_you_mean(name, known)}")


def target_token(kind: str, number: int, index: Tensor) -> Tensor | None:
    """The number of the one token that each row of the numbers `index` looks at; None: the pattern has several for a row."""
    if kind == "first":
        return torch.zeros_like(index)
    back = {"previous": 1, "next": -1, "self": 0, "offset": number}.get(kind)
    return None if back is None else index - back


def pattern_rows(
    call: AttnCall, kind: str, number: int, at: Tensor, spans: Any, tokenizer: Any, ends: tuple[int, ...]
) -> Tensor:
    """bool [B, r, m]: the keys of the pattern for the rows `at` [B, r], whether or not they see them.

    Args:
        spans: of "span": rows of a span look at the keys of the same one. ends: of "sentence": ids of the tokens that end one.
    """
    B = len(at)
    i = call.rows.index.expand(B, -1).gather(1, at)[..., None]
    j = torch.where(call.keys.valid, call.keys.index, -(2**40))[:, None]
    target = target_token(kind, number, i)
    if target is not None:
        return (j == target) & (j >= 0)
    if kind == "all":
        return (j >= 0).expand(B, at.shape[1], -1)
    if kind == "block":
        return torch.div(i, number, rounding_mode="floor") == torch.div(j, number, rounding_mode="floor")
    if kind == "span":
        found = torch.zeros(B, at.shape[1], call.keys.size, dtype=torch.bool, device=at.device)
        for ranges in zip(*_even(call.tokens.spans(spans, tokenizer)), strict=True):
            for row, (start, stop) in enumerate(ranges):
                found[row] |= (
                    (i[row] >= start) & (i[row] < stop) & (j[row % len(j)] >= start) & (j[row % len(j)] < stop)
                )
        return found
    return _by_ids(call, kind, at, i, j, ends)


def _even(spans: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """Lists of one length, filled with spans that hold nothing."""
    most = max(map(len, spans))
    return [[*own, *[(-1, -1)] * (most - len(own))] for own in spans]


def grouped(call: AttnCall, kind: str, number: int, ends: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """(group of each key, int [B or 1, m], of each row, [B or 1, n]), where rows look at the keys of their group; None: not so.

    Of calls whose rows and keys are valid tokens in a row. "other_same_token" has the groups of "same_token".
    """
    if kind == "all":
        return torch.zeros_like(call.keys.index[:1]), torch.zeros_like(call.rows.index[:1])
    if kind == "block":
        of = lambda track: torch.div(track.index[:1], number, rounding_mode="floor")  # noqa: E731
        return of(call.keys), of(call.rows)
    if kind not in OF_IDS or call.tokens.ids is None:
        return None
    ids = call.tokens.ids.to(call.keys.slot.device)
    if ids.shape[1] < call.keys.size:
        return None
    if kind == "sentence":
        number_of = _sentences(ids, ends)
        return number_of[:, call.keys.slot], number_of[:, call.rows.slot]
    keys = ids[:, call.keys.slot]
    if kind == "after_same_token":
        # The first follows none.
        keys = torch.cat([torch.full_like(keys[:, :1], -1), keys[:, :-1]], dim=1)
    return keys, ids[:, call.rows.slot]


def _sentences(ids: Tensor, ends: tuple[int, ...]) -> Tensor:
    """The number of each token's sentence, [B, T]; the token that ends one belongs to it."""
    number = torch.isin(ids, torch.tensor(ends, device=ids.device)).long().cumsum(dim=1)
    return torch.nn.functional.pad(number, (1, 0))[:, :-1]


def _by_ids(call: AttnCall, kind: str, at: Tensor, i: Tensor, j: Tensor, ends: tuple[int, ...]) -> Tensor:
    ids = call.tokens.ids
    if ids is None:
        raise SelectionError(
            f"the pattern {kind!r} compares token ids, which this call does not have (it was given embeddings); give a map."
        )
    ids = ids.to(at.device)
    keys = ids[:, call.keys.slot.clamp_max(ids.shape[1] - 1)][:, None]
    rows = ids[:, call.rows.slot].expand(len(at), -1).gather(1, at)[..., None]
    if kind == "sentence":
        number = _sentences(ids, ends)
        of_keys = number[:, call.keys.slot.clamp_max(ids.shape[1] - 1)][:, None]
        return (of_keys == number[:, call.rows.slot].expand(len(at), -1).gather(1, at)[..., None]) & (j >= 0)
    if kind == "after_same_token":
        # Key j follows a token that is that of the row.
        before = ids[:, (call.keys.slot - 1).clamp(0, ids.shape[1] - 1)][:, None]
        return (before == rows) & (j >= 1)
    same = (keys == rows) & (j >= 0)
    return same if kind == "same_token" else same & (j != i)


def seen_rows(call: AttnCall, at: Tensor) -> Tensor:
    """bool [B, 1 or H, r, m]: which keys the rows `at` [B, r] see, by the masks of the call alone."""
    (att, heads), B = call.map.ungathered, len(at)
    own = lambda t: t if t is None or heads is None or t.shape[1] == 1 else t[:, list(heads)]  # noqa: E731
    found = torch.ones(B, 1, at.shape[1], att.k.shape[2], dtype=torch.bool, device=at.device)
    if att.causal:
        found = (torch.arange(found.shape[3], device=at.device) <= at[..., None])[:, None]
    mask, bias = own(att.mask4()), own(att.key_bias)
    if mask is not None:
        if mask.shape[2] > 1:
            mask = mask.expand(B, -1, -1, -1)
            mask = mask.gather(2, at[:, None, :, None].expand(B, mask.shape[1], at.shape[1], mask.shape[3]))
        found = found & visible(mask)
    if bias is not None:
        found = found & visible(bias)[:, :, None]
    return found


def sees_key(call: AttnCall, at: Tensor) -> Tensor:
    """bool [B, 1 or H, n]: whether each row of a call sees the one key `at` int [B, n], by the masks of the call alone."""
    (att, heads), (B, n) = call.map.ungathered, at.shape
    own = lambda t: t if heads is None or t.shape[1] == 1 else t[:, list(heads)]  # noqa: E731
    found = torch.ones_like(at, dtype=torch.bool)[:, None]
    if att.causal:
        found = (at <= torch.arange(n, device=at.device))[:, None]
    for hides in (att.mask4(), None if att.key_bias is None else att.key_bias[:, :, None]):
        if hides is not None:
            wide = own(hides).expand(B, -1, n, -1)
            found = found & visible(wide.gather(3, at[:, None, :, None].expand(-1, wide.shape[1], -1, 1)))[..., 0]
    return found
