"""Calls of searches, readings and captures that are none: an error of the library, by name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from attnsteer import FreezeMaps, HeadGate, InjectMap, Scatterbrain, capture, steer
from attnsteer.analysis import Swap, freeze_report, generate_frozen, head_profile, patch_effects, shifted
from attnsteer.errors import AttnSteerError
from attnsteer.methods.patchheads import subspace
from attnsteer.reading import sentence
from attnsteer.search import michel, rotary_bases, screen_heads
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from attnsteer.viz import view
from tests.search.common import random_choices


@functools.cache
def model_of() -> Any:
    return tiny_transformers("llama")


@functools.cache
def inputs_of() -> Any:
    return tiny_transformers_inputs("llama", model_of())


GATE = HeadGate({(0, 0): 2.0})


def seen(model: Any = None, **options: Any) -> Any:
    with torch.no_grad(), capture(model or model_of(), **options) as found:
        (model or model_of())(**inputs_of())
    return found


def run(method: Any) -> None:
    with torch.no_grad(), steer(model_of(), method, control=True):
        model_of()(**inputs_of())


def other(**options: Any) -> Any:
    return tiny_transformers("llama", **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: InjectMap("offset:99999999999999999999"), "one of"),
        (lambda _: run(InjectMap(seen(other(num_attention_heads=8, hidden_size=64)))), "it is another model"),
        (lambda _: run(FreezeMaps(seen(other(head_dim=32), what=("q", "k")))), "widths 32 and 32, this model's 16"),
        (lambda _: subspace(5, 3), "give a capture and a whole number"),
        (lambda _: seen(what=3), r"capture\(what=3\)"),
        (lambda _: seen(to=3), r"capture\(to=3\)"),
        (lambda _: seen().get(0, sample="a"), "sample 'a'"),
        (lambda _: michel(model_of(), random_choices(2), batch="a"), "in batches of 'a'"),
        (lambda _: michel(model_of(), 3), "samples=3: give a list"),
        (lambda _: rotary_bases("six"), "give whole numbers"),
        (lambda _: Scatterbrain(7), "give an even number"),
        (lambda _: screen_heads(model_of(), None, random_choices(2)), "give a method, or methods by name"),
        (lambda _: head_profile(model_of(), 3), "give a list of batches"),
        (lambda _: head_profile(model_of(), [inputs_of()], theta=-1), "0 to 1, or None"),
        (
            lambda _: head_profile(model_of(), [inputs_of()], patterns={"mine": lambda block: 3}),
            "the pattern 'mine' gave 3",
        ),
        (
            lambda _: head_profile(model_of(), [inputs_of()], target=[(5, 10**9)] * 2),
            "token ids of this model run from 0",
        ),
        (lambda _: patch_effects(model_of(), [Swap([10**6], [5], 6, [7])]), "token 1000000 is none of the 99"),
        (lambda _: patch_effects(3, [Swap([5], [5], 6, [7])]), "int"),
        (lambda _: Swap(None, [1], 5, [6]), r"Swap\(prompt=None\)"),
        (lambda _: freeze_report(model_of(), lambda m: None, random_choices(2)), "give a context manager"),
        (lambda _: generate_frozen(model_of().model, inputs_of(), GATE), "does not generate"),
        (lambda _: generate_frozen(model_of(), 3, GATE), "keyword arguments of generate"),
        (lambda _: shifted(3, torch.zeros(4)).__enter__(), "give a module and a vector"),
        (lambda _: sentence([0.5, 0.5], ["a"]), "give one for each key"),
        (lambda folder: view(seen(), folder), "is a folder"),
    ],
)
def test_calls_that_are_none(call: Any, message: str, tmp_path: Any) -> None:
    with pytest.raises(AttnSteerError, match=message):
        call(tmp_path)
