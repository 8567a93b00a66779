"""How many files of the package one decode step of a language model goes through."""

from __future__ import annotations

import torch

from attnsteer import ACT, steer
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.stops import stops

MOST_FILES = 9


@torch.no_grad()
def test_a_decode_step_with_act() -> None:
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model)
    ids = inputs["input_ids"]
    with steer(model, ACT({1: [0, 2]}, threshold=0.02)):
        cache = model(**inputs, use_cache=True).past_key_values

        def step() -> None:
            mask = torch.ones(len(ids), cache.get_seq_length() + 1, dtype=torch.long)
            model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)

        step()
        files, functions = stops(step)
    assert "methods/act.py" in files
    assert len(files) <= MOST_FILES, sorted(files)
    # An idle copy of this figure would say nothing, so what was removed is asked too.
    cache = model(**inputs, use_cache=True).past_key_values
    assert stops(step) == (set(), set())
    assert len(functions) > len(files)
