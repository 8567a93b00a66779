"""What the words of a prompt are attended to by, as pictures: read while the model samples, and nothing edited."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...call import AttnCall
from ...errors import UnsupportedHost
from ...intervention import Intervention
from ...maps.phrases import Prompt


class Maps:
    """The sum of what was read in one run, by word and grid."""

    def __init__(self, prompt: Prompt, phrases: list[str]):
        """
        Raises:
            SelectionError: a phrase is not in the prompt.
        """
        self.prompt, self.phrases = prompt, phrases
        # One picture for a phrase, whatever its words.
        terms = prompt.terms([list(phrases)])[0]
        self.tokens = [[t for n, found in terms if n == i for t in found] for i in range(len(phrases))]
        self.sums: dict[tuple[int, int], Tensor] = {}

    def __deepcopy__(self, memo: Any) -> Maps:
        return self

    def clear(self) -> None:
        """A run starts."""
        self.sums = {}

    def add(self, maps: Tensor, grid: tuple[int, int]) -> None:
        """maps: [b, T, h, w]."""
        before = self.sums.get(grid)
        self.sums[grid] = maps if before is None or before.shape != maps.shape else before + maps

    def images(self, side: int = 256) -> Tensor:
        """[b * T, h, w, 3] in 0 to 1, each word's largest attention white; black where nothing was read.

        Args:
            side: of the pictures, in pixels, along their longer edge.
        """
        if not self.sums:
            return torch.zeros(max(1, len(self.phrases)), side, side, 3)
        grid = max(self.sums)
        size = tuple(round(n * side / max(grid)) for n in grid)
        total = sum(
            F.interpolate(m.float().cpu(), size=size, mode="bilinear", align_corners=False) for m in self.sums.values()
        )
        total = total / total.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
        return total.flatten(0, 1)[..., None].expand(-1, -1, -1, 3).contiguous()


@dataclass(frozen=True)
class WordMaps(Intervention):
    """Adds up the attention of the image to some words, in the rows of the positive prompt; edits nothing.

    Args:
        maps: where it goes.
    """

    maps: Any = field(default=None)

    kinds = ("cross", "joint")
    needs = ("segments", "grid")
    observes = True

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        rows = (call.branch_rows or {}).get("cond")
        if call.branch is not None or rows is None or not bool(rows.any()) or not call.gives("grid"):
            return None
        image, text = call.segments["image"], call.segments.get("text")
        keys = call.k.shape[2] if text is None else text.stop - text.start
        length = self.maps.prompt.length
        if keys % length:
            raise UnsupportedHost(
                f"{call.site.path}: the prompt of the preview has {length} tokens, this conditioning {keys}. Give the node "
                "the text that was encoded."
            )
        found = []
        for tokens in self.maps.tokens:
            chosen = torch.zeros(1, 1, call.k.shape[2], dtype=torch.bool, device=out.device)
            # Conditionings of unequal lengths come repeated.
            for start in range(0, keys, length):
                chosen[..., [start + t for t in tokens]] = True
            found.append(call.map.mass(chosen)[rows][..., image].float().mean(dim=1))
        self.maps.add(torch.stack(found, dim=1).unflatten(2, call.grid), call.grid)
        return out
