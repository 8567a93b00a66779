"""What heads are: profiles, sinks, their weights. Imported on first use."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "HeadTable": "table",
        "Needle": "effects",
        "clusters": "effects",
        "gating_effects": "effects",
        "head_profile": "profile",
        "Sinks": "sink_report",
        "head_weights": "projections",
        "retrieval_scores": "effects",
        "sinks": "sink_report",
    },
)
