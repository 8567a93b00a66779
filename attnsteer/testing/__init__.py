"""A bench for methods: the laws that every method must satisfy, and tiny random models of every host family to run them on.

Names are imported when they are first used: this package imports neither torch, transformers nor diffusers.
"""

from __future__ import annotations

from .._lazy import lazy

# module of this package -> the public names that it defines
_DEFINED = {
    "cases": ("HostCase", "MethodCase", "NotApplicable", "Setting"),
    "host_cases": ("HOSTS",),
    "laws": ("LAWS", "Law"),
    "checking": ("LawFailure", "Result", "check_law", "check_laws", "run_laws"),
    "transformers_models": (
        "TRANSFORMERS",
        "TinyTransformers",
        "tiny_transformers",
        "tiny_transformers_inputs",
    ),
    "weights": ("randomize_",),
    "diffusers_parts": (
        "SCHEDULERS",
        "STOCHASTIC_SCHEDULERS",
        "tiny_clip_text_encoder",
        "tiny_clip_tokenizer",
        "tiny_scheduler",
        "tiny_vae",
    ),
    "denoisers": ("DENOISERS", "TinyDenoiser", "tiny_denoiser", "tiny_denoiser_inputs"),
    "pipelines": (
        "PIPELINES",
        "TinyPipeline",
        "official_pag",
        "self_attention_modules",
        "tiny_call",
        "tiny_pipeline",
    ),
}

__getattr__, __dir__, __all__ = lazy(__name__, {name: module for module, names in _DEFINED.items() for name in names})
