"""The time of InstABoost, InjectMap, FreezeMaps, PatchHeads and AttentionBuckets: a prefill, and a decode step behind it.

    python -m benchmarks.reweightings [--tokens 4096] [--rounds 5]

Times are of one thread's processor, medians of rounds in turns within one run, so that other processes hardly count. Each method is
compared with our dense path (`steer(reference=True)`) on a shorter prompt first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnsteer import AttentionBuckets, FreezeMaps, InjectMap, InstABoost, Intervention, PatchHeads, capture, steer
from benchmarks.cases import share_of_heads
from benchmarks.models import LlamaShape, llama, prompt, twin
from benchmarks.parts import TOLERANCE, Decoder, error

SHAPE = LlamaShape(hidden=768, heads=12, kv_heads=4, head_dim=64, mlp=2048, layers=2, vocab=256)
SINKS = 4
# Prefill and decode step, over the unsteered model.
BARS = (1.10, 1.10)


def methods(model: nn.Module, ids: Tensor) -> dict[str, Intervention]:
    """By name, for a prompt."""
    tokens = ids.shape[1]
    spans = [[(tokens // 8, tokens // 8 + max(2, tokens // 16))]]
    some = share_of_heads(SHAPE, 0.2)
    with capture(model, what=("q", "k", "output")) as clean:
        model(ids.flip(1), logits_to_keep=1)
    return {
        "InstABoost, all heads": InstABoost(spans, 4.0),
        "InjectMap, a pattern in 20 % of the heads": InjectMap("previous", heads=some, strength=0.5),
        "InjectMap, a pattern in the last row": InjectMap("previous", heads=some, rows="last"),
        "FreezeMaps, all heads": FreezeMaps(clean, same_tokens=False),
        "PatchHeads, 20 % of the heads": PatchHeads(clean, heads=some),
        "AttentionBuckets, two bases": AttentionBuckets((500000.0, 600000.0)),
    }


def gate(tokens: int = 96) -> float:
    """The largest difference of logits to our dense path: a prompt and a step behind it, all methods."""
    model, ids = llama(SHAPE, tokens), prompt(SHAPE, tokens, SINKS)
    worst = 0.0
    for name, method in methods(model, ids).items():
        found = []
        for reference in (False, True):
            with steer(twin(model), method, reference=reference) as run:
                found.append(torch.cat([run.target(ids).logits, Decoder(run.target, ids)()], dim=1))
        worst = max(worst, error(*found))
        print(f"gate: {name}, {error(*found):.1e}", flush=True)
    return worst


def ratios(arms: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1) -> dict[str, float]:
    """Median processor time of each arm over that of the first."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, call in arms.items():
            begin = time.process_time()
            for _ in range(calls):
                call()
            if number:
                taken[name].append(time.process_time() - begin)
    medians = {name: statistics.median(t) for name, t in taken.items()}
    first = next(iter(medians.values()))
    return {name: t / first for name, t in medians.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    worst = gate()
    if worst > TOLERANCE:
        raise SystemExit(f"the gate failed: {worst:.1e} above {TOLERANCE:.0e}")
    model, ids = llama(SHAPE, given.tokens), prompt(SHAPE, given.tokens, SINKS)
    runs = {name: steer(twin(model), method) for name, method in methods(model, ids).items()}
    call = lambda m: lambda: m(ids, use_cache=True, logits_to_keep=1)  # noqa: E731
    prefill = ratios({"unsteered": call(model)} | {n: call(r.target) for n, r in runs.items()}, given.rounds)
    print(
        f"\n{given.tokens} tokens, medians of {given.rounds} rounds\n\n| method | prefill | decode step |\n| --- | --- | --- |"
    )
    steps = {"unsteered": Decoder(model, ids)} | {n: Decoder(r.target, ids) for n, r in runs.items()}
    decode = ratios(steps, 3 * given.rounds, calls=4)
    for name in runs:
        said = [
            f"{r:.2f}{'' if r <= bar else ' (bar missed)'}"
            for r, bar in zip((prefill[name], decode[name]), BARS, strict=True)
        ]
        print(f"| {name} | {' | '.join(said)} |", flush=True)
    for run in runs.values():
        run.remove()


if __name__ == "__main__":
    main()
