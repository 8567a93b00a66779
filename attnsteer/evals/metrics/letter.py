"""Accuracy of multiple choice by the letter that the model writes, and the share of answers that could be parsed.

Source: ACT (Yu et al. 2024, arXiv 2406.15765) compares one greedy token with the letter: `parser="first_token"`. Our own
parser, the default, also reads longer answers. An answer that is not parsed counts as wrong, and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RecordError, did_you_mean
from .base import Mean, Metric, Ratio

PARSERS = ("own", "first_token")


def metric(parser: str = "own") -> Metric:
    """Columns: `right`, `parsed`.

    The record has `choices`, `answer` (index) and `generated`. Where the choices are single letters they are the labels;
    else the labels are A, B, C, ... in the order of the choices.

    Args:
        parser: "own" (`parse`), or "first_token": the first word, without punctuation, is a label or nothing is.
    """
    if parser not in PARSERS:
        raise RecordError(
            f"letter: no parser {parser!r}; there are {', '.join(PARSERS)}.{did_you_mean(parser, PARSERS)}"
        )

    def read(record: Mapping[str, Any]) -> dict[str, float]:
        labels, answer = labels_of(record["choices"]), record["answer"]
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(labels):
            raise RecordError(
                f"letter: the answer {answer!r} is no index of the {len(labels)} choices (0 is the first)."
            )
        said = (parse if parser == "own" else first_token)(record["generated"], labels)
        return {"right": int(said == labels[answer]), "parsed": int(said is not None)}

    return Metric(
        "letter",
        ("choices", "answer", "generated"),
        read,
        {
            "accuracy": Mean("right"),
            "accuracy_of_parsed": Ratio(("right",), ("parsed",)),
            "parse_rate": Mean("parsed"),
        },
        correct="right",
        note=f"parser: {parser}",
        better={"accuracy": 1, "accuracy_of_parsed": 1, "parse_rate": 1},
    )


def labels_of(choices: Sequence[str]) -> tuple[str, ...]:
    """The letters of the choices: themselves where each is one capital letter, else A, B, C, ..."""
    if not 1 <= len(choices) <= 26:
        raise RecordError(f"letter: {len(choices)} choices; there are letters for 1 to 26.")
    if all(re.fullmatch("[A-Z]", str(c)) for c in choices):
        return tuple(choices)
    return tuple(chr(ord("A") + i) for i in range(len(choices)))


def first_token(text: str, labels: Sequence[str]) -> str | None:
    """The first word without punctuation around it, when it is a label."""
    words = re.split(r"\s+", text.strip(), maxsplit=1)
    word = words[0].strip("().:,;*\"'") if words else ""
    return word if word in labels else None


def parse(text: str, labels: Sequence[str]) -> str | None:
    """The label that an answer names, or None.

    1. "answer is (B)", "answer: B", "option B" (the last one said: a model that reasons ends with its answer);
    2. else the label that the text begins with, set off: "B", "(B) the red one", "B. red", but not "B or C";
    3. else the only label that stands alone in the text.
    "A" and "I" before a word in small letters are words, unless marked: "(A) red", "A. red", "A: red".
    """
    one = "".join(labels)
    stated = rf"(?i:\b(?:answer|option|choice)\b(?:\s+is|\s+would\s+be)?)\s*[:=]?\s*[\"'(*\[]*([{one}])(?![\w'])"
    found = [m[1] for m in re.finditer(stated, text) if not _article(text, m)]
    if found:
        return found[-1]
    begins = re.match(rf"\s*[\"'(*\[]*([{one}])(?![\w'])(?!\s*\w)", text)
    if begins:
        return begins[1]
    alone = {m[1] for m in re.finditer(rf"(?<![\w'])([{one}])(?![\w'])", text) if not _article(text, m)}
    return alone.pop() if len(alone) == 1 else None


def _article(text: str, match: re.Match[str]) -> bool:
    return match[1] in "AI" and re.match(r"\s+[a-z]", text[match.end(1) :]) is not None
