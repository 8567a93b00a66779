"""Every law on every method and host. A combination that does not apply must have its reason in SKIPS.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnsteer import Where, sites, steer
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.testing.fingerprint import fingerprint
from attnsteer.testing.laws import LAWS, HostCase, MethodCase, NotApplicable, check

from .cases import DENOISERS, GUIDANCE, LANGUAGE, LATENT, LATENT_PIPELINES, METHODS, PIPELINES, VISION

SKIPS = (Path(__file__).parents[1] / "SKIPS.md").read_text(encoding="utf-8")
# Tracing a model takes seconds; what it meets is the host, so one method of each door and a few hosts tell all.
COMPILED = {("HeadGate", h) for h in ("llama", "bert", "t5", "llava", "sd", "flux")} | {
    ("ACT", "llama"),
    ("PASTA", "gpt_oss"),
}
ALL = [
    *((law, m, h) for law in LAWS for h in LANGUAGE for m in METHODS),
    *((law, m, h) for law in LAWS for h in LANGUAGE if h.name == "llava" for m in VISION),
    *((law, METHODS[0], h) for law in LAWS for h in DENOISERS),
    *((law, m, h) for law in LAWS for h in PIPELINES for m in [*GUIDANCE, METHODS[0]]),
    *((law, LATENT[0], h) for law in LAWS for h in LATENT_PIPELINES),
    *((law, LATENT[1], h) for law in LAWS for h in LATENT_PIPELINES if h.name == "sd3-pipeline"),
]
COMBINATIONS = [(law, m, h) for law, m, h in ALL if law != "compile" or (m.name, h.name) in COMPILED]


@pytest.mark.parametrize(
    ("law", "method", "host"), COMBINATIONS, ids=[f"{law}-{m.name}-{h.name}" for law, m, h in COMBINATIONS]
)
def test_law(law: str, method: MethodCase, host: HostCase) -> None:
    try:
        check(law, method, host)
    except NotApplicable as reason:
        assert str(reason) in SKIPS, f"tests/SKIPS.md has no row with the reason: {reason}"
        pytest.skip(str(reason))


@pytest.mark.parametrize("host", DENOISERS, ids=lambda h: h.name)
@pytest.mark.parametrize("method", METHODS[1:], ids=lambda m: m.name)
def test_methods_on_tokens_refuse_denoisers(method: MethodCase, host: HostCase) -> None:
    """One clear error before any computation, and nothing left behind."""
    model = host.build()
    before = fingerprint(model)
    made = method.build([s for s in sites(model) if s.kind != "cross"], 2)
    with pytest.raises((SelectionError, UnsupportedHost), match=r"needs tokens|linear attention|causal|is defined on"):
        steer(model, made.new(where=Where()))
    assert fingerprint(model) == before
