"""Captions of images, greedy."""

from __future__ import annotations

from typing import Any

from ..loaded import Loaded
from . import Ask, kept
from .generating import RESERVED as RESERVED
from .generating import generate

WRITES = ("generated", "finished")
KEEPS = ("objects", "image_id", "level", "category")
UNIT = "tokens"
DECODING: dict[str, Any] = {"max_new_tokens": 512}


def ask(loaded: Loaded, ask: Ask) -> tuple[list[dict[str, Any]], int]:
    """Records with `generated`."""
    rows, written = generate(loaded, ask)
    return [{**kept(s, KEEPS), **r} for s, r in zip(ask.samples, rows, strict=True)], written
