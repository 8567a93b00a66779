"""Searches over heads and models: each ends in a `HeadSet`, or a small record of what it found. Imported on first use."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Choice": "samples",
        "Pursuit": "pursuit",
        "Rung": "greedy",
        "ScoredHeads": "scored",
        "SearchState": "state",
        "calibrate_act": "calibration",
        "calibrate_heads": "calibration",
        "candidate_log_likelihoods": "samples",
        "enhanced": "pursuit",
        "halving": "greedy",
        "head_pursuit": "pursuit",
        "headhunter": "greedy",
        "SINK_DIMS": ".methods._sink_dims",
        "Backbone": ".methods._sink_dims",
        "SinkDims": "sink_dims",
        "find_sink_dims": "sink_dims",
        "rotary_bases": "bases",
        "inverted": "pursuit",
        "maps": "functions",
        "michel": "importance",
        "pruning_curve": "importance",
        "screen_heads": "screen",
        "scaled_tau": ".methods._sink_dims",
        "shapley": "contributions",
        "shapley_intervals": "contributions",
        "somp": "pursuit",
        "vhd": "divergence",
    },
)
