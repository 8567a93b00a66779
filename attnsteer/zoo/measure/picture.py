"""A picture of where words look: the image, and the attention of its words at the sites that localise best."""

from __future__ import annotations

from typing import Any

import torch

from ...steering import steer
from ...viz import contact_sheet
from ...viz.record import PhraseRecorder
from .image_quality import STEPS, generate, middle, shorter

PROMPT = "a red circle and a blue square"
TOKENS = {"red": 2, "circle": 3, "and": 4, "blue": 6, "square": 7, "end": 8}


def map_picture(pipe: Any, table: dict[str, Any], rows: int = 6, seed: int = 0) -> Any:
    """One row per site, best first: the image, and the map of each word at the middle of the sampling."""
    scores = {s: max(r.values()) for s, r in middle(table).items()}
    best = sorted(scores, key=scores.get, reverse=True)[:rows]
    recorder = PhraseRecorder(tuple(TOKENS.values()))
    with steer(pipe, recorder):
        image = generate(pipe, [PROMPT], seeds=[seed], **shorter(pipe))[0]
    tiles, labels = [], []
    for site in best:
        maps = torch.stack([r.maps[0] for r in recorder.records if r.site == site and abs(r.step - STEPS // 2) <= 2])
        maps = maps.mean(dim=0)
        maps = maps / maps.amax(dim=(-2, -1), keepdim=True)
        tiles.append([_large(image), *(_large(m[None].expand(3, -1, -1)) for m in maps)])
        labels.append(f"{_short(site)}: {scores[site]:.1f}x")
    return contact_sheet(tiles, rows=labels, columns=["image", *TOKENS])


def _large(image: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(image[None], size=(96, 96), mode="nearest")[0].clamp(0, 1)


def _short(site: str) -> str:
    parts = [p for p in site.split(".") if p not in ("unet", "transformer", "attentions", "attn2", "attn")]
    return ".".join(parts).removesuffix(".transformer_blocks.0")
