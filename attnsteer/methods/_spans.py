"""What methods on user-marked text share: spans as key sets, and where the prompt ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError, UnsupportedHost
from ..parameters import parsed, plain
from ..tokens import Tokens, token_range


def checked_spans(spans: Any) -> Any:
    """`spans` as nested tuples, their form validated; strings and ranges are resolved against the batch later.

    Raises:
        SelectionError: they are of another form.
    """
    spans = _tuples(spans)
    if isinstance(spans, str):
        return spans
    listed = isinstance(spans, tuple) and len(spans) > 0
    words = listed and all(isinstance(s, str) for s in spans)
    samples = listed and all(isinstance(s, tuple) for s in spans)
    if not words and not samples:
        raise SelectionError(
            "give strings to find in the text (with a tokenizer), or per sample a list of (start, stop) token ranges."
        )
    if samples:
        if any(len(s) == 2 and all(isinstance(i, int) for i in s) for s in spans):
            raise SelectionError("give one list of ranges per sample, e.g. [[(0, 4)]].")
        for item in (i for s in spans for i in s if not isinstance(i, str)):
            token_range(item)
    return spans


def marked() -> Any:
    """The field of spans that the user marks."""
    return parsed(checked_spans, "strings, or per sample a list of (start, stop) token ranges")


def check_spans(tokens: Tokens, spans: Any, tokenizer: Any) -> None:
    """Raise a SelectionError where the batch has no such tokens (see `Tokens.spans`, which remembers what it found)."""
    tokens.spans(spans, tokenizer)


def _tuples(value: Any) -> Any:
    value = plain(value)
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def span_keys(call: AttnCall, spans: Any, tokenizer: Any) -> Tensor:
    """The marked tokens as a key set [B, 1, m] of this call."""
    tokens = call.context.get("tokens")
    if tokens is None:
        raise UnsupportedHost(
            f"{call.site.path} ran outside its model's forward, so tokens and padding are not known; call the model itself."
        )
    found = tokens.spans(spans, tokenizer)
    return call.span_keys(found)


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
