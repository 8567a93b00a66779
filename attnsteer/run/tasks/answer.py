"""Answers in the model's own words, greedy; a single token where the recipe says `max_new_tokens: 1`."""

from __future__ import annotations

from typing import Any

from ..loaded import Loaded
from . import Request, sample_fields
from .generating import generate

RECORD_KEYS = ("generated", "finished")
SAMPLE_KEYS = ("label", "pair", "choices", "answer", "answers", "name", "synonyms", "level", "category")
UNIT = "tokens"
DECODING: dict[str, Any] = {"max_new_tokens": 16}


def answer(loaded: Loaded, request: Request) -> tuple[list[dict[str, Any]], list[int]]:
    """Records with `generated`."""
    rows, written = generate(loaded, request)
    return [{**sample_fields(s, SAMPLE_KEYS), **r} for s, r in zip(request.samples, rows, strict=True)], written
