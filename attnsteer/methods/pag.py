"""PAG: guidance away from a branch whose self-attention maps are the identity.

Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance" (ECCV 2024, arXiv 2403.17377),
section 4; official code KU-CVLAB/Perturbed-Attention-Guidance at ba1c0c9 (its scripts' scale is s + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..parameters import choice
from ..registry import register_method
from .softpag import JOINT, SoftPAG


@register_method
@dataclass(frozen=True)
class PAG(SoftPAG):
    """Perturbed-attention guidance: O' = V in the selected self-attention, in the weak branch only.

    Args:
        scale: s; 3.0 in diffusers, 0 is off. joint: as in `SoftPAG`; the default is that of diffusers' SD3 PAG.

    The default `where` is the UNet's middle block. diffusers' layer strings match substrings ("blocks.1" also takes
    blocks 10 to 19); `Where(layers=[1])` is one layer.
    """

    joint: str = choice("ii_identity", JOINT)
