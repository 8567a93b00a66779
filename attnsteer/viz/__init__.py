"""Pictures: head grids, attention over images, cross-attention with boxes, contact sheets; a page to look around in.

Figures need the extra `viz`; names are imported on first use.
"""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "PhraseMaps": "record",
        "PhraseRecorder": "record",
        "WordMaps": "record",
        "WordRecorder": "record",
        "box_ratio": "record",
        "contact_sheet": "sheet",
        "Projection": "projection",
        "cross_attention": "attention",
        "head_grid": "head_figures",
        "joint_projection": "projection",
        "layout_preview": "layout",
        "phrase_maps": "record",
        "strength_by_head": "sheet",
        "sink_maps": "sinks",
        "strength_by_layer": "sheet",
        "to_bertviz": "exporters",
        "to_circuitsvis": "exporters",
        "view": "viewer",
        "word_attention": "attention",
        "word_maps": "record",
    },
)
