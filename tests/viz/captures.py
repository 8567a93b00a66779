"""Captures made by hand, for tests of what shows them: no model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnsteer.captured import Captured, Take


def take(
    maps: Tensor, layer: int = 0, kind: str = "self", *, rows: Any = None, step: int | None = None, **more: Any
) -> Take:
    """One call of one site: maps [B, H, n, m]."""
    B, H, n, m = maps.shape
    numbers = torch.arange(n) if rows is None else torch.tensor(rows)
    facts = {"phase": "prefill", "branch": None, "scale": 0.5, "softcap": None, "first": 0, "groups": 1}
    given = {**facts, **more}
    tensors = {"map": maps, **given.pop("tensors", {})}
    heads = tuple(range(H))
    return Take(
        f"layers.{layer}.{kind}", layer, kind, heads, heads, step=step, rows=numbers.expand(B, -1),
        keys=torch.arange(m)[None], tensors=tensors, **given,
    )  # fmt: skip


def causal(seed: int, heads: int = 3, n: int = 7, sharp: float = 2.0) -> Tensor:
    """A random causal map [1, heads, n, n]."""
    g = torch.Generator().manual_seed(seed)
    scores = sharp * torch.randn(1, heads, n, n, generator=g)
    return scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(dim=-1)


def captured(*takes: Take, what: tuple[str, ...] = ("map",), ids: Any = None) -> Captured:
    """Of these takes."""
    found = Captured(what)
    found.takes, found.ids = list(takes), ids
    return found


def text(seed: int = 0, layers: int = 2, n: int = 7, planes: bool = True) -> Captured:
    """A small language model's, with queries and keys."""
    g = torch.Generator().manual_seed(seed + 100)
    planes_of = lambda: {w: torch.randn(1, 3, n, 4, generator=g) for w in ("q", "k")} if planes else {}  # noqa: E731
    takes = [take(causal(10 * seed + i, n=n), i, tensors=planes_of()) for i in range(layers)]
    return captured(*takes, what=("map", "q", "k") if planes else ("map",), ids=[list(range(5, 5 + n))])
