"""VisualKnockout: blocks attention between parts of a prompt, to find where the image's information goes.

Kaduri, Bagon, Dekel, "What's in the Image? A Deep-Dive into the Vision of Vision Language Models" (CVPR 2025, arXiv 2411.17491;
no official code was found), and Zhang et al., "Cross-modal Information Flow in Multimodal Large Language Models" (CVPR 2025,
arXiv 2411.18620; FightingFighting/cross-modal-information-flow-in-MLLM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall, Reweight
from ..errors import SelectionError, did_you_mean
from ..intervention import Intervention
from ..parameters import parsed, plain
from ..registry import register_method
from ..tokens import Tokens
from ._images import check_some_image

PARTS = ("before", "image", "question", "last", "generated")


def _blocks(given: Any) -> tuple[tuple[str, str], ...]:
    given = plain(given)
    if not isinstance(given, (list, tuple)):
        raise SelectionError('give pairs (rows, keys), e.g. [("last", "image")]; none changes nothing.')
    pairs = [tuple(pair) if isinstance(pair, (list, tuple)) else (pair,) for pair in given]
    for pair in pairs:
        if len(pair) != 2:
            raise SelectionError(f'{pair} is no pair (rows, keys), such as ("last", "image").')
        for part in pair:
            if part not in PARTS:
                raise SelectionError(
                    f"there is no part {part!r}; there are {', '.join(PARTS)}.{did_you_mean(str(part), PARTS)}"
                )
        if pair[0] == pair[1]:
            raise SelectionError(f"{pair}: a row always keeps itself, so a part cannot be cut off from itself.")
    return tuple(dict.fromkeys(pairs))


@register_method
@dataclass(frozen=True)
class VisualKnockout(Intervention):
    """A'_ij = 0 for the rows i and keys j of each blocked pair, and the rest of the row is renormalised.

    The parts of a sample, which share no token: "before" (text before its first image token), "image", "question" (prompt text
    behind the first image token, but for the last token), "last" (the prompt's last token, from which the first word is
    generated) and "generated". Text between images counts as question.

    Args:
        blocks: pairs (rows, keys) of parts, e.g. [("last", "image"), ("generated", "image")]; none changes nothing. A row of the
            image is an earlier layer's view of it: ("image", "question") blocks nothing in a causal model.

    Choose a band of layers with `where=Where(layers=range(8, 16))`. Keys and values of a text that was cut off stay in the cache as
    they were computed, which is the intended meaning. A sample without an image has neither image nor question, and is left alone.

    Raises:
        SelectionError: an unknown part, or one cut off from itself; no image in any prompt.
    """

    blocks: tuple[tuple[str, str], ...] = parsed(
        _blocks, "pairs (rows, keys) of parts", (("last", "image"), ("generated", "image"))
    )

    kinds = ("self",)
    needs = ("tokens", "images")
    prefix_local = True
    may_rest = True

    def check_tokens(self, tokens: Tokens) -> None:
        check_some_image(tokens, "VisualKnockout")

    def weights(self, call: AttnCall) -> Reweight | None:
        return call.once("edit", lambda: self._edit(call)) if self.blocks else None

    def _edit(self, call: AttnCall) -> Reweight:
        image = call.image_tokens()
        keys = self._parts(image, call.keys, call.at_keys(image)[:, 0], call)
        rows = self._parts(image, call.rows, call.at_rows(image), call)
        groups = []
        for part in dict.fromkeys(k for _, k in self.blocks):
            blocked = torch.stack([rows[r] for r, k in self.blocks if k == part]).any(dim=0)
            weight = torch.where(blocked[:, None], 0.0, 1.0).to(call.map.stat_dtype)
            groups.append((keys[part][:, None], weight))
        return Reweight(tuple(groups))

    def _parts(self, image: Tensor, track: Any, own: Tensor, call: AttnCall) -> dict[str, Tensor]:
        """Part -> bool [B, size], of rows or keys. own: which are image tokens."""
        slots = torch.arange(image.shape[1], device=image.device)
        none = image.shape[1] + torch.iinfo(torch.int32).max
        first = torch.where(image, slots, none).amin(dim=-1, keepdim=True)
        text = track.prompt & ~own & (first < none)
        last = text & track.last_prompt
        if call.tokens.more_to_come:
            last = torch.zeros_like(last)
        behind = track.slot > first
        return {
            "before": text & ~behind & ~last,
            "image": own,
            "question": text & behind & ~last,
            "last": last,
            "generated": track.generated & track.valid & (first < none),
        }
