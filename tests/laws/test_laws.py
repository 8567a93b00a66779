"""Every law on every method and host. A combination that does not apply must have its reason in SKIPS.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnsteer.testing.laws import LAWS, HostCase, MethodCase, NotApplicable, check

from .cases import DENOISERS, GUIDANCE, LANGUAGE, METHODS, PIPELINES

SKIPS = (Path(__file__).parents[1] / "SKIPS.md").read_text(encoding="utf-8")
COMBINATIONS = [
    *((law, m, h) for law in LAWS for h in [*LANGUAGE, *DENOISERS] for m in METHODS),
    *((law, m, h) for law in LAWS for h in PIPELINES for m in [*GUIDANCE, METHODS[0]]),
]


@pytest.mark.parametrize(
    ("law", "method", "host"), COMBINATIONS, ids=[f"{law}-{m.name}-{h.name}" for law, m, h in COMBINATIONS]
)
def test_law(law: str, method: MethodCase, host: HostCase) -> None:
    try:
        check(law, method, host)
    except NotApplicable as reason:
        assert str(reason) in SKIPS, f"tests/SKIPS.md has no row with the reason: {reason}"
        pytest.skip(str(reason))
