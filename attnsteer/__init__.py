"""attnsteer: exact, training-free attention interventions for language, vision-language and diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy
from ._version import __version__

if TYPE_CHECKING:
    from . import errors, methods, zoo
    from .baking import bake
    from .captured import Captured
    from .capturing import capture
    from .heads import HeadSet
    from .intervention import Intervention
    from .methods import (
        ACT,
        ADHH,
        CONFORM,
        HGAI,
        NAG,
        PAG,
        PAI,
        PAINT,
        PASTA,
        SEG,
        SLG,
        SPIN,
        VAR,
        VHR,
        AttendAndExcite,
        AttentionBuckets,
        AttentionRefocusing,
        AttentionRegulation,
        BlockMask,
        FreezeMaps,
        HeadGate,
        InjectMap,
        InstABoost,
        PatchHeads,
        Scatterbrain,
        SoftPAG,
        SpotLight,
        StoryAdapter,
        TokenMerge,
        VisualHighlight,
        VisualKnockout,
        VisualTokenMerge,
        ZeroTuning,
    )
    from .methods.bases.latent_loss import LatentLoss
    from .reading import CARVE, TAG, AttentionPrompting, ControlMLLM, RefAM, flow, rollout
    from .registry import get_method, register_host, register_method
    from .site import Site
    from .steering import Steering, detach, sites, steer
    from .stories import story
    from .tokens import Tokens
    from .where import Where

# Loaded on first use, so that importing attnsteer imports not even torch.
__getattr__, _names, __all__ = lazy(
    __name__,
    {
        "Captured": "captured",
        "HeadSet": "heads",
        "Intervention": "intervention",
        "LatentLoss": "methods.bases.latent_loss",
        "Site": "site",
        "Steering": "steering",
        "Tokens": "tokens",
        "Where": "where",
        "capture": "capturing",
        "bake": "baking",
        "detach": "steering",
        "errors": "errors",
        "flow": "reading",
        "get_method": "registry",
        "methods": "methods",
        "register_host": "registry",
        "register_method": "registry",
        "rollout": "reading",
        "sites": "steering",
        "steer": "steering",
        "story": "stories",
        "zoo": "zoo",
        "AttentionPrompting": "reading",
        "CARVE": "reading",
        "ControlMLLM": "reading",
        "RefAM": "reading",
        "TAG": "reading",
        "ACT": "methods",
        "AttendAndExcite": "methods",
        "AttentionBuckets": "methods",
        "AttentionRefocusing": "methods",
        "AttentionRegulation": "methods",
        "BlockMask": "methods",
        "CONFORM": "methods",
        "HeadGate": "methods",
        "FreezeMaps": "methods",
        "InjectMap": "methods",
        "InstABoost": "methods",
        "PatchHeads": "methods",
        "NAG": "methods",
        "PAG": "methods",
        "PASTA": "methods",
        "Scatterbrain": "methods",
        "SEG": "methods",
        "SLG": "methods",
        "SoftPAG": "methods",
        "SpotLight": "methods",
        "StoryAdapter": "methods",
        "TokenMerge": "methods",
        "VAR": "methods",
        "VHR": "methods",
        "ADHH": "methods",
        "HGAI": "methods",
        "PAI": "methods",
        "PAINT": "methods",
        "SPIN": "methods",
        "VisualHighlight": "methods",
        "VisualKnockout": "methods",
        "VisualTokenMerge": "methods",
        "ZeroTuning": "methods",
    },
)
__all__ = ["__version__", *__all__]


def __dir__() -> list[str]:
    return list(__all__)
