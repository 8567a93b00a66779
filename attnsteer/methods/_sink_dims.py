"""The hidden dimensions of massive activations, by backbone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import SelectionError

# The paper's tau of 20 is for this width.
WIDTH, TAU = 4096, 20.0


@dataclass(frozen=True)
class Backbone:
    """Sink dimensions of one language model, and how to recognise it.

    Attributes:
        dims: hidden dimensions. stated: by the authors of VAR (paper or code), or found here with `find_sink_dims`; False: seen
            in other people's code only.
        type: `model_type` of the text config ("" where transformers has none). hidden, layers: its sizes.
        kv_heads: key and value heads, where that tells it from another one; None: not looked at.
    """

    dims: tuple[int, ...]
    stated: bool
    type: str = ""
    hidden: int = 0
    layers: int = 0
    kv_heads: int | None = None


SINK_DIMS: dict[str, Backbone] = {
    "Llama-2-7B, Vicuna-7B": Backbone((1415, 2533), True, "llama", 4096, 32, 32),
    "Llama-2-13B, Vicuna-13B": Backbone((2100, 4743), True, "llama", 5120, 40, 40),
    "Qwen2-VL-7B": Backbone((458, 2570), True, "qwen2_vl_text", 3584, 28),
    # Its InternLM2 backbone is remote code, which is not loaded here.
    "InternVL2-8B": Backbone((3584,), True),
    "Qwen2-VL-2B": Backbone((1073, 534, 940), False, "qwen2_vl_text", 1536, 28),
    "Qwen2.5-VL-3B": Backbone((318, 1874, 1819), False, "qwen2_5_vl_text", 2048, 36),
    "Qwen2.5-VL-7B": Backbone((458, 2570), False, "qwen2_5_vl_text", 3584, 28),
    "Qwen2.5-VL-32B": Backbone((4675, 3094), False, "qwen2_5_vl_text", 5120, 64),
    "Qwen3-VL-2B": Backbone((1793, 1999, 1401), False, "qwen3_vl_text", 2048, 28),
    "Qwen3-VL-4B": Backbone((0,), False, "qwen3_vl_text", 2560, 36),
    "Qwen3-VL-8B": Backbone((1838,), False, "qwen3_vl_text", 4096, 36),
    "InternVL3.5-1B": Backbone((35, 13), False, "qwen3", 1024, 28),
    "InternVL3.5-4B": Backbone((4, 396, 0), False, "qwen3", 2560, 36),
    "InternVL3.5-8B": Backbone((2276, 233), False, "qwen3", 4096, 36),
    "InternVL3.5-38B": Backbone((731,), False, "qwen3", 5120, 64),
    # Found here: one dimension, phi 23 of at most 24 in the sinks and near 12 in every token; VAR's tau of 20 tells them apart.
    "SmolLM2-135M": Backbone((507,), True, "llama", 576, 30, 3),
    "Llama-3-8B, Llama-3.1-8B": Backbone((788, 1384, 4062), False, "llama", 4096, 32, 8),
}


def known_sink_dims(target: Any) -> tuple[int, ...]:
    """The sink dimensions that the authors of VAR state for a model's language backbone, recognised by type and sizes.

    Raises:
        SelectionError: it is not in `SINK_DIMS`, or only with dimensions that the authors do not state.
    """
    config = _text_config(target)
    found = {name: b for name, b in SINK_DIMS.items() if b.type and _is(b, config)}
    for backbone in found.values():
        if backbone.stated:
            return backbone.dims
    about = ", ".join(f"{k}={getattr(config, k, None)}" for k in ("model_type", "hidden_size", "num_hidden_layers"))
    rumour = "".join(f" Others use {b.dims} for {name}, which is unverified." for name, b in found.items())
    raise SelectionError(
        f"VAR: the sink dimensions of this backbone ({about}) are not known.{rumour} Give sink_dims=(...), or find them: "
        "attnsteer.search.find_sink_dims(model, batches)."
    )


def _text_config(target: Any) -> Any:
    module = getattr(target, "model", target) if not hasattr(target, "config") else target
    config = getattr(module, "config", None)
    for name in ("get_text_config",):
        if hasattr(config, name):
            config = getattr(config, name)()
    return config


def _is(backbone: Backbone, config: Any) -> bool:
    at = lambda name: getattr(config, name, None)  # noqa: E731
    same = (at("model_type"), at("hidden_size"), at("num_hidden_layers")) == (
        backbone.type,
        backbone.hidden,
        backbone.layers,
    )
    return same and backbone.kv_heads in (None, at("num_key_value_heads"))


def scaled_tau(hidden_size: int) -> float:
    """VAR's threshold for another width: 20 sqrt(D / 4096), the same share of a token's energy in one dimension.

    In narrow models a dimension may hold such a share in every token; `find_sink_dims(...).tau` looks at that.
    """
    return TAU * math.sqrt(hidden_size / WIDTH)
