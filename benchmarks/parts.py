"""What the benchmark cases are made of: sizes, gates, outcomes, and a decoding step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from benchmarks.measure import Times
from benchmarks.models import LlamaShape, MMDiTShape, UNetShape

MODES = ("full", "quick", "smoke")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Size:
    """How large a case is.

    Attributes:
        shape: of the model. tokens: of the prompt, or in the cache. gate: tokens (or latent side) of the gate.
        repeats: undisturbed rounds of interleaved timing. patience: seconds to wait for them (see `measure.interleaved`).
        memory: measure the peak too.
    """

    shape: LlamaShape | MMDiTShape | UNetShape
    tokens: int = 0
    gate: int = 0
    repeats: int = 5
    patience: float = 0.0
    memory: bool = True


@dataclass(frozen=True)
class Check:
    """A further figure of a case with a bar of its own; `at_least` turns the bar round."""

    what: str
    value: float
    bar: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Whether the bar is met."""
        return self.value >= self.bar if self.at_least else self.value <= self.bar


@dataclass(frozen=True)
class Gate:
    """The result of a correctness gate: the largest error against the reference, and how far the edit moves the output."""

    error: float
    tolerance: float
    moved: float
    against: str

    @property
    def passed(self) -> bool:
        """Whether the error is small and the edit is not: a gate over an edit that does nothing proves nothing."""
        return self.error <= self.tolerance and (self.moved > 100 * self.tolerance or self.tolerance == 0.0)


@dataclass
class Outcome:
    """What a case measured: the ratio, further checks, the times behind them by name, and figures worth keeping."""

    value: float
    checks: list[Check] = field(default_factory=list)
    times: dict[str, Times] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One case: the ratio `value` must be at most `bar`."""

    name: str
    what: str
    bar: float
    gate: Callable[[Size], Gate]
    measure: Callable[[Size, int], Outcome]
    sizes: dict[str, Size]


def error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a - b).abs().max())


class Decoder:
    """A model, its filled cache, and one more token at a time."""

    def __init__(self, model: nn.Module, ids: Tensor):
        self.model, self.ids = model, ids
        self.cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        self.next = 0

    def __call__(self) -> Tensor:
        token = self.ids[:, self.next : self.next + 1]
        self.next = (self.next + 1) % self.ids.shape[1]
        return self.model(token, past_key_values=self.cache, use_cache=True).logits
