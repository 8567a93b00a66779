"""Rollout and flow: the vectors of the official code, a slow definition, and real forwards against eager maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnsteer
from attnsteer import HeadGate, HeadSet, Where, flow, rollout
from attnsteer.errors import CompositionError, SelectionError, UnsupportedHost
from attnsteer.reading.chains import Graph
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.reference import reading as slow

# Two layers, and what compute_joint_attention and compute_node_flow of samiraabnar/attention_flow at 8044f53 give for them.
A1 = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
A2 = torch.tensor([[1.0, 0, 0], [0.1, 0.9, 0], [0.6, 0.2, 0.2]])


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_transformers("llama")


@pytest.fixture(scope="module")
def inputs(llama: nn.Module) -> dict[str, Tensor]:
    return tiny_transformers_inputs("llama", llama, batch=2, length=7, padding="left", seed=1)


def eager(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return list(model(**inputs, output_attentions=True).attentions)
    finally:
        model.set_attn_implementation("sdpa")


def of_sample(maps: list[Tensor], inputs: dict[str, Tensor], b: int, heads: Any = slice(None)) -> list[Tensor]:
    keep = inputs["attention_mask"][b].bool()
    return [A[b, heads][:, keep][:, :, keep].mean(dim=0) for A in maps]


def test_vectors_of_the_official_code() -> None:
    wanted = torch.tensor([[1, 0, 0], [0.2875, 0.7125, 0], [0.385, 0.165, 0.45]], dtype=torch.float64)
    assert (slow.rollout([A1, A2]) - wanted).abs().max() < 1e-7
    raw = torch.tensor([[1, 0, 0], [0.3, 0.75, 0], [0.5, 0.25, 0.6]], dtype=torch.float64)
    for i in range(3):
        layers = [((W + torch.eye(3)) / 2).tolist() for W in (A1, A2)]
        assert torch.tensor(Graph(layers).flows(i)).sub(raw[i]).abs().max() < 1e-6
        assert (slow.flow([A1, A2], i, normalise=False) - raw[i]).abs().max() < 1e-7
        assert (slow.flow([A1, A2], i) - raw[i] / raw[i].sum()).abs().max() < 1e-7
    assert (slow.flow([A1, A2], 2) - torch.tensor([0.370370, 0.185185, 0.444444])).abs().max() < 1e-6


def test_flows_are_the_smallest_cuts() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        maps = [torch.rand(3, 3, generator=g).masked_fill(torch.rand(3, 3, generator=g) < 0.3, 0.0) for _ in range(3)]
        graph = Graph([m.tolist() for m in maps])
        for i in range(3):
            wanted = slow.flow(maps, i, residual=False, normalise=False)
            assert (torch.tensor(graph.flows(i), dtype=torch.float64) - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("residual", [True, False])
def test_rollout_is_that_of_eager_maps(llama: nn.Module, inputs: dict[str, Tensor], residual: bool) -> None:
    maps = eager(llama, inputs)
    every = rollout(llama, inputs, residual=residual)
    last = rollout(llama, inputs, residual=residual, rows="last")
    assert every.layers == tuple(range(len(maps)))
    for b in range(2):
        wanted = slow.rollout(of_sample(maps, inputs, b), residual)
        assert (every.of(b) - wanted).abs().max() <= 1e-6
        assert (every.of(b).sum(dim=-1) - 1).abs().max() <= 1e-5
        assert torch.equal(last.of(b), every.of(b)[-1:])
        got = flow(llama, inputs, residual=residual)
        assert (got.of(b)[0].sum() - 1).abs() < 1e-5 and got.rows[b].tolist() == last.rows[b].tolist()


def test_flow_of_a_model(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    maps = eager(llama, inputs)
    two = flow(llama, inputs, where=Where(layers=[0, 1]), rows=[2], normalise=False)
    for b in range(2):
        kept = [A[:3, :3] for A in of_sample(maps[:2], inputs, b)]
        # Later tokens are no way from row 2, so that they can be left out of the slow definition.
        assert (two.of(b)[0, :3] - slow.flow(kept, 2, normalise=False)).abs().max() <= 1e-6
        assert not two.of(b)[0, 3:].any()


def test_classes_of_heads(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    maps = eager(llama, inputs)
    classes = {"some": HeadSet({0: [1, 2], 2: [0]}), "one": HeadSet({1: [3]})}
    found = rollout(llama, inputs, heads=classes)
    for b in range(2):
        some = [of_sample(maps, inputs, b, [1, 2])[0], of_sample(maps, inputs, b, [0])[2]]
        assert (found["some"].of(b) - slow.rollout(some)).abs().max() <= 1e-6
        assert (found["one"].of(b) - slow.rollout([of_sample(maps, inputs, b, [3])[1]])).abs().max() <= 1e-6
    alone = rollout(llama, inputs, heads=classes["some"])
    assert torch.equal(alone.tensor, found["some"].tensor)


def test_edited_maps_are_followed(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    plain = rollout(llama, inputs)
    sharper = rollout(llama, inputs, attnsteer.ZeroTuning(gamma=4.0))
    assert (sharper.of(1)[-1, 0] - plain.of(1)[-1, 0]) > 0.01
    before = [p.clone() for p in (plain.tensor,)]
    assert torch.equal(rollout(llama, inputs).tensor, before[0])


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"rows": [99]}, SelectionError, "no row 99"),
        ({"rows": (3, 40)}, SelectionError, "counted from"),
        ({"heads": HeadSet({0: [99]})}, SelectionError, "none of the heads"),
        ({"heads": {}}, SelectionError, "HeadSet"),
        ({"residual": 2}, SelectionError, "residual"),
    ],
)
def test_what_is_not_there_is_refused(
    llama: nn.Module, inputs: dict[str, Tensor], more: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        rollout(llama, inputs, **more)


def test_calls_that_are_no_chain(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    ids = inputs["input_ids"]
    with torch.no_grad():
        cache = llama(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(UnsupportedHost, match="not the same tokens"):
        rollout(llama, {"input_ids": ids[:, 4:], "past_key_values": cache})
    with pytest.raises(SelectionError, match="mapping"):
        rollout(llama, ids)
    with pytest.raises(SelectionError, match="4096 nodes"):
        flow(llama, {"input_ids": ids[:1].repeat(1, 200)})
    with pytest.raises(SelectionError, match="counted from 0"):
        rollout(llama, inputs).of(5)


def test_beside_an_edit_of_some_heads_it_says_so(llama: nn.Module, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(CompositionError, match="some of them only"):
        rollout(llama, inputs, HeadGate({(0, 0): 0.0}))
