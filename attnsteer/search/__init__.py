"""Searches over heads and models: each ends in a `HeadSet`, or a small record of what it found. Imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module that defines it. No module has the name of a function: once imported, it would stand in its place.
_WHERE = {
    "Choice": "samples",
    "Rung": "greedy",
    "SearchState": "state",
    "calibrate_act": "calibration",
    "calibrate_heads": "calibration",
    "candidate_log_likelihoods": "samples",
    "halving": "greedy",
    "headhunter": "greedy",
    "SINK_DIMS": "sink_dims",
    "Backbone": "sink_dims",
    "SinkDims": "sink_dims",
    "find_sink_dims": "sink_dims",
    "scaled_tau": "sink_dims",
    "vhd": "divergence",
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
