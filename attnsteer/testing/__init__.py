"""Tiny random models of every host family, for tests here and in other projects.

Names are imported when they are first used: this package imports neither torch, transformers nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import Any

# public name -> the module of this package that defines it
_WHERE = {
    "transformers_models": (
        "TRANSFORMERS",
        "TinyTransformers",
        "randomize_",
        "tiny_transformers",
        "tiny_transformers_inputs",
    ),
    "diffusers_models": (
        "DENOISERS",
        "PIPELINES",
        "SCHEDULERS",
        "STOCHASTIC_SCHEDULERS",
        "TinyDenoiser",
        "TinyPipeline",
        "official_pag",
        "self_attention_modules",
        "tiny_call",
        "tiny_clip_text_encoder",
        "tiny_clip_tokenizer",
        "tiny_denoiser",
        "tiny_denoiser_inputs",
        "tiny_pipeline",
        "tiny_scheduler",
        "tiny_vae",
    ),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
