"""The differential fuzz for about a minute, and what it must be able to see."""

from __future__ import annotations

import dataclasses
import random
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnsteer.kernels import statistics
from attnsteer.testing.fuzz import Case, check, draw
from attnsteer.testing.fuzz import __main__ as program
from attnsteer.testing.fuzz.layout import Layout

SECONDS = 40.0
# What is refused, and why it is right: the form, and a part of the message.
REFUSED = (
    ("positions", "lets them see each other"),
    ("tree", "interleaves them"),
    ("", "filled before steering began"),
    ("", "leaves the prompt out"),
)


@pytest.mark.slow
def test_every_outcome_is_exact_or_refused() -> None:
    """Drawn by hypothesis, the same cases in every run, for as long as the time lasts."""
    stop, ran = time.monotonic() + SECONDS, []

    @settings(max_examples=600, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def some(data: st.DataObject) -> None:
        # What is drawn may not depend on the clock, or hypothesis takes the test for a flaky one.
        case = draw(lambda name, options: data.draw(st.sampled_from(list(options)), label=name))
        if time.monotonic() > stop:
            return
        outcome = check(case)
        ran.append(outcome.kind)
        assert outcome.kind != "wrong", f"{outcome}; python -m attnsteer.testing.fuzz --case '{case}'"
        if outcome.kind == "refused":
            assert any(form in ("", case.form) and text in outcome.message for form, text in REFUSED), outcome

    some()
    assert ran.count("exact") > 0.8 * len(ran) and len(ran) > 20


def a_case(**changes: object) -> Case:
    source = random.Random(3)
    case = draw(lambda _, options: source.choice(options))
    plain = {
        "host": "llama", "method": "ACT", "strength": 0.3, "layer": 1, "heads": (0, 2), "phases": "all", "form": "2d",
        "rows": ((-2, 9), (11,)), "blind": "none", "parents": (), "way": "decode", "cuts": (2,), "seed": 1,
    }  # fmt: skip
    return dataclasses.replace(case, **{**plain, **changes})


def test_a_case_is_its_own_line() -> None:
    case = a_case()
    assert Case.parse(str(case)) == case


def test_it_sees_padding_that_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A divisor of means that counts padding rows, in the fast path and in the explicit map alike."""
    assert check(a_case()).kind == "exact"
    right = statistics.seen_by
    monkeypatch.setattr("attnsteer.kernels.seen_by", lambda att, weight: right(att, torch.ones_like(weight)) + 2.0)
    assert check(a_case()).kind == "wrong"


def test_it_sees_a_sequence_that_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """State that stays where it was while the batch rows change places."""
    case = a_case(way="reorder")
    assert check(case).kind == "exact"
    monkeypatch.setattr("attnsteer.hosts.transformers.cache_state.Sequence.batch", lambda self, change: None)
    assert check(case).kind == "wrong"


def test_it_sees_packed_rows_that_are_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = a_case(form="float", rows=((-2, 5, 6),), way="whole", method="ZeroTuning", strength=6.0)
    assert check(case).kind == "exact"
    monkeypatch.setattr("attnsteer.hosts.transformers.forward.roles_of_mask", lambda *_: (None, None))
    assert check(case).kind == "wrong"


def test_the_program_prints_the_line_that_runs_a_failure_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--cases", "3", "--seed", "5"]) == 0
    assert "3 cases" in capsys.readouterr().out
    monkeypatch.setattr("attnsteer.hosts.transformers.cache_state.Sequence.batch", lambda self, change: None)
    line = str(a_case(way="reorder"))
    assert program.main(["--case", line]) == 1
    assert f"--case '{line}'" in capsys.readouterr().out


def test_a_layout_knows_its_slots() -> None:
    layout = Layout(((-1, 2, -1, 3),), packed=True)
    assert layout.request.tolist() == [[-1, 0, 0, -1, 1, 1, 1]] and layout.index.tolist() == [[0, 0, 1, 0, 0, 1, 2]]
    seen = layout.mask("self")[0, 0]
    assert seen[0].nonzero()[:, 0].tolist() == [0] and seen[6].nonzero()[:, 0].tolist() == [4, 5, 6]
    assert Layout(((-1, 2, -1, 3),)).index.tolist() == [[0, 0, 1, 0, 2, 3, 4]]
