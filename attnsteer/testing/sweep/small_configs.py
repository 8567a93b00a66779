"""Small configs of any model type of transformers: one shrinking rule for all, and hints for the types that it does not fit."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from typing import Any

VOCAB = 160
# Special tokens that lie beyond the vocabulary move here, downwards, each to an id of its own.
SPECIAL = VOCAB - 1
WIDTH, HEADS, HEAD_DIM, LAYERS = 64, 4, 16, 2
# At most so many layers where a stack mixes kinds of them.
KINDS = 4

_LAYERS = re.compile(
    r"(num_)?(hidden_|encoder_|decoder_|dec_|enc_|text_|prediction_|mtp_)?(n_)?layers?|n_layers?|n_layer|num_blocks|"
    r"(num_)?(encoder|decoder|vision|text|fusion|resampler|speech|audio|temporal|perceiver|transformer|conformer|local|global|"
    r"acoustic|semantic|depth)_(hidden_)?(layers|depth|layer|num_layers|num_hidden_layers)|num_(encoder|decoder|hidden)_layers|"
    r"depth|(encoder|decoder)_depth|num_layers_(encoder|decoder)|local_depth|expert_layers"
)
_WIDTH = re.compile(
    r"hidden_size|d_model|n_embd|embed_dim|dim|hidden_dim|emb_dim|embedding_size|d_embed|model_dim|hidden_sizes?|"
    r"(text|vision|encoder|decoder|out|output|backbone|resampler|audio|fusion|mm|projector|cross_attention|image_text|pooler)_"
    r"(hidden_size|dim|embed_dim|embd|hidden_dim|d_model)|"
    r"(out|output|embed|hidden|model|text|vision)_(dim|size|hidden_size)s?|projection_dim|projection_size|proj_dim|projector_dim|entity_emb_size|"
    r"(text|vision|audio)_embed_dim|image_embed_dim|lru_width|d_latents|qk_channels|v_channels|shared_projection_dim"
)
_HEADS = re.compile(
    r"num_attention_heads|num_heads|n_heads?|(encoder|decoder|vision|text|audio|resampler|cross|enc|dec|perceiver|fusion|qformer)?_?"
    r"(num_)?(attention_heads|attn_heads|n_heads|num_heads|attention_head|heads)|"
    r"num_(encoder|decoder|self|cross)_(attention_)?heads|num_(self|cross)_attention_heads|num_mem_heads"
)
_KV = re.compile(
    r"num_key_value_heads|num_kv_heads|n_kv_heads|kv_heads|multi_query_group_num|num_global_key_value_heads"
)
_INNER = re.compile(
    r"(\w+_)?(intermediate|ffn|ff|mlp|feedforward|inner)_?(size|dim|hidden_size|hidden_dim)?|d_ff|n_inner|(encoder|decoder)_ffn_dim|"
    r"(\w+_)?feed_forward(_size|_dim|_proj)?|(\w+_)?intermediate_(size|dim)(_mlp)?|ffn_hidden_size|dim_feedforward|d_inner|inner_dim"
)
_EXPERTS = re.compile(
    r"(n_routed|num_local|num|n|moe_num|n_shared|num_routed|num_shared)_experts|moe_num_experts|num_experts"
)
_CHOSEN = re.compile(
    r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|num_selected_experts|moe_top_k|num_experts_per_tok"
)
_PERIOD = re.compile(
    r"\w*(interval|_pattern|_period|every_n\w*|_frequency|cross_attention_freq|attention_freq)|block_sparse_moe_freq"
)
_POSITIONS = re.compile(
    r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|max_(source|target)_positions|seq_length|max_seqlen"
    r"|max_length|original_max_position_embeddings|max_encoder_position_embeddings"
)
_DIM_HEAD = re.compile(
    r"(attention_|global_|attn_|kv_|linear_key_|linear_value_|index_)?head_dim|d_kv|dim_head|attention_head_size"
)

# Sizes of latent attention, indexers and state spaces, which go with each other and not with the width.
_FIXED: dict[str, Any] = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "qk_head_dim":
    16, "index_topk": 4, "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "n_group": 1, "topk_group": 1,
    "mamba_n_heads": 4, "n_mamba_heads": 4, "mamba_d_head": 32, "mamba_headdim": 32, "mamba_d_state": 8, "mamba_num_heads":
    4, "mamba_head_dim": 32, "mamba_n_groups": 1, "mamba_ngroups": 1, "mamba_chunk_size": 16, "chunk_size": 16,
    "state_size": 8, "ssm_state_size": 8, "n_groups": 1, "num_expert_group": 1, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_dt_rank": 4, "time_step_rank":
    4, "mamba_expand": 2, "conv_kernel": 4, "sliding_window": 8, "attention_chunk_size": 8, "window_size": 4, "index_kpool":
    2, "local_attention": 8, "attention_window": 8, "window": 8, "attention_context_left": 8, "first_k_dense_replace": 1,
    "query_pre_attn_scalar": 16, "num_codebooks": 2, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
    "num_queries": 8, "num_query_tokens": 4, "num_mel_bins": 16, "num_latents": 8, "relative_attention_num_buckets": 8,
    "upsample_groups": 16, "max_bucket_distance": 16, "relative_attention_max_distance": 16, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "type_vocab_size": None, "image_seq_length": 16, "audio_seq_length": None,
}  # fmt: skip


def small(cls: type, hints: dict[str, Any] | None = None) -> Any:
    """A config of `cls` in which everything that costs is small.

    Args:
        hints: values that the rule does not find; a mapping goes into the sub-config of its name, None takes a key out.
    """
    hints = dict(hints or {})
    start = hints.pop("_start", {})
    values = shrunk(cls(**start), hints)
    values.update({k: v for k, v in start.items() if k not in values})
    return cls(**values)


def shrunk(config: Any, hints: dict[str, Any], ids: list[int] | None = None) -> dict[str, Any]:
    """The values of a config, shrunk: keyword arguments of its class."""
    from transformers import PreTrainedConfig

    ids = [SPECIAL] if ids is None else ids
    fields = {f.name for f in dataclasses.fields(config)}
    given = {k: v for k, v in vars(config).items() if k in fields and k != "transformers_version"}
    layers = _layers(given)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, PreTrainedConfig):
            own = hints.get(key) if isinstance(hints.get(key), dict) else {}
            values[key] = {**shrunk(value, own, ids), "model_type": value.model_type}
        elif isinstance(value, (list, tuple)) and layers and len(value) == layers[0]:
            values[key] = [_value(key, value[i], given, None, ids) for i in layers[1]]
        else:
            values[key] = _value(key, value, given, layers, ids)
    for key, value in hints.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict) and "model_type" not in value:
            values[key] = {**values[key], **{k: v for k, v in value.items() if not isinstance(v, dict)}}
            for k, v in value.items():
                if isinstance(v, dict):
                    values[key][k] = {**values[key][k], **v} if isinstance(values[key].get(k), dict) else v
        elif value == "-":
            values.pop(key, None)
        else:
            values[key] = value
    return values


def _layers(given: dict[str, Any]) -> tuple[int, list[int]] | None:
    """(how many layers there are, the numbers of those that are kept): a few of each kind."""
    count = next(
        (v for k, v in given.items() if k in ("num_hidden_layers", "num_layers", "n_layer") and isinstance(v, int)),
        None,
    )
    lists = [v for v in given.values() if isinstance(v, (list, tuple)) and len(v) == count and count and count > 2]
    if not count:
        return None
    kept: list[int] = []
    seen: set[str] = set()
    for i in range(count):
        kind = repr([v[i] for v in lists])
        if kind not in seen and len(kept) < KINDS:
            seen.add(kind)
            kept.append(i)
    kept += [i for i in range(count) if i not in kept][: max(0, LAYERS - len(kept))]
    return count, sorted(kept)


def _value(key: str, value: Any, given: dict[str, Any], layers: Any, ids: list[int]) -> Any:
    if isinstance(value, dict):
        return _rope(copy.deepcopy(value)) if "rope" in key else value
    if value is None:
        # What a class does not work out by itself, though its default says so.
        return {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}.get(key)
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return 0.0 if "drop" in key else value
    if isinstance(value, int):
        return _integer(key, value, given, layers, ids)
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
        return type(value)(_stage(key, v) for v in value)
    return value


def _stage(key: str, value: int) -> int:
    """One entry of a list that has one for each stage of a pyramid."""
    if re.fullmatch(r"(num_)?(attention_)?heads?|num_(attention_)?heads|nheads|(encoder|decoder)_attention_heads", key):
        return 1 if value == 1 else 2
    if re.search(r"depths?$|num_(hidden_)?(layers|blocks)|layers$|num_repeats", key):
        return min(value, 2)
    if re.search(
        r"hidden_sizes|dims?$|channels?|embed_dims?|hidden_dims?|dim_per_stage|widths?|embedding_dims|sizes_per_stage",
        key,
    ):
        return min(value, 32)
    return value


def _integer(key: str, value: int, given: dict[str, Any], layers: Any, ids: list[int]) -> int:
    if re.search(r"_(token_id|token_index|token_ids|id)$", key) or key.endswith("_token"):
        if value >= VOCAB - 40:
            ids[0] -= 1
            return ids[0]
        return value
    if "drop" in key:
        return 0
    if key in _FIXED:
        new = _FIXED[key]
        return value if new is None or value <= 0 else min(value, new)
    if re.fullmatch(r"(\w+_)?vocab_size|n_vocab|vocab_size_\w+", key):
        return min(value, VOCAB)
    if _LAYERS.fullmatch(key):
        kept = len(layers[1]) if layers and layers[0] == value else LAYERS
        return min(value, kept)
    if _KV.fullmatch(key):
        heads = next(
            (given[k] for k in ("num_attention_heads", "num_heads", "n_head") if isinstance(given.get(k), int)), None
        )
        return HEADS if value == heads else min(value, 2)
    if _HEADS.fullmatch(key):
        return min(value, HEADS)
    if _DIM_HEAD.fullmatch(key):
        return min(value, HEAD_DIM)
    if _EXPERTS.fullmatch(key):
        return min(value, 4)
    if _CHOSEN.fullmatch(key):
        return min(value, 2)
    if _PERIOD.fullmatch(key):
        return min(value, 2)
    if _POSITIONS.fullmatch(key):
        return min(value, 128)
    if _WIDTH.fullmatch(key):
        return min(value, WIDTH)
    if "moe" in key and _INNER.fullmatch(key):
        return min(value, 32)
    if _INNER.fullmatch(key):
        return min(value, 96)
    if key in ("image_size", "img_size", "input_size", "pretrain_image_size"):
        return min(value, 32)
    if key in ("patch_size",):
        return 8 if value > 8 else value
    return value


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters for heads of width 16: three axes share its eight frequencies."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            value[key] = _rope(inner)
    if isinstance(value.get("mrope_section"), list):
        half = int(HEAD_DIM * (value.get("partial_rotary_factor") or 1) / 2)
        first, count = half // 3, len(value["mrope_section"])
        value["mrope_section"] = (
            [half // 2] * 2 if count == 2 else [half - 2 * ((half - first) // 2)] + [(half - first) // 2] * 2
        )
    for key in ("original_max_position_embeddings",):
        with contextlib.suppress(KeyError):
            value[key] = min(value[key], 64)
    return value
