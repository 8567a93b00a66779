"""What readers share: rows that are checked against the sequence, and blocks of a call's map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..captured import blocks, checked_rows, chosen_rows, map_rows, needs_tokens
from ..errors import SelectionError, brief
from ..steering import find_host


def rows_of(call: AttnCall, rows: Any, tokenizer: Any = None) -> Tensor:
    """bool [B, n]: the rows of a call that a choice (of `captured.checked_rows`) names.

    Raises:
        SelectionError: no row of a sample is meant, or a number is outside of a sample's sequence.
    """
    B, _, n, _ = call.map.shape
    valid, index = call.rows.valid.expand(B, n), call.rows.index.expand(B, n)
    chosen = chosen_rows(call, rows, tokenizer).expand(B, n)
    wanted = list(range(*rows)) if isinstance(rows, tuple) else rows
    for b in range(B):
        if isinstance(wanted, list) and wanted and not isinstance(wanted[0], list):
            there = index[b][valid[b]].tolist()
            outside = [i for i in wanted if i not in there]
            if outside:
                raise SelectionError(
                    f"rows={brief(rows)}: {call.site.path} has no row {outside[0]} of sample {b}; its rows are those of tokens "
                    f"{min(there, default=0)} to {max(there, default=-1)}, counted from the first that is not padding."
                )
        if not bool(chosen[b].any()):
            raise SelectionError(f"rows={brief(rows)}: {call.site.path} has none of them in sample {b}.")
    return chosen


def row_blocks(call: AttnCall, heads: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their map [B, H, r, m]) of a call, block by block; no more than a bounded number of scores is built at once."""
    B, H, n, m = call.map.shape
    for block in blocks(n, B * (H if heads is None else heads) * m):
        at = torch.arange(block.start, min(block.stop, n), device=call.map.device)
        yield block, map_rows(call, at.expand(B, -1))


def needs_of_rows(model: Any, rows: Any) -> tuple[str, ...]:
    """What a choice of rows is read from, of what the host of `model` gives."""
    provides = find_host(model).provides
    wanted = {"segments"} & provides
    if needs_tokens(checked_rows(rows)) or "tokens" in provides:
        wanted.add("tokens")
    return tuple(sorted(wanted))
