"""A decoding baseline: logits contrasted with those of the prompt without its images, as in the second part of PAI.

Liu, Zheng, Chen, "Paying More Attention to Image" (ECCV 2024, arXiv 2407.21771), section 3.3; official code LALBJ/PAI. It edits no
attention, so it stands here and not among the methods.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..errors import SelectionError, UnsupportedHost
from ..hosts.transformers.image_tokens import family_of, placeholders


class TextContrast(LogitsProcessor):
    """log p' = gamma (log p - log p_u) + log p_u, and -inf where p < cut max p.

    p is what the model says of the next token, p_u what it says without the images, after the same continuation. Without the
    images it runs as if nothing were attached (`run.paused()`), over a cache of its own.

        contrast = TextContrast(model, inputs, run, gamma=1.1)
        model.generate(**inputs, logits_processor=[contrast])

    One object serves one `generate`, of any number of samples, beams and returned sequences.

    Args:
        model: a vision-language model of transformers. inputs: the processor's output, with `input_ids` [B, n] and, if padded,
            `attention_mask`. run: the `Steering` of the model, or None.
        gamma: 1 is the model itself (but for the cut). The paper has 1.1; the command line of the official code 2.
        cut: from 0 (nothing is cut) to 1; 0.1 in the official code.

    Raises:
        SelectionError: a value out of range, a sample without text, prompts that `generate` was not given.
        UnsupportedHost: the model is none whose image tokens are known, or takes no prompt without images.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], run: Any = None, *, gamma: float = 1.1, cut: float = 0.1):
        if not (math.isfinite(gamma) and gamma >= 0) or not 0 <= cut <= 1:
            raise SelectionError(f"TextContrast: gamma={gamma} must be 0 or more, cut={cut} from 0 to 1.")
        family = family_of(getattr(model, "config", None))
        if family is None or not family.text_alone:
            raise UnsupportedHost(
                f"TextContrast: a {type(model).__name__} has no image tokens that are known, or takes no prompt without images."
            )
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        keep = ~placeholders(family, model.config, ids)
        keep = keep if mask is None else keep & mask.to(torch.bool)
        if not bool(keep.any(dim=-1).all()):
            raise SelectionError(
                "TextContrast: a sample has no token besides its image, so there is no prompt without it."
            )
        self.model, self.run, self.gamma, self.cut = model, run, gamma, cut
        self._prompts, self._texts = ids, [row[own] for row, own in zip(ids, keep, strict=True)]
        parameters = inspect.signature(model.forward).parameters
        # Positions of several axes are worked out from the ids and the mask by the model itself.
        several = any(callable(getattr(m, "get_rope_index", None)) for m in model.modules())
        self._positions = "position_ids" in parameters and not several
        # What the cache holds: whole rows of `generate`, validity of the cache's slots, and the cache.
        self._rows: Tensor | None = None
        self._mask: Tensor | None = None
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        own = scores.log_softmax(dim=-1, dtype=torch.float32)
        text = self._next(input_ids).log_softmax(dim=-1, dtype=torch.float32)
        mixed = self.gamma * (own - text) + text
        if self.cut > 0:
            mixed = mixed.masked_fill(own < math.log(self.cut) + own.amax(dim=-1, keepdim=True), -torch.inf)
        return mixed.to(scores.dtype)

    def _next(self, ids: Tensor) -> Tensor:
        """Logits [R, V] of the next token without the images."""
        samples, prompt = self._prompts.shape
        fits = ids.shape[1] >= prompt and len(ids) % samples == 0
        if not fits or not torch.equal(ids[:, :prompt], self._prompts.repeat_interleave(len(ids) // samples, dim=0)):
            raise SelectionError(
                f"TextContrast was made for {samples} prompts of {prompt} tokens, and generate works on {list(ids.shape)} others. "
                "Make one for each call of generate, from its own inputs."
            )
        before = self._before(ids)
        if before is None:
            fed = self._start(ids)
        else:
            if not torch.equal(before, torch.arange(len(before), device=ids.device)):
                self._cache.batch_select_indices(before)
                self._mask = self._mask[before]
            fed = ids[:, -1:]
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], dim=1)
        given = {"input_ids": fed, "attention_mask": self._mask, "past_key_values": self._cache, "use_cache": True}
        if self._positions:
            given["position_ids"] = (self._mask.cumsum(dim=-1) - 1).clamp_min(0)[:, -fed.shape[1] :]
        if self.run is None:
            output = self.model(**given)
        else:
            with self.run.paused():
                output = self.model(**given)
        self._rows, self._cache = ids, output.past_key_values
        return output.logits[:, -1]

    def _before(self, ids: Tensor) -> Tensor | None:
        """Which row of the cache each row goes on with (beams change places), [R]; None: not one for each."""
        if (
            self._rows is None
            or ids.shape[1] != self._rows.shape[1] + 1
            or not hasattr(self._cache, "batch_select_indices")
        ):
            return None
        same = (ids[:, None, :-1] == self._rows[None]).all(dim=-1)
        return same.to(torch.int8).argmax(dim=1) if bool(same.any(dim=1).all()) else None

    def _start(self, ids: Tensor) -> Tensor:
        """Texts and continuations, padded on the left, for a cache that is empty."""
        each, prompt = len(ids) // len(self._texts), self._prompts.shape[1]
        texts = [torch.cat([self._texts[i // each], row[prompt:]]) for i, row in enumerate(ids)]
        width = max(map(len, texts))
        fed = torch.stack([torch.cat([t[:1].expand(width - len(t)), t]) for t in texts])
        lengths = torch.tensor([len(t) for t in texts], device=ids.device)
        self._mask = (torch.arange(width, device=ids.device) >= width - lengths[:, None]).long()
        self._cache = None
        return fed
