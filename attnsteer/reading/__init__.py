"""Readers: what a model's attention says about its inputs. They edit nothing in attention. Imported on first use."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Relevance": "chains",
        "NormMap": "norms",
        "flow": "chains",
        "norm_maps": "norms",
        "rollout": "chains",
    },
)
