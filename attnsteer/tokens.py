"""`Tokens`: roles of the tokens of a batch: valid, first, image, and spans found by substring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .account import Samples
from .errors import SelectionError, brief
from .parameters import plain, whole

Range = tuple[int, int]


@dataclass
class Tokens:
    """What is known of the tokens of a batch. Positions count slots of the sequence, padding included.

    Attributes:
        batch: number of rows B. length: tokens seen so far, padding included.
        valid: bool [B, T], False for padding; None: all valid. ids: int [B, T] token ids, or None.
        image: bool [B, T], tokens that stand for (parts of) images or videos; None when not known.
        prompt: slots of the prompt seen so far; tokens behind them were generated, or are being scored; None: not known.
        more_to_come: a chunked prefill is under way, so spans may lie in later chunks.
        virtual: slots in front that an adapter fills with learned vectors (prompt and prefix tuning of peft): no ids of the user's,
            so that spans and indices begin behind them.
        request: int [B or 1, T], which of the sequences packed into its row each token belongs to; None: there is one.
        moved: whether rows of the batch hold other sequences than at its beginning (beams that were reordered, samples dropped).
        repeats: which sample each row belongs to, where samples were repeated or rows moved; None: each row is one.
    """

    batch: int
    length: int
    valid: Tensor | None = None
    ids: Tensor | None = None
    image: Tensor | None = None
    prompt: int | None = None
    more_to_come: bool = False
    virtual: int = 0
    request: Tensor | None = None
    moved: bool = False
    repeats: Samples | None = field(default=None, repr=False)
    _resolved: dict[int, tuple[Any, list[list[Range]]]] = field(default_factory=dict, repr=False)

    @property
    def samples(self) -> Samples:
        """Which sample each row belongs to."""
        return Samples.plain(self.batch) if self.repeats is None else self.repeats

    @property
    def prompt_known(self) -> bool:
        """Whether it is known where the prompt ends."""
        return self.prompt is not None

    @property
    def resolved_spans(self) -> dict[int, Any]:
        """What was found so far, by the `id` of the spans."""
        return self._resolved

    def ends_marked(self) -> bool:
        """Whether the last token of some row is in a span, as where the prompt of a span was cut back and goes on otherwise."""
        if not self._resolved:
            return False
        counts = self._longest(self.length)
        rows = [row for _, found in self._resolved.values() for row in zip(found, counts, strict=False)]
        return any(stop >= count for ranges, count in rows for _, stop in ranges)

    def first(self) -> Tensor:
        """Index of the first valid token of each row, [B]."""
        if self.valid is None:
            return torch.zeros(self.batch, dtype=torch.long)
        return self.valid.to(torch.int8).argmax(dim=-1)

    def count(self, upto: int | None = None) -> Tensor:
        """Number of valid tokens of each row among the first `upto` slots, virtual ones left out, [B]."""
        upto = self.length if upto is None else upto
        if self.valid is None:
            return torch.full((self.batch,), upto - self.virtual, dtype=torch.long)
        return self.valid[:, :upto].sum(dim=-1) - self.virtual

    def image_spans(self) -> list[list[Range]]:
        """Slot ranges of the image tokens of each row, in order: one for each unbroken run.

        An image whose tiles are kept apart by text tags (Idefics 3) has several; images without any text between
        them have one together.

        Raises:
            SelectionError: where the images are is not known.
        """
        out = []
        for row in self.image_mask():
            edges = torch.nn.functional.pad(row.to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
            out.append(list(zip(edges[::2], edges[1::2], strict=True)))
        return out

    def before_image(self) -> Tensor:
        """bool [B, T]: valid tokens before the first image token of their row (all, in a row without one)."""
        return (self.image_mask().cumsum(dim=-1) == 0) & self._valid()

    def after_image(self) -> Tensor:
        """bool [B, T]: valid tokens behind the last image token of their row, generated ones included."""
        image = self.image_mask()
        seen = image.cumsum(dim=-1)
        return (seen == seen[:, -1:]) & (seen > 0) & ~image & self._valid()

    def generated(self) -> Tensor:
        """bool [B, T]: tokens behind the prompt."""
        at = torch.arange(self.length)
        return (at >= (self.length if self.prompt is None else self.prompt)).expand(self.batch, -1)

    def image_mask(self) -> Tensor:
        """`image`, or an error that says how to name the images."""
        if self.image is None:
            raise SelectionError(
                "where the images are is not known here: the call has no input_ids with image placeholders of a known model "
                "type, or its cache was filled before. Enter run.images(...) around the calls, with the processor's output or "
                "with a list of (start, stop) token ranges for each sample."
            )
        return self.image

    def _valid(self) -> Tensor:
        if self.valid is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool, device=self.image_mask().device)
        return self.valid.to(self.image_mask().device)

    def take(self, index: Tensor) -> None:
        """Keep the rows `index` [b], in that order: beams that were reordered, samples that were repeated or dropped."""
        for name in ("valid", "ids", "image", "request"):
            tensor = getattr(self, name)
            if tensor is not None and len(tensor) == self.batch:
                setattr(self, name, tensor[index.to(tensor.device)])
        rows = index.tolist()
        self.moved |= rows != list(range(self.batch))
        self.repeats = self.samples.taken(rows)
        self._resolved = {key: (spans, [found[i] for i in rows]) for key, (spans, found) in self._resolved.items()}
        self.batch = len(rows)

    def keep_spans(self, before: Tokens, upto: int, prompt: bool = False) -> None:
        """Take over what was found in the tokens of an earlier call, of which these are a continuation.

        What reaches beyond the first `upto` slots, which both share (the cache was cut back), is looked for again; so is all
        where other slots of these are padding now, and text where more of the prompt came in, in which it may occur again.

        Args:
            prompt: the slots behind `upto` are a part of the prompt.
        """
        if before.batch != self.batch or not before._resolved or not self._holds(before, upto):
            return
        counts = self._longest(upto) if upto < before.length else None
        for key, (spans, found) in before._resolved.items():
            if prompt and self.ids is not None and _has_text(spans):
                continue
            if counts is None or all(stop <= counts[b] for b, row in enumerate(found) for _, stop in row):
                self._resolved[key] = (spans, found)

    def _holds(self, before: Tokens, upto: int) -> bool:
        """Whether the first `upto` slots hold tokens and padding where they did in an earlier call."""
        told = [t.valid[:, :upto] for t in (self, before) if t.valid is not None]
        if not told:
            return True
        return bool((told[0] if len(told) == 1 else told[0] == told[1]).all())

    def spans(self, spans: Any, tokenizer: Any = None) -> list[list[Range]]:
        """Token ranges per row, counted from its first valid token, for `spans`, which may be:

        - a string or a list of strings: found in the text of each row's prompt, a tokenizer is needed;
        - a list with one entry per sample, each a list of strings and (start, stop) token ranges, counted
          from the sample's first valid token.

        A string that occurs several times says which: ("cat", 1) for the second, ("cat", "all") for all of them. Samples that
        `generate` repeats (beams, several sequences) share their spans.

        Raises:
            SelectionError: a string that is not in the text or there several times, an empty or out-of-range range, a wrong
                count.
        """
        known = self._resolved.get(id(spans))
        # A batch that grew since the prompt (several continuations of one sample) is resolved again.
        if known is not None and len(known[1]) == self.batch:
            return known[1]
        if isinstance(spans, str):
            spans_list: list[Any] = [[spans]] * self.batch
        elif isinstance(spans, (list, tuple)) and spans and all(is_text(s) for s in spans):
            spans_list = [list(spans)] * self.batch
        else:
            spans_list = self._per_sample(spans)
        counts = self._longest(self.length)
        out, complete = [], True
        for b, wanted in enumerate(spans_list):
            row: list[Range] = []
            for item in wanted:
                row += self._find(b, item, tokenizer) if is_text(item) else [token_range(item)]
            late = [found for found in row if found[1] > counts[b]]
            if late and not self.more_to_come:
                raise SelectionError(
                    f"span {late[0]} of sample {b} ends after its {counts[b]} tokens; ranges count from "
                    "the sample's first token that is not padding. If the prompt comes in chunks, enter "
                    "run.chunked_prefill() for them."
                )
            complete &= not late
            out.append(row)
        if complete:
            self._resolved[id(spans)] = (spans, out)
        return out

    def _longest(self, upto: int) -> list[int]:
        """Valid tokens of each row, or of the longest sequence packed into it, among the first `upto` slots; no virtual ones."""
        if self.request is None and self.valid is None:
            # Known without a look at the device.
            return [upto - self.virtual] * self.batch
        if self.request is None:
            return self.count(upto).tolist()
        return [max((size for _, size in self._sequences(b, upto)), default=0) for b in range(self.batch)]

    def _sequences(self, b: int, upto: int) -> list[tuple[Tensor, int]]:
        """(bool [upto], number of tokens) of each sequence packed into row `b`."""
        row = lambda t: t[b if len(t) > 1 else 0, :upto].cpu()  # noqa: E731
        request = row(self.request)
        valid = torch.ones_like(request, dtype=torch.bool) if self.valid is None else row(self.valid)
        found = [valid & (request == i) for i in request[valid].unique().tolist()]
        return [(tokens, int(tokens.sum())) for tokens in found]

    def _text(self, b: int, text: str, upto: int) -> Tensor:
        """bool [upto]: the slots of row `b` whose tokens are the text in which a string is looked for."""
        if self.request is None:
            every = torch.ones(upto, dtype=torch.bool)
            return every if self.valid is None else self.valid[b if len(self.valid) > 1 else 0, :upto].cpu()
        # A row that sees itself only may be padding, and has no text that a span could be in.
        long = [tokens for tokens, size in self._sequences(b, upto) if size > 1]
        if len(long) != 1:
            raise SelectionError(
                f"the span {text!r} is a string, and row {b} holds {len(long)} packed sequences. Give token ranges, which count in "
                "each of them, or put each in a batch row of its own."
            )
        return long[0]

    def _per_sample(self, spans: Any) -> list[Any]:
        if not isinstance(spans, (list, tuple)) or not spans or not all(isinstance(s, (list, tuple)) for s in spans):
            raise SelectionError(
                f"spans={spans!r}: give strings to find in the text, or one list of (start, stop) token ranges per "
                "sample."
            )
        if len(spans) not in self.samples.of_row:
            raise SelectionError(
                f"spans has {len(spans)} samples, and this is {self.samples}. Give one list of spans for each sample."
            )
        return [spans[i] for i in self.samples.rows(len(spans))]

    def _find(self, b: int, item: Any, tokenizer: Any) -> list[Range]:
        text, which = (item, None) if isinstance(item, str) else item
        which = which if which in (None, "all") else whole(which)
        if tokenizer is None:
            raise SelectionError(f"the span {text!r} is a string: give the method a tokenizer, or token ranges.")
        if self.ids is None:
            raise SelectionError(
                f"the span {text!r} cannot be found: the model was called without input_ids. Give ranges."
            )
        stop = self.length if self.prompt is None else min(self.prompt, self.length)
        ids = self.ids[b, :stop]
        ids = ids[self._text(b, text, stop).to(ids.device)]
        offsets, prompt = char_offsets(ids[self.virtual :].tolist(), tokenizer)
        places = _places(prompt, text)
        shown = prompt if len(prompt) <= 200 else prompt[:200] + "..."
        if not places:
            raise SelectionError(f"the span {text!r} is not in the text of sample {b}: {shown!r}.")
        if which is None and len(places) > 1:
            raise SelectionError(
                f"the span {text!r} is {len(places)} times in the text of sample {b}: {shown!r}. Say which: ({text!r}, 0) is the "
                f'first, ({text!r}, "all") are all of them; or give token ranges.'
            )
        if isinstance(which, int) and which >= len(places):
            raise SelectionError(
                f"the span ({text!r}, {which}) is not there: sample {b} has {text!r} {len(places)} times, counted from 0."
            )
        chosen = places if which == "all" else [places[which or 0]]
        found = []
        for at in chosen:
            inside = [i for i, (s, e) in enumerate(offsets) if s < at + len(text) and e > at]
            if not inside:
                raise SelectionError(f"the span {text!r} covers no token of sample {b}: {shown!r}.")
            found.append((inside[0], inside[-1] + 1))
        return found


def _places(whole: str, text: str) -> list[int]:
    """Where `text` begins in `whole`, occurrences that overlap left out."""
    found, at = [], whole.find(text)
    while text and at >= 0:
        found.append(at)
        at = whole.find(text, at + len(text))
    return found


def _has_text(spans: Any) -> bool:
    """Whether some span is text, which is looked for in the prompt."""
    if isinstance(spans, str) or all(is_text(s) for s in spans):
        return True
    return any(is_text(item) for row in spans for item in row)


def is_text(item: Any) -> bool:
    """Whether a span is given as text: a string, or (string, which of its occurrences)."""
    if isinstance(item, str):
        return True
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], str):
        return False
    # Two strings are two spans of a sample.
    return item[1] == "all" or (whole(item[1]) is not None and whole(item[1]) >= 0)


def checked_images(where: Any) -> Any:
    """What `run.images` was given: a mapping as it is, ranges as nested tuples."""
    if isinstance(where, Mapping):
        if not any(
            isinstance(where.get(name), Tensor) for name in ("input_ids", "mm_token_type_ids", "token_type_ids")
        ):
            raise SelectionError(
                f"run.images: this processor output has {sorted(where)}, but neither input_ids nor mm_token_type_ids as tensors; "
                'ask for them with return_tensors="pt".'
            )
        return where
    good = isinstance(where, (list, tuple)) and where and all(isinstance(row, (list, tuple)) for row in where)
    if not good:
        raise SelectionError(
            f"run.images({where!r}): give the processor's output, or for each sample a list of (start, stop) token ranges."
        )
    return tuple(tuple(token_range(item) for item in row) for row in where)


def char_offsets(ids: list[int], tokenizer: Any) -> tuple[list[Range], str]:
    """Character range of each token in the decoded text, and that text."""
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    if getattr(tokenizer, "is_fast", False):
        again = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        if list(again["input_ids"]) == list(ids):
            return [tuple(pair) for pair in again["offset_mapping"]], whole
    # Decoding growing prefixes is slow but right for any tokenizer whose text does not survive a round trip.
    ranges, start = [], 0
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1], skip_special_tokens=False)
        # A character of several byte tokens decodes to this mark until its last one; all of them cover it.
        done = len(text.rstrip("\ufffd"))
        ranges.append((start, done + (done < len(text))))
        start = done
    return ranges, whole


def token_range(item: Any) -> Range:
    """(start, stop) of one range of tokens, or a SelectionError."""
    given = plain(item)
    pair = tuple(whole(i) for i in given) if isinstance(given, (tuple, list)) and len(given) == 2 else (None,)
    if None in pair or not 0 <= pair[0] < pair[1]:
        raise SelectionError(f"span {brief(item)}: give (start, stop) with 0 <= start < stop, or a string.")
    return pair
