"""A user's method in one file: two new methods, each under 30 lines, pass every law unchanged."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnsteer import Intervention, register_method
from attnsteer.call import AttnCall, Reweight
from attnsteer.registry import _METHODS
from attnsteer.testing import LAWS, MethodCase, check_laws, run_laws


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


test_laws = run_laws(
    [
        MethodCase(Recency, acting=lambda setting: Recency(5.0), zero=lambda setting: Recency(1.0)),
        MethodCase(Shrink, acting=lambda setting: Shrink(0.8), zero=lambda setting: Shrink(0.0)),
    ],
    hosts=["llama", "gemma2", "gpt_oss", "t5", "sd", "flux"],
    # Compilation is slow and meets the host rather than the method.
    laws=[law for law in LAWS if law != "compile"],
)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """For the law round_trip; a method of a package is decorated with `register_method`."""
    before = dict(_METHODS)
    register_method(Recency)
    register_method(Shrink)
    yield
    _METHODS.clear()
    _METHODS.update(before)


def test_each_is_under_thirty_lines() -> None:
    for cls in (Recency, Shrink):
        assert len(inspect.getsource(cls).splitlines()) < 30


def printed(name: str, monkeypatch: pytest.MonkeyPatch) -> type[Intervention]:
    """A class as CONTRIBUTING.md prints it."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = next(c for c in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if f"class {name}(" in c)
    module = types.ModuleType(f"printed_{name}")
    # A dataclass looks for the module of its class.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, f"CONTRIBUTING.md, {name}", "exec"), vars(module))
    return vars(module)[name]


@pytest.mark.long
@pytest.mark.parametrize("host", ["llama", *(pytest.param(h, marks=pytest.mark.long) for h in ("mistral", "gpt_oss"))])
def test_the_printed_method_on_scores_keeps_every_law(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, learned sinks, chunks and steps without a cache are where rows and keys are easily miscounted."""
    sharpen = printed("Sharpen", monkeypatch)
    case = MethodCase(sharpen, lambda setting: sharpen(1.5), lambda setting: sharpen(0.0), prompt_bound=True)
    results = check_laws(case, host, [law for law in LAWS if law != "compile"])
    assert not [str(r) for r in results if r.outcome == "fail"]
    assert {"cache", "generate", "padding", "packed", "beams"} <= {r.law for r in results if r.outcome == "pass"}


@pytest.mark.long
def test_a_compiled_model() -> None:
    case = MethodCase(Recency, acting=lambda setting: Recency(5.0))
    assert [r.outcome for r in check_laws(case, "llama", "compile")] == ["pass"]
