"""The time of InstABoost, InjectMap, FreezeMaps, PatchHeads and AttentionBuckets: a prefill, and a decode step behind it.

    python -m benchmarks.reweightings [--shape small|1b|8b] [--layers N] [--tokens 4096] [--rounds 5] [--only TEXT]...
        [--prefill | --decode]

Shapes are the proportions of a layer: a small one, in which a decode step has hardly any arithmetic, Llama-3.2-1B and Llama-3.1-8B.
Times are of one thread's processor, medians of rounds in turns within one run, so that other processes hardly count. Each method is
compared with our dense path (`steer(reference=True)`) on a shorter prompt first.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnsteer import (
    AttentionBuckets,
    Captured,
    FreezeMaps,
    InjectMap,
    InstABoost,
    Intervention,
    PatchHeads,
    capture,
    steer,
)
from benchmarks.cases import share_of_heads
from benchmarks.models import LlamaShape, llama, prompt, twin
from benchmarks.parts import TOLERANCE, Decoder, error

SMALL = LlamaShape(hidden=768, heads=12, kv_heads=4, head_dim=64, mlp=2048, layers=2, vocab=256)
SHAPES = {
    "small": SMALL,
    "1b": LlamaShape(layers=1, vocab=256),
    "8b": LlamaShape(hidden=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, layers=1, vocab=256),
}
SINKS = 4
# Prefill and decode step, over the unsteered model.
BARS = (1.10, 1.10)


def methods(model: nn.Module, ids: Tensor, shape: LlamaShape, only: Sequence[str] = ()) -> dict[str, Intervention]:
    """By name, for a prompt; `only`: those whose names hold one of these."""
    tokens = ids.shape[1]
    spans = [[(tokens // 8, tokens // 8 + max(2, tokens // 16))]]
    some = share_of_heads(shape, 0.2)
    asked = lambda name: not only or any(text in name for text in only)  # noqa: E731

    @functools.cache
    def clean() -> Captured:
        with capture(model, what=("q", "k", "output")) as found:
            model(ids.flip(1), logits_to_keep=1)
        return found

    made: dict[str, Callable[[], Intervention]] = {
        "InstABoost, all heads": lambda: InstABoost(spans, 4.0),
        "InjectMap, one key in 20 % of the heads": lambda: InjectMap("previous", heads=some, strength=0.5),
        "InjectMap, one key in the last row": lambda: InjectMap("previous", heads=some, rows="last"),
        "InjectMap, several keys in 20 % of the heads": lambda: InjectMap("same_token", heads=some, strength=0.5),
        "FreezeMaps, all heads": lambda: FreezeMaps(clean(), same_tokens=False),
        "PatchHeads, 20 % of the heads": lambda: PatchHeads(clean(), heads=some),
        "AttentionBuckets, two bases": lambda: AttentionBuckets((500000.0, 600000.0)),
    }
    return {name: make() for name, make in made.items() if asked(name)}


def gate(only: Sequence[str] = (), tokens: int = 96) -> float:
    """On the small shape: the largest difference of logits to our dense path: a prompt and a step behind it, all methods."""
    model, ids = llama(SMALL, tokens), prompt(SMALL, tokens, SINKS)
    worst = 0.0
    for name, method in methods(model, ids, SMALL, only).items():
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
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int, help="as many of them; default: two of the small one, else one")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", default=[], help="the methods whose names hold this")
    parser.add_argument("--decode", action="store_true", help="leave the prefill untimed")
    parser.add_argument("--prefill", action="store_true", help="leave the decode step untimed")
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    shape = shape if given.layers is None else dataclasses.replace(shape, layers=given.layers)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    worst = gate(given.only)
    if worst > TOLERANCE:
        raise SystemExit(f"the gate failed: {worst:.1e} above {TOLERANCE:.0e}")
    model, ids = llama(shape, given.tokens), prompt(shape, given.tokens, SINKS)
    runs = {name: steer(twin(model), method) for name, method in methods(model, ids, shape, given.only).items()}
    call = lambda m: lambda: m(ids, use_cache=True, logits_to_keep=1)  # noqa: E731
    prefill = dict.fromkeys(runs, float("nan"))
    if not given.decode:
        prefill = ratios({"unsteered": call(model)} | {n: call(r.target) for n, r in runs.items()}, given.rounds)
        print("prefill: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in prefill.items()), flush=True)
    print(f"\n{shape}, {given.tokens} tokens, medians of {given.rounds} rounds\n")
    print("| method | prefill | decode step |\n| --- | --- | --- |", flush=True)
    decode = dict.fromkeys(runs, float("nan"))
    if not given.prefill:
        steps = {"unsteered": Decoder(model, ids)} | {n: Decoder(r.target, ids) for n, r in runs.items()}
        decode = ratios(steps, 3 * given.rounds, calls=4)
    for name in runs:
        said = [
            f"{r:.3f}{' (bar missed)' if r > bar else ''}"
            for r, bar in zip((prefill[name], decode[name]), BARS, strict=True)
        ]
        print(f"| {name} | {' | '.join(said)} |", flush=True)
    for run in runs.values():
        run.remove()


if __name__ == "__main__":
    main()
