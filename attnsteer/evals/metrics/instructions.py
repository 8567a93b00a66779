"""Whether an answer has the form that was asked for: checks of its text, after IFEval (Zhou et al. 2023, arXiv 2311.07911).

Own rule for answers that the limit of tokens cut off: what was not written is no fault. The last line of a list may stop behind
its bullet, and a JSON object in the middle, if what is there is the beginning of one with the key first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ...errors import RecordError, did_you_mean
from .base import Mean, Metric, Ratio

FENCE = re.compile(r"^```(?:json)?\s*|\s*```$")


def begin(text: str, word: str, finished: bool) -> bool:
    """It begins with the word, in any case, behind quotation marks at most."""
    return re.match(rf"{re.escape(word)}\b", text.lstrip(" \n\"'*_"), re.IGNORECASE) is not None


def key(text: str, word: str, finished: bool) -> bool:
    """The word is in it, in any case, as a word."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def bullet(text: str, word: str, finished: bool) -> bool:
    """Every line with something in it begins with "* "; the last one of a cut answer may be the bullet alone."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not finished and len(lines) > 1 and lines[-1] == "*":
        lines = lines[:-1]
    return bool(lines) and all(line.startswith("* ") for line in lines)


def as_json(text: str, word: str, finished: bool) -> bool:
    """A JSON object with the key, perhaps in a code fence, and nothing else."""
    inner = FENCE.sub("", text.strip())
    try:
        found = json.loads(inner)
    except (ValueError, RecursionError):
        return not finished and re.match(rf'\{{\s*"{re.escape(word)}"\s*:', inner) is not None
    return isinstance(found, dict) and word in found


CHECKS = {"begin": begin, "bullet": bullet, "key": key, "json": as_json}


def metric() -> Metric:
    """Estimates: `followed`, and `followed_KIND` for each kind of demand that the samples have.

    The record has `generated`, `category` (of `CHECKS`), `name` (the word that the demand names), and perhaps `finished`.
    """
    parts = {f"followed_{kind}": Ratio((f"right_{kind}",), (f"is_{kind}",)) for kind in CHECKS}
    return Metric(
        "instructions",
        ("generated", "category", "name"),
        _read,
        {"followed": Mean("right"), **parts},
        correct="right",
        when={f"followed_{kind}": f"is_{kind}" for kind in CHECKS},
        note="what the limit of tokens cut off is no fault",
        better=dict.fromkeys(("followed", *parts), 1),
    )


def _read(record: Mapping[str, Any]) -> dict[str, float]:
    text, kind, word = record["generated"], record["category"], record["name"]
    if not isinstance(text, str) or not isinstance(word, str) or not word:
        raise RecordError(f"instructions: the answer {text!r} or the word {word!r} is no text.")
    if kind not in CHECKS:
        raise RecordError(
            f"instructions: there is no check {kind!r}; there are {', '.join(CHECKS)}.{did_you_mean(str(kind), CHECKS)}"
        )
    right = int(CHECKS[kind](text, word, bool(record.get("finished", True))))
    return {"right": right, f"is_{kind}": 1, f"right_{kind}": right}
