"""Pictures: head grids, attention over images, cross-attention with boxes, contact sheets.

Figures need the extra `viz`; names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

# public name -> the module of this package that defines it
_WHERE = {
    "PhraseMaps": "record",
    "PhraseRecorder": "record",
    "WordMaps": "record",
    "WordRecorder": "record",
    "box_ratio": "record",
    "contact_sheet": "sheet",
    "cross_attention": "attention",
    "head_grid": "heads",
    "phrase_maps": "record",
    "strength_by_layer": "sheet",
    "word_attention": "attention",
    "word_maps": "record",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
