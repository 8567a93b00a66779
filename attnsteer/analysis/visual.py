"""`visual_heads`: how much, how narrowly and where each head looks at the image when the answer is said.

After Bi et al., "Unveiling Visual Perception in Language Models: An Attention Head Analysis Approach" (CVPR 2025, arXiv
2412.18108; jing-bi/visual-head at 843e00a). There the post-softmax row of the answer's token is summed over the image slots,
right and wrong answers apart (llava/eval/model_vqa_loader_vip_ana.py), and over the patches of the object. The concentration
is said to be of entropy, and its formula is in neither place: 1 - H / ln N, and its product with the mass, are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..call import AttnCall
from ..captured import map_rows
from ..errors import SelectionError, brief
from ..intervention import Intervention
from ..parameters import whole
from ..search.screen import sites_of
from ..search.state import model_digest
from ..steering import steer
from ..versions import library_versions
from ..where import Where
from .table import Column, HeadTable

ROWS = ("answer", "generated")


@dataclass(frozen=True)
class _Looked(Intervention):
    """Takes one row of each sample over its image's tokens; edits nothing.

    Attributes:
        decode: the first generated token's row in place of the prompt's last.
        found: site path -> of each sample, (probabilities of its image tokens [H, N], keys that the row sees). which: site path ->
            which those H are.
    """

    decode: bool = False
    found: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict, compare=False, repr=False)
    which: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    done: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    observes = True
    kinds = ("self",)
    needs = ("tokens", "images")

    def output(self, call: AttnCall, out: Tensor) -> None:
        """The row of each sample, once a batch."""
        path = call.site.path
        if (call.phase == "prefill") is self.decode or self.done.get(path):
            return
        self.done[path], self.which[path] = True, tuple(call.heads)
        B, _, n, m = call.map.shape
        image = call.image_keys()[:, 0].expand(B, m)
        last = call.row_valid.expand(B, n).to(torch.int32).cumsum(dim=1).argmax(dim=1)
        A = map_rows(call, last[:, None])[:, :, 0].float()
        seen = call.map.keys_seen().expand(B, -1, n)[:, 0].gather(1, last[:, None])[:, 0].tolist()
        self.found.setdefault(path, []).extend((A[b][:, image[b]].cpu(), int(seen[b])) for b in range(B))


@torch.no_grad()
def visual_heads(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    row: str = "answer",
    regions: Sequence[Sequence[int]] | None = None,
    right: Sequence[bool] | None = None,
    where: Where | None = None,
) -> HeadTable:
    """Score heads by their attention to the image in the row of the answer.

    Readings, each with a value for every sample:

    - mass ([0, 1]): attention to the image's tokens; chance is that of a uniform row. mass_right, mass_wrong: of the samples
      that were answered rightly, and of the others.
    - concentration ([0, 1]): 1 - H(p) / ln N of the attention p within the N image tokens, renormalised; none where the mass is
      zero, or N is one.
    - score ([0, 1]): mass times concentration, zero where there is no mass.
    - region ([0, 1]): share of the image's mass that is on the sample's region; chance is the region's share of the tokens.
      region_mass: the attention to it.

    Args:
        model: a vision-language model of transformers whose images stand in the prompt.
        batches: processor outputs with an image in each sample, passed to the model as they are.
        row: "answer", the prompt's last token, which predicts the answer; or "generated", the first token that the model says,
            as the official code has it (greedy; the end is not allowed before it).
        regions: of each sample, over all batches: numbers of image tokens, counted from 0 in the sample's own.
        right: of each sample, whether it was answered rightly.
        where: layers and heads; None: all of the language model.

    Returns:
        `to_heads("score", top=k)` is a head set of the best, `intervals` are over samples, `plot` is the grid.

    Raises:
        SelectionError: no batches, a sample without an image, an unknown row, a region that is none of the image's, or as many
        regions or answers as there are no samples.
    """
    if row not in ROWS:
        raise SelectionError(f"visual_heads(row={row!r}): one of {', '.join(ROWS)}.")
    probe = _Looked(row == "generated", where=Where(kinds="self") if where is None else where)
    pairs, shape = sites_of(model, probe)
    with steer(model, probe, control=True):
        for batch in batches:
            probe.done.clear()
            if probe.decode:
                model.generate(**batch, max_new_tokens=2, min_new_tokens=2, do_sample=False)
            else:
                model(**batch)
    if not probe.found:
        raise SelectionError("visual_heads got no batches; give processor outputs with an image in each sample.")
    at = [(path, probe.which[path].index(h)) for path, h in pairs.values()]
    taken = [[(own[k], seen) for own, seen in probe.found[path]] for path, k in at]
    sizes = [len(p) for p, _ in taken[0]]
    if 0 in sizes:
        raise SelectionError(
            f"visual_heads: sample {sizes.index(0)} of {len(sizes)} has no image, so no head looks at it; leave it out."
        )
    inside = _regions(regions, sizes)
    mass = torch.stack([torch.stack([p.sum() for p, _ in own]) for own in taken], dim=1).double()
    narrow = torch.stack([torch.stack([_narrow(p) for p, _ in own]) for own in taken], dim=1).double()
    one, known = torch.ones_like(mass), (~narrow.isnan()).double()
    uniform = torch.tensor([n / seen for n, (_, seen) in zip(sizes, taken[0], strict=True)], dtype=torch.float64)
    heads = tuple(pairs)
    level = lambda x: x.mean().expand(len(heads))  # noqa: E731
    narrow = narrow.nan_to_num(0.0)
    # Of one image token there is no concentration, and so no score.
    scored = (torch.tensor(sizes)[:, None] > 1).double() * one
    columns = {
        "mass": Column(mass, one, "attention to the image", level(uniform)),
        "concentration": Column(narrow, known, "concentration within the image"),
        "score": Column(mass * narrow, scored, "image mass times concentration"),
    }
    if right is not None:
        if len(right) != len(sizes):
            raise SelectionError(
                f"visual_heads: {len(right)} answers in right= for {len(sizes)} samples; give one each."
            )
        told = torch.tensor([bool(r) for r in right])[:, None].double() * one
        columns["mass_right"] = Column(mass * told, told, "attention to the image, right answers")
        columns["mass_wrong"] = Column(mass * (1 - told), 1 - told, "attention to the image, wrong answers")
    if inside is not None:
        there = [[p[at].sum() for (p, _), at in zip(own, inside, strict=True)] for own in taken]
        on = torch.stack([torch.stack(own) for own in there], dim=1).double()
        some = (mass > 0).double()
        share = torch.tensor([len(at) / n for at, n in zip(inside, sizes, strict=True)], dtype=torch.float64)
        columns["region"] = Column(
            on / mass.clamp_min(1e-300), some, "share of the image's mass in the region", level(share)
        )
        columns["region_mass"] = Column(on, one, "attention to the region")
    facts = {
        "search": "visual_heads",
        "arxiv": "2412.18108",
        "model": model_digest(model),
        "samples": len(sizes),
        "row": row,
        "versions": library_versions(),
    }
    return HeadTable(heads, shape, columns, facts)


def _narrow(p: Tensor) -> Tensor:
    """1 - H / ln N of attention p [N], renormalised; NaN where there is none or N is one."""
    total = p.sum()
    if len(p) < 2 or not bool(total > 0):
        return torch.tensor(math.nan)
    return 1 - torch.special.entr(p / total).sum() / math.log(len(p))


def _regions(regions: Sequence[Sequence[int]] | None, sizes: list[int]) -> list[list[int]] | None:
    if regions is None:
        return None
    if len(regions) != len(sizes):
        raise SelectionError(f"visual_heads: {len(regions)} regions for {len(sizes)} samples; give one each.")
    out = []
    for i, (own, size) in enumerate(zip(regions, sizes, strict=True)):
        numbers = [whole(j) for j in own]
        if not numbers or any(j is None or not 0 <= j < size for j in numbers) or len({*numbers}) < len(numbers):
            raise SelectionError(
                f"visual_heads: regions[{i}]={brief(own)}; sample {i} has the image tokens 0 to {size - 1}: give some of "
                "them, each once."
            )
        out.append(numbers)
    return out
