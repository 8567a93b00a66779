"""TokenMerge: attention among fewer tokens: those that are most alike are merged before it, and get the same output after it.

Bolya et al., "Token Merging: Your ViT But Faster" (ToMe, ICLR 2023, arXiv 2210.09461); Bolya and Hoffman, "Token Merging for Fast
Stable Diffusion" (CVPRW 2023, arXiv 2303.17604); Shen et al., "FastVGGT" (arXiv 2509.02560, 2025). Official codes
facebookresearch/ToMe (tome/merge.py at af95e4b), dbolya/tomesd (tomesd/merge.py at 27a14a3), mystorm16/FastVGGT (merging/merge.py
at a4dd237): their matching, in place around the attention primitive, where q, k and v are merged after norms and rotary embedding,
as FastVGGT does. Tokens are compared by the mean of their keys over the heads, as in ToMe; tomesd and FastVGGT compare hidden
states, which are not seen there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..edits import MergedTokens
from ..errors import SelectionError, UnsupportedHost
from ..intervention import Intervention
from ..parameters import choice, flag, integer, number, parsed, whole
from ..registry import register_method

# Rows of the table of likeness that are made at a time.
TILE = 1024


def _pair(value: Any) -> tuple[int, int]:
    sizes = tuple(map(whole, value)) if isinstance(value, (tuple, list)) and len(value) == 2 else ()
    if not sizes or any(s is None or s < 1 for s in sizes):
        raise SelectionError("give a pair (height, width) of whole numbers, e.g. (2, 2).")
    return sizes


@register_method
@dataclass(frozen=True)
class TokenMerge(Intervention):
    """O' = unmerge(softmax(q' k'^T + log size) v') with q', k', v' the means of groups of tokens; approximate.

    Args:
        ratio: the share of the image's tokens that is merged into others, at most what is not a destination (0.75 with cells of
            2 x 2, 0.5 by "alternate"); 0 changes nothing.
        stride: (height, width) of the cells of which one token each is a destination.
        use_rand: whether it is drawn, anew at each step, the same for all samples and layers; else it is a cell's first.
        size_bias: log size is added to the scores of a group, so that equal tokens merge without any error. ToMe has it; tomesd and
            FastVGGT leave it out, at two to three times the error.
        match: "grid": destinations by cells; "alternate": every second token is one, as in ToMe.
        grid: (height, width) of the tokens of an image; None: the host says (denoisers).
        frames: images in the sequence, one after the other; all tokens of the first are destinations where there are several.
        special: tokens in front of each frame that are never merged away (class and register tokens).
        protect: a share of the tokens, evenly strided, that is never merged away; 0.1 in FastVGGT.
        seed: of the draws.

    Self-attention without masks only; the text of joint attention is never merged. Projections still run on all tokens, so that
    rotary embeddings and norms are exact. ToMe's own schedule, which lets vision transformers go on with merged tokens, is not
    built. It pays from about 1,024 tokens on (docs/efficiency.md).
    """

    ratio: float = number(0.5, low=0.0, high=1.0)
    stride: tuple[int, int] = parsed(_pair, "(height, width)", (2, 2))
    use_rand: bool = flag(True)
    size_bias: bool = flag(True)
    match: str = choice("grid", ("grid", "alternate"), kw_only=True)
    grid: tuple[int, int] | None = parsed(_pair, "(height, width)", None, kw_only=True)
    frames: int = integer(1, low=1, kw_only=True)
    special: int = integer(0, low=0, kw_only=True)
    protect: float = number(0.0, low=0.0, below=1.0, kw_only=True)
    seed: int = integer(0, low=0, kw_only=True)

    kinds = ("self", "joint")
    approximate = True
    # Tokens are compared by the mean over its heads.
    whole_heads = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames > 1 and (self.match == "alternate" or self.grid is None):
            raise SelectionError("TokenMerge(frames=...) needs match='grid' and grid=(height, width) of one frame.")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("grid",) if self.match == "grid" and self.grid is None else ()

    @classmethod
    def tomesd(cls, ratio: float = 0.5, **other: Any) -> TokenMerge:
        """tomesd's defaults: no size bias. It merges at the top level of the UNet only: give that `where`."""
        return cls(ratio, (2, 2), True, False, **other)

    @classmethod
    def tome(cls, ratio: float, special: int = 1, **other: Any) -> TokenMerge:
        """ToMe's matching and proportional attention in vision transformers, in each attention by itself."""
        return cls(ratio, match="alternate", special=special, **other)

    @classmethod
    def fastvggt(cls, grid: tuple[int, int], frames: int, ratio: float = 0.9, **other: Any) -> TokenMerge:
        """FastVGGT's defaults. There a protected destination is a key twice, and cells of odd grids shear; not here."""
        own = {"special": 5, "protect": 0.1, "seed": 33, **other}
        return cls(ratio, (2, 2), True, False, grid=grid, frames=frames, **own)

    def inputs(self, call: AttnCall) -> MergedTokens | None:
        if self.ratio == 0.0:
            return None
        att, (_, _, n, m) = call.map.att, call.map.shape
        if call.site.causal or att.causal or n != m:
            raise UnsupportedHost(
                f"{call.site.path}: tokens are merged where each row is a key and none is hidden from another; this attention is "
                "causal, or meets other keys. Leave it out of Where."
            )
        if att.mask is not None or att.key_bias is not None or att.sinks is not None:
            raise UnsupportedHost(
                f"{call.site.path}: tokens under a mask, a bias or a learned sink are not merged. Leave it out of Where."
            )
        where, destination, fixed = self._roles(call, n)
        merged = min(int(int(where.sum()) * self.ratio), int((where & ~destination & ~fixed).sum()))
        if merged == 0 or not bool(destination.any()):
            # One token by itself, or none but special ones before it: there is nothing to merge into.
            return None
        metric = call.k.to(att.stat_dtype).mean(dim=1)
        root = match(metric, destination, where & ~destination & ~fixed, merged)
        return merge(call.q, call.k, call.v, root, n - merged, self.size_bias)

    def _roles(self, call: AttnCall, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """bool [n] each: the tokens of images, the destinations among them, and what is never merged away."""
        device = call.rows.slot.device
        image = slice(0, n)
        if call.site.kind == "joint":
            if "image" not in call.segments:
                raise UnsupportedHost(
                    f"{call.site.path}: which rows are image is not known for this model; none can be merged."
                )
            image = call.segments["image"]
        count = image.stop - image.start
        inside = torch.zeros(count, dtype=torch.bool)
        fixed = torch.zeros(count, dtype=torch.bool)
        if self.match == "alternate":
            inside[1::2] = True
            fixed[: self.special] = True
            # ToMe gives nothing to its second special token, the first of the destinations, either.
            inside[: self.special] = False
        else:
            h, w = call.grid if self.grid is None else self.grid
            size = self.special + h * w
            if size * self.frames != count:
                raise UnsupportedHost(
                    f"{call.site.path}: {count} tokens are not {self.frames} x ({self.special} + {h} x {w}). Give the grid, the "
                    "frames and the special tokens of this model, or another Where."
                )
            draw = torch.Generator().manual_seed(self.seed + (0 if call.step is None else call.step))
            if self.stride[0] > h or self.stride[1] > w:
                raise UnsupportedHost(
                    f"{call.site.path}: no cell of {self.stride[0]} x {self.stride[1]} fits into {h} x {w} tokens, so none has a "
                    "destination. Give a smaller stride, or leave this site out of Where."
                )
            frames = [self._cells(h, w, draw) for _ in range(self.frames)]
            for i, cells in enumerate(frames):
                start = i * size
                fixed[start : start + self.special] = True
                inside[start + self.special : start + size] = True if i == 0 and self.frames > 1 else cells
            if self.frames > 1:
                inside |= fixed
        if self.protect:
            many = max(1, int(count * self.protect))
            fixed[torch.arange(0, count, max(1, count // many))[:many]] = True
        where, destination, kept = (torch.zeros(n, dtype=torch.bool) for _ in range(3))
        where[image], destination[image], kept[image] = True, inside, fixed
        return where.to(device), destination.to(device), kept.to(device)

    def _cells(self, h: int, w: int, draw: torch.Generator) -> Tensor:
        """bool [h * w], one token of each whole cell."""
        sy, sx = self.stride
        rows, columns = h // sy, w // sx
        pick = torch.zeros(rows, columns, dtype=torch.long)
        if self.use_rand:
            pick = torch.randint(sy * sx, (rows, columns), generator=draw)
        y = torch.arange(rows)[:, None] * sy + pick // sx
        x = torch.arange(columns)[None] * sx + pick % sx
        return torch.zeros(h * w, dtype=torch.bool).index_fill(0, (y * w + x).flatten(), True)


def match(metric: Tensor, destination: Tensor, source: Tensor, count: int) -> Tensor:
    """The token that each token becomes part of, int64 [B, n]: itself, or of the `count` best sources their destination.

    Args:
        metric: [B, n, d], compared by cosine. destination, source: bool [n], disjoint.
    """
    B, n, _ = metric.shape
    x = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    a, b = source.nonzero()[:, 0], destination.nonzero()[:, 0]
    targets, best, at = x[:, b].transpose(1, 2).contiguous(), [], []
    for start in range(0, len(a), TILE):
        values, index = torch.matmul(x[:, a[start : start + TILE]], targets).max(dim=-1)
        best.append(values)
        at.append(index)
    order = torch.cat(best, dim=1).argsort(dim=-1, descending=True)[:, :count]
    root = torch.arange(n, device=metric.device).expand(B, n).clone()
    return root.scatter_(1, a[order], b[torch.cat(at, dim=1).gather(1, order)])


def merge(q: Tensor, k: Tensor, v: Tensor, root: Tensor, count: int, sizes: bool) -> MergedTokens:
    """The means of the groups of tokens with the same root; `count`: groups, the same number in each sample."""
    B, n = root.shape
    own = root == torch.arange(n, device=root.device)
    group = (own.cumsum(dim=1) - 1).gather(1, root)
    size = torch.zeros(B, count, dtype=torch.float32, device=q.device).scatter_add_(
        1, group, own.new_ones(B, n).float()
    )
    kept = own.nonzero()[:, 1].reshape(B, count)
    gone = (~own).nonzero()[:, 1].reshape(B, n - count)
    to = group.gather(1, gone)

    def mean(t: Tensor) -> Tensor:
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        at = lambda index: index[:, None, :, None].expand(B, t.shape[1], -1, t.shape[3])  # noqa: E731
        total = wide.gather(2, at(kept)).scatter_add(2, at(to), wide.gather(2, at(gone)))
        return (total / size[:, None, :, None].to(total.dtype)).to(t.dtype)

    return MergedTokens(mean(q), mean(k), mean(v), group, size if sizes else None)
