"""State that a method keeps from the prompt is found again in decoding, whatever else acts there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnsteer import ACT, PASTA, HeadGate, SpotLight, Where, steer
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs

NOTHING = {(0, 0): 1.0, (1, 2): 1.0}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    "method", [ACT(threshold=0.05), ACT({0: [0, 1], 1: [2]}, 0.2, 0.05, decode="running"), PASTA([[(0, 2)], [(1, 3)]])]
)
@torch.no_grad()
def test_a_method_that_acts_in_one_phase_only_does_not_hide_the_state_of_another(method: Any, phase: str) -> None:
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model, padding="left")

    def scores(*methods: Any) -> list[torch.Tensor]:
        with steer(model, *methods, control=True):
            done = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
        return list(done.scores)

    gate = HeadGate(NOTHING, where=Where(phases=phase))
    alone, first, second = scores(method), scores(method, gate), scores(gate, method)
    for a, b, c in zip(alone, first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert torch.equal(b, c)


@pytest.mark.parametrize("rows", [[1, 0], [1], [0, 0, 1], [1, 1]])
@pytest.mark.parametrize("how", ["batch_select_indices", "reorder_cache"])
@torch.no_grad()
def test_spans_follow_the_rows_of_the_cache(rows: list[int], how: str) -> None:
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model, padding="left")
    spans, index = [[(1, 3)], [(5, 7)]], torch.tensor(rows)
    token, mask = inputs["input_ids"][index][:, 5:6], torch.cat([inputs["attention_mask"], torch.ones(2, 1).long()], 1)

    def decoded(steered: Any, chosen: torch.Tensor, move: bool) -> torch.Tensor:
        with steer(model, SpotLight(steered, 0.9)):
            cache = model(**{k: v[chosen] for k, v in inputs.items()}, use_cache=True).past_key_values
            if move:
                getattr(cache, how)(index)
            return model(input_ids=token, attention_mask=mask[index], past_key_values=cache).logits

    moved = decoded(spans, torch.arange(2), move=True)
    direct = decoded([spans[i] for i in rows], index, move=False)
    torch.testing.assert_close(moved, direct, rtol=1e-5, atol=1e-5)
