"""What a decode step costs before any time is taken: operators that are dispatched, and values that are read back."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnsteer import (
    ACT,
    PASTA,
    FreezeMaps,
    HeadGate,
    InjectMap,
    InstABoost,
    PatchHeads,
    SpotLight,
    ZeroTuning,
    capture,
    steer,
)

LAYERS = 8
SPANS = [[(3, 9)]]
READS = ("_local_scalar_dense", "is_nonzero", "nonzero")
# By method: at most so many times the operators of the unsteered step.
BARS = {
    "ACT on a quarter of the heads": (lambda: ACT({layer: [0, 3] for layer in range(LAYERS)}, 0.4, 0.001), 1.15),
    "ACT on all heads": (lambda: ACT(beta=0.4, threshold=0.001), 1.15),
    "ZeroTuning": (lambda: ZeroTuning(gamma=3.0), 1.05),
    "PASTA": (lambda: PASTA(SPANS, alpha=0.1), 1.05),
    "InstABoost": (lambda: InstABoost(SPANS, 4.0), 1.05),
    "SpotLight": (lambda: SpotLight(SPANS, 0.5), 1.25),
    "HeadGate": (lambda: HeadGate({(layer, 0): 0.5 for layer in range(LAYERS)}), 1.1),
}


class Counted(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        return sum(count for name, count in self.names.items() if any(read in name for read in READS))


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, attn_implementation="sdpa")
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def step(model: Any, *methods: Any, batch: int = 1) -> Counted:
    """The third step over 600 tokens."""
    ids = torch.randint(3, 100, (batch, 600), generator=torch.Generator().manual_seed(1))
    token = torch.full((batch, 1), 5)
    with steer(model, *methods) if methods else contextlib.nullcontext():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        for _ in range(2):
            model(input_ids=token, past_key_values=cache)
        with Counted() as counted:
            model(input_ids=token, past_key_values=cache)
    return counted


@pytest.mark.parametrize("name", BARS)
def test_a_decode_step_dispatches_few_operators_more(model: Any, name: str) -> None:
    make, bar = BARS[name]
    plain, steered = step(model), step(model, make())
    ratio = sum(steered.names.values()) / sum(plain.names.values())
    assert ratio <= bar, {n: c - plain.names[n] for n, c in steered.names.items() if c > plain.names[n]}
    assert steered.reads <= plain.reads


SOME = {layer: [0, 3] for layer in range(LAYERS)}
# What is put back into a run; the donor has the prompt, so that a generated row has nothing of it.
PUT_BACK = {
    "one key": (lambda donor: InjectMap("previous", SOME, strength=0.5), 1.25),
    "several keys": (lambda donor: InjectMap("same_token", SOME), 1.28),
    "frozen maps": (lambda donor: FreezeMaps(donor, same_tokens=False), 1.1),
    "patched heads": (lambda donor: PatchHeads(donor, SOME), 1.12),
}


@pytest.mark.parametrize("name", PUT_BACK)
@torch.no_grad()
def test_what_is_put_back_is_looked_up_once_for_all_layers(model: Any, name: str) -> None:
    make, bar = PUT_BACK[name]
    with capture(model, what=("q", "k", "output")) as donor:
        model(input_ids=torch.randint(3, 100, (1, 600), generator=torch.Generator().manual_seed(2)))
    plain, steered = step(model), step(model, make(donor))
    ratio = sum(steered.names.values()) / sum(plain.names.values())
    assert ratio <= bar, {n: c - plain.names[n] for n, c in steered.names.items() if c > plain.names[n]}
    assert steered.reads <= plain.reads


class Sized(TorchDispatchMode):
    """Collects the numbers of keys that the kernel is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "flash_attention_for_cpu" in str(function):
            self.keys.append(args[1].shape[2])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_share_of_a_long_prompt_takes_one_pass_over_all_keys_in_each_layer(model: Any) -> None:
    """That of the keys outside the span, beside one over the few keys inside."""
    ids = torch.randint(3, 100, (1, 800), generator=torch.Generator().manual_seed(1))
    with steer(model, SpotLight(SPANS, 0.5)):
        model(input_ids=ids)
        with Sized() as sizes:
            model(input_ids=ids)
    few = SPANS[0][0][1] - SPANS[0][0][0]
    assert sizes.keys == [few, 800] * LAYERS


EACH = {
    "ACT": (lambda beta: ACT({layer: [0, 3] for layer in range(LAYERS)}, beta, 0.001), 0.4, [0.4, 0.2, 0.6]),
    "ZeroTuning": (lambda gamma: ZeroTuning(gamma=gamma), 3.0, [3.0, 0.5, 2.0]),
    "PASTA": (lambda alpha: PASTA(SPANS * 3, alpha=alpha), 0.1, [0.1, 0.3, 0.5]),
    "SpotLight": (lambda target: SpotLight(SPANS * 3, target), 0.5, [0.5, 0.3, 0.4]),
    "HeadGate": (lambda gate: HeadGate({(layer, 0): gate for layer in range(LAYERS)}), 0.5, [0.5, 0.3, 2.0]),
}


@pytest.mark.parametrize("name", EACH)
def test_a_value_for_each_sample_dispatches_no_operator_more_in_each_layer(model: Any, name: str) -> None:
    make, one, each = EACH[name]
    found = [sum(step(model, make(value), batch=3).names.values()) for value in (one, each, [None, *each[1:]])]
    assert found[1] <= found[0] + 5
    # Three in each layer keep the sample that is left alone, to the bit.
    assert found[2] <= found[0] + 5 + 3 * LAYERS


@torch.no_grad()
@pytest.mark.parametrize("name", ["ACT", "SpotLight"])
def test_a_share_of_some_samples_leaves_the_others(model: Any, name: str) -> None:
    make, _, each = EACH[name]
    ids = torch.randint(3, 100, (3, 40), generator=torch.Generator().manual_seed(1))
    token = torch.tensor([[5], [6], [7]])

    def logits(*methods: Any) -> torch.Tensor:
        with steer(model, *methods) if methods else contextlib.nullcontext():
            cache = model(input_ids=ids, use_cache=True).past_key_values
            return torch.cat([model(input_ids=token, past_key_values=cache).logits for _ in range(2)], dim=1)

    found, whole, plain = logits(make([None, *each[1:]])), logits(make(each)), logits()
    assert torch.allclose(found[:1], plain[:1], rtol=0, atol=1e-6) and not torch.allclose(
        whole[:1], plain[:1], atol=1e-4
    )
    assert torch.allclose(found[1:], whole[1:], rtol=0, atol=1e-6)


PAIRS = pytest.mark.parametrize(
    "names",
    [
        ("ZeroTuning", "SpotLight"),
        ("SpotLight", "ZeroTuning"),
        ("ACT on all heads", "HeadGate"),
        ("ACT on a quarter of the heads", "PASTA"),
    ],
    ids=" and ".join,
)


@PAIRS
def test_composed_methods_read_nothing_back(model: Any, names: tuple[str, ...]) -> None:
    assert step(model, *(BARS[name][0]() for name in names)).reads <= step(model).reads


@torch.no_grad()
def prefill_reads(model: Any, monkeypatch: pytest.MonkeyPatch, *methods: Any) -> int:
    """Values read back in the second prefill of a steering, `tolist` included, which on CPU is no operator."""
    ids, lists = torch.randint(3, 100, (1, 300), generator=torch.Generator().manual_seed(1)), []
    inner = torch.Tensor.tolist
    with steer(model, *methods) if methods else contextlib.nullcontext():
        model(input_ids=ids, use_cache=True)
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (lists.append(1), inner(self))[1])
        with Counted() as counted:
            model(input_ids=ids, use_cache=True)
        monkeypatch.undo()
    return counted.reads + len(lists)


@pytest.mark.parametrize("name", BARS)
def test_a_prefill_reads_one_value_more_at_most(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, _ = BARS[name]
    assert prefill_reads(model, monkeypatch, make()) <= prefill_reads(model, monkeypatch) + 1


@PAIRS
def test_so_does_one_of_composed_methods(model: Any, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [BARS[name][0]() for name in names]
    assert prefill_reads(model, monkeypatch, *methods) <= prefill_reads(model, monkeypatch) + 1
