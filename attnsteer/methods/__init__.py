"""The methods: one published intervention per file. Calling this package, `methods()`, lists their names."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .act import ACT
    from .adhh import ADHH
    from .attend_and_excite import AttendAndExcite
    from .attention_refocusing import AttentionRefocusing
    from .attention_regulation import AttentionRegulation
    from .attentionbuckets import AttentionBuckets
    from .blockmask import BlockMask
    from .conform import CONFORM
    from .freezemaps import FreezeMaps
    from .headgate import HeadGate
    from .hgai import HGAI
    from .injectmap import InjectMap
    from .instaboost import InstABoost
    from .knockout import VisualKnockout
    from .nag import NAG
    from .pag import PAG
    from .pai import PAI
    from .paint import PAINT
    from .pasta import PASTA
    from .patchheads import PatchHeads
    from .scatterbrain import Scatterbrain
    from .seg import SEG
    from .slg import SLG
    from .softpag import SoftPAG
    from .spin import SPIN
    from .spotlight import SpotLight
    from .story_adapter import StoryAdapter
    from .tokenmerge import TokenMerge
    from .var import VAR
    from .vhr import VHR
    from .visualhighlight import VisualHighlight
    from .visualtokenmerge import VisualTokenMerge
    from .zerotuning import ZeroTuning


class _Methods(ModuleType):
    # `attnsteer.methods` is a public function and this package has that name too: it is both.
    def __call__(self) -> tuple[str, ...]:
        """The names of all methods, third-party ones included, sorted."""
        from ..registry import methods

        return methods()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        from ..errors import UnknownName
        from ..registry import get_method

        try:
            return get_method(name)
        except UnknownName as error:
            raise AttributeError(str(error)) from None


sys.modules[__name__].__class__ = _Methods
