"""Whether an answer names the right thing: a substring test after negated parts are taken out.

Source: the referring object classification and referring text classification of ControlMLLM (Wu et al. 2024, arXiv 2407.21534,
its repository's evaluators): the name or a synonym, underscores as blanks and split at a parenthesis, occurs in the
answer, as it is written. Their rule for negation deletes from " not", then from " no", up to the first comma or
full stop; the latter is a prefix, so " nose," and " notebook," go too. Here the words are whole words, unless `official=True`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import RecordError
from .base import Mean, Metric


def metric(official: bool = False, ignore_case: bool = False) -> Metric:
    """Columns: `right`.

    The record has `generated`, `name`, and perhaps `synonyms`.

    Args:
        official: take negations out as the published code does. ignore_case: small and capital letters are equal; they are
            not in the published code.
    """

    def read(record: Mapping[str, Any]) -> dict[str, float]:
        text = without_negations(record["generated"], official)
        names = [record["name"], *(record.get("synonyms") or ())]
        if not all(isinstance(n, str) and n for n in names):
            raise RecordError(f"contains: the names {names!r} are no texts.")
        wanted = [v for n in names for v in variants(n)]
        if ignore_case:
            text, wanted = text.lower(), [w.lower() for w in wanted]
        return {"right": int(any(w in text for w in wanted))}

    rule = "as published" if official else "whole words"
    return Metric(
        "contains",
        ("generated", "name"),
        read,
        {"accuracy": Mean("right")},
        correct="right",
        note=f"negations: {rule}; {'any case' if ignore_case else 'case-sensitive'}",
        better={"accuracy": 1},
    )


def without_negations(text: str, official: bool = False) -> str:
    """The text without what follows "not" and then "no", up to and with the first comma or full stop."""
    end = "" if official else r"\b"
    for word in ("not", "no"):
        text = re.sub(rf"\s+{word}{end}[^,.]*[,.]", "", text)
    return text


def variants(name: str) -> list[str]:
    """A name as it may be written: underscores as blanks; "car (automobile)" as "car" and "automobile"."""
    plain = name.replace("_", " ")
    found = re.fullmatch(r"([^()]+)\(([^()]+)\)\s*", plain)
    return [v.strip() for v in found.groups()] if found else [plain]
