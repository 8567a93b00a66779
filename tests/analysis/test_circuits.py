"""A score's ledger adds up, names the head that was made to write it, and its directions are those of the full form."""

from __future__ import annotations

import pytest
import torch

from attnsteer.analysis import trace
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
@pytest.mark.parametrize("side", ["query", "key"])
def test_parts_add_up_to_the_score(family: str, side: str) -> None:
    model = tiny_transformers(family)
    inputs = {"input_ids": tiny_transformers_inputs(family, model, batch=1)["input_ids"]}
    ledger = trace(model, inputs, 2, 1, 9, 4, side)
    assert sum(ledger.parts.values()) == pytest.approx(ledger.score, abs=1e-3 * max(1, abs(ledger.score)))
    assert {p[0] for p in ledger.parts} == {"embedding", "head", "block", "bias"}
    assert sum(p[0] == "head" for p in ledger.parts) == 8 and len(ledger.top(3)) == 3
    if family != "gpt2":
        # Without biases of q and k the directions are all of it.
        assert float(ledger.directions.sum()) == pytest.approx(ledger.score, abs=1e-3 * max(1, abs(ledger.score)))


def test_the_score_is_that_of_the_softmax() -> None:
    model = tiny_transformers("llama", attn_implementation="eager")
    ids = tiny_transformers_inputs("llama", model, batch=1)["input_ids"]
    with torch.no_grad():
        A = model(input_ids=ids, output_attentions=True).attentions[1][0, 3, 8]
    scores = torch.tensor([trace(model, {"input_ids": ids}, 1, 3, 8, j).score for j in range(9)])
    assert torch.allclose((scores / 4.0).softmax(-1), A[:9], atol=1e-4)


def test_a_planted_writer_is_named_and_others_are_refused() -> None:
    model = tiny_transformers("llama")
    ids = {"input_ids": tiny_transformers_inputs("llama", model, batch=1)["input_ids"]}
    with torch.no_grad():
        # One head of layer 0 writes far more than all else.
        model.model.layers[0].self_attn.o_proj.weight[:, 32:48] *= 1e4
    assert trace(model, ids, 1, 0, 9, 3).top(1)[0][0] == ("head", 0, 2)
    with pytest.raises(SelectionError, match="no head"):
        trace(model, ids, 1, 9, 3, 2)
    qwen = tiny_transformers("qwen3")
    with pytest.raises(UnsupportedHost, match="not bilinear"):
        trace(qwen, ids, 1, 0, 3, 2)
