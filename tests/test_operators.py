"""What a decode step costs before any time is taken: operators that are dispatched, and values that are read back."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnsteer import ACT, PASTA, HeadGate, InstABoost, SpotLight, ZeroTuning, steer

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
def step(model: Any, *methods: Any) -> Counted:
    """The third step over 600 tokens."""
    ids = torch.randint(3, 100, (1, 600), generator=torch.Generator().manual_seed(1))
    token = torch.tensor([[5]])
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


@pytest.mark.parametrize(
    "names",
    [
        ("ZeroTuning", "SpotLight"),
        ("SpotLight", "ZeroTuning"),
        ("ACT on all heads", "HeadGate"),
        ("ACT on a quarter of the heads", "PASTA"),
    ],
    ids=" and ".join,
)
def test_composed_methods_read_nothing_back(model: Any, names: tuple[str, ...]) -> None:
    assert step(model, *(BARS[name][0]() for name in names)).reads <= step(model).reads
