"""Several reweightings of the same heads: what they cost together, against what each of them costs alone."""

from __future__ import annotations

import functools
from typing import Any

from attnsteer import ACT, Intervention, SpotLight, ZeroTuning, steer
from benchmarks.measure import interleaved, peak_memory
from benchmarks.models import LlamaShape, llama, prompt, twin
from benchmarks.parts import TOLERANCE, Check, Gate, Outcome, Size, error

SINKS = 12
PAIR = ("ZeroTuning", "SpotLight")
THREE = (*PAIR, "ACT")
BAR = 1.1


def chosen(names: tuple[str, ...], tokens: int) -> tuple[Intervention, ...]:
    """The methods of these names on all heads, for a prompt of so many tokens."""
    spans = [[(tokens // 8, tokens // 8 + tokens // 16)]]
    all_of = {"ZeroTuning": ZeroTuning(gamma=3.0), "SpotLight": SpotLight(spans, 0.3), "ACT": ACT(None, 0.4, 0.02)}
    return tuple(all_of[name] for name in names)


@functools.lru_cache
def gate(shape: LlamaShape, tokens: int) -> Gate:
    """All logits of a prompt, two and three methods against the dense path."""
    model, ids = llama(shape, tokens), prompt(shape, tokens, SINKS)
    plain, worst, least = model(ids).logits, 0.0, float("inf")
    for names in (PAIR, THREE):
        with steer(model, *chosen(names, tokens)):
            fast = model(ids).logits
        with steer(model, *chosen(names, tokens), reference=True):
            slow = model(ids).logits
        worst, least = max(worst, error(fast, slow)), min(least, error(fast, plain))
    return Gate(worst, TOLERANCE, least, "steer(reference=True), two and three methods, all logits")


def measure(size: Size, threads: int) -> Outcome:
    """A prefill under two methods and under three: what it takes beyond the plain one, over the sum of what each takes alone."""
    plain, ids = llama(size.shape, size.tokens), prompt(size.shape, size.tokens, SINKS)
    sets = {name: (name,) for name in THREE} | {"two": PAIR, "three": THREE}
    runs = {name: steer(twin(plain), *chosen(names, size.tokens)) for name, names in sets.items()}
    try:
        models = {"unsteered": plain, **{name: run.target for name, run in runs.items()}}
        arms = {n: functools.partial(m, ids, use_cache=True, logits_to_keep=1) for n, m in models.items()}
        times = interleaved(arms, size.repeats, patience=size.patience)
    finally:
        for run in runs.values():
            run.remove()
    cost = {name: times.median(name) - times.median("unsteered") for name in sets}
    two, three = (cost[name] / sum(cost[n] for n in sets[name]) for name in ("two", "three"))
    checks = [Check("three methods over the sum of their costs", three, BAR)]
    more: dict[str, Any] = {"ratios": {name: times.ratio(name, "unsteered") for name in sets}}
    if size.memory:
        request = {"shape": size.shape.to_dict(), "tokens": size.tokens}
        arms_of = {"unsteered": (), **sets}
        peaks = {n: peak_memory(n, {**request, "methods": names}, threads)["bytes"] for n, names in arms_of.items()}
        more["peak_mib"] = {name: round(found / 2**20, 1) for name, found in peaks.items()}
        for name in ("two", "three"):
            largest = max(peaks[n] for n in sets[name])
            checks.append(Check(f"peak memory of {name} over that of the largest of them", peaks[name] / largest, BAR))
    return Outcome(two, checks, {"prefill": times}, more)
