"""`HeadSet`: what it holds, set algebra, and files that are not what they should be."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from attnsteer import ACT, HeadSet
from attnsteer.errors import SelectionError, SerializationError

PAIRS = st.sets(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)
SCORED = HeadSet(
    {2: [5, 0], 3: [1]},
    scores={(2, 0): 0.25, (2, 5): -1.5, (3, 1): 0.25},
    shape=(4, 8),
    provenance={"method": "calibrate_act", "nested": {"seeds": [1, 2]}},
)


# ------------------------------------------------------------------------------------------------ what it holds


def test_forms_of_the_same_set_are_equal() -> None:
    forms = [
        {2: [5, 0], 3: [1]},
        {3: (1,), 2: {0, 5}},
        [(3, 1), (2, 0), (2, 5), (2, 0)],
        iter([(2, 0), (2, 5), [3, 1]]),
    ]
    sets = [HeadSet(form) for form in forms]
    assert len(set(sets)) == 1
    assert list(sets[0]) == [(2, 0), (2, 5), (3, 1)] and len(sets[0]) == 3
    assert sets[0].to_dict() == {2: [0, 5], 3: [1]} and sets[0].layers == (2, 3)
    assert sets[0][2] == (0, 5) and sets[0][0] == () and (3, 1) in sets[0] and (1, 3) not in sets[0]
    assert repr(sets[0]) == "HeadSet({2: [0, 5], 3: [1]})"
    assert repr(HeadSet([(i, j) for i in range(5) for j in range(6)])) == "HeadSet(30 heads in 5 layers)"


@pytest.mark.parametrize(
    "heads",
    [
        {0: [-1]}, {-1: [0]}, {0: [1.0]}, {0: [True]}, {"0": [1]}, {0: 3}, {0: "12"}, [(0, 1, 2)], [0, 1], "01", 5,
        [(0,)], None,
    ],
)  # fmt: skip
def test_what_is_not_a_pair_of_indices_is_refused(heads: Any) -> None:
    with pytest.raises(SelectionError, match="HeadSet got"):
        HeadSet(heads)


@pytest.mark.parametrize("shape", [(4,), 4, (4, 0), (4, 8, 2), "48", (4.0, 8)])
def test_a_wrong_shape_is_refused(shape: Any) -> None:
    with pytest.raises(SelectionError, match="layers, heads per layer"):
        HeadSet({0: [0]}, shape=shape)


def test_heads_outside_the_shape_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"\(4, 0\).*\(4, 8\)"):
        HeadSet({4: [0]}, shape=(4, 8))
    with pytest.raises(SelectionError, match=r"\(0, 8\).*\(4, 8\)"):
        HeadSet({0: [8]}, shape=(4, 8))


def test_scores_are_those_of_members_and_numbers() -> None:
    assert HeadSet({0: [1]}, scores={(0, 1): 2, (5, 5): 1.0}).scores == {(0, 1): 2.0}
    with pytest.raises(SelectionError, match="not a number"):
        HeadSet({0: [1]}, scores={(0, 1): float("nan")})
    assert HeadSet({0: [1]}) != HeadSet({0: [1]}, scores={(0, 1): 1.0})


def test_it_cannot_be_changed() -> None:
    before = copy.deepcopy(SCORED)
    for name in ("scores", "shape", "provenance", "layers", "anything"):
        with pytest.raises(AttributeError):
            setattr(SCORED, name, None)
    with pytest.raises(TypeError):
        SCORED[2] = (1,)  # type: ignore[index]
    SCORED.scores.clear()
    SCORED.provenance["nested"]["seeds"].append(3)
    SCORED.to_dict()[2].append(7)
    assert before == SCORED and SCORED.provenance == before.provenance and len(SCORED.scores) == 3


def test_it_does_not_share_what_it_was_given() -> None:
    heads, provenance = {0: [1]}, {"a": [1]}
    made = HeadSet(heads, provenance=provenance)
    heads[0].append(2)
    provenance["a"].append(2)
    assert made == HeadSet({0: [1]}) and made.provenance == {"a": [1]}


def test_copies_are_equal() -> None:
    for twin in (copy.copy(SCORED), copy.deepcopy(SCORED), pickle.loads(pickle.dumps(SCORED)), HeadSet(SCORED)):
        assert twin == SCORED and twin.shape == SCORED.shape and twin.provenance == SCORED.provenance


def test_top_is_by_score_and_ties_go_to_the_lower_layer() -> None:
    assert list(SCORED.top(1)) == [(2, 0)]
    assert SCORED.top(2) == HeadSet({2: [0], 3: [1]}, scores=SCORED.scores)
    assert len(SCORED.top(0)) == 0 and SCORED.top(99) == SCORED
    assert SCORED.top(2).shape == (4, 8) and SCORED.top(2).provenance == SCORED.provenance
    with pytest.raises(SelectionError, match="0 or more"):
        SCORED.top(-1)
    with pytest.raises(SelectionError, match="1/2 have one"):
        HeadSet({0: [0, 1]}, scores={(0, 0): 1.0}).top(1)


# ------------------------------------------------------------------------------------------------ set algebra


@given(PAIRS, PAIRS)
def test_it_is_a_set(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> None:
    x, y = HeadSet(a), HeadSet(b)
    assert set(x | y) == a | b and set(x & y) == a & b and set(x - y) == a - b
    assert x | y == y | x and x & y == y & x and (x - y) | (x & y) == x


def test_algebra_keeps_scores_and_the_shape() -> None:
    other = HeadSet({2: [5], 0: [0]}, scores={(2, 5): 9.0, (0, 0): 3.0})
    assert (SCORED | other).scores == {(0, 0): 3.0, **SCORED.scores}
    assert (SCORED & other).scores == {(2, 5): -1.5} and (SCORED - other).scores == {(2, 0): 0.25, (3, 1): 0.25}
    assert (SCORED | other).shape == (other | SCORED).shape == (4, 8)


@pytest.mark.parametrize("join", [HeadSet.__or__, HeadSet.__and__, HeadSet.__sub__])
def test_sets_of_two_models_do_not_mix(join: Any) -> None:
    with pytest.raises(SelectionError, match=r"\(4, 8\) and \(32, 32\)"):
        join(SCORED, HeadSet({0: [0]}, shape=(32, 32)))


# ------------------------------------------------------------------------------------------------ files


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    loaded = HeadSet.load(SCORED.save(tmp_path / "heads.safetensors"))
    assert loaded == SCORED and loaded.shape == SCORED.shape and loaded.provenance == SCORED.provenance
    assert loaded.digest() == SCORED.digest() != HeadSet(list(SCORED)).digest()


@given(PAIRS, st.floats(allow_nan=False), st.booleans())
def test_any_set_survives_a_file(tmp_path_factory: Any, pairs: set[tuple[int, int]], score: float, some: bool) -> None:
    path = tmp_path_factory.mktemp("heads") / "h.safetensors"
    made = HeadSet(pairs, scores={p: score for p in sorted(pairs)[: 2 if some else None]})
    assert HeadSet.load(made.save(path)) == made


def foreign(path: Path, heads: Any = None, scores: Any = None, **meta: Any) -> Path:
    """A file like that of `save`, with some things changed (None: left out)."""
    tensors = {
        "heads": torch.tensor([[0, 1]]) if heads is None else heads,
        "scores": torch.zeros(1, dtype=torch.float64) if scores is None else scores,
    }
    record = {"format": "attnsteer.headset", "schema": "1", "shape": "null", "provenance": "{}"} | meta
    save_file(tensors, str(path), metadata={k: v for k, v in record.items() if v is not None})
    return path


def test_the_helper_writes_a_good_file(tmp_path: Path) -> None:
    assert HeadSet.load(foreign(tmp_path / "h")) == HeadSet({0: [1]}, scores={(0, 1): 0.0})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, "'other'"),
        ({"format": None}, "written by HeadSet.save"),
        ({"schema": "3"}, "upgrade attnsteer"),
        ({"schema": None}, "schema None"),
        ({"schema": "one"}, "schema one"),
        ({"heads": torch.tensor([0, 1])}, r"expected int64 \[N, 2\]"),
        ({"heads": torch.tensor([[0, 1, 2]])}, r"expected int64 \[N, 2\]"),
        ({"heads": torch.tensor([[0.0, 1.0]])}, "torch.float32"),
        ({"heads": torch.tensor([[True, False]])}, "torch.bool"),
        ({"heads": torch.tensor([[0, -1]])}, "non-negative"),
        ({"scores": torch.zeros(2, dtype=torch.float64)}, r"scores \(2,\)"),
        ({"scores": torch.zeros(1, dtype=torch.int64)}, "torch.int64"),
        ({"shape": "[1, 1]"}, r"\(0, 1\)"),
        ({"shape": "[4]"}, "layers, heads per layer"),
        ({"shape": "7"}, "does not hold a head set"),
        ({"shape": "{"}, "does not hold a head set"),
        ({"provenance": "[1]"}, "does not hold a head set"),
    ],
)
def test_a_foreign_or_newer_file_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SerializationError, match=words) as caught:
        HeadSet.load(foreign(tmp_path / "heads.safetensors", **changes))
    assert "heads.safetensors" in str(caught.value)


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, str(path))
    with pytest.raises(SerializationError, match="'weight'"):
        HeadSet.load(path)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = SCORED.save(tmp_path / "whole").read_bytes()
    for length in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "part").write_bytes(whole[:length])
        with pytest.raises(SerializationError, match="not a whole safetensors file"):
            HeadSet.load(tmp_path / "part")


def test_a_missing_file_a_folder_and_a_pickle_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SerializationError, match="there is no file"):
            HeadSet.load(path)
    torch.save({"heads": torch.zeros(1, 2)}, tmp_path / "heads.pt")
    (tmp_path / "heads.json").write_text(json.dumps({"0": [1]}))
    for name in ("heads.pt", "heads.json"):
        with pytest.raises(SerializationError, match="not a whole safetensors file"):
            HeadSet.load(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HeadSet({0: [0]}, scroes={}), "HeadSet has no parameter 'scroes'; .* Did you mean 'scores'?"),
        (lambda: HeadSet(), "HeadSet needs heads; it has heads, scores, shape, provenance"),
        (lambda: HeadSet([], [], []), "HeadSet takes 1 values by position"),
    ],
)
def test_wrong_parameters_are_named(make: Any, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        make()


@pytest.mark.parametrize("path", [3, None, 1.5, b"heads", ["a"]])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(SerializationError, match=r"HeadSet.load\(.*give a path"):
        HeadSet.load(path)
    with pytest.raises(SerializationError, match=r"HeadSet.save\(.*give a path"):
        HeadSet({0: [0]}).save(path)
    with pytest.raises(SerializationError, match=r"ACT.save_pretrained\(.*give a path"):
        ACT().save_pretrained(path)
    with pytest.raises(SerializationError, match=r"from_pretrained\(.*give a path"):
        ACT.from_pretrained(path)
