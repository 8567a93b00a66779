"""Attention maps that a loss can be written on: captured while the denoiser runs, with their graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..call import AttnCall
from ..errors import SelectionError, UnsupportedHost
from ..kernels import Attention
from ..kernels.problem import pick
from ..site import Site
from .phrases import Prompt, fits

COMPETE = ("inner", "prompt", "all")


class MapsComplete(Exception):
    """All maps of a pass are there: the rest of the denoiser need not run."""


@dataclass(frozen=True)
class MapSite:
    """A site that a method may read: its heads (None: all) and the grid of its image rows."""

    site: Site
    heads: tuple[int, ...] | None
    grid: tuple[int, int] | None

    @property
    def count(self) -> int:
        """How many heads are read."""
        return self.site.heads if self.heads is None else len(self.heads)


@dataclass
class SiteMaps:
    """The maps of one site. text: image rows over text keys [B, H, N, M]; image: over image keys [B, H, N, N]; or None.

    In joint attention each is the softmax over those keys alone: a row's share of the other keys does not count.
    """

    site: Site
    grid: tuple[int, int]
    text: Tensor | None = None
    image: Tensor | None = None


class Capture:
    """Takes the maps of the wanted sites in one pass, and says when all are there.

    Args:
        wanted: the sites. reads: "text" and/or "image", the keys over which the rows are taken.
    """

    def __init__(self, wanted: Sequence[MapSite], reads: Sequence[str]):
        self.wanted = {w.site.path: w for w in wanted}
        self.reads = tuple(reads)
        # A pass that is computed again for its gradient comes here too; it must find the same work and change nothing.
        self.armed = False
        self._parts: dict[str, list[tuple[tuple[int, ...], SiteMaps]]] = {}

    def begin(self) -> None:
        """A pass starts."""
        self.armed, self._parts = True, {}

    def end(self) -> tuple[SiteMaps, ...]:
        """The maps of the pass that ended, in the order of execution."""
        self.armed = False
        missing = [path for path in self.wanted if not self._has(path)]
        if missing:
            raise UnsupportedHost(
                f"{missing[0]} did not run in this pass of the denoiser (skipped layers?), so its map is missing. Leave it out "
                "of Where."
            )
        parts, self._parts = self._parts, {}
        return tuple(_joined(part) for part in parts.values())

    @property
    def complete(self) -> bool:
        """Whether an armed capture has everything."""
        return self.armed and all(self._has(path) for path in self.wanted)

    def _has(self, path: str) -> bool:
        return sum(len(heads) for heads, _ in self._parts.get(path, ())) == self.wanted[path].count

    def add(self, call: AttnCall) -> None:
        """Take the maps of one call, if its site is wanted."""
        if call.site.path not in self.wanted:
            return
        if not call.gives("grid"):
            raise UnsupportedHost(f"{call.site.path}: the grid of its image rows is not known for this model.")
        maps = SiteMaps(call.site, call.grid)
        if "text" in self.reads and call.site.kind != "self":
            maps.text = _block(call, "text")
        if "image" in self.reads and call.site.kind != "cross":
            maps.image = _block(call, "image")
        if self.armed:
            self._parts.setdefault(call.site.path, []).append((call.heads, maps))


def _block(call: AttnCall, keys: str) -> Tensor:
    """softmax over the keys of one role, for the image rows: [B, H, N, M]."""
    att = call.map.att
    if call.site.kind == "joint":
        if not {"image", "text"} <= set(call.segments):
            raise UnsupportedHost(
                f"{call.site.path}: which rows are image and which are text is not known for this model."
            )
        return kernels.dense(_part(att, call.segments["image"], call.segments[keys]))
    return kernels.dense(att)


def _part(att: Attention, rows: slice, keys: slice) -> Attention:
    """The same computation for some rows and keys."""
    full, mask = slice(None), att.mask4()
    bias = att.key_bias
    return att.replace(
        q=att.q[:, :, rows],
        k=att.k[:, :, keys],
        v=att.v[:, :, keys],
        mask=None if mask is None else pick(mask, full, full, rows, keys),
        key_bias=None if bias is None else pick(bias, full, full, keys),
        sinks=None,
    )


def _joined(parts: list[tuple[tuple[int, ...], SiteMaps]]) -> SiteMaps:
    """The head groups of one site as one."""
    if len(parts) == 1:
        return parts[0][1]
    maps = [m for _, m in sorted(parts, key=lambda part: part[0])]
    cat = lambda name: None if getattr(maps[0], name) is None else torch.cat([getattr(m, name) for m in maps], 1)  # noqa: E731
    return SiteMaps(maps[0].site, maps[0].grid, cat("text"), cat("image"))


@dataclass
class Maps:
    """What a loss is written on: the maps of one pass over the conditional rows, one row for each sample.

    Attributes:
        sites: the captured maps, site by site. prompt: where words are. index, length: this call of the scheduler's loop,
            from 0, and how many there are. size: shorter side to which maps are brought where they are larger.
        include: default rule from phrases to tokens. memory: a dictionary of the method that lives through one sampling run.
    """

    sites: tuple[SiteMaps, ...]
    prompt: Prompt
    index: int
    length: int
    size: int | None = 16
    include: str = "words"
    memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """Fraction of the loop that is done, 0 to 1."""
        return self.index / self.length

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """(height, width) of `text()`: of the largest map over text, averaged down to `size` along its shorter side."""
        grids = [m.grid for m in self.sites if m.text is not None]
        if not grids:
            raise SelectionError("none of the sites attends to text; select cross or joint attention.")
        h, w = max(grids)
        side = min(h, w)
        if self.size is None or side <= self.size:
            return h, w
        return round(h * self.size / side), round(w * self.size / side)

    def text(self) -> Tensor:
        """Attention of the image to the text, mean over sites and heads, [B, h, w, M]; sums to one over the M keys."""
        if "text" not in self._known:
            self._known["text"] = self._mean()
        return self._known["text"]

    @functools.cached_property
    def _known(self) -> dict[Any, Tensor]:
        return {}

    def _mean(self) -> Tensor:
        h, w = self.grid
        total, heads = 0.0, 0
        for maps in self.sites:
            if maps.text is None:
                continue
            A = maps.text.sum(dim=1)
            heads += maps.text.shape[1]
            if maps.grid != (h, w):
                A = _resized(A.unflatten(1, maps.grid), (h, w)).flatten(1, 2)
            total = total + A
        fits(self.prompt, total.shape[-1])
        return (total / heads).unflatten(1, (h, w))

    def images(self) -> list[tuple[Tensor, tuple[int, int]]]:
        """Attention among image positions, per site: ([B, H, N, N], grid); rows are queries and sum to one."""
        found = [(m.image, m.grid) for m in self.sites if m.image is not None]
        if not found:
            raise SelectionError("none of the sites attends among image positions; select self or joint attention.")
        return found

    def words(
        self,
        phrases: list[list[Any]] | Sequence[Any],
        include: str | None = None,
        sharpness: float | None = None,
        compete: str = "all",
        smooth: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(maps [B, T, h, w], valid bool [B, T]): the attention to each word; a sample with fewer words has invalid rows.

        Args:
            phrases: words or phrases, or one list of them per prompt. include: see `Prompt.terms`.
            sharpness: c in softmax over tokens of c A, as in Attend-and-Excite; None: the attention as it is.
            compete: the tokens of that softmax: "inner": all but the first and the last; "prompt": those that stand for
                text; "all".
            smooth: blur each map with the 3 x 3 kernel of Attend-and-Excite.
        """
        A = self.text()
        index = self.terms(phrases, include)
        if sharpness is not None:
            keep = self._competing(compete, A.shape[0], A.shape[-1]).to(A.device)
            A = torch.softmax((A * sharpness).masked_fill(~keep[:, None, None], -torch.inf), dim=-1)
        chosen = torch.zeros(A.shape[0], max(map(len, index)), A.shape[-1], dtype=A.dtype)
        valid = torch.zeros(chosen.shape[:2], dtype=torch.bool)
        for b, terms in enumerate(index):
            for t, (_, tokens) in enumerate(terms):
                if tokens[-1] >= A.shape[-1]:
                    raise SelectionError(f"token position {tokens[-1]}: the denoiser sees {A.shape[-1]} text keys.")
                chosen[b, t, tokens], valid[b, t] = 1.0, True
        found = torch.einsum("bhwm,btm->bthw", A, chosen.to(A.device))
        return smoothed(found) if smooth else found, valid.to(A.device)

    def terms(self, phrases: Any, include: str | None = None) -> list[list[tuple[int, list[int]]]]:
        """Per sample of the batch, (number of the phrase, token positions) of each map of `words`."""
        from .phrases import checked, per_prompt

        nested = isinstance(phrases, list) and phrases and all(isinstance(p, list) for p in phrases)
        wanted = phrases if nested else per_prompt(checked("phrases", phrases))
        terms = self.prompt.terms(wanted, include or self.include)
        return self.per_sample(terms)

    def per_sample(self, values: list[Any]) -> list[Any]:
        """One entry per sample, of a list with one per prompt: each prompt has its images in a row."""
        text = next((m.text if m.text is not None else m.image for m in self.sites), None)
        batch = text.shape[0]
        if batch % len(values):
            raise SelectionError(f"{len(values)} prompts do not divide the {batch} samples of this call.")
        return [value for value in values for _ in range(batch // len(values))]

    def _competing(self, compete: str, batch: int, keys: int) -> Tensor:
        """bool [B, M]"""
        mask = torch.ones(batch, keys, dtype=torch.bool)
        if compete == "inner":
            mask[:, 0] = mask[:, -1] = False
        elif compete == "prompt":
            mask.zero_()
            for b, tokens in enumerate(self.per_sample(self.prompt.content())):
                mask[b, tokens] = True
        return mask


def _resized(A: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, h, w, M] at another size: area means where it shrinks, bilinear where it grows."""
    A = A.movedim(-1, 1)
    if A.shape[-2] >= size[0]:
        return F.adaptive_avg_pool2d(A, size).movedim(1, -1)
    return F.interpolate(A, size=size, mode="bilinear", align_corners=False).movedim(1, -1)


def kernel() -> Tensor:
    """The 3 x 3 kernel of the official code, fp32: its "sigma 0.5" enters as exp(-(x / 2 sigma)^2), a deviation of 0.707."""
    x = torch.arange(3, dtype=torch.float32) - 1.0
    line = 1 / (0.5 * math.sqrt(2 * math.pi)) * torch.exp(-((x / (2 * 0.5)) ** 2))
    full = line[:, None] * line[None]
    return full / full.sum()


def smoothed(A: Tensor) -> Tensor:
    """Maps [B, T, h, w] blurred with `kernel`, edges reflected."""
    weight = kernel().to(A)[None, None]
    flat = F.pad(A.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(flat, weight).view_as(A)
