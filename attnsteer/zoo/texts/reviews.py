"""Short reviews to be called positive or negative after two labelled ones: a task whose accuracy is largely the bias of labels.

A model that was shown "positive", then "negative", tends to say the last one. The metric `label_bias` tells that from not knowing:
it ranks the reviews, and moves the threshold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .draw import rng, split_of

SUBJECTS = (
    "film", "book", "hotel", "restaurant", "phone", "concert", "train ride", "museum", "lamp", "coffee machine", "headset",
    "bicycle", "play", "cafe", "backpack", "tent", "album", "garden tour", "keyboard", "bakery",
)  # fmt: skip
OPENINGS = {
    "positive": (
        "I loved this {s}", "What a wonderful {s}", "This {s} was a delight", "The {s} is better than I had hoped",
        "I would choose this {s} again", "A lovely {s}", "The {s} made my day", "We were very happy with the {s}",
        "The best {s} in years", "This {s} deserves every praise",
    ),
    "negative": (
        "I hated this {s}", "What a terrible {s}", "This {s} was a letdown", "The {s} is worse than I had feared",
        "I would not choose this {s} again", "An awful {s}", "The {s} ruined my day", "We were very unhappy with the {s}",
        "The worst {s} in years", "This {s} deserves every complaint",
    ),
}  # fmt: skip
REASONS = {
    "positive": (
        "everything worked at once", "it was worth every penny", "people smiled all evening", "each detail was done with care",
        "I did not want it to end", "nothing was missing", "the staff were kind", "it looked beautiful",
    ),
    "negative": (
        "nothing worked at all", "it was a waste of money", "people left before the end", "each detail was done without care",
        "I could not wait for it to end", "half of it was missing", "the staff were rude", "it looked dreadful",
    ),
}  # fmt: skip
FORMS = ("{a}: {b}.", "{a}, and {b}.", "{a}. To put it shortly, {b}.", "{a}; {b}, as my sister said too.")
LABELS = ("positive", "negative")


@dataclass(frozen=True)
class Review:
    """A review behind two labelled ones. prompt: ends where the label is due. text: the review; answer: index into `LABELS`."""

    prompt: str
    text: str
    answer: int


def reviews(split: str, seed: int = 0) -> Iterator[Review]:
    """Reviews of a split, none twice, half of them positive on average; the examples are always positive, then negative.

    The examples come from the split too, and differ from prompt to prompt.
    """
    seen: set[str] = set()
    for number in itertools.count():
        g = rng(split, number, 30, seed)
        labels = (*LABELS, LABELS[int(g.integers(2))])
        texts = [_text(g, label, split) for label in labels]
        if texts[-1] in seen or len(set(texts)) < len(texts):
            continue
        seen.add(texts[-1])
        shots = "\n\n".join(f"Review: {t}\nSentiment: {label}" for t, label in zip(texts, LABELS, strict=False))
        yield Review(f"{shots}\n\nReview: {texts[-1]}\nSentiment:", texts[-1], LABELS.index(labels[-1]))


def _text(g: Any, label: str, split: str) -> str:
    """A review that belongs to the split."""
    parts = (SUBJECTS, OPENINGS[label], REASONS[label], FORMS)
    while True:
        subject, opening, reason, form = (values[int(g.integers(len(values)))] for values in parts)
        text = form.format(a=opening.format(s=subject), b=reason)
        if split_of(text) == split:
            return text
