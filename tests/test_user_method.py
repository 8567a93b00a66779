"""A user's method in one file: two new methods, each under 30 lines, pass every law unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attnsteer import Intervention, Where, register_method
from attnsteer.call import AttnCall, Reweight
from attnsteer.registry import _METHODS
from attnsteer.testing.laws import LAWS, HostCase, MethodCase, NotApplicable, check
from tests.laws.cases import DENOISERS, LANGUAGE, chosen


@dataclass(frozen=True)
class Recency(Intervention):
    """Multiplies the attention to all tokens after the third by `factor`, halves that to the first, renormalises."""

    factor: float = 1.0

    kinds = ("self",)
    needs = ("tokens",)

    def weights(self, call: AttnCall) -> Reweight | None:
        if self.factor == 1.0:
            return None
        later = (call.key_index() >= 3)[:, None]
        return Reweight(((later, self.factor), (call.first_key(), 0.5)))


@dataclass(frozen=True)
class Shrink(Intervention):
    """Pulls each head output towards its head mean over channels: o <- (1 - t) o + t mean(o)."""

    t: float = 0.0

    linear = True

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        return None if self.t == 0.0 else torch.lerp(out, out.mean(dim=-1, keepdim=True), self.t)


CASES = [
    MethodCase(
        "Recency",
        lambda pool, b: Recency(5.0, where=chosen(pool)[1] & Where(heads=chosen(pool)[0])),
        lambda pool, b: Recency(1.0, where=chosen(pool)[1] & Where(heads=chosen(pool)[0])),
    ),
    MethodCase(
        "Shrink",
        lambda pool, b: Shrink(0.8, where=chosen(pool)[1] & Where(heads=chosen(pool)[0])),
        lambda pool, b: Shrink(0.0, where=chosen(pool)[1] & Where(heads=chosen(pool)[0])),
    ),
]
HOSTS = [h for h in [*LANGUAGE, *DENOISERS] if h.name in ("llama", "gemma2", "gpt_oss", "t5", "sd", "flux")]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    before = dict(_METHODS)
    register_method(Recency)
    register_method(Shrink)
    yield
    _METHODS.clear()
    _METHODS.update(before)


def test_each_is_under_thirty_lines() -> None:
    for cls in (Recency, Shrink):
        assert len(inspect.getsource(cls).splitlines()) < 30


# Compilation is slow and meets the host rather than the method; one host is enough here.
COMBINATIONS = [(law, m, h) for law in LAWS for m in CASES for h in HOSTS if law != "compile" or h.name == "llama"]


@pytest.mark.parametrize(
    ("law", "method", "host"), COMBINATIONS, ids=[f"{law}-{m.name}-{h.name}" for law, m, h in COMBINATIONS]
)
def test_law(law: str, method: MethodCase, host: HostCase) -> None:
    try:
        check(law, method, host)
    except NotApplicable as reason:
        pytest.skip(str(reason))
