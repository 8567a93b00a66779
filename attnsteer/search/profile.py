"""PASTA's profiling of heads: a method in every head alone on each task, the best k of each, and those that all tasks share.

Zhang et al., "Tell Your Model Where to Attend" (ICLR 2024, arXiv 2311.02262), "multi-task model profiling": there on
1,000 training samples of each task, with k from 300 to 500 of 1,024 heads for LLaMA-7B, which leaves 25 to 86. QingruZhang/PASTA
ships the heads that were found, and no code that finds them; what breaks ties is ours (lower layer, then lower head).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import SelectionError, brief
from ..heads import HeadSet
from ..intervention import Intervention
from ..parameters import whole
from .calibration import calibrate_heads

HOW = ("intersection", "union")


def profile_heads(
    model: nn.Module,
    method: Intervention | Mapping[str, Intervention],
    tasks: Mapping[str, Iterable[Any]],
    k: int,
    *,
    state: str | Path | None = None,
    **options: Any,
) -> HeadSet:
    """The heads that are among the best `k` of every task when the method acts in each of them alone.

    Args:
        model, options: of `calibrate_heads`, whose metric scores each head.
        method: for all tasks, or one for each by its name (their spans may differ).
        tasks: name -> samples. Leave one out for heads that are to be tested on it ("task-agnostic").
        k: best heads of each task. state: a file that keeps the progress, one for each task with its name added.

    Returns:
        A `HeadSet` whose scores are the means over the tasks, with the table of each task in its provenance.

    Raises:
        SelectionError: no tasks, a k beyond the heads, tasks without a method, or no head that all tasks share.
    """
    if not isinstance(tasks, Mapping) or not tasks:
        raise SelectionError("profile_heads: give samples by task, {name: samples}.")
    missing = [name for name in tasks if isinstance(method, Mapping) and name not in method]
    if missing:
        raise SelectionError(f"profile_heads: no method for tasks {missing}; there are {sorted(method)}.")
    found = {}
    for name, samples in tasks.items():
        own = method[name] if isinstance(method, Mapping) else method
        file = None if state is None else Path(f"{state}.{name}")
        found[name] = calibrate_heads(model, own, samples, keep="all", state=file, **options)
    return shared_heads(found, k)


def shared_heads(profiles: Mapping[str, HeadSet], k: int, how: str = "intersection") -> HeadSet:
    """The heads among the best `k` of every profile (a scored head set for each task); see `profile_heads`.

    Args:
        how: "intersection", or "union": among the best of any, which the official configs have too, for small k. (For GPT-J and
            k = 3 theirs agrees with their lists of the single tasks in 11 heads of 12.)

    Raises:
        SelectionError: no profiles, a k beyond their heads, or no head that all of them share.
    """
    if how not in HOW:
        raise SelectionError(f"shared_heads(how={how!r}): one of {HOW}.")
    if not profiles:
        raise SelectionError("shared_heads: give scored head sets by task, {name: HeadSet}.")
    least = min(map(len, profiles.values()))
    if whole(k) is None or not 0 < k <= least:
        raise SelectionError(f"shared_heads(k={brief(k)}): give 1 to {least}, the heads of the smallest profile.")
    best = {name: set(heads.top(k)) for name, heads in profiles.items()}
    shared = set.intersection(*best.values()) if how == "intersection" else set.union(*best.values())
    if not shared:
        raise SelectionError(
            f"no head is among the best {k} of all {len(profiles)} tasks; take a larger k (the paper: about a "
            "third of all heads)."
        )
    scores = {pair: sum(h.scores[pair] for h in profiles.values()) / len(profiles) for pair in shared}
    first = next(iter(profiles.values()))
    provenance = {
        "search": "profile_heads",
        "k": k,
        "how": how,
        "tasks": {name: heads.provenance | {"best": sorted(map(list, best[name]))} for name, heads in profiles.items()},
    }
    return HeadSet(shared, scores=scores, shape=first.shape, provenance=provenance)
