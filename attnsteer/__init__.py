"""attnsteer: exact, training-free attention interventions for language, vision-language and diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import errors, methods, zoo
    from .guidance.latent import LatentLoss
    from .heads import HeadSet
    from .intervention import Intervention
    from .methods import (
        ACT,
        PAG,
        PASTA,
        SEG,
        VAR,
        VHR,
        AttendAndExcite,
        AttentionRefocusing,
        HeadGate,
        SoftPAG,
        SpotLight,
        ZeroTuning,
    )
    from .registry import get_method, register_host, register_method
    from .site import Site
    from .steering import Steering, sites, steer
    from .tokens import Tokens
    from .where import Where

# Public name -> module; loaded on first use, so that importing attnsteer imports not even torch.
_PUBLIC = {
    "HeadSet": "heads",
    "Intervention": "intervention",
    "LatentLoss": "guidance.latent",
    "Site": "site",
    "Steering": "steering",
    "Tokens": "tokens",
    "Where": "where",
    "errors": "errors",
    "get_method": "registry",
    "methods": "methods",
    "register_host": "registry",
    "register_method": "registry",
    "sites": "steering",
    "steer": "steering",
    "zoo": "zoo",
    "ACT": "methods",
    "AttendAndExcite": "methods",
    "AttentionRefocusing": "methods",
    "HeadGate": "methods",
    "PAG": "methods",
    "PASTA": "methods",
    "SEG": "methods",
    "SoftPAG": "methods",
    "SpotLight": "methods",
    "VAR": "methods",
    "VHR": "methods",
    "ZeroTuning": "methods",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PUBLIC:
        raise AttributeError(f"module 'attnsteer' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module = importlib.import_module(f".{_PUBLIC[name]}", __name__)
    value = module if name in ("errors", "methods", "zoo") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
