"""VQA accuracy: an answer is as right as people agree with it (Antol et al. 2015, arXiv 1505.00468).

min(matches / 3, 1), averaged over the subsets that leave one person out; with ten people this is min(0.3 matches, 1). Answers
are compared in small letters, without punctuation and articles, with number words as digits. The official table of
contractions is not used: apostrophes are taken out on both sides, which agrees but for words that it would merge. An answer
that is an article alone ("A") becomes empty: score multiple choice with `choice` or `letter`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import RecordError
from .base import Mean, Metric

NUMBERS = {w: str(n) for n, w in enumerate("zero one two three four five six seven eight nine ten".split())} | {
    "none": "0"
}


def metric() -> Metric:
    """Columns: `score` in [0, 1].

    The record has `generated` and `answers`, what several people said.
    """
    return Metric(
        "vqa",
        ("generated", "answers"),
        _read,
        {"accuracy": Mean("score")},
        note="own normalisation",
        better={"accuracy": 1},
    )


def _read(record: Mapping[str, Any]) -> dict[str, float]:
    answers = record["answers"]
    if not isinstance(answers, list | tuple) or len(answers) < 2:
        raise RecordError(f"vqa: the answers are {answers!r}; a list of at least two is needed.")
    said, people = normalise(record["generated"]), [normalise(a) for a in answers]
    matches = sum(said == p for p in people)
    # Leaving out one who agrees takes a match away, leaving out another one does not.
    n = len(people)
    return {"score": (matches * min((matches - 1) / 3, 1) + (n - matches) * min(matches / 3, 1)) / n}


def normalise(text: str) -> str:
    """The text in small letters, without punctuation and articles, number words as digits."""
    text = re.sub(r"[’']", "", text.lower())
    # A point or comma within a number belongs to it.
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    words = re.sub(r"(?!(?<=\d)\.(?=\d))[^\w\s:/$€£%-]", " ", text).split()
    return " ".join(NUMBERS.get(w, w) for w in words if w not in ("a", "an", "the"))
