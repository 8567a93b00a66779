"""Length and repetition: guards against figures that improve because a model stops writing, or writes the same again.

`repetition` is seq-rep-4 (Welleck et al. 2020, arXiv 1908.04319, section 6.1): 1 - distinct 4-grams / 4-grams of a text, mean
over texts of at least four words. `distinct_1` and `distinct_2` are distinct n-grams / n-grams within a text, mean over
texts (Li et al. 2016 count them over all texts together). Words are what is between blanks, in small letters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RecordError
from .base import Mean, Metric, Ratio

# A text of which more than this is repeated counts as looping.
LOOPING = 0.5
# What makes a run suspicious: points of recall lost, relative change of length, points of repetition or of loops gained.
LOST_RECALL, CHANGED_LENGTH, GAINED_REPETITION = 0.10, 0.50, 0.10


def metric() -> Metric:
    """Columns: `words`, `empty`, `looping`; `has_n` and `distinct_n` for n = 1, 2, 4; `repeated_4`; `cut`, `known_end`.

    The record has `generated`, and perhaps `finished`: whether the text ended before the limit of new tokens.
    """
    return Metric(
        "fluency",
        ("generated",),
        _read,
        {
            "length": Mean("words"),
            "repetition": Ratio(("repeated_4",), ("has_4",)),
            "distinct_1": Ratio(("distinct_1",), ("has_1",)),
            "distinct_2": Ratio(("distinct_2",), ("has_2",)),
            "looping": Mean("looping"),
            "empty": Mean("empty"),
            "cut": Ratio(("cut",), ("known_end",)),
        },
        when={"cut": "known_end", "repetition": "has_4", "distinct_1": "has_1", "distinct_2": "has_2"},
        note="words: split at blanks, small letters",
        better={"repetition": -1, "looping": -1, "empty": -1, "cut": -1},
    )


def _read(record: Mapping[str, Any]) -> dict[str, float]:
    text = record["generated"]
    if not isinstance(text, str):
        raise RecordError(f"fluency: the text is {text!r}; a text is needed.")
    words = text.lower().split()
    found: dict[str, float] = {"words": len(words), "empty": int(not words), "looping": 0}
    for n in (1, 2, 4):
        share = distinct(words, n)
        if share is not None:
            found |= {f"has_{n}": 1, f"distinct_{n}": share}
    if "has_4" in found:
        found["repeated_4"] = 1 - found["distinct_4"]
        found["looping"] = int(found["repeated_4"] > LOOPING)
    if record.get("finished") is not None:
        found |= {"known_end": 1, "cut": int(not record["finished"])}
    return found


def distinct(words: Sequence[str], n: int) -> float | None:
    """Distinct n-grams over n-grams, or None where there are none."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def guard(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What makes an improvement suspicious: sentences for a report, none where nothing does.

    Looks at those that both have of `recall` (of CHAIR), `length`, `repetition`, `looping`, `empty` and `cut`.

    Args:
        before, after: estimates of both arms by name, as `aggregate` gives them (of several metrics, put together).
    """
    pairs = {
        k: tuple(float(getattr(arm[k], "value", arm[k])) for arm in (before, after))
        for k in ("recall", "length", "repetition", "looping", "empty", "cut")
        if k in before and k in after
    }
    found = []
    if "recall" in pairs and pairs["recall"][0] - pairs["recall"][1] > LOST_RECALL:
        found.append(
            "recall fell from {:.1%} to {:.1%}: fewer of the objects that are there are named".format(*pairs["recall"])
        )
    if "length" in pairs and abs(pairs["length"][1] - pairs["length"][0]) > CHANGED_LENGTH * pairs["length"][0]:
        found.append("the mean length changed from {:.1f} to {:.1f} words".format(*pairs["length"]))
    for key, words in (
        ("repetition", "repeated 4-grams"),
        ("looping", "texts that loop"),
        ("empty", "empty texts"),
        ("cut", "texts that never ended, cut off by the token limit,"),
    ):
        if key in pairs and pairs[key][1] - pairs[key][0] > GAINED_REPETITION:
            found.append(f"{words} rose from {pairs[key][0]:.1%} to {pairs[key][1]:.1%}")
    return found
