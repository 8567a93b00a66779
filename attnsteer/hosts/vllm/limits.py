"""What of an engine cannot be steered exactly: refused when it starts, by name. Duck-typed on vLLM's configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import UnsupportedHost, listing

# The releases that the tests ran on: from the first, below the second.
TESTED = ((0, 32), (0, 33))
# Caches that hold numbers, not codes for them.
PLAIN_CACHES = ("auto", "float32", "float16", "bfloat16", "half", "float")


def check_version(version: str, untested: bool) -> None:
    """Raise for a release that was not tested, unless the settings allow one."""
    found = re.match(r"(\d+)\.(\d+)", version)
    number = (int(found[1]), int(found[2])) if found else None
    if untested or (number is not None and TESTED[0] <= number < TESTED[1]):
        return
    first, last = (".".join(map(str, t)) for t in TESTED)
    raise UnsupportedHost(
        f"this is vLLM {version}; attnsteer was tested with {first} up to {last}, which is left out, and what it relies on has "
        'moved between releases. Install one of those, or set "untested_version": true in its settings: what can be checked by '
        "behaviour is checked all the same."
    )


def check_engine(config: Any) -> None:
    """Raise where a setting of an engine (a `VllmConfig`) hides rows, keys or numbers from an exact edit."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    has = lambda owner, name, default=None: getattr(owner, name, default)  # noqa: E731
    if has(model, "runner_type", "generate") != "generate":
        raise UnsupportedHost("only engines that generate are steered; this one pools.")
    if has(model, "use_mla", False):
        raise UnsupportedHost(
            f"{model.model} has multi-head latent attention, whose cache holds no keys of heads. It is not steered in vLLM."
        )
    asked = {
        "decode_context_parallel_size=1": has(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill_context_parallel_size=1": has(parallel, "prefill_context_parallel_size", 1) > 1,
        "enable_dbo=False": bool(has(parallel, "enable_dbo", False)),
        'kv_cache_dtype="auto"': str(has(cache, "cache_dtype", "auto")) not in PLAIN_CACHES,
        "kv_sharing_fast_prefill=False": bool(has(cache, "kv_sharing_fast_prefill", False)),
        "no kv_transfer_config": has(config, "kv_transfer_config") is not None,
    }
    speculative = has(config, "speculative_config")
    if speculative is not None:
        asked["no adaptive verification"] = bool(has(speculative, "adaptive_verification", False))
        asked["async_scheduling=False with speculative decoding"] = bool(
            has(config.scheduler_config, "async_scheduling", False)
        )
    mode = has(has(config, "compilation_config"), "cudagraph_mode")
    if mode is not None and has(mode, "has_full_cudagraphs", lambda: False)():
        asked["cudagraph_mode=PIECEWISE: a full graph would replay decode without the edits"] = True
    wrong = [name for name, on in asked.items() if on]
    if wrong:
        raise UnsupportedHost(f"a steered engine needs {listing(wrong)}.")


def check_layers(
    config: Any, context: Mapping[str, Any], number_of: Callable[[str], int], shards: int
) -> dict[int, tuple[str, Any]]:
    """The attention layers of this process by number: number -> (name, layer).

    Raises:
        UnsupportedHost: a layer is of a kind that is not steered, or some layer of the model is none of them.
    """
    text = config.model_config.hf_text_config
    found: dict[int, tuple[str, Any]] = {}
    for name, layer in context.items():
        if "draft" in name or not hasattr(layer, "get_kv_cache_spec"):
            # A drafter's, which is not steered; layers of experts, which only stand in the same table.
            continue
        reason = _refused(layer)
        if reason:
            raise UnsupportedHost(
                f"{name} is {type(layer).__name__} {reason}. Models with such layers are not steered in vLLM; steer them in "
                "transformers."
            )
        number = number_of(name)
        if number in found:
            raise UnsupportedHost(
                f"{name} and {found[number][0]} are both layer {number}; which one is meant cannot be said."
            )
        if layer.num_heads * shards != text.num_attention_heads:
            raise UnsupportedHost(
                f"{name} has {layer.num_heads} heads in each of {shards} processes; the model's config says "
                f"{text.num_attention_heads} for all layers."
            )
        found[number] = name, layer
    first, stop = config.model_config.get_layers_start_end_indices(config.parallel_config)
    missing = [i for i in range(first, stop) if i not in found]
    if missing:
        raise UnsupportedHost(
            f"layers {listing(missing)} of {config.model_config.model} have no softmax attention of the usual kind (a hybrid "
            "model). Such models are not steered in vLLM; steer them in transformers."
        )
    return found


def _refused(layer: Any) -> str:
    """Why a layer is not steered; empty where it is."""
    impl = getattr(layer, "impl", None)
    if type(layer).__name__ != "Attention" or impl is None:
        return "attention"
    if str(getattr(layer, "attn_type", "decoder")).rpartition(".")[2].lower() != "decoder":
        return f"of type {layer.attn_type}"
    checks = {
        "with ALiBi slopes": getattr(impl, "alibi_slopes", None) is not None,
        "that shares another layer's cache": getattr(layer, "kv_sharing_target_layer_name", None) is not None,
        "with a quantised cache": str(getattr(layer, "kv_cache_dtype", "auto")) not in PLAIN_CACHES,
        "whose values have another size than its keys": layer.head_size
        != getattr(layer, "head_size_v", layer.head_size),
        "in which parts of a prompt see both ways": bool(getattr(layer, "use_mm_prefix", False)),
        "of chunks that look back": getattr(impl, "chunk_lookback", -1) > -1,
    }
    return next((reason for reason, on in checks.items() if on), "")
