"""StoryAdapter: every frame of a story attends to all frames made so far, through an IP-Adapter's image tokens.

Mao et al., "Story-Adapter: A Training-free Iterative Framework for Long Story Visualization" (2024, arXiv 2410.06244), global
reference cross-attention; official code UCSC-VLAA/story-adapter at 6f1c402 (ip_adapter/attention_processor.py, run.py). The loop
over rounds is `attnsteer.story`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError
from ..intervention import Intervention
from ..parameters import PerSample, integer, number
from ..registry import register_method


@register_method
@dataclass(frozen=True)
class StoryAdapter(Intervention):
    """out = Attn(Q, K_text, V_text) + lambda Attn(Q, K_ip(C), V_ip(C)), with the tokens C of all reference images in one softmax.

    For UNets with an IP-Adapter (`load_ip_adapter`), at their cross-attention. The references are what the pipeline is given:
    `ip_adapter_image=[[frame 1, ..., frame n]]`; without guidance's conditional half they are the pipeline's own zero
    embeddings, projected, as in the official code. `scale` takes the place of `set_ip_adapter_scale` where the method acts;
    heads, layers, steps, branches and samples that it leaves alone keep the pipeline's. Edits of head outputs come after it.

    Args:
        scale: lambda; the paper's rounds go from 0.3 to 0.5 (`StoryAdapter.schedule`), 0 is the model without an adapter.
        frames: how many reference images there must be; None: any number.

    Raises:
        UnsupportedHost: no IP-Adapter is loaded, or several; or they have masks, by which each image has a softmax of its own.
        SelectionError: another number of reference images than `frames`.
    """

    scale: float = number(0.3, low=0, per_sample=True)
    frames: int | None = integer(None, low=1, optional=True, kw_only=True)

    kinds = ("cross",)
    needs = ("image_prompt",)

    @staticmethod
    def schedule(rounds: int = 10, first: float = 0.3, last: float = 0.5) -> tuple[float, ...]:
        """lambda of each round, evenly from `first` to `last`.

        Raises:
            SelectionError: no round.
        """
        if type(rounds) is not int or rounds < 1:
            raise SelectionError(f"StoryAdapter.schedule({rounds!r}): give at least one round, as an integer.")
        return tuple(torch.linspace(first, last, rounds, dtype=torch.float64).tolist())

    def output(self, call: AttnCall, out: Tensor) -> Tensor:
        prompt = call.image_prompt
        if self.frames is not None and prompt.images != self.frames:
            raise SelectionError(
                f"StoryAdapter(frames={self.frames}): the pipeline was given {prompt.images} reference images. Give all frames "
                "of the story as one list in a list: ip_adapter_image=[[frame 1, frame 2, ...]]."
            )
        image = prompt.out
        if len(call.heads) != image.shape[1]:
            image = image.index_select(1, torch.tensor(call.heads, device=image.device))
        if not isinstance(self.scale, PerSample):
            return self.scale * image
        wide = torch.promote_types(out.dtype, torch.float32)
        return (call.each(self.scale, image.to(wide))[..., None] * image.to(wide)).to(out.dtype)
