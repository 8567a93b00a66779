"""Captions of images, greedy."""

from __future__ import annotations

from typing import Any

from ..loaded import Loaded
from . import Request, sample_fields
from .generating import generate

RECORD_KEYS = ("generated", "finished")
SAMPLE_KEYS = ("objects", "image_id", "level", "category")
UNIT = "tokens"
DECODING: dict[str, Any] = {"max_new_tokens": 512}


def answer(loaded: Loaded, request: Request) -> tuple[list[dict[str, Any]], list[int]]:
    """Records with `generated`."""
    rows, written = generate(loaded, request)
    return [{**sample_fields(s, SAMPLE_KEYS), **r} for s, r in zip(request.samples, rows, strict=True)], written
