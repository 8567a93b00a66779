"""VisualTokenMerge: fewer image tokens for the language model, by clusters before it, or by attention scores inside it.

"Token Sequence Compression for Efficient Multimodal Computing" (arXiv 2504.17892, 2025) clusters projected image tokens and hands
on one aggregate of each cluster. No code was found: k-means, the mean and the place of a cluster are our reconstruction. Chen et
al., "An Image is Worth 1/2 Tokens After Layer 2" (FastV, ECCV 2024, arXiv 2403.06764) drops tokens inside; official code
pkunlp-icler/FastV (modeling_llama.py at d165972): its in-place form, of any batch, with a cache. Yang et al., "VisionZip" (CVPR
2025, arXiv 2412.04467); official code dvlab-research/VisionZip (clip_encoder.py at 3151f6d): its choice and its sums, on projected
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SelectionError
from ..intervention import Intervention
from ..parameters import choice, integer, number
from ..registry import register_method
from ..where import Where

if TYPE_CHECKING:
    from ..site import Site

# Those that need no attention, and those that read the scores of a layer of the language model or of the image tower.
BLIND, SCORED = ("cluster", "spatial", "random"), ("attention", "lowest")
STEPS = 10


@register_method
@dataclass(frozen=True)
class VisualTokenMerge(Intervention):
    """The image tokens of a prompt become `keep` tokens, from layer `layer` on; approximate.

    Args:
        keep: image tokens that stay, for each sample; not less than there are: nothing is edited. None: by `ratio`.
        ratio: where keep is None, the share of a sample's image tokens that stays, rounded to whole tokens; 1 changes nothing.
        method: "cluster": k-means of the tokens as they enter layer `layer` (10 steps, started from the tokens farthest from each
            other), the mean of each cluster at the mean of its members' places (halves up). "spatial": evenly strided.
            "random": drawn by `seed`. "attention": those to which the prompt's last token attends most, by the head mean of the
            layer before (FastV). "lowest": those to which it attends least, a control. "visionzip": those that the class token of
            the image tower attends to, and sums of the others (see `visionzip`).
        layer: K, the first layer that sees fewer tokens. 0: before the language model; "attention" and "lowest" need 1 or more.
        positions: "keep" the places that tokens had; "renumber" closes the gaps.
        contextual: tokens of `keep` that are sums of others, with "visionzip".
        seed: of "random".

    Text is never dropped. Layers before K, their cache and the numbers of later tokens stay as they are; the logits of rows that
    were dropped come back as NaN. Every sample of a batch must lose the same number of tokens. It is attached alone, and refuses
    static caches, compiled code, sliding layers, packed requests, caches that were cut back, and a second image in a later turn.
    It pays for long prompts of many image tokens; what decoding gains is small (docs/efficiency.md).
    """

    keep: int | None = integer(None, low=1)
    ratio: float = number(0.25, above=0, high=1)
    method: str = choice("cluster", (*BLIND, *SCORED, "visionzip"))
    layer: int = integer(0, low=0)
    positions: str = choice("keep", ("keep", "renumber"))
    contextual: int = integer(0, low=0, kw_only=True)
    seed: int = integer(0, kw_only=True)

    kinds = ("self",)
    needs = ("images", "layers")
    approximate = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method in SCORED and self.layer < 1:
            raise SelectionError(
                f'VisualTokenMerge(method="{self.method}") reads the scores of the layer before; give layer=1 or more, e.g. 2.'
            )
        if self.method == "visionzip" and (self.layer or self.keep is None or self.contextual >= self.keep):
            raise SelectionError(
                'VisualTokenMerge(method="visionzip") acts before the language model, on keep=... tokens of which fewer are '
                "contextual; see VisualTokenMerge.visionzip(54, 10)."
            )
        if self.positions == "renumber" and self.layer:
            raise SelectionError(
                'VisualTokenMerge(positions="renumber") acts before the language model; leave layer=0.'
            )

    def prepared(self, target: Any) -> VisualTokenMerge:
        """The same; a part of the model cannot have fewer tokens."""
        if self.where != Where():
            raise SelectionError(
                f"VisualTokenMerge acts on the whole language model from `layer` on; {self.where} selects a part of it."
            )
        return self

    @classmethod
    def fastv(cls, k: int = 2, r: float = 0.5) -> VisualTokenMerge:
        """FastV: from layer k on, without the share r of the image tokens; 2 and 0.5 in its README."""
        return cls(None, 1.0 - r, "attention", k)

    @classmethod
    def visionzip(cls, dominant: int = 54, contextual: int = 10) -> VisualTokenMerge:
        """VisionZip: `dominant` tokens by the class token's attention, `contextual` sums of the others by likeness of their keys.

        The class token itself, which the official code hands on as one of the dominant, is no token of the models here. A sum is
        its target plus the mean of its members, as there, but of projected tokens.
        """
        return cls(dominant + contextual, method="visionzip", contextual=contextual)

    def default_where(self, sites: Sequence[Site]) -> Where:
        layers = sorted({s.layer for s in sites if s.modality == "text" and not s.refused})
        if self.layer and self.layer not in layers:
            raise SelectionError(
                f"VisualTokenMerge(layer={self.layer}): the language model has the layers {layers[0]} to {layers[-1]}."
            )
        if self.method == "visionzip":
            tower = sorted({s.layer for s in sites if s.modality == "vision" and s.kind == "self"})
            if len(tower) < 2:
                raise SelectionError(
                    'VisualTokenMerge(method="visionzip") reads the image tower\'s last layer but one; there is none.'
                )
            return Where(layers=[tower[-2]], modalities="vision")
        return Where(layers=[max(0, self.layer - 1)])

    def around(self, forward: Callable[..., Any], inputs: Any, run: Any) -> Any:
        count = inputs.images
        keep = round(count * self.ratio) if self.keep is None else self.keep
        if keep >= count:
            return forward(inputs)
        keep = max(1, keep)
        slots = inputs.slots
        if self.method == "cluster":
            tokens, place = clustered(inputs.tokens, slots, keep)
            return forward(inputs.merged(tokens, place))
        if self.method == "visionzip":
            tokens, place = zipped(inputs.tokens, slots, *inputs.tower(), keep - self.contextual, self.contextual)
            return forward(inputs.merged(tokens, place))
        if self.method == "spatial":
            chosen = torch.linspace(0, count - 1, keep).round().long().expand(len(slots), -1)
        elif self.method == "random":
            draw = torch.Generator().manual_seed(self.seed)
            # The same places in each sample, so that a batch is its samples.
            chosen = torch.randperm(count, generator=draw)[:keep].expand(len(slots), -1)
        else:
            score = inputs.scores().mean(dim=1)
            chosen = score.topk(keep, dim=-1, largest=self.method == "attention").indices
        return forward(inputs.kept(slots.gather(1, chosen.to(slots.device))))


def clustered(x: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """k-means of tokens: (means [B, K, D], mean slot of each cluster, halves rounded up, [B, K], ascending).

    Args:
        x: [B, N, D]. slots: int64 [B, N]. count: K. Started from the token nearest the mean, then from those farthest from all
            centres so far; a cluster that loses all members keeps its centre.
    """
    B, N, D = x.shape
    y = x.float()
    near = torch.cdist(y.mean(dim=1, keepdim=True), y)[:, 0]
    first = near.argmin(dim=-1)
    chosen, distance = [first], torch.full((B, N), torch.inf, device=x.device)
    for _ in range(count - 1):
        last = y.gather(1, chosen[-1][:, None, None].expand(B, 1, D))
        distance = torch.minimum(distance, torch.cdist(last, y)[:, 0])
        chosen.append(distance.argmax(dim=-1))
    centre = y.gather(1, torch.stack(chosen, dim=1)[..., None].expand(-1, -1, D))
    for _ in range(STEPS):
        member = torch.nn.functional.one_hot(torch.cdist(y, centre).argmin(dim=-1), count).to(y.dtype).transpose(1, 2)
        size = member.sum(dim=-1, keepdim=True)
        centre = torch.where(size > 0, torch.matmul(member, y) / size.clamp_min(1.0), centre)
    # Counted from the first one, so that places neither depend on padding in front nor are too large to be exact.
    begin = slots[:, :1]
    place = torch.matmul(member, (slots - begin)[..., None].to(y.dtype)) / size.clamp_min(1.0)
    # A cluster without members stands where the token nearest its centre does.
    nearest = slots.gather(1, torch.cdist(centre, y).argmin(dim=-1))
    place = torch.where(size[..., 0] > 0, begin + (place[..., 0] + 0.5).floor().long(), nearest)
    place, order = place.sort(dim=1, stable=True)
    return centre.gather(1, order[..., None].expand(-1, -1, D)).to(x.dtype), place


def zipped(
    x: Tensor, slots: Tensor, score: Tensor, keys: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor]:
    """VisionZip's tokens, [B, dominant + contextual, D], and their slots; in order of the slots.

    Args:
        x: tokens [B, N, D]. slots: [B, N]. score: what the class token gives each, summed over heads, [B, N]. keys: their keys,
            the mean over heads, [B, N, d].
    """
    B, N, D = x.shape
    top = score.topk(dominant, dim=-1).indices
    rest = torch.ones_like(score, dtype=torch.bool).scatter(1, top, False)
    index = rest.nonzero()[:, 1].reshape(B, N - dominant)
    own = x.gather(1, top[..., None].expand(-1, -1, D))
    if not contextual:
        place, order = slots.gather(1, top).sort(dim=1)
        return own.gather(1, order[..., None].expand(-1, -1, D)), place
    key = keys.gather(1, index[..., None].expand(-1, -1, keys.shape[-1]))
    key = key / key.norm(dim=-1, keepdim=True)
    step = max(1, (N - dominant) // contextual)
    targets = torch.arange(0, N - dominant, step, device=x.device)[:contextual]
    others = torch.ones(N - dominant, dtype=torch.bool, device=x.device).index_fill(0, targets, False)
    token = x.gather(1, index[..., None].expand(-1, -1, D))
    best = torch.matmul(key[:, others], key[:, targets].transpose(1, 2)).argmax(dim=2)
    member = torch.nn.functional.one_hot(best, len(targets)).to(x.dtype).transpose(1, 2)
    mean = torch.matmul(member, token[:, others]) / member.sum(dim=-1, keepdim=True).clamp_min(1.0)
    tokens = torch.cat([own, token[:, targets] + mean], dim=1)
    place, order = slots.gather(1, torch.cat([top, index[:, targets]], dim=1)).sort(dim=1)
    return tokens.gather(1, order[..., None].expand(-1, -1, D)), place
