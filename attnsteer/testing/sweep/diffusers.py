"""The part of the sweep for diffusers: `versions`, `names` and `measure`, as in `transformers.py`; to be filled."""

from __future__ import annotations

from .rows import Row


def versions() -> dict[str, str]:
    """Library -> version that is installed."""
    import diffusers

    return {"diffusers": diffusers.__version__}


def names() -> list[str]:
    """All types."""
    return []


def measure(name: str) -> Row:
    """Build `name` small, and measure it."""
    return Row(name)
