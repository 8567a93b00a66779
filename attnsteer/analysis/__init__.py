"""What heads are: profiles, sinks, their weights. Imported on first use."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "FreezeReport": "freezing",
        "HeadTable": "table",
        "Needle": "effects",
        "Ledger": "circuits",
        "Swap": "patching",
        "clusters": "effects",
        "freeze_report": "freezing",
        "gating_effects": "effects",
        "generate_frozen": "freezing",
        "head_profile": "profile",
        "Sinks": "sink_report",
        "head_weights": "projections",
        "patch_effects": "patching",
        "retrieval_scores": "effects",
        "shifted": "freezing",
        "sinks": "sink_report",
        "trace": "circuits",
        "visual_heads": "visual",
    },
)
