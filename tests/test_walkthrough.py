"""docs/walkthrough.md runs from top to bottom in one session, and prints what stands on the page."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.md"
# Rounded figures may fall to the other side on another machine; a sample may turn.
SLACK = 2.0
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def parts(text: str) -> list[tuple[str, str]]:
    """(code, what it printed) of each block."""
    return re.findall(r"^```python\n(.*?)^```\n+^```text\n(.*?)^```", text, re.M | re.S)


def agree(printed: str, shown: str) -> bool:
    """The same words, and numbers that differ by no more than rounding (0.02 of probabilities, two of a hundred samples)."""
    if NUMBER.sub("#", printed) != NUMBER.sub("#", shown):
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return all(abs(float(a) - float(b)) <= (0.02 if "." in b else SLACK) for a, b in pairs)


def test_the_page_prints_what_it_shows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = parts(text)
    assert len(found) == text.count("```python") >= 5
    session: dict[str, object] = {}
    for number, (code, shown) in enumerate(found, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"walkthrough, block {number}", "exec"), session)
        assert agree(printed.getvalue(), shown), f"block {number} printed:\n{printed.getvalue()}"


@pytest.mark.parametrize(
    ("printed", "same"),
    [("a 0.52 b 61\n", True), ("a 0.55 b 61\n", False), ("a 0.51 c 61\n", False), ("a 0.51 b 66\n", False)],
)
def test_what_agrees(printed: str, same: bool) -> None:
    assert agree(printed, "a 0.51 b 60\n") is same
