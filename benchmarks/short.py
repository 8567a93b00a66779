"""Short prompts and single tokens on a model of many small layers, where operators and Python count more than arithmetic."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnsteer import ACT, PASTA, HeadGate, HeadSet, Intervention, SpotLight, ZeroTuning, steer
from benchmarks.measure import Times, interleaved
from benchmarks.models import LlamaShape, llama, prompt, twin
from benchmarks.parts import TOLERANCE, Check, Decoder, Gate, Outcome, Size, error

# The proportions of SmolLM2-135M.
SMALL_LAYERS = LlamaShape(hidden=576, heads=9, kv_heads=3, head_dim=64, mlp=1536, layers=30, vocab=49152)
FEW_SMALL_LAYERS = LlamaShape(hidden=576, heads=9, kv_heads=3, head_dim=64, mlp=1536, layers=6, vocab=256)
ALL_HEADS = "ACT on all heads"
READS = ("_local_scalar_dense", "is_nonzero", "nonzero")
SINKS, BETA, THRESHOLD = 12, 0.4, 0.02


class Counted(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))

    def to_dict(self) -> dict[str, int]:
        """Operators, and those among them that read a value back."""
        reads = sum(count for name, count in self.names.items() if any(read in name for read in READS))
        return {"operators": sum(self.names.values()), "reads": reads}


def methods(shape: LlamaShape, tokens: int) -> dict[str, Intervention]:
    """By name, for a prompt of so many tokens."""
    spans = [[(tokens // 8, tokens // 8 + max(2, tokens // 16))]]
    some = HeadSet({layer: [layer % shape.heads, (layer + 2) % shape.heads] for layer in range(shape.layers)})
    return {
        "ACT on a quarter of the heads": ACT(some, BETA, THRESHOLD),
        ALL_HEADS: ACT(None, BETA, THRESHOLD),
        "ZeroTuning": ZeroTuning(gamma=3.0),
        "SpotLight": SpotLight(spans, 0.3),
        "PASTA": PASTA(spans, alpha=0.1),
        "HeadGate": HeadGate({(layer, 0): 0.5 for layer in range(shape.layers)}),
    }


@functools.lru_cache
def gate(shape: LlamaShape, tokens: int) -> Gate:
    """Logits of a prompt and of three tokens behind it, each method against our dense path."""
    model, ids = llama(shape, tokens), prompt(shape, tokens, SINKS)

    def logits() -> torch.Tensor:
        step = Decoder(model, ids)
        return torch.cat([model(ids).logits, *(step() for _ in range(3))], dim=1)

    plain, worst, least = logits(), 0.0, float("inf")
    for method in methods(shape, tokens).values():
        with steer(model, method):
            fast = logits()
        with steer(model, method, reference=True):
            slow = logits()
        worst, least = max(worst, error(fast, slow)), min(least, error(fast, plain))
    return Gate(worst, TOLERANCE, least, "steer(reference=True), all methods, prefill and three steps")


def measure(size: Size, threads: int) -> Outcome:
    """Prefills of an eighth, a quarter and all of the tokens, and a decode step behind all: time, operators, values read back."""
    checks, times, counts, ratios = [], {}, {}, {}
    for tokens, most in ((size.tokens // 8, 1.10), (size.tokens // 4, 1.10), (size.tokens, 1.05)):
        name = f"prefill {tokens}"
        times[name], counts[name] = _measured(size, tokens, lambda m, ids: _prefill(m, ids))
        ratios[name] = _ratios(times[name], checks, name, most)
    times["decode"], counts["decode"] = _measured(size, size.tokens, Decoder)
    ratios["decode"] = _ratios(times["decode"], checks, "decode", 1.08)
    worst = max(r for name, own in ratios.items() for method, r in own.items() if method != ALL_HEADS)
    return Outcome(worst, checks, times, {"ratios": ratios, "counts": counts})


def _prefill(model: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model(ids, use_cache=True, logits_to_keep=1).logits


def _measured(size: Size, tokens: int, arm: Callable[..., Any]) -> tuple[Times, dict[str, Any]]:
    plain, ids = llama(size.shape, max(tokens, size.tokens)), prompt(size.shape, tokens, SINKS)
    runs = {name: steer(twin(plain), method) for name, method in methods(size.shape, tokens).items()}
    counts = {}
    try:
        arms = {"unsteered": arm(plain, ids)} | {name: arm(run.target, ids) for name, run in runs.items()}
        times = interleaved(arms, size.repeats, warmup=2, patience=size.patience)
        for name, call in arms.items():
            with Counted() as counted:
                call()
            counts[name] = counted.to_dict()
    finally:
        for run in runs.values():
            run.remove()
    return times, counts


def _ratios(times: Times, checks: list[Check], what: str, bar: float) -> dict[str, float]:
    found = {name: times.ratio(name, "unsteered") for name in times.rounds if name != "unsteered"}
    checks += [Check(f"{what}, {name}", r, 1.15 if name == ALL_HEADS else bar) for name, r in found.items()]
    return found
