"""NAG: attention outputs extrapolated from a negative prompt through the prompt, with a bounded norm.

Chen et al., "Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models" (2025, arXiv 2505.21179),
section 4; official code ChenDarYen/Normalized-Attention-Guidance at 69159ca, whose scale is phi + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError, brief
from ..intervention import Intervention
from ..parameters import choice, is_all, number, parsed
from ..registry import register_method


def _negative(given: Any) -> Any:
    if isinstance(given, Mapping):
        if given and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in given.items()):
            return dict(given)
    elif isinstance(given, str):
        return given
    elif isinstance(given, (list, tuple)) and given and all(isinstance(text, str) for text in given):
        return tuple(given)
    raise SelectionError(f"give a text, one per prompt, or {{argument of the denoiser: tensor}}, not {brief(given)}.")


@register_method
@dataclass(frozen=True)
class NAG(Intervention):
    """Z' = Z+ + phi (Z+ - Z-), its norm at most tau times that of Z+, then alpha Z' + (1 - alpha) Z+, for image rows.

    Z+ and Z- are the outputs of all heads of a site together, before the output projection, with the prompt and with the negative
    prompt. Only conditional rows are guided, so it needs no classifier-free guidance, and composes with it.

    Args:
        negative: the negative prompt: a text, one for each prompt, or {argument of the denoiser: tensor [1 or b, ...]}, such as
            "encoder_hidden_states" and, on Flux and SD3, "pooled_projections".
        scale: phi; the papers' 4 (2 for SDXL), 0 is off. tau: how many times the norm may grow. alpha: share of the guided
            output; 0.25 for Flux and Wan, 0.375 for SD1.5, SANA and PixArt, 0.125 for SD3.5, 0.5 for SDXL.
        norm: "l1" (paper, and the official code for cross-attention), or "l2" (the official code for Flux).

    On UNets `where` may name some cross-attentions. On Flux, SD3, PixArt, Sana and Wan all of them take part, since else the image
    streams would part; the conditional rows then run twice. `Where(steps=(0.0, 0.25))` stops after a quarter.
    """

    negative: Any = parsed(_negative, "a text, one per prompt, or a mapping of tensors")
    scale: float = number(4.0, low=0, per_sample=True)
    tau: float = number(2.5, above=0, per_sample=True)
    alpha: float = number(0.25, low=0, high=1, per_sample=True)
    norm: str = choice("l1", ("l1", "l2"), kw_only=True)

    kinds = ("cross", "joint")
    needs = ("segments", "contrast")
    whole_heads = True

    def __post_init__(self) -> None:
        super().__post_init__()
        w = self.where
        if w.heads is not None or w.branches is not None:
            raise SelectionError(f"NAG compares all heads of a site at once, in the conditional branch; leave out {w}.")

    @classmethod
    def released_code(cls, negative: Any, **changes: Any) -> NAG:
        """What the official code for Flux computes: the L2 norm; its nag_scale of 5 is a scale of 4."""
        return cls(negative, **{"norm": "l2", **changes})

    @property
    def on(self) -> bool:
        """Whether there is anything to compare."""
        return not (is_all(self.scale, 0.0) or is_all(self.alpha, 0.0))

    def inputs(self, call: AttnCall) -> tuple[Tensor, Tensor, Tensor] | None:
        """Twins of a double block: the image stream of their row, which has the modulation of the prompt."""
        if not self.on or not call.gives("contrast") or not call.contrast.apart:
            return None
        c, image = call.contrast, call.segments["image"]
        found = [t.clone() for t in (call.q, call.k, call.v)]
        for t in found:
            t[c.twins, :, image] = t[c.rows, :, image]
        return tuple(found)

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        if not self.on or not call.gives("contrast"):
            return None
        c, image = call.contrast, call.segments["image"] if call.site.kind == "joint" else slice(None)
        wide = torch.promote_types(out.dtype, torch.float32)
        positive = out[c.rows, :, image].to(wide)
        negative = (out[c.twins, :, image] if c.negative is None else c.negative[:, :, image]).to(wide)
        scale, tau, alpha = (self._of(call, value, c.rows, positive) for value in (self.scale, self.tau, self.alpha))
        # Z+ + phi (Z+ - Z-), then alpha Z' + (1 - alpha) Z+, each in one pass over the outputs.
        guided = torch.lerp(negative, positive, 1 + scale)
        guided = normalised(positive, guided, tau, 1 if self.norm == "l1" else 2)
        guided = torch.lerp(positive, guided, alpha).to(out.dtype)
        if guided.shape == out.shape:
            return guided
        new = out.clone()
        new[c.rows, :, image] = guided
        if c.twins is not None:
            new[c.twins, :, image] = guided
        return new

    @staticmethod
    def _of(call: AttnCall, value: Any, rows: slice, like: Tensor) -> Any:
        """A parameter of the guided rows: a number, or [b, 1, 1, 1]."""
        found = call.each(value)
        return found[rows].to(like.dtype)[..., None] if isinstance(found, Tensor) else found


def normalised(positive: Tensor, guided: Tensor, tau: Any, p: int) -> Tensor:
    """`guided` [b, H, n, d] with its norm, over heads and channels, cut to tau times that of `positive` where it is more."""
    most, own = (torch.linalg.vector_norm(t, p, dim=(1, 3), keepdim=True) for t in (positive, guided))
    return guided * (tau * most / own.clamp_min(torch.finfo(own.dtype).tiny)).clamp_max(1.0)
