"""Where the words of a prompt are among the text keys of a denoiser: phrases to tokens, by character spans."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import SelectionError, UnsupportedHost, brief

INCLUDE = ("words", "last", "last+1")
# A phrase of a prompt: its text, (text, which of several occurrences, from 1), or (start, stop) of token positions.
Phrase = Any


@dataclass(frozen=True)
class Segment:
    """One tokenizer's part of the text keys of one prompt.

    Attributes:
        text: what was tokenized. start: position of its first token among all text keys. length: keys of this part.
        offsets: character range (start, stop) of each token in `text`. special: per token, whether it stands for no text.
    """

    text: str
    start: int
    length: int
    offsets: tuple[tuple[int, int], ...] = ()
    special: tuple[bool, ...] = ()

    def tokens(self, start: int, stop: int) -> list[int]:
        """Positions among all text keys of the tokens that overlap the characters `start` to `stop`."""
        pairs = zip(self.offsets, self.special, strict=True)
        return [self.start + i for i, ((a, b), no) in enumerate(pairs) if not no and a < stop and b > start]

    def content(self) -> list[int]:
        """Positions of all tokens that stand for text."""
        return [self.start + i for i, no in enumerate(self.special) if not no]


@dataclass(frozen=True)
class Prompt:
    """The prompts of one call of a pipeline, as they lie in the text keys; each is repeated for its images.

    Attributes:
        samples: per prompt, its segments. unknown: why words cannot be placed, for messages; "" where they can.
    """

    samples: tuple[tuple[Segment, ...], ...] = ()
    unknown: str = ""

    @property
    def length(self) -> int | None:
        """Text keys in all; None where nothing is known."""
        return sum(s.length for s in self.samples[0]) if self.samples else None

    def content(self) -> list[list[int]]:
        """Per prompt, the positions of all tokens that stand for text.

        Raises:
            SelectionError: the prompts are not known.
        """
        self._need("the tokens of the prompt")
        return [[i for segment in sample for i in segment.content()] for sample in self.samples]

    def terms(self, phrases: list[list[Phrase]], include: str = "words") -> list[list[tuple[int, list[int]]]]:
        """Per sample, (number of the phrase, token positions) of each map that the phrases stand for.

        Args:
            phrases: one list per prompt, or one list for all. include: "words": one map per word of the phrase;
                "last": one map, of its last word; "last+1": of that word and the token after it. A word of several
                tokens is one map, and where several tokenizers read the prompt, its tokens in each of them.

        Raises:
            SelectionError: a phrase is not in its prompt, is there several times, or was cut off.
        """
        if self.samples and len(phrases) not in (1, len(self.samples)):
            raise SelectionError(f"{len(phrases)} lists of phrases for {len(self.samples)} prompts; give one for each.")
        each = phrases * max(1, len(self.samples)) if len(phrases) == 1 else phrases
        return [
            [(n, t) for n, phrase in enumerate(wanted) for t in self._of(sample, phrase, include)]
            for sample, wanted in enumerate(each)
        ]

    def _of(self, sample: int, phrase: Phrase, include: str) -> list[list[int]]:
        if is_range(phrase):
            start, stop = phrase
            if self.length is not None and stop > self.length:
                raise SelectionError(f"token range ({start}, {stop}): there are {self.length} text keys.")
            # Positions were chosen by hand, so no rule is applied to them.
            return [[i] for i in range(start, stop)]
        self._need(repr(phrase))
        text, which = (phrase, None) if isinstance(phrase, str) else phrase
        found = [_in_segment(segment, text, which, include) for segment in self.samples[sample]]
        placed = [terms for terms in found if terms is not None]
        if not placed or not all(tokens for terms in placed for tokens in terms):
            shown = self.samples[sample][0].text
            cut = any(_places(s.text, text) for s in self.samples[sample])
            problem = "is cut off: the prompt is longer than the text encoder reads" if cut else "is not in the prompt"
            raise SelectionError(
                f"the phrase {text!r} {problem}: {shown!r}. Phrases are whole words, as they are written."
            )
        return [sorted(i for terms in placed for i in terms[n]) for n in range(len(placed[0]))]

    def _need(self, what: str) -> None:
        if not self.samples:
            raise SelectionError(
                f"{what} cannot be found: {self.unknown or 'the pipeline was given no prompt text'}. Give the pipeline the "
                "prompt as a string, or give (start, stop) ranges of token positions instead of words."
            )


def _in_segment(segment: Segment, text: str, which: int | None, include: str) -> list[list[int]] | None:
    """Token positions of each map of a phrase in one segment; None where its text does not reach it whole."""
    if not segment.offsets:
        return None
    places = _places(segment.text, text)
    if not places:
        return None
    if which is None and len(places) > 1:
        raise SelectionError(
            f"the phrase {text!r} is {len(places)} times in the prompt {segment.text!r}; give ({text!r}, 1) for the first, "
            f"({text!r}, 2) for the second, or a longer phrase."
        )
    number = 1 if which is None else which
    if number > len(places):
        raise SelectionError(f"({text!r}, {number}): the phrase is {len(places)} times in the prompt {segment.text!r}.")
    start = places[number - 1]
    words = [(start + m.start(), start + m.end()) for m in re.finditer(r"\S+", text)]
    terms = [segment.tokens(*word) for word in (words if include == "words" else words[-1:])]
    if not all(terms) or segment.offsets[terms[-1][-1] - segment.start][1] < words[-1][1]:
        # Cut off, perhaps in the middle of a word.
        return None
    if include == "last+1":
        after = terms[0][-1] + 1
        if after < segment.start + segment.length:
            terms[0].append(after)
    return terms


def _places(text: str, phrase: str) -> list[int]:
    """Where `phrase` begins as whole words, in any case."""
    return [m.start() for m in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE)]


def occurrences(text: str, phrase: str) -> int:
    """How many times `phrase` is in `text` as whole words, in any case."""
    return len(_places(text, phrase))


def is_range(phrase: Any) -> bool:
    """Whether a phrase is a (start, stop) range of token positions."""
    return _pair(phrase, int) and 0 <= phrase[0] < phrase[1]


def is_phrase(value: Any) -> bool:
    """Whether `value` is one phrase, rather than a list of them."""
    if isinstance(value, str):
        return bool(value.strip())
    return is_range(value) or (_pair(value, str) and bool(value[0].strip()) and value[1] >= 1)


def _pair(value: Any, first: type) -> bool:
    ok = isinstance(value, (tuple, list)) and len(value) == 2
    return ok and isinstance(value[0], first) and not isinstance(value[0], bool) and type(value[1]) is int


def checked(name: str, phrases: Any) -> tuple[Any, ...]:
    """`phrases` as a tuple of phrases, or a tuple of such tuples, one per prompt.

    Raises:
        SelectionError: it is neither.
    """
    given = (phrases,) if isinstance(phrases, str) else phrases
    if isinstance(given, (list, tuple)) and given:
        if all(is_phrase(p) for p in given):
            return tuple(p if isinstance(p, str) else tuple(p) for p in given)
        if all(isinstance(p, (list, tuple)) and p and all(is_phrase(q) for q in p) for p in given):
            return tuple(checked(name, p) for p in given)
    raise SelectionError(
        f"{name}={brief(phrases)}: give words of the prompt, e.g. ('cat', 'frog'), one list of them per prompt, ('cat', 2) for the "
        "second occurrence, or (start, stop) ranges of token positions."
    )


def per_prompt(phrases: tuple[Any, ...]) -> list[list[Phrase]]:
    """Checked phrases as one list per prompt, or one for all."""
    return [list(phrases)] if all(is_phrase(p) for p in phrases) else [list(p) for p in phrases]


def fits(prompt: Prompt, keys: int) -> None:
    """Raise `UnsupportedHost` where the prompt does not explain the text keys that the denoiser has."""
    if prompt.length is not None and prompt.length != keys:
        raise UnsupportedHost(
            f"the prompt has {prompt.length} tokens for this pipeline, its denoiser sees {keys} text keys: where the words are "
            "is not known. Give (start, stop) ranges of token positions instead of words."
        )
