"""The methods: one published intervention per file. Calling this package, `methods()`, lists their names."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .act import ACT
    from .attend_and_excite import AttendAndExcite
    from .attention_refocusing import AttentionRefocusing
    from .attention_regulation import AttentionRegulation
    from .conform import CONFORM
    from .headgate import HeadGate
    from .nag import NAG
    from .pag import PAG
    from .pasta import PASTA
    from .seg import SEG
    from .slg import SLG
    from .softpag import SoftPAG
    from .spotlight import SpotLight
    from .var import VAR
    from .vhr import VHR
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
