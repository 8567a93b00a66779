"""Rollout and flow: how far each token of the input reaches a row, through the attention of all layers.

Abnar, Zuidema, "Quantifying Attention Flow in Transformers" (ACL 2020, arXiv 2005.00928), section 3; official code
samiraabnar/attention_flow at 8044f53 (`compute_joint_attention`, `compute_node_flow`). W_l is the mean map of the heads of layer
l; with the residual A_l = rownorm(W_l + I), without A_l = W_l. Rollout: R_1 = A_1, R_l = A_l R_{l-1}. Flow: the largest flow from
a row of the last layer to each token, in the layered graph with capacities A_l; then divided by its sum over the tokens.

Ours: classes of heads (W_l is the mean over those of a class; a layer without any of them hands on what it got); learned sinks
keep their share, so that without the residual such rows sum to less than one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..captured import checked_rows
from ..errors import SelectionError, UnsupportedHost, brief
from ..heads import HeadSet
from ..intervention import Intervention
from ..parameters import Flag, whole
from ..steering import steer
from ..where import Where
from ._rows import needs_of_rows, row_blocks, rows_of

# Nodes of a flow's graph: a flow is computed for each pair of a row and a token, by augmenting paths.
NODES = 4096
# Below this a capacity is used up.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Relevance:
    """How much of each row comes from each token.

    Attributes:
        tensor: fp32 [B, r, m], rows over slots; zero for padding. rows: int64 [B, r], the number of each row in its sequence, -1
            where a sample has fewer. keys: int64 [B, m], that of each slot, -1 for padding. layers: those that were passed.
    """

    tensor: Tensor
    rows: Tensor
    keys: Tensor
    layers: tuple[int, ...]

    def of(self, sample: int = 0) -> Tensor:
        """[rows, tokens] of one sample, without padding.

        Raises:
            SelectionError: there is no such sample.
        """
        if whole(sample) is None or not 0 <= sample < len(self.tensor):
            raise SelectionError(f"sample {brief(sample)}: there are {len(self.tensor)}, counted from 0.")
        return self.tensor[sample][self.rows[sample] >= 0][:, self.keys[sample] >= 0]


def rollout(
    model: Any,
    inputs: Mapping[str, Any],
    *interventions: Intervention,
    where: Where | None = None,
    rows: Any = None,
    heads: HeadSet | Mapping[str, HeadSet] | None = None,
    residual: bool = True,
    tokenizer: Any = None,
) -> Any:
    """Attention rollout, from one forward; maps come in blocks of rows and are multiplied at once.

    Memory beside the forward is that of one matrix [B, n, n] for each class of heads; no map of a head is kept.

    Args:
        model: a model whose self-attention is steered. inputs: keyword arguments of its forward, a whole sequence.
        interventions: methods that act meanwhile; the maps are those that they made.
        where: the layers, in the order in which they run; None: all main sites of self-attention.
        rows: which rows of the last layer are given, as of `capture`; None: all.
        heads: a `HeadSet`: W_l is the mean of these heads; a mapping of names to them: one rollout for each. None: all heads.
        residual: add the identity to W_l and normalise; False: the plain product.
        tokenizer: for rows that are strings.

    Returns:
        A `Relevance`, or one by name of `heads`. Its rows sum to one (without learned sinks, or with the residual).

    Raises:
        SelectionError: rows that are not in the sequence, heads that the layers do not have, sites that are no chain.
        UnsupportedHost: a layer whose rows are not its keys: cross-attention, or calls over a cache.
    """
    Flag().check("rollout", "residual", residual)
    chain = _follow("rollout", model, inputs, interventions, where, rows, heads, residual, tokenizer, False)
    at = chain.wanted()
    sample = torch.arange(len(at))[:, None]
    return _answer(heads, {name: chain.relevance(R.cpu()[sample, at]) for name, R in chain.product.items()})


def flow(
    model: Any,
    inputs: Mapping[str, Any],
    *interventions: Intervention,
    where: Where | None = None,
    rows: Any = "last",
    heads: HeadSet | Mapping[str, HeadSet] | None = None,
    residual: bool = True,
    normalise: bool = True,
    tokenizer: Any = None,
) -> Any:
    """Attention flow: the largest flow from rows of the last layer to each token. For short inputs: one flow for each pair.

    It needs the mean map of each layer, [B, n, n], which it keeps.

    Args:
        rows: which rows of the last layer; the last one by default. normalise: divide each row by its sum, as the official code
            does; False: the flows themselves. The others: as of `rollout`.

    Returns:
        A `Relevance`, or one by name of `heads`.

    Raises:
        SelectionError, UnsupportedHost: as `rollout`; and inputs of more than 4,096 nodes (layers and tokens).
    """
    for name, value in (("residual", residual), ("normalise", normalise)):
        Flag().check("flow", name, value)
    chain = _follow("flow", model, inputs, interventions, where, rows, heads, residual, tokenizer, True)
    found = {}
    for name, layers in chain.maps.items():
        at = chain.wanted()
        R = torch.zeros(len(at), at.shape[1], chain.keys.shape[1])
        for b, own in enumerate(chain.wanted_rows().tolist()):
            keep = (chain.keys[b] >= 0).nonzero()[:, 0].tolist()
            # A row sees no key behind the last valid one, so padding can be left out of the graph.
            graph = Graph([A[b][keep][:, keep].tolist() for A in layers])
            for r, i in enumerate(own):
                if i >= 0:
                    R[b, r, keep] = torch.tensor(graph.flows(keep.index(i)))
        total = R.sum(dim=-1, keepdim=True)
        found[name] = chain.relevance(R / torch.where(total > 0, total, 1.0) if normalise else R)
    return _answer(heads, found)


def _answer(heads: Any, found: dict[str, Relevance]) -> Any:
    return found if isinstance(heads, Mapping) and not isinstance(heads, HeadSet) else next(iter(found.values()))


class _Links:
    """The layers of one forward, multiplied or kept as they come."""

    def __init__(
        self, name: str, classes: dict[str, HeadSet | None], rows: Any, residual: bool, keep: bool, tokens: Any
    ):
        self.name, self.classes, self.rows, self.residual, self.keep = name, classes, rows, residual, keep
        self.tokenizer = tokens
        self.product: dict[str, Tensor] = {}
        self.maps: dict[str, list[Tensor]] = {name: [] for name in classes}
        self.seen: list[Any] = []
        self.index = self.keys = self.chosen = None

    def add(self, call: AttnCall) -> None:
        """One layer more."""
        B, _, n, m = call.map.shape
        rows = torch.where(call.rows.valid, call.rows.index, -1).expand(B, n).cpu()
        keys = torch.where(call.keys.valid, call.keys.index, -1).expand(B, m).cpu()
        if call.packed:
            raise UnsupportedHost(f"{self.name}: several sequences are packed into a row at {call.site.path}.")
        if n != m or not torch.equal(rows, keys):
            raise UnsupportedHost(
                f"{self.name}: {call.site.path} has {n} rows and {m} keys, which are not the same tokens. Layers are chained over "
                "whole sequences: call the model without a cache, and select self-attention of one stack with where=."
            )
        if self.index is not None and (self.index.shape != rows.shape or not torch.equal(self.index, rows)):
            raise SelectionError(
                f"{self.name}: {call.site.path} has other rows ({n}) than {self.seen[0].path} ({self.index.shape[1]}), so they are "
                "no chain. Select the layers of one stack with where=."
            )
        if any(site.path == call.site.path for site in self.seen):
            raise SelectionError(f"{self.name}: {call.site.path} was called twice; give the inputs of one forward.")
        if self.keep and (len(self.seen) + 2) * n > NODES:
            raise SelectionError(
                f"{self.name}: {len(self.seen) + 1} layers of {n} tokens are more than {NODES} nodes, and a flow is computed for "
                "each pair of a row and a token; take fewer layers or tokens, or rollout."
            )
        self.index, self.keys = rows, keys
        self.chosen = rows_of(call, self.rows, self.tokenizer).cpu()
        self.seen.append(call.site)
        made = {name: [] for name in self.classes}
        own = {name: _own(call, heads) for name, heads in self.classes.items()}
        eye = torch.eye(n, device=call.map.device)
        for block, A in row_blocks(call):
            for name, heads in own.items():
                if heads is None:
                    continue
                W = A[:, heads].float().mean(dim=1)
                if self.residual:
                    W = W + eye[block]
                    W = W / W.sum(dim=-1, keepdim=True)
                below = self.product.get(name)
                made[name].append(W if self.keep or below is None else W @ below)
        for name, parts in made.items():
            if not parts:
                continue
            whole_map = torch.cat(parts, dim=1)
            if self.keep:
                self.maps[name].append(whole_map.cpu())
            else:
                self.product[name] = whole_map

    def wanted(self) -> Tensor:
        """int64 [B, r], the place of each chosen row; 0 where a sample has fewer."""
        return self.wanted_rows().clamp_min(0)

    def wanted_rows(self) -> Tensor:
        """The same with -1 where a sample has fewer."""
        count = self.chosen.sum(dim=1)
        at = self.chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
        return torch.where(torch.arange(at.shape[1])[None] < count[:, None], at, -1)

    def relevance(self, R: Tensor) -> Relevance:
        """`R`: [B, r, m]."""
        at = self.wanted_rows()
        rows = torch.where(at >= 0, self.index.gather(1, at.clamp_min(0)), -1)
        valid = (rows >= 0)[..., None] & (self.keys >= 0)[:, None]
        return Relevance(R.cpu() * valid, rows, self.keys, tuple(site.layer for site in self.seen))


def _own(call: AttnCall, heads: HeadSet | None) -> list[int] | None:
    """Places of the heads of a class among those of a call; None: the layer has none of them."""
    if heads is None:
        return list(range(len(call.heads)))
    wanted = set(heads.of(call.site))
    return [i for i, head in enumerate(call.heads) if head in wanted] or None


@dataclass(frozen=True)
class _Chain(Intervention):
    """Hands each layer's map on; edits nothing."""

    links: Any = field(default=None, compare=False, repr=False)

    observes = True
    whole_heads = True
    kinds = ("self", "joint")
    needs = property(lambda self: self.links.needs)

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Take the map; the outputs stay."""
        self.links.add(call)


def _follow(
    name: str,
    model: Any,
    inputs: Any,
    interventions: Any,
    where: Where | None,
    rows: Any,
    heads: Any,
    residual: bool,
    tokenizer: Any,
    keep: bool,
) -> _Links:
    if not isinstance(inputs, Mapping):
        raise SelectionError(f"{name}: inputs are keyword arguments of the model, a mapping, not {brief(inputs)}.")
    several = isinstance(heads, Mapping) and not isinstance(heads, HeadSet)
    classes = dict(heads) if several else {"": heads}
    if not classes or not all(h is None or isinstance(h, HeadSet) for h in classes.values()):
        raise SelectionError(f"{name}(heads={brief(heads)}): give a HeadSet, or names with one each.")
    links = _Links(name, classes, checked_rows(rows), residual, keep, tokenizer)
    links.needs = needs_of_rows(model, rows)
    with torch.no_grad(), steer(model, *interventions, _Chain(links, where=where or Where(kinds=("self", "joint")))):
        model(**inputs)
    for own, chosen in classes.items():
        if chosen is not None and not any(h < site.heads for site in links.seen for h in chosen.of(site)):
            raise SelectionError(f"{name}: none of the heads {own or chosen!r} is in the layers that were passed.")
    return links


class Graph:
    """The layered graph of a flow: node (l, i) has edges to (l - 1, j) of capacity A_l[i][j].

    Args:
        layers: A_1 to A_L, each [n][n] of numbers that are not negative.
    """

    def __init__(self, layers: list[list[list[float]]]):
        self.n, self.top = len(layers[0]), len(layers)
        self.to: list[int] = []
        self.capacity: list[float] = []
        self.edges: list[list[int]] = [[] for _ in range(self.n * (self.top + 1))]
        for level, A in enumerate(layers, start=1):
            for i, row in enumerate(A):
                for j, share in enumerate(row):
                    if share > 0:
                        self._edge(level * self.n + i, (level - 1) * self.n + j, share)

    def _edge(self, a: int, b: int, capacity: float) -> None:
        # An edge and its return have numbers that differ in the last bit.
        for here, there, size in ((a, b, capacity), (b, a, 0.0)):
            self.edges[here].append(len(self.to))
            self.to.append(there)
            self.capacity.append(size)

    def flows(self, i: int) -> list[float]:
        """The largest flow from node (L, i) to each input, [n]."""
        return [self._flow(self.top * self.n + i, j) for j in range(self.n)]

    def _flow(self, source: int, sink: int) -> float:
        """Dinic's algorithm: blocking flows along shortest paths."""
        left, total = list(self.capacity), 0.0
        while True:
            depth = {source: 0}
            waiting = deque([source])
            while waiting:
                a = waiting.popleft()
                for e in self.edges[a]:
                    if left[e] > ROUNDING and self.to[e] not in depth:
                        depth[self.to[e]] = depth[a] + 1
                        waiting.append(self.to[e])
            if sink not in depth:
                return total
            total += self._blocking(source, sink, left, depth)

    def _blocking(self, source: int, sink: int, left: list[float], depth: dict[int, int]) -> float:
        tried = dict.fromkeys(depth, 0)
        total, path = 0.0, []
        at = source
        while True:
            if at == sink:
                pushed = min(left[e] for e in path)
                for e in path:
                    left[e] -= pushed
                    left[e ^ 1] += pushed
                total += pushed
                # Back to the first edge that is used up.
                cut = next(k for k, e in enumerate(path) if left[e] <= ROUNDING)
                at = self.to[path[cut] ^ 1]
                del path[cut:]
                continue
            own = self.edges[at]
            while tried[at] < len(own):
                e = own[tried[at]]
                if left[e] > ROUNDING and depth.get(self.to[e]) == depth[at] + 1:
                    path.append(e)
                    at = self.to[e]
                    break
                tried[at] += 1
            else:
                if not path:
                    return total
                at = self.to[path.pop() ^ 1]
                tried[at] += 1
