"""The error family: every message says what was asked, what exists, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class AttnSteerError(Exception):
    """Base of every error that this library raises on purpose."""


class SelectionError(AttnSteerError, ValueError):
    """A `Where`, a `HeadSet` or a span selects nothing, or something that does not exist; a hyper-parameter does not exist, is
    missing, or cannot have that value."""


class UnknownName(AttnSteerError, KeyError):
    """A method, host, field or model name that is not known."""

    def __str__(self) -> str:
        # KeyError would show the repr of the message, with escaped newlines.
        return str(self.args[0]) if self.args else ""


class RegistrationError(AttnSteerError, ValueError):
    """A method or host cannot be added: its name is taken, it is of the wrong kind, or it does not load."""


class UnsupportedHost(AttnSteerError, TypeError):
    """The object, backend, cache or processor cannot be steered exactly."""


class CompositionError(AttnSteerError, ValueError):
    """Two interventions, or two steerings, cannot act together."""


class NotFinite(AttnSteerError, ArithmeticError):
    """A loss, a map or a latent became NaN or infinite. latent: the last good one [b, ...]; index: the call of the loop."""

    def __init__(self, message: str, latent: Any = None, index: int | None = None):
        super().__init__(message)
        self.latent, self.index = latent, index


class ContractError(AttnSteerError, TypeError):
    """A method returned what the contract does not allow; the message names method, door and site."""


class CaptureTooLarge(AttnSteerError, MemoryError):
    """A capture would take more than is free; the message says how much it needs."""


class NeverFired(AttnSteerError, RuntimeError):
    """A steering was left although one of its interventions changed nothing."""


class NothingChanged(UserWarning):
    """A steering was removed although one of its interventions changed nothing."""


class SerializationError(AttnSteerError, ValueError):
    """A saved intervention or head set cannot be read."""


class HubError(SerializationError):
    """The hub refuses, cannot be reached, or has no such repository."""


class ZooError(AttnSteerError, OSError):
    """A file of an embedded model is missing, cut short or changed."""


class RecordError(AttnSteerError, ValueError):
    """A record, a file or an option of a metric is not what the metric reads."""


class RecipeError(AttnSteerError, ValueError):
    """A recipe, its data or its parameters are not what can be run."""


class RunError(AttnSteerError, RuntimeError):
    """A run folder belongs to another recipe, is in use, is damaged, or cannot be written."""


class MissingExtra(AttnSteerError, ImportError):
    """A library of an optional extra is not installed."""


def brief(value: object, limit: int = 80) -> str:
    """The repr of a value for error messages, on one line and cut to `limit` characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # repr is the code of whatever was given; the error to show is another one
        return f"<{type(value).__name__}>"
    return clipped(text, limit)


def clipped(text: str, limit: int = 500) -> str:
    """A text that may hold a value of any size, cut to `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A " Did you mean 'x'?" suffix, or an empty string when nothing is close."""
    if not isinstance(name, str):
        return ""
    # A wrong case is the likeliest slip, so it counts for nothing.
    spelled = {str(k).lower(): str(k) for k in known}
    close = difflib.get_close_matches(name.lower(), list(spelled), n=1, cutoff=0.5)
    return f" Did you mean {spelled[close[0]]!r}?" if close else ""


def listing(items: Iterable[object], limit: int = 12) -> str:
    """A short, comma-separated list for error messages; long ones say how many were left out."""
    names = [str(item) for item in items]
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names) - limit} more)"
