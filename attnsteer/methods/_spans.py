"""What methods on user-marked text share: spans as key sets, and where the prompt ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError, UnsupportedHost
from ..parameters import Parsed, declared_field, plain, whole
from ..tokens import Tokens, is_text, token_range


def checked_spans(spans: Any) -> Any:
    """`spans` as nested tuples, their form validated; strings and ranges are resolved against the batch later.

    Raises:
        SelectionError: they are of another form.
    """
    spans = _tuples(spans)
    if isinstance(spans, str):
        return spans
    listed = isinstance(spans, tuple) and len(spans) > 0
    words = listed and all(is_text(s) for s in spans)
    samples = listed and all(isinstance(s, tuple) for s in spans)
    if not words and not samples:
        raise SelectionError(
            "give strings to find in the text (with a tokenizer), or per sample a list of (start, stop) token ranges."
        )
    if samples and not words:
        if any(len(s) == 2 and all(isinstance(i, int) for i in s) for s in spans):
            raise SelectionError("give one list of ranges per sample, e.g. [[(0, 4)]].")
        for item in (i for s in spans for i in s if not is_text(i)):
            token_range(item)
    return spans


@dataclass(frozen=True)
class _Spans(Parsed):
    """Spans: strings for all samples, or a list for each."""

    def count(self, value: Any) -> int | None:
        return None if isinstance(value, str) or all(is_text(s) for s in value) else len(value)

    def of_sample(self, value: Any, i: int) -> Any:
        return value if self.count(value) is None else (value[i],)

    def of_request(self, given: Any) -> Any:
        ranges = isinstance(given, (list, tuple)) and given and all(_is_pair(item) for item in given)
        return [given] if ranges else given

    def settled(self, value: Any, tokens: Tokens, tokenizer: Any) -> Any:
        (found,) = tokens.spans(value, tokenizer)
        return (tuple(found),)

    def shared(self, value: Any) -> Any:
        return "one for each"

    def resting(self, value: Any) -> Any:
        return ((),)

    def joined(self, values: Sequence[Any]) -> Any:
        return tuple(own for (own,) in values)


def _is_pair(item: Any) -> bool:
    pair = plain(item)
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(whole(i) is not None for i in pair)


def marked() -> Any:
    """The field of spans that the user marks."""
    form = _Spans(parse=checked_spans, text="strings, or per sample a list of (start, stop) token ranges")
    return declared_field(form)


def check_spans(tokens: Tokens, spans: Any, tokenizer: Any) -> None:
    """Raise a SelectionError where the batch has no such tokens (see `Tokens.spans`, which remembers what it found)."""
    tokens.spans(spans, tokenizer)


def _tuples(value: Any) -> Any:
    value = plain(value)
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def span_keys(call: AttnCall, spans: Any, tokenizer: Any) -> Tensor:
    """The marked tokens as a key set [B, 1, m] of this call."""
    return call.span_keys(call.tokens.spans(spans, tokenizer))


def span_counts(call: AttnCall, spans: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """(in how many spans each key is [B, 1, m], spans of each sample [B, 1, 1]), int64."""
    found = call.tokens.spans(spans, tokenizer)
    every = [call.span_keys([ranges[i : i + 1] for ranges in found]) for i in range(max(map(len, found)))]
    total = torch.tensor([len(ranges) for ranges in found], device=call.key_position.device)
    return torch.stack(every).sum(dim=0), total[:, None, None]


def check_prompt(call: AttnCall) -> None:
    """Raise where the prompt's end is not known: its tokens went into the cache before steering began."""
    if not call.tokens.prompt_known:
        raise UnsupportedHost(
            f"{call.site.path}: the cache was filled before steering began, so where the prompt ends is not known. "
            "Run the prefill inside the steering context."
        )
