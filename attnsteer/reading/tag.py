"""TAG: points at what words name, from the attention of those words to the image, in the heads that look at it most.

Xu et al., "Attention-driven GUI Grounding: Leveraging Pretrained Multimodal Large Language Models without Fine-Tuning" (AAAI 2025,
arXiv 2412.10840; abstract and code read); official code HeimingX/TAG at 1c6236f (`core_utils/tag.py`). For each token of the words
the `heads` (layer, head) pairs with the most attention to the image are kept, and their rows averaged; the mean over tokens is
divided by its largest value, cut at `threshold`, and its 8-connected regions are boxed; the click is the centre of the box of
largest value, then largest area.

Words are those of the prompt (between its first and last double quote, or a phrase), or the value under a key of the model's
own JSON answer. Where a resampler stands between patches and tokens (MiniCPM-V), `through` brings its queries onto patches.
The code's boxes end in the last pixel, so that its clicks are half a pixel up and left of ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SelectionError, UnsupportedHost, brief
from ..heads import HeadSet
from ..parameters import Named, check_fields, number, parsed, whole
from ..tokens import char_offsets
from ._pictures import checked_picture, components
from ._vision import ImageRows, generated, image_grid, over_image, prepared


@dataclass(frozen=True)
class Region:
    """A box on the map, in cells: (x0, y0, x1, y1), ends excluded; its largest value."""

    box: tuple[int, int, int, int]
    confidence: float

    @property
    def area(self) -> int:
        """In cells."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True)
class Grounded:
    """Where the words are.

    Attributes:
        point: (x, y) in fractions of the image. box: (x0, y0, x1, y1) likewise. map: fp32 [h, w], largest value 1.
        regions: all of them, best first. source: "answer" or "prompt", whose words were read. answer: what the model said, or None.
    """

    point: tuple[float, float]
    box: tuple[float, float, float, float]
    map: Tensor
    regions: tuple[Region, ...]
    source: str = "prompt"
    answer: str | None = None


def _heads(given: Any) -> Any:
    if isinstance(given, HeadSet):
        return given
    count = whole(given)
    if count is None or count < 1:
        raise SelectionError(
            f"TAG(heads={brief(given)}): give how many (layer, head) pairs each token keeps, or a HeadSet."
        )
    return count


@dataclass(frozen=True)
class TAG(Named):
    """Tuning-free attention-driven grounding: a reader; nothing in attention is edited.

    Args:
        heads: (layer, head) pairs that each token keeps, by their attention to the image; or a `HeadSet` that all tokens read.
        threshold: share of the largest value below which a cell is dropped, 0 to 1.
    """

    heads: Any = parsed(_heads, "a number of heads, or a HeadSet", 10)
    threshold: float = number(0.5, low=0, high=1)

    def __post_init__(self) -> None:
        check_fields(self)

    # Tensor maths.

    def chosen(self, rows: Tensor) -> Tensor:
        """int64 [k, heads]: for each token the (layer, head) pairs that are kept, of rows [k, pairs, N] over image tokens."""
        if isinstance(self.heads, HeadSet):
            return torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
        return rows.sum(dim=-1).topk(min(self.heads, rows.shape[1]), dim=-1).indices

    def merged(self, rows: Tensor) -> Tensor:
        """[N]: the map of the words, largest value 1, from rows [k, pairs, N]."""
        if rows.ndim != 3 or 0 in rows.shape:
            raise SelectionError(
                f"TAG: rows of the shape {list(rows.shape)}; give [tokens, (layer, head) pairs, image tokens]."
            )
        kept = self.chosen(rows)
        found = rows.gather(1, kept[..., None].expand(-1, -1, rows.shape[2])).mean(dim=1).mean(dim=0)
        return found / found.max()

    def through(
        self,
        rows: Sequence[Tensor],
        resampler: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        tiles: tuple[int, int],
    ) -> Tensor:
        """The map [h, w] of an image that was cut into slices, each behind a resampler.

        Args:
            rows: of each slice [k, pairs, queries]. resampler: of each slice its cross-attention, head mean [queries, patches or
                more]. sizes: (height, width) in patches of each slice. tiles: (across, down) slices, in reading order.
        """
        if not len(rows) == len(resampler) == len(sizes) == tiles[0] * tiles[1]:
            raise SelectionError(f"TAG: {len(rows)} slices, and tiles={tiles}; give as many, in reading order.")
        # Heads are chosen by all slices together, which keep their relative mass.
        kept = self.chosen(torch.cat(list(rows), dim=-1))
        made = []
        for own, C, (h, w) in zip(rows, resampler, sizes, strict=True):
            near = own.gather(1, kept[..., None].expand(-1, -1, own.shape[2])).mean(dim=1).mean(dim=0)
            made.append((near @ C[:, : h * w]).view(h, w))
        lines = [torch.cat(made[i : i + tiles[0]], dim=1) for i in range(0, len(made), tiles[0])]
        found = torch.cat(lines, dim=0)
        return found / found.max()

    def regions(self, found: Tensor) -> tuple[Region, ...]:
        """The regions of a map [h, w], best first: by largest value, then by area.

        As in the code, what lies inside the box of a region that was found before (by columns, then rows) is no region of its own.
        """
        height, width = found.shape
        mask = (found >= self.threshold) & (found > 0)
        visited = torch.zeros_like(mask)
        made = []
        for x in range(width):
            for y in range(height):
                if not bool(mask[y, x]) or bool(visited[y, x]):
                    continue
                label = components(mask & ~visited, diagonal=True)
                own = (label == label[y, x]).nonzero()
                (y0, x0), (y1, x1) = own.amin(dim=0).tolist(), own.amax(dim=0).tolist()
                inside = (slice(y0, y1 + 1), slice(x0, x1 + 1))
                visited[inside] = True
                made.append(Region((x0, y0, x1 + 1, y1 + 1), float((found[inside] * mask[inside]).max())))
        return tuple(sorted(made, key=lambda r: (-r.confidence, -r.area)))

    def point(self, found: Tensor) -> Grounded:
        """Where a map [h, w] points."""
        if found.ndim != 2 or not bool(torch.isfinite(found).all()) or float(found.max()) <= 0:
            raise SelectionError(
                f"TAG: a map of the shape {list(found.shape)} that is zero or not finite points nowhere."
            )
        found = (found / found.max()).cpu()
        regions = self.regions(found)
        x0, y0, x1, y1 = regions[0].box
        h, w = found.shape
        box = (x0 / w, y0 / h, x1 / w, y1 / h)
        return Grounded(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), box, found, regions)

    # With a model.

    def ground(
        self,
        model: Any,
        processor: Any,
        image: Any,
        text: str,
        phrase: Any = None,
        *,
        key: str | None = None,
        layers: Any = None,
        grid: Any = None,
        max_new_tokens: int = 1024,
        **options: Any,
    ) -> Grounded:
        """Where in the image the words are.

        Args:
            model, processor: of transformers. image: a PIL image. text: the whole prompt, with the processor's image token.
            phrase: the words as they stand in the prompt, or (start, stop) of tokens; None: between its first and last quote.
            key: of the model's JSON answer, whose value is read in place of the prompt's words where it is there.
            layers: of the language model; None: all. grid: (height, width) in image tokens where the model does not tell.
            max_new_tokens, options: of `generate`, with `key`.

        Raises:
            SelectionError: words that are not in the prompt, or there several times; a grid that is not known.
        """
        inputs = prepared(model, processor, checked_picture("TAG", image), text)
        tokenizer = getattr(processor, "tokenizer", processor)
        words = self._words(text, phrase)
        answer, rows, source = None, None, "prompt"
        heads = self.heads if isinstance(self.heads, HeadSet) else None
        if key is not None:
            with torch.no_grad(), over_image(model, layers, "generated", heads) as taken:
                new = generated(model, inputs, max_new_tokens, options).tolist()
            answer = tokenizer.decode(new, skip_special_tokens=True).strip()
            wanted = value_tokens(new, tokenizer, key)
            start = inputs["input_ids"].shape[1]
            there = {int(i) for r in taken for i in r.rows}
            wanted = [start + t for t in wanted if start + t in there]
            if wanted:
                rows, source = stacked(taken, wanted), "answer"
        if rows is None:
            with torch.no_grad(), over_image(model, layers, [words], heads, tokenizer=tokenizer) as taken:
                model(**inputs)
            rows = stacked(taken)
        size = image_grid(model, inputs, rows.shape[-1], grid)
        found = self.point(self.merged(rows).view(size))
        return Grounded(found.point, found.box, found.map, found.regions, source, answer)

    @staticmethod
    def _words(text: str, phrase: Any) -> list[Any]:
        if phrase is not None:
            return [phrase]
        first, last = text.find('"'), text.rfind('"')
        if not 0 <= first < last - 1:
            raise SelectionError(
                f"TAG: the prompt {brief(text)} has no words between double quotes; give phrase=, the words to look for."
            )
        return [text[first + 1 : last]]


def stacked(taken: Sequence[ImageRows], wanted: Sequence[int] | None = None) -> Tensor:
    """Rows [tokens, (layer, head) pairs, N] of what `over_image` took; `wanted`: numbers of the tokens, None: all."""
    by_layer: dict[int, dict[int, Tensor]] = {}
    for r in taken:
        for place, i in enumerate(r.rows.tolist()):
            by_layer.setdefault(r.layer, {})[i] = r.map[:, place]
    if not by_layer:
        raise UnsupportedHost("TAG: no rows of these words were seen.")
    tokens = sorted(next(iter(by_layer.values()))) if wanted is None else list(wanted)
    return torch.stack([torch.cat([by_layer[layer][i] for layer in sorted(by_layer)]) for i in tokens])


def value_tokens(ids: Sequence[int], tokenizer: Any, key: str) -> list[int]:
    """Which of the generated tokens make the string under a key of a JSON answer; none where it is not there."""
    offsets, text = char_offsets(list(ids), tokenizer)
    found = re.search(rf'"{re.escape(key)}"\s*:\s*"((?:[^"\\]|\\.)*)"', text)
    if found is None:
        return []
    start, stop = found.span(1)
    return [t for t, (a, b) in enumerate(offsets) if a < stop and b > start]
