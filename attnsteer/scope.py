"""What the blocks that are entered around calls say of them: `run.freeze()`, `paused`, `chunked_prefill`, `images`, `branches`."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .account import Samples


@dataclass(frozen=True)
class Scope:
    """What holds for the calls of the thread or asyncio task that entered the blocks.

    Attributes:
        frozen: statistics stay as the prompt left them. chunked: calls are chunks of one prompt; chunk_total: its slots.
        samples: which sample each row of the calls belongs to; None: as the calls tell.
        images: the processor's output, or token ranges. layout: names of the equal parts of a denoiser's batch.
        paused: the target runs as it is.
    """

    frozen: bool = False
    chunked: bool = False
    chunk_total: int | None = None
    samples: Samples | None = None
    images: Any = None
    layout: tuple[str, ...] | None = None
    paused: bool = False


PLAIN = Scope()
# By steering (its id).
SCOPES: ContextVar[Mapping[int, Scope]] = ContextVar("attnsteer_scopes", default={})  # noqa: B039  never mutated
