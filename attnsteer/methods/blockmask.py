"""BlockMask: rows attend to their own block of tokens and to the blocks whose mean key fits their query best; the rest is left out.

Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models" (arXiv 2506.23858, 2025), after Lu et al., "MoBA"
(arXiv 2502.13189, 2025); official code KwaiVGI/VMoBA (src/vmoba.py at 4da72ff): its choice of blocks, step by step. Here batch
rows choose by themselves ("overall" pools a whole packed batch there), and there is a causal form, which MoBA has and VMoBA not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..edits import BlockBias
from ..errors import SelectionError, UnsupportedHost
from ..intervention import Intervention
from ..parameters import choice, flag, integer, number, parsed, whole
from ..registry import register_method

SELECT = ("query_head", "head_global", "overall", "block")
# As in the official code: added to sums that are divided by, and the least range that is divided by.
EPSILON = 1e-6


def _block_size(value: Any) -> int | tuple[int, int]:
    one = whole(value)
    pair = None
    if isinstance(value, (tuple, list)) and len(value) == 2:
        pair = tuple(map(whole, value))
    sizes = (one,) if pair is None else pair
    if any(s is None or not 1 <= s < 1 << 31 for s in sizes):
        raise SelectionError(
            "give the tokens of a block, e.g. 512, or (height, width) of a tile of the image, e.g. (8, 8)."
        )
    return one if pair is None else pair


@register_method
@dataclass(frozen=True)
class BlockMask(Intervention):
    """Attention within a row's own block and the best other blocks, by g_ic = q_i . mean of the keys of block c; approximate.

    Args:
        block_size: tokens of a block, counted from a sample's first token (the last block may be short); or (height, width) of
            tiles of the image (denoisers). The text of joint attention is in no block: it sees all and is seen by all.
        top_k: blocks that a row keeps, its own included; None: by `threshold`.
        threshold: tau, where top_k is None: blocks are kept, the best first, until their gates, brought to 0 to 1 by the range of
            the group, are this share of the group's sum. As in the official code, one block beside a row's own is kept at least. 1
            keeps all.
        select: what competes: "query_head" the blocks of a row, in each head; "head_global" all (row, block) pairs of a head;
            "overall" those of all heads; "block" the rows and heads of a block (by `threshold` only). Causal sites take the first.
        released: as the official code, which attends to everything where only own blocks were chosen (`released_code`).

    With top_k not below the number of blocks, or threshold 1, nothing is edited. Under causality later blocks are hidden, a row
    sees its own block up to itself, and the mean key of that block, which counts in `threshold`, is over these keys. It pays
    from about 4,096 tokens on (docs/efficiency.md). A class of the same name in `torch.nn.attention.flex_attention` has nothing
    to do with this one.
    """

    block_size: Any = parsed(_block_size, "a number of tokens, or (height, width)", 512)
    top_k: int | None = integer(None, low=1)
    threshold: float = number(0.25, low=0.0, high=1.0)
    select: str = choice("query_head", SELECT)
    released: bool = flag(False, kw_only=True)

    kinds = ("self", "joint")
    approximate = True
    # What is pooled over rows is refused on causal sites.
    row_local = True
    whole_heads = property(lambda self: self.select in ("overall", "block"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select == "block" and self.top_k is not None:
            raise SelectionError('BlockMask(select="block") has no form with top_k; give threshold=... alone.')

    @property
    def needs(self) -> tuple[str, ...]:
        return ("grid",) if isinstance(self.block_size, tuple) else ()

    @classmethod
    def released_code(
        cls, block_size: Any, threshold: float = 0.25, select: str = "query_head", **other: Any
    ) -> BlockMask:
        """The official function's defaults, and its full attention where only own blocks are chosen."""
        return cls(block_size, None, threshold, select, released=True, **other)

    def bias(self, call: AttnCall) -> BlockBias | None:
        causal = call.site.causal
        if causal and isinstance(self.block_size, tuple) and self.top_k is None:
            raise UnsupportedHost(
                f"{call.site.path}: which part of its own tile a row of causal attention sees is not worked out; give top_k."
            )
        if causal and self.select != "query_head":
            raise UnsupportedHost(
                f"{call.site.path}: select={self.select!r} lets rows compete with later ones, which causal attention must not see; "
                'use "query_head".'
            )
        if self.top_k is None and self.threshold == 1.0:
            return None
        own, block, count = self._blocks(call)
        if count < 2 or (self.top_k is not None and self.top_k >= count):
            return None
        gate, there = _gate(call, block, count), self._there(call, own, block, count, causal)
        mine = torch.zeros_like(there).scatter_(-1, own.clamp_min(0)[:, None, :, None], True) & there
        mine = mine & (own >= 0)[:, None, :, None]
        if self.top_k is None:
            if causal:
                gate = _seen(call, gate, own, block, count)
            keep = _by_threshold(gate, there, mine, self.threshold, self.select)
        else:
            keep = _by_rank(gate, there, mine, self.top_k, self.select)
        if self.released and not bool((keep & ~mine).any()):
            return None
        # Padding, and tokens of no block, see what the model lets them see.
        return BlockBias(block, keep | (own < 0)[:, None, :, None], there)

    def _blocks(self, call: AttnCall) -> tuple[Tensor, Tensor, int]:
        """(the block of each row [B or 1, n], of each key [B or 1, m], -1 for none; how many there are)."""
        rows, keys = call.rows, call.keys
        n, m = rows.size, keys.size
        if isinstance(self.block_size, tuple) or call.site.kind == "joint":
            return self._image_blocks(call, n, m)
        size = self.block_size
        if m < call.past + n:
            raise UnsupportedHost(
                f"{call.site.path}: its cache holds {m} of {call.past + n} tokens (a sliding window), and the mean key of a block "
                'that has left it in part is not known. Leave this layer out, or the steps: Where(phases="prefill").'
            )
        own, block = ((t.index - t.start) // size for t in (rows, keys))
        count = -(-m // size)
        if call.packed:
            # Requests share no block.
            own, block = own + rows.request * count, block + keys.request * count
            count *= int(keys.request.max()) + 1
        return own.masked_fill(~rows.valid, -1), block.masked_fill(~keys.valid, -1), count

    def _image_blocks(self, call: AttnCall, n: int, m: int) -> tuple[Tensor, Tensor, int]:
        image = slice(0, n)
        if call.site.kind == "joint":
            if "image" not in call.segments:
                raise UnsupportedHost(
                    f"{call.site.path}: which rows are image is not known for this model; they have no blocks."
                )
            image = call.segments["image"]
        if n != m:
            raise UnsupportedHost(
                f"{call.site.path}: {n} rows meet {m} keys; blocks of an image need each row to be a key."
            )
        tokens = torch.arange(image.stop - image.start, device=call.rows.slot.device)
        if isinstance(self.block_size, tuple):
            (height, width), (h, w) = call.grid, self.block_size
            if height % h or width % w or height * width != len(tokens):
                raise UnsupportedHost(
                    f"{call.site.path}: tiles of {h} x {w} do not divide {len(tokens)} tokens, {height} x {width}. Give a size "
                    "that does, or another Where."
                )
            ids = tokens // width // h * (width // w) + tokens % width // w
            count = (height // h) * (width // w)
        else:
            ids, count = tokens // self.block_size, -(-len(tokens) // self.block_size)
        block = torch.full((1, n), -1, dtype=torch.long, device=tokens.device)
        block[0, image] = ids
        return block, block, count

    def _there(self, call: AttnCall, own: Tensor, block: Tensor, count: int, causal: bool) -> Tensor:
        """bool [B or 1, 1, n, C]: which blocks a row may choose among."""
        ids = torch.arange(count, device=own.device)
        there = (block[:, :, None] == ids).any(dim=1)[:, None, None]
        if call.packed:
            per = count // (int(call.keys.request.max()) + 1)
            there = there & (ids // per == call.rows.request[..., None])[:, None]
        if causal:
            there = there & (ids <= own[..., None])[:, None]
        B = max(len(own), len(block))
        return there.expand(B, 1, own.shape[1], count)


def _gate(call: AttnCall, block: Tensor, count: int) -> Tensor:
    """g_ic, [B, H, n, C]: the product of each query with the mean key of each block."""
    q, k, dtype = call.q, call.k, call.map.stat_dtype
    member = (block[:, None] == torch.arange(count, device=block.device)[:, None]).to(dtype)
    mean = torch.matmul(member[:, None], k.to(dtype)) / member.sum(dim=-1).clamp_min(1.0)[:, None, :, None]
    B, H, n, d = q.shape
    folded = q.to(dtype).reshape(B, k.shape[1], -1, d)
    return torch.matmul(folded, mean.transpose(-1, -2)).reshape(B, H, n, count)


def _seen(call: AttnCall, gate: Tensor, own: Tensor, block: Tensor, count: int) -> Tensor:
    """`gate` with the mean of a row's own block taken over its keys up to the row: the others are hidden from the row.

    Without this a row would choose by later tokens, and otherwise in a decode step than in one call over everything.
    """
    q, k, b = call.q, call.k, block.shape[0]
    (B, H, n, d), Hkv = q.shape, k.shape[1]
    # Running sums are of all keys, so that what one block adds is a small difference of large numbers.
    k = torch.where((block >= 0)[:, None, :, None], k, 0.0).double()
    total, many = k.cumsum(dim=2), (block >= 0).long().cumsum(dim=1)
    member = (block[:, None] == torch.arange(count, device=block.device)[:, None]).long()
    start = member.argmax(dim=-1).expand(max(b, len(own)), -1).gather(1, own.clamp_min(0).expand(max(b, len(own)), -1))
    place = (call.rows.slot - call.keys.slot[0]).expand_as(start)
    at = lambda t, where: t.gather(2, where.expand(B, -1)[:, None, :, None].expand(B, Hkv, n, d))  # noqa: E731
    number = many.expand(len(start), -1)
    size = number.gather(1, place) - number.gather(1, start) + 1
    mean = (at(total, place) - at(total, start) + at(k, start)) / size.clamp_min(1)[:, None, :, None]
    mean = mean.to(gate.dtype)[:, :, None]
    value = (q.to(gate.dtype).reshape(B, Hkv, -1, n, d) * mean).sum(dim=-1).reshape(B, H, n, 1)
    return gate.scatter(-1, own.clamp_min(0).expand(B, -1)[:, None, :, None].expand(B, H, n, 1), value)


def _by_rank(gate: Tensor, there: Tensor, mine: Tensor, k: int, select: str) -> Tensor:
    """The best k blocks for each row, or k times the rows for a group; a row's own come first."""
    B, H, n, C = gate.shape
    gate = gate.masked_fill(mine, torch.inf).masked_fill(~there, -torch.inf)
    if select == "query_head":
        best = gate.topk(min(k, C), dim=-1).indices
        return torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, best, True) & there
    groups = gate.reshape(B, H, -1) if select == "head_global" else gate.reshape(B, 1, -1)
    rows = n if select == "head_global" else n * H
    best = groups.topk(min(k * rows, groups.shape[-1]), dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).reshape(gate.shape) & there


def _by_threshold(gate: Tensor, there: Tensor, mine: Tensor, share: float, select: str) -> Tensor:
    """Blocks whose gates, over the range of their group, make up a share of its sum, a row's own counted first."""
    B, H, n, C = shape = gate.shape
    there, mine = there.expand(shape), mine.expand(shape)
    if select == "block":
        forward = lambda t: t.permute(0, 3, 1, 2).reshape(B, C, H * n)  # noqa: E731
        back = lambda t: t.reshape(B, C, H, n).permute(0, 2, 3, 1)  # noqa: E731
    else:
        size = {"query_head": (B, H, n, C), "head_global": (B, H, n * C), "overall": (B, H * n * C)}[select]
        forward, back = (lambda t: t.reshape(size)), (lambda t: t.reshape(shape))
    g, valid, own = forward(gate), forward(there), forward(mine)
    low = g.masked_fill(~valid, torch.inf).amin(dim=-1, keepdim=True)
    span = g.masked_fill(~valid, -torch.inf).amax(dim=-1, keepdim=True) - low
    # A group with nothing to choose has an infinite low and no span.
    g = ((g - low) / torch.where(span <= EPSILON, 1.0, span)).masked_fill(~valid, 0.0)
    total = g.sum(dim=-1, keepdim=True) + EPSILON
    missing = (share - (g * own).sum(dim=-1, keepdim=True) / total).clamp_min(0.0)
    values, order = g.masked_fill(own, 0.0).sort(dim=-1, descending=True)
    enough = values.cumsum(dim=-1) / total >= missing
    last = torch.where(enough.any(dim=-1, keepdim=True), enough.float().argmax(dim=-1, keepdim=True), g.shape[-1] - 1)
    chosen = torch.arange(g.shape[-1], device=g.device) <= last
    return back(torch.zeros_like(valid).scatter_(-1, order, chosen) & valid | own)
