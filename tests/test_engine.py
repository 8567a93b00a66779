"""The four inside doors and their composition at one site, against maths on the explicit map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import HeadGate, Intervention, Where, ZeroTuning, sites, steer
from attnsteer.account import plain
from attnsteer.call import AttnCall, KeyBias, Reweight
from attnsteer.errors import CompositionError, UnsupportedHost
from attnsteer.kernels import Attention
from attnsteer.shards import Shards
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.laws.dense_model import Dense, Sequence, dense_model


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@dataclass(frozen=True)
class Bias(Intervention):
    """log(factor) on keys from position 4 on; as one bias per key, or as a full matrix."""

    factor: float = 0.1
    full: bool = False

    def bias(self, call: AttnCall) -> KeyBias | Tensor:
        term = torch.where(call.key_position >= 4, torch.tensor(self.factor).log(), torch.tensor(0.0))
        return term.expand(1, 1, call.q.shape[2], -1) if self.full else KeyBias(term[None, None])


@dataclass(frozen=True)
class AsWeights(Intervention):
    """The same as `Bias`, as a renormalised reweighting."""

    factor: float = 0.1

    def weights(self, call: AttnCall) -> Reweight:
        return Reweight((((call.key_position >= 4)[None, None], self.factor),))


@dataclass(frozen=True)
class Temperature(Intervention):
    """softmax(log A / tau), by scaling the queries."""

    tau: float = 2.0

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor]:
        return call.q / self.tau, call.k, call.v


@dataclass(frozen=True)
class DoubleValues(Intervention):
    """Doubles the values."""

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor]:
        return call.q, call.k, call.v * 2


@pytest.fixture(params=["llama", "gemma2", "gpt_oss", "t5"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def setup(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    model = tiny_transformers(name)
    inputs = tiny_transformers_inputs(name, model, batch=3, length=12, padding="left")
    mask = inputs["attention_mask"].bool()
    rows = torch.ones_like(inputs["decoder_input_ids"]).bool() if "decoder_input_ids" in inputs else mask
    return model, inputs, rows


@torch.no_grad()
@pytest.mark.parametrize("where", [Where(layers=[1]), Where(layers=[1], heads=[0, 3])], ids=["all heads", "two heads"])
def test_a_key_bias_is_a_renormalised_reweighting(name: str, where: Where) -> None:
    model, inputs, rows = setup(name)
    where = where & Where(kinds="self")
    outs = []
    for method in (Bias(where=where), Bias(full=True, where=where), AsWeights(where=where)):
        for reference in (False, True):
            with steer(model, method, reference=reference):
                outs.append(model(**inputs).logits[rows])
    assert far(outs[0], model(**inputs).logits[rows]) > 1e-2
    assert all(far(out, outs[0]) <= 1e-5 for out in outs[1:])


@torch.no_grad()
def test_temperature_through_the_inputs() -> None:
    """Scaled queries of two heads against the explicit map raised to 1 / tau."""
    model, inputs, rows = setup("llama")
    with steer(model, Temperature(2.0, where=Where(layers=[1], heads=[1, 2]))):
        ours = model(**inputs).logits
    site = sites(model)[1]

    def edit(A: Tensor, seq: Sequence, memory: dict[str, Any]) -> Tensor:
        root = A.sqrt()
        return root / root.sum(dim=-1, keepdim=True).clamp_min(1e-30)

    with dense_model(model, Dense(model, {site.name: ([1, 2], edit)}, {}), [model.config]) as dense:
        dense.sequence = Sequence(inputs["attention_mask"].bool())
        theirs = model(**inputs).logits
    assert far(ours[rows], theirs[rows]) <= 1e-5


@torch.no_grad()
def test_stages_compose_in_their_order() -> None:
    """inputs, bias, weights, output: whatever the order in which they are given, each stage sees the one before."""
    model, inputs, rows = setup("llama")
    where = Where(layers=[1], heads=[0, 2])
    parts = [
        HeadGate({(1, 0): 0.5, (1, 2): -1.0}),
        AsWeights(0.3, where=where),
        Bias(5.0, where=where),
        Temperature(1.5, where=where),
    ]
    outs = []
    for order in (parts, parts[::-1]):
        for reference in (False, True):
            with steer(model, *order, reference=reference):
                outs.append(model(**inputs).logits[rows])
    assert all(far(out, outs[0]) <= 1e-5 for out in outs[1:])
    # A bias of log 5 and a weight of 0.3 on the same keys are a weight of 1.5.
    with steer(model, parts[0], AsWeights(1.5, where=where), parts[3]):
        assert far(model(**inputs).logits[rows], outs[0]) <= 1e-5


@torch.no_grad()
def test_rows_split_queries_but_not_values() -> None:
    model, inputs, rows = setup("llama")
    where = Where(layers=[1], rows=(5, 7))
    plain = model(**inputs).logits
    with steer(model, Temperature(3.0, where=where)):
        out = model(**inputs).logits
    assert torch.equal(out[:, :5], plain[:, :5]) and far(out[:, 5:], plain[:, 5:]) > 1e-3
    with pytest.raises(CompositionError, match="k or v"), steer(model, DoubleValues(where=where)):
        model(**inputs)


@torch.no_grad()
def test_doubled_values_are_a_gate_of_two(name: str) -> None:
    model, inputs, rows = setup(name)
    heads = [0, 3]
    with steer(model, DoubleValues(where=Where(layers=[1], heads=heads, kinds="self"))):
        a = model(**inputs).logits[rows]
    with steer(model, HeadGate({(1, h): 2.0 for h in heads}, where=Where(kinds="self"))):
        b = model(**inputs).logits[rows]
    assert far(a, b) <= 1e-5


@torch.no_grad()
def test_tensor_parallel_shards_keep_global_head_numbers() -> None:
    """Each rank computes half of the heads; indices in `heads` stay those of the whole model."""
    model, inputs, _ = setup("llama")
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    run = steer(model, ZeroTuning({1: [1, 2]}, 5.0))
    runtime = next(iter(run.runtimes.values()))
    track = plain(6, torch.device("cpu"))

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        att = Attention(q, k, v, 8**-0.5, causal=True)
        base = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
        return runtime(att, base, AttnCall(runtime.site, track, track), (0,))

    whole = compute(q, k, v)
    assert far(whole, compute(q, k, v)) == 0
    with pytest.raises(UnsupportedHost, match="4 heads"):
        compute(q[:, :2], k[:, :1], v[:, :1])
    for rank in (0, 1):
        runtime.shards = Shards(None, (4, 5), rank)
        part = compute(q[:, 2 * rank : 2 * rank + 2], k[:, rank : rank + 1], v[:, rank : rank + 1])
        assert far(part, whole[:, 2 * rank : 2 * rank + 2]) <= 1e-6
    # Three processes, the last of which has fewer.
    runtime.shards = Shards(None, (4, 5, 6), 0)
    with pytest.raises(UnsupportedHost, match="4 heads"):
        compute(q[:, :2], k[:, :1], v[:, :1])
    run.remove()


def test_a_gate_at_the_end_divides_no_heads() -> None:
    """It reads no map, so the method before it is asked once, for all heads; and the output is the same."""
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model)
    asked: list[tuple[int, ...]] = []

    @dataclass(frozen=True)
    class Asked(ZeroTuning):
        def weights(self, call: AttnCall) -> Reweight | None:
            asked.append(call.heads)
            return super().weights(call)

    gate = HeadGate({(1, 0): 0.5, (1, 2): -1.0})
    with torch.no_grad():
        with steer(model, Asked(gamma=4.0, where=Where(layers=[1])), gate):
            out = model(**inputs).logits
        with steer(model, Asked(gamma=4.0, where=Where(layers=[1])), gate, reference=True):
            assert far(out, model(**inputs).logits) < 1e-5
    assert asked == [(0, 1, 2, 3)] * 2
