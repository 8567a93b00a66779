"""AttentionRefocusing: moves the latent so that words are attended to inside their boxes, and boxes attend to themselves.

Phung, Ge & Huang, "Grounded Text-to-Image Synthesis with Attention Refocusing" (CVPR 2024, arXiv 2306.05427), section 3;
official code Attention-Refocusing/attention-refocusing at 2c265cb, which optimises other terms than the paper states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import SelectionError
from ..maps.regions import cells, layouts, union
from ..maps.words_to_image import COMPETE, Maps
from ..parameters import Number, choice, flag, number, parsed, plain
from ..registry import register_method
from .attend_and_excite import competing
from .bases.latent_loss import LatentLoss, Plan, at

# (first fraction of the loop, its end, step size, updates at most): the supplement, in its gaps the released code; of 50.
SCHEDULE = (
    (0.0, 0.04, 4.0, 2), (0.04, 0.1, 4.0, 6), (0.1, 0.2, 3.0, 3), (0.2, 0.22, 3.0, 2), (0.3, 0.32, 3.0, 2),
    (0.4, 0.42, 1.0, 2), (0.5, 0.52, 1.0, 2), (0.6, 0.62, 1.0, 2), (0.7, 0.72, 1.0, 2),
)  # fmt: skip
FORMS = ("paper", "released")
# In the released code weights change at call 15 of 50, and the stop rule at call 10.
LATE, LATER = 0.2, 0.3


def _boxes(given: Any) -> Any:
    checked = [dict(layout) for layout in layouts(given)]
    return checked if isinstance(given, (list, tuple)) else checked[0]


def _schedule(given: Any) -> tuple[tuple[float, float, float, int], ...]:
    forms = (Number(low=0, high=1), Number(low=0, high=1), Number(low=0), Number(low=0, whole=True))
    rows = [plain(row) for row in plain(given)]
    if not rows or not all(isinstance(row, (list, tuple)) and len(row) == 4 for row in rows):
        raise SelectionError("give rows of (from, to, step size, updates), 0 <= from < to <= 1.")
    checked = tuple(tuple(f.check("schedule", "row", v) for f, v in zip(forms, row, strict=True)) for row in rows)
    if any(row[0] >= row[1] for row in checked):
        raise SelectionError("give rows of (from, to, step size, updates), 0 <= from < to <= 1.")
    return checked


@register_method
@dataclass(frozen=True)
class AttentionRefocusing(LatentLoss):
    """L = CAR + SAR. CAR: mean over words of (1 - max of A inside the box) + max of A outside; SAR: mean over words of the
    attention that the box's pixels get from outside it, per outside pixel.

    Args:
        boxes: phrase -> (x0, y0, x1, y1) in fractions of the image (from the left and top), several boxes, or a mask [h, w]
            (then CAR's maxima are means, as the paper has it); or one such mapping per prompt.
        cross, own: weights of CAR and SAR; 0 leaves a term out, and its maps unread.
        schedule: (from, to, step size, updates): what to do in which fraction of the loop. The fields `step_size` and
            `updates` multiply it.
        aligned: from a fifth of the loop on, a sample all of whose words reach this inside is left alone ("misaligned" is
            not defined in the paper; the value is the released code's).
        stop_share: a sample is left alone at calls where, for every word, at least this share of its attention lies in its
            region, 0 to 1; None: no such rule (not from the paper: more updates than needed break the image).
        form: "paper", or "released" (use `released_code`).
        sharpness, compete, smooth: of A, see `AttendAndExcite`. The rest: see `LatentLoss`.

    Defaults are for 16 x 16 maps of Stable Diffusion 1.4. In joint attention SAR reads the image-image block, rows
    renormalised (not from the paper).
    """

    boxes: Any = parsed(_boxes, "{phrase: (x0, y0, x1, y1)} in fractions of the image, or one such mapping per prompt")
    cross: float = number(1.0, low=0, kw_only=True)
    own: float = number(1.0, low=0, kw_only=True)
    schedule: Sequence[tuple[float, float, float, int]] = parsed(
        _schedule, "rows of (from, to, step size, updates)", SCHEDULE, kw_only=True
    )
    aligned: float = number(0.2, low=0, kw_only=True)
    stop_share: float | None = number(None, above=0, high=1, per_sample=True, kw_only=True)
    form: str = choice("paper", FORMS, kw_only=True)
    sharpness: float | None = number(100.0, above=0, optional=True, kw_only=True)
    compete: str | None = choice(None, COMPETE, kw_only=True)
    smooth: bool = flag(True, kw_only=True)
    step_size: float = field(default=1.0, kw_only=True)
    decay: float = field(default=1.0, kw_only=True)
    until: float = field(default=1.0, kw_only=True)

    kinds = ("self", "cross", "joint")

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "AttentionRefocusing"
        if max(self.cross, self.own) == 0:
            raise SelectionError(f"{name}(cross={self.cross}, own={self.own}): weights >= 0, not both 0.")
        regions = (region for layout in layouts(self.boxes) for _, region in layout)
        if self.form == "released" and any(isinstance(region, Tensor) for region in regions):
            raise SelectionError(f"{name}: the released code knows boxes only; a mask needs the paper's form.")

    @classmethod
    def released_code(cls, boxes: Any, **changes: Any) -> AttentionRefocusing:
        """The released terms, without the one on GLIGEN's grounding tokens: thresholds, leakage between objects, row-wise SAR.

        The authors' sampler (PLMS) optimises once per step: not for the second prediction of the first step, at the latent
        that this step would lead to.
        """
        return cls(boxes, **{"form": "released", "scaled": False, **changes})

    @property
    def reads(self) -> tuple[str, ...]:
        """Maps of the terms that have a weight; CAR's also tell when to stop."""
        return ("text", "image") if self.own else ("text",)

    def phrases(self) -> list[list[Any]]:
        return [[phrase for phrase, _ in layout] for layout in layouts(self.boxes)]

    def choose(self, sites: Sequence[Any]) -> list[Any]:
        """Self-attention is read for SAR only."""
        return [s for s in super().choose(sites) if self.own or s.site.kind != "self"]

    def plan(self, index: int, length: int) -> Plan:
        """The row of the schedule that holds at this call."""
        progress = index / length + 1e-9
        for start, stop, size, updates in self.schedule:
            if start <= progress < stop and index < at(self.until, length):
                # The released code compares the loss times its factor with 0.1, up to a fifth of the loop.
                early = self.form == "released" and progress < LATE and size > 0
                return Plan(
                    size * self.step_at(index, length),
                    updates * self.updates,
                    0.1 / size if early else -1.0,
                    at_once=True,
                )
        return Plan(0.0)

    def reached(self, maps: Maps, loss: Tensor, target: float) -> Tensor:
        """The released code stops after the update whose loss is small enough, or whose words are all inside."""
        if self.form == "paper":
            return torch.zeros_like(loss, dtype=torch.bool)
        return (loss <= target) | (self._inside(maps) >= self.aligned)

    def satisfied(self, maps: Maps, loss: Tensor) -> Tensor | None:
        rules = [super().satisfied(maps, loss)]
        if self.form == "paper" and maps.progress + 1e-9 >= LATE:
            rules.append(self._inside(maps) >= self.aligned)
        if self.stop_share is not None:
            rules.append(self._share(maps) >= self.stop_share)
        given = [rule for rule in rules if rule is not None]
        return torch.stack(given).any(dim=0) if given else None

    def loss(self, maps: Maps) -> Tensor:
        car, sar = (self._car, self._sar) if self.form == "paper" else (self._released_car, self._released_sar)
        total = self.cross * car(maps) if self.cross else 0.0
        return total + self.own * sar(maps) if self.own else total

    def _words(self, maps: Maps) -> tuple[Tensor, Tensor]:
        compete = competing(self.compete, maps) if self.sharpness is not None else "all"
        return maps.words(self.phrases(), sharpness=self.sharpness, compete=compete, smooth=self.smooth)

    def _boxes(self, maps: Maps, grid: tuple[int, int]) -> list[list[list[Tensor]]]:
        """Per sample and word (the terms of `_words`), the cells of each of its boxes, bool [h, w]."""
        key = ("boxes", grid)
        if key not in maps.memory:
            found = layouts(self.boxes)
            truncate = self.form == "released"
            drawn = [[cells(region, grid, truncate, phrase) for phrase, region in layout] for layout in found]
            terms = maps.terms(self.phrases())
            each = maps.per_sample(drawn)
            maps.memory[key] = [[each[b][n] for n, _ in words] for b, words in enumerate(terms)]
        return maps.memory[key]

    def _regions(self, maps: Maps, grid: tuple[int, int], like: Tensor) -> Tensor:
        """[B, T, h, w] of zeros and ones: the union of each word's boxes; nothing for missing words."""
        boxes = self._boxes(maps, grid)
        out = torch.zeros(len(boxes), max(map(len, boxes)), *grid, dtype=like.dtype)
        for b, words in enumerate(boxes):
            for t, parts in enumerate(words):
                out[b, t] = union(parts).to(out)
        return out.to(like.device)

    def _masked(self, maps: Maps) -> Tensor:
        """bool [B, T]: words whose region is a mask."""
        found = layouts(self.boxes)
        kinds = maps.per_sample([[isinstance(region, Tensor) for _, region in layout] for layout in found])
        terms = maps.terms(self.phrases())
        out = torch.zeros(len(terms), max(map(len, terms)), dtype=torch.bool)
        for b, words in enumerate(terms):
            out[b, : len(words)] = torch.tensor([kinds[b][n] for n, _ in words])
        return out

    def _car(self, maps: Maps) -> Tensor:
        """[B]"""
        A, valid = self._words(maps)
        inside = self._regions(maps, maps.grid, A)
        outside, masks = 1.0 - inside, self._masked(maps).to(A.device)
        mean = lambda where: (A * where).sum(dim=(-2, -1)) / where.sum(dim=(-2, -1)).clamp_min(1.0)  # noqa: E731
        most = lambda where: (A * where).amax(dim=(-2, -1))  # noqa: E731
        lost = 1.0 - torch.where(masks, mean(inside), most(inside)) + torch.where(masks, mean(outside), most(outside))
        return _mean_over(lost, valid)

    def _sar(self, maps: Maps) -> Tensor:
        """[B]: the attention that pixels of a region get from outside, summed over them, per outside pixel."""
        images, losses = maps.images(), []
        for A, grid in images:
            inside = self._regions(maps, grid, A).flatten(2)
            outside, valid = 1.0 - inside, inside.sum(dim=-1) > 0
            got = torch.einsum("bnm,btn,btm->bt", A.mean(dim=1), outside, inside)
            losses.append(_mean_over(got / outside.sum(dim=-1).clamp_min(1.0), valid))
        return torch.stack(losses).mean(dim=0)

    def _released_car(self, maps: Maps) -> Tensor:
        """[B]: weighted terms over boxes; the weights are constants."""
        A, _ = self._words(maps)
        early = 1.0 if maps.progress + 1e-9 < LATER else 0.0
        losses = []
        for a, words in zip(A, self._boxes(maps, maps.grid), strict=True):
            regions = [union(parts).to(a.device) for parts in words]
            everything, total = union(regions), a.new_zeros(())
            for o, parts in enumerate(words):
                for box in parts:
                    f = a[o][box.to(a.device)].amax()
                    total = total + _weight(f, (0.1, 6.0), (0.2, 1.0), early) * (1.0 - f)
                for other, others in enumerate(words):
                    for box in others if other != o else ():
                        leak = box.to(a.device) & ~regions[o]
                        if bool(leak.any()):
                            g = a[o][leak].amax()
                            total = total + (4.0 if g > 0.15 else 1.0 if g > 0.1 else early) * g
                if not bool(everything.all()):
                    total = total + len(parts) * a[o][~everything].amax() / 2
            losses.append(total / len(words))
        return torch.stack(losses)

    def _released_sar(self, maps: Maps) -> Tensor:
        """[B]: attention mass that leaves each box, mean over its queries; summed over boxes, per word; mean over sites."""
        losses = []
        for A, grid in maps.images():
            rows = []
            for a, words in zip(A.mean(dim=1), self._boxes(maps, grid), strict=True):
                flat = [box.flatten().to(a.device) for parts in words for box in parts]
                rows.append(sum(a[box][:, ~box].sum(dim=-1).mean() for box in flat) / len(words))
            losses.append(torch.stack(rows))
        return torch.stack(losses).mean(dim=0)

    @torch.no_grad()
    def _inside(self, maps: Maps) -> Tensor:
        """[B]: the least, over words and their boxes, of the largest attention inside."""
        A, _ = self._words(maps)
        boxes = self._boxes(maps, maps.grid)
        least = [
            min(float(a[o][box.to(a.device)].amax()) for o, parts in enumerate(words) for box in parts)
            for a, words in zip(A, boxes, strict=True)
        ]
        return torch.tensor(least, dtype=A.dtype, device=A.device)

    @torch.no_grad()
    def _share(self, maps: Maps) -> Tensor:
        """[B]: the least, over words, of the share of a word's attention that lies in its region."""
        A, valid = maps.words(self.phrases())
        share = (A * self._regions(maps, maps.grid, A)).sum(dim=(-2, -1)) / A.sum(dim=(-2, -1)).clamp_min(1e-12)
        return share.masked_fill(~valid, 1.0).amin(dim=-1)


def _weight(value: Tensor, first: tuple[float, float], second: tuple[float, float], rest: float) -> float:
    """A weight that falls at two thresholds."""
    return first[1] if value < first[0] else second[1] if value < second[0] else rest


def _mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid words, [B]."""
    return values.masked_fill(~valid, 0.0).sum(dim=-1) / valid.sum(dim=-1)
