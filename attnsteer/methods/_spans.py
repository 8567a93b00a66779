"""What methods on user-marked text share: spans as key sets, and where the prompt ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError, UnsupportedHost
from ..tokens import Tokens, token_range


def checked_spans(name: str, spans: Any) -> Any:
    """`spans` as nested tuples, their form validated; strings and ranges are resolved against the batch later."""
    if isinstance(spans, str):
        return spans
    listed = isinstance(spans, (list, tuple)) and len(spans) > 0
    words = listed and all(isinstance(s, str) for s in spans)
    samples = listed and all(isinstance(s, (list, tuple)) for s in spans)
    if not words and not samples:
        raise SelectionError(
            f"{name}(spans={spans!r}): give strings to find in the text (with a tokenizer), or per sample a list of "
            "(start, stop) token ranges."
        )
    if samples:
        if any(len(s) == 2 and all(isinstance(i, int) for i in s) for s in spans):
            raise SelectionError(f"{name}(spans={spans!r}): give one list of ranges per sample, e.g. [[(0, 4)]].")
        for item in (i for s in spans for i in s if not isinstance(i, str)):
            token_range(item)
    return _tuples(spans)


def check_spans(tokens: Tokens, spans: Any, tokenizer: Any) -> None:
    """Raise a SelectionError where the batch has no such tokens (see `Tokens.spans`, which remembers what it found)."""
    tokens.spans(spans, tokenizer)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def span_keys(call: AttnCall, spans: Any, tokenizer: Any) -> Tensor:
    """The marked tokens as a key set [B, 1, m] of this call."""
    return call.span_keys(_found(call, spans, tokenizer))


def span_counts(call: AttnCall, spans: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """(in how many spans each key is [B, 1, m], spans of each sample [B, 1, 1]), int64."""
    found = _found(call, spans, tokenizer)
    every = [call.span_keys([ranges[i : i + 1] for ranges in found]) for i in range(max(map(len, found)))]
    total = torch.tensor([len(ranges) for ranges in found], device=call.key_position.device)
    return torch.stack(every).sum(dim=0), total[:, None, None]


def _found(call: AttnCall, spans: Any, tokenizer: Any) -> list[list[tuple[int, int]]]:
    tokens = call.context.get("tokens")
    if tokens is None:
        raise UnsupportedHost(
            f"{call.site.path} ran outside its model's forward, so tokens and padding are not known; call the model itself."
        )
    return tokens.spans(spans, tokenizer)


def prompt_length(call: AttnCall) -> int:
    """Slots of the prompt: what the prefill calls have covered so far."""
    if call.phase == "prefill":
        call.state["prompt"] = int(call.row_position[-1]) + 1
    if "prompt" not in call.state:
        raise UnsupportedHost(
            f"{call.site.path}: the cache was filled before steering began, so where the prompt ends is not known. "
            "Run the prefill inside the steering context."
        )
    return call.state["prompt"]


def valid_rows(call: AttnCall, weight: Tensor) -> Tensor:
    """`weight` [B, H, n] with ones on padding rows."""
    if call.row_valid is None:
        return weight
    return torch.where(call.row_valid[:, None], weight, torch.ones_like(weight))
