"""Hyper-parameters: every declared one of every method refuses hostile values alike, and takes numbers of NumPy and torch."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import time
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch

from attnsteer import Captured, HeadGate, HeadSet, Intervention, Where, ZeroTuning, capture, get_method, methods
from attnsteer.errors import AttnSteerError, SelectionError
from attnsteer.parameters import Choice, Flag, Number, Parsed, declared, integer, number
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs


@functools.cache
def clean() -> Captured:
    """What a run takes for methods whose source is one."""
    model = tiny_transformers("llama")
    with torch.no_grad(), capture(model, what=("q", "k", "output")) as seen:
        model(**tiny_transformers_inputs("llama", model, batch=1, length=4))
    return seen


# What stands for the fields without a default; a function is called for it.
REQUIRED: dict[str, dict[str, Any]] = {
    "AttendAndExcite": {"words": ["cat"]},
    "AttentionRefocusing": {"boxes": {"cat": (0.0, 0.0, 0.5, 0.5)}},
    "AttentionRegulation": {"words": ["cat"]},
    "CONFORM": {"groups": [("red", "cube"), "ball"]},
    "FreezeMaps": {"source": clean},
    "HeadGate": {"gates": {(0, 1): 0.5}},
    "InjectMap": {"source": "previous"},
    "InstABoost": {"spans": "a"},
    "NAG": {"negative": "dark"},
    "PAINT": {"local": [[0]], "summary": [[1]]},
    "PASTA": {"spans": "a"},
    "SpotLight": {"spans": "a"},
    "VisualHighlight": {"value": 2.0},
}
# What a method needs beside those, by itself or with one of its parameters.
BESIDE: dict[str, dict[str, Any]] = {"PatchHeads": {"source": clean}}
WITH: dict[tuple[str, str], dict[str, Any]] = {
    ("ACT", "alpha"): {"threshold": None},
    ("InjectMap", "share"): {"keys": "image"},
    ("SLG", "start"): {"stop": None},
    ("TokenMerge", "frames"): {"grid": (2, 2)},
}
# Values of the tables below that some parameters take.
ALLOWED: dict[tuple[str, str], tuple[str, ...]] = {
    # No heads are a set too, which steer() refuses.
    ("", "heads"): ("empty", "generator"),
    ("CONFORM", "refine_at"): ("empty",),
    ("InjectMap", "sentence_ends"): ("empty",),
    ("InjectMap", "source"): ("vector",),
    ("VisualKnockout", "blocks"): ("empty",),
}
BUILT_IN = [n for n in methods() if get_method(n).__module__.startswith("attnsteer.methods.")]
DECLARED = [(n, f.name) for n in BUILT_IN for f in fields(get_method(n)) if declared(get_method(n), f.name) is not None]


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


HOSTILE: dict[str, Any] = {
    "object": object(), "unprintable": Unprintable(), "class": int, "complex": 1j, "nan": math.nan, "-inf": -math.inf,
    "1e300": 1e300, "1e-300": 1e-300, "huge": 10**5000, "bytes": b"1", "function": len, "np.nan": np.float32("nan"),
    "vector": torch.zeros(3, 3, 3), "graph": torch.tensor(0.5, requires_grad=True), "meta": torch.zeros((), device="meta"),
    "nested": [[[[]]]], "dict": {"a": {"b": 1}}, "generator": (i for i in ()), "set": {None}, "date": np.datetime64("2020"),
    "sparse": torch.eye(2).to_sparse(),
}  # fmt: skip
WRONG_TYPES: dict[type, dict[str, Any]] = {
    Number: {
        "text": "2",
        "list": [0.5],
        "True": True,
        "np.True": np.True_,
        "none": None,
        "empty": [],
        "where": Where(),
    },
    Choice: {"number": 3, "list": ["a"], "wrong": "nothing like it", "none": None, "True": True},
    Flag: {"number": 1, "text": "True", "none": None, "zero": 0.0},
    Parsed: {"number": 3.5, "True": True, "empty": [], "mixed": [1, "a"]},
}


def make(name: str, **values: Any) -> Any:
    given = {**REQUIRED.get(name, {}), **BESIDE.get(name, {}), **values}
    return get_method(name)(**{k: v() if v is clean else v for k, v in given.items()})


def test_every_hyper_parameter_of_every_method_is_declared() -> None:
    undeclared = {(n, f.name) for n in BUILT_IN for f in fields(get_method(n)) if f.init} - set(DECLARED)
    with_texts = ("InjectMap", "InstABoost", "PASTA", "PatchHeads", "SpotLight")
    assert undeclared == {(name, "tokenizer") for name in with_texts}
    for name in BUILT_IN:
        missing = {f.name for f in fields(get_method(name)) if f.default is MISSING and f.default_factory is MISSING}
        assert missing == set(REQUIRED.get(name, {}))


@pytest.mark.parametrize(("name", "parameter"), DECLARED)
def test_a_hostile_value_is_refused_with_method_parameter_and_what_it_takes(name: str, parameter: str) -> None:
    form = declared(get_method(name), parameter)
    wrong = next(WRONG_TYPES[kind] for kind in type(form).__mro__ if kind in WRONG_TYPES)
    table = {k: v for k, v in {**HOSTILE, **wrong}.items() if not (v is None and form.optional)}
    if form.learnable:
        del table["graph"]
    if form.per_sample:
        # One value for a batch of one.
        table.pop("list", None)
    for label in ALLOWED.get((name, parameter), ALLOWED.get(("", parameter), ())):
        del table[label]
    for label, value in table.items():
        with pytest.raises(SelectionError) as caught:
            make(name, **{parameter: value})
        message = str(caught.value)
        assert message.startswith(f"{name}({parameter}="), (label, message)
        assert message.endswith((".", ")")) and len(message) < 600 and "\n" not in message, (label, message)
        assert isinstance(form, Parsed) or form.describe() in message, (label, message)


@pytest.mark.parametrize(
    ("name", "parameter"), [(n, p) for n, p in DECLARED if isinstance(declared(get_method(n), p), Number)]
)
def test_bounds_hold_and_numpy_and_torch_numbers_are_taken(name: str, parameter: str) -> None:
    form = declared(get_method(name), parameter)
    for bound, allowed in ((form.low, True), (form.high, True), (form.above, False), (form.below, False)):
        if bound is not None:
            if allowed:
                assert form.check(name, parameter, bound) == bound
            else:
                with pytest.raises(SelectionError):
                    make(name, **{parameter: bound})
    for out in (form.low is not None and form.low - 1, form.high is not None and form.high + 1):
        if out is not False:
            with pytest.raises(SelectionError, match=rf"{name}\({parameter}="):
                make(name, **{parameter: out})
    value = 4 if form.whole else 0.5
    kinds = (np.int32, np.uint8, torch.tensor) if form.whole else (np.float32, np.float64, np.float16, torch.tensor)
    options = WITH.get((name, parameter), {})
    for kind in kinds:
        kept = getattr(make(name, **{parameter: kind(value)}, **options), parameter)
        assert kept == value and type(kept) is type(value)


NEITHER: dict[str, Any] = {
    **HOSTILE,
    "learned": torch.ones(2, requires_grad=True),
    "long": "x" * 10_000,
    "nul": "\0",
    "half": "\ud800",
}


@pytest.mark.parametrize("label", NEITHER)
def test_selections_files_and_names_refuse_hostile_values_too(label: str) -> None:
    value = NEITHER[label]
    tries: list[Any] = [lambda f=f.name: Where(**{f: value}) for f in fields(Where)]
    tries += [lambda: HeadSet(value), lambda: HeadSet({0: value}), lambda: HeadSet({0: [1]}, shape=value)]
    tries += [lambda: HeadSet({0: [1]}, scores=value), lambda: get_method(value), lambda: HeadSet.load(value)]
    tries += [lambda: Intervention.from_pretrained(value), lambda: ZeroTuning().save_pretrained(value)]
    if isinstance(value, str):
        tries += [lambda: make("InjectMap", source=value), lambda: make("InjectMap", keys=value)]
    for i, build in enumerate(tries):
        try:
            build()
        except AttnSteerError as error:
            assert len(str(error)) < 1000 and "\n" not in str(error), (label, i, error)


def test_what_it_takes_can_be_read() -> None:
    texts = {
        Number(low=0, high=1): "number from 0 to 1", Number(above=0): "finite number above 0", Number(): "finite number",
        Number(low=0, below=1): "number of at least 0, below 1", Number(True, low=2, whole=True): "integer of at least 2 or None",
        Number(above=0, infinite=True): "number above 0, or infinity", Flag(): "True or False",
        Choice(names=("a", "b")): "one of 'a', 'b'", Number(high=-1): "finite number at most -1",
    }  # fmt: skip
    assert {form: form.describe() for form in texts} == texts
    assert declared(get_method("ACT"), "beta").per_sample and not declared(get_method("ACT"), "min_rows").per_sample


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ZeroTuning(gama=1.5), ["ZeroTuning has no parameter 'gama'", "heads, gamma, where", "Did you mean 'gamma'?"]),
        (lambda: Where(layer=[1]), ["Where has no parameter 'layer'", "Did you mean 'layers'?"]),
        (lambda: HeadGate(), ["HeadGate needs gates"]),
        (lambda: HeadGate(gate={}), ["no parameter 'gate'", "'gates'"]),
        (lambda: ZeroTuning(None, 2.0, Where()), ["2 values by position (heads, gamma), not 3"]),
        (lambda: ZeroTuning({0: [1]}, heads={0: [1]}), ["heads twice"]),
        (lambda: Where(*range(12)), ["10 values by position", "not 12"]),
        (lambda: ZeroTuning().new(gama=2.0), ["no parameter 'gama'"]),
        (lambda: Third(streng=1.0), ["Third has no parameter 'streng'", "Did you mean 'strength'?"]),
        (lambda: Third(), ["Third needs strength"]),
        (lambda: Third(0.5, 2), ["1 values by position"]),
        (lambda: Third("a"), ["Third(strength='a')", "number from 0 to 1, not str"]),
        (lambda: Plain(nothing=1), ["Plain has no parameter 'nothing'", "it has where"]),
    ],
)  # fmt: skip
def test_a_wrong_name_or_count_is_one_clear_error(build: Any, words: list[str]) -> None:
    with pytest.raises(SelectionError) as caught:
        build()
    assert all(word in str(caught.value) for word in words), str(caught.value)


class Plain(Intervention):
    """Not a dataclass of its own."""


@dataclass(frozen=True)
class Third(Intervention):
    """A method of another package."""

    strength: float = number(low=0, high=1)
    after: int = integer(1, low=0, kw_only=True)


@dataclass(frozen=True)
class Later(Third):
    """Other defaults: the declarations of the base hold."""

    strength: float = 0.25


def test_a_subclass_keeps_the_declarations_of_its_base() -> None:
    assert Later().strength == 0.25 and Later(np.float32(0.5)).strength == 0.5
    with pytest.raises(SelectionError, match=r"Later\(strength=2\): give a number from 0 to 1"):
        Later(2)


@pytest.mark.parametrize(
    "made", [Third(0.5, where=Where(layers=1)), HeadGate({(0, 1): 2.0}), Where(heads={0: [1]}), Plain()]
)
def test_copies_and_pickles_are_equal(made: Any) -> None:
    for again in (copy.copy(made), copy.deepcopy(made), *(pickle.loads(pickle.dumps(made, p)) for p in range(2, 6))):
        assert again == made and type(again) is type(made)


# ------------------------------------------------------------------------------------------------ NumPy and torch


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_arrays_of_integers_are_heads_layers_and_gates(array: Any) -> None:
    one = array(1)
    assert HeadSet({np.int64(0): array([1, 2])}) == HeadSet(array([[0, 1], [0, 2]])) == HeadSet({0: [1, 2]})
    assert HeadSet([(one, one)]) == HeadSet({1: [1]}) and type(HeadSet([(one, one)]).layers[0]) is int
    where = Where(layers=array([2, 0]), heads=array([1]), steps=one, rows=array([0, 4]))
    assert where == Where(layers=[0, 2], heads=1, steps=1, rows=(0, 4)) and type(where.layers[0]) is int
    assert Where(steps=array([0.0, 0.5])).steps == (0.0, 0.5)
    head = one if isinstance(one, torch.Tensor) else np.int64(1)
    gate = HeadGate({(np.int64(0), head): array(0.5)})
    assert gate == HeadGate({(0, 1): 0.5}) and gate.to_dict() == HeadGate({(0, 1): 0.5}).to_dict()
    assert get_method("SpotLight")([array([[0, 4]])]).spans == (((0, 4),),)
    for wrong in (array([0.5]), array([True]), array([[1]])):
        with pytest.raises(SelectionError):
            Where(layers=wrong)
        with pytest.raises(SelectionError):
            HeadSet({0: wrong})


def test_two_gates_of_one_head_are_refused() -> None:
    with pytest.raises(SelectionError, match="two gates"):
        HeadGate({(0, 1): 0.5, (torch.tensor(0), 1): 2.0})


def test_looking_at_arguments_costs_little() -> None:
    """A method is made once per batch; a hundred take less than a second on any machine."""
    start = time.perf_counter()
    for _ in range(100):
        ZeroTuning(gamma=2.0)
    assert time.perf_counter() - start < 1.0
