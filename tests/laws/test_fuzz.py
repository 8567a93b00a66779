"""The differential fuzz for a minute, and what it must be able to see."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections import Counter

import pytest
import torch

from attnsteer.kernels import statistics
from attnsteer.testing.fuzz import Case, cases, check, draw
from attnsteer.testing.fuzz import __main__ as program
from attnsteer.testing.fuzz.hosts import HOSTS
from attnsteer.testing.fuzz.layout import Layout, read

SEED, SECONDS = 20, 60.0
# What is refused, and why it is right: a part of the message.
REFUSED = (
    "lets them see each other",
    "interleaves them",
    "a window hides what it belongs to",
    "defined on causal",
    "filled before steering began",
    "leaves the prompt out",
    "was cut back",
    "ends after its",
    "its means move with each generated token",
    "is not in the text",
    "times in the text",
    "holds 2 packed sequences",
    "holds 3 packed sequences",
)


@pytest.mark.slow
def test_every_outcome_is_exact_or_refused() -> None:
    """The same cases in the same order in every run, as many as the time allows."""
    stop, ran = time.monotonic() + SECONDS, Counter()
    for number, case in enumerate(cases(SEED)):
        if time.monotonic() > stop:
            break
        outcome = check(case)
        ran[outcome.kind] += 1
        assert outcome.kind != "wrong", f"case {number} of seed {SEED}: {outcome}; {program.again(case)}"
        if outcome.kind == "refused":
            assert any(text in outcome.message for text in REFUSED), f"{outcome}; {program.again(case)}"
    assert ran["exact"] > 0.7 * ran.total() and ran.total() > 30


def test_cases_are_the_same_for_a_seed() -> None:
    first, second = (list(itertools.islice(cases(7), 300)) for _ in range(2))
    assert first == second and first != list(itertools.islice(cases(8), 300))
    assert {c.host for c in first} == set(HOSTS) and {w for h in HOSTS.values() for w in h.ways} == {
        c.way for c in first
    }


def a_case(**changes: object) -> Case:
    source = random.Random(3)
    case = draw(lambda _, options: source.choice(options))
    plain = {
        "host": "llama", "method": "ACT", "variant": "plain", "strength": (0.3,), "layer": 1, "heads": (0, 2),
        "phases": "all", "region": "all", "form": "2d", "packed": False, "rows": ((-2, 9), (11,)), "blind": "none",
        "parents": (), "way": "decode", "cuts": (2,), "threads": False, "seed": 1,
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


@pytest.mark.parametrize("change", [{"way": "reorder"}, {"way": "beams", "cuts": (6,), "variant": "running"}])
def test_it_sees_a_sequence_that_is_not_followed(monkeypatch: pytest.MonkeyPatch, change: dict[str, object]) -> None:
    """State that stays where it was while the batch rows change places."""
    case = a_case(**change)
    assert check(case).kind == "exact"
    monkeypatch.setattr("attnsteer.hosts.transformers.cache_state.Sequence.batch", lambda self, change: None)
    assert check(case).kind == "wrong"


def test_it_sees_packed_rows_that_are_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = a_case(form="float", packed=True, rows=((-2, 5, 6),), way="whole", method="ZeroTuning", strength=(6.0,))
    assert check(case).kind == "exact"
    monkeypatch.setattr("attnsteer.hosts.transformers.forward.roles_of_mask", lambda *_: (None, None))
    assert check(case).kind == "wrong"


def test_it_sees_threads_that_share_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    case = a_case(threads=True, way="chunks", cuts=(4,), form="none", rows=((11,),))
    assert check(case).kind == "exact"
    found = check(dataclasses.replace(case, threads=False))
    assert found.kind == "exact"
    monkeypatch.setattr("attnsteer.testing.fuzz.run._at_once", lambda every, work: [work(every[0])] * len(every))
    assert check(case).kind == "wrong"


# A tree in a model with windows only: the seventh token's parent is the first, beyond the window of 5, and the others follow it.
ORPHAN = {
    "host": "mistral", "form": "tree", "parents": (0, 0, 1, 2, 3, 4, 5, 0, 7, 8, 9), "rows": ((11,),), "way": "whole",
    "method": "ZeroTuning", "strength": (6.0,),
}  # fmt: skip


def test_a_mask_that_leaves_open_whose_token_a_row_is_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "window hides what it belongs to" in check(a_case(**ORPHAN)).message
    # Where some layers see everything, their mask tells.
    assert check(a_case(**{**ORPHAN, "host": "gemma3_text"})).kind == "exact"
    monkeypatch.setattr("attnsteer.hosts.transformers.forward.Stack._hidden", lambda *_: None)
    assert check(a_case(**ORPHAN)).kind == "wrong"


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
    assert layout.roles.request.tolist() == [[-1, 0, 0, -1, 1, 1, 1]]
    assert layout.roles.index.tolist() == [[0, 0, 1, 0, 0, 1, 2]]
    seen = layout.mask("self")[0, 0]
    assert seen[0].nonzero()[:, 0].tolist() == [0] and seen[6].nonzero()[:, 0].tolist() == [4, 5, 6]
    assert Layout(((-1, 2, -1, 3),)).roles.index.tolist() == [[0, 0, 1, 0, 2, 3, 4]]
    assert Layout(((4,),)).positions((0, 0, 1, 0)).tolist() == [[0, 1, 2, 1]]


def test_roles_are_read_from_a_mask() -> None:
    layout = Layout(((-2, 3, -1, 2), (-1, 4, -1, 2)), packed=True)
    for blind in ("none", "self", "all"):
        assert read(layout.mask(blind)[:, 0]).agree(layout.roles), blind
    assert not read(layout.mask()[:, 0]).agree(Layout(layout.rows).roles)
    # Two branches that go on in turns.
    between = torch.eye(4, dtype=torch.bool)
    between[2, 0] = between[3, 1] = True
    assert read(between[None]) is None
    # A token that sees two sequences.
    both = torch.eye(3, dtype=torch.bool)
    both[2, :2] = True
    assert read(both[None]) is None
    # Tokens that see each other, as those of an image.
    image = torch.ones(4, 4, dtype=torch.bool).tril()
    image[1:3, 1:3] = True
    assert read(image[None]).request.tolist() == [[0, 0, 0, 0]]
