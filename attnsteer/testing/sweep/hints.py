"""What the shrinking rule does not find, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Another class than that of the first mapping.
CLASSES: dict[str, str] = {}

# A backbone in place of one of timm's.
_RESNET = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"], "num_channels": 3,
}  # fmt: skip
_DETR = {
    "_start": {"use_timm_backbone": False, "backbone_config": {**_RESNET, "out_features": ["stage4"]}},
    "use_timm_backbone": False,
    "backbone_config": {**_RESNET, "out_features": ["stage4"]},
    "num_queries": 6,
    "auxiliary_loss": False,
}
_DETR3 = {**_DETR, "_start": {"use_timm_backbone": False, "backbone_config": _RESNET}, "backbone_config": _RESNET}
_SERIES = {
    "prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2], "input_size": 1, "num_time_features": 2, "d_model": 64,
    "num_static_categorical_features": 0, "num_static_real_features": 0, "num_dynamic_real_features": 0, "moving_average": 3,
    "cardinality": None, "embedding_dimension": None,
}  # fmt: skip

_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_HALF_AXES = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
    }
}
_SWIN = {"window_size": 2, "image_size": 64}

# Values of configs; see `small_configs.small`.
CONFIGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "chameleon": {"vocabulary_map": {"<image>": 150}},
    "conditional_detr": _DETR,
    "dab-detr": _DETR,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deformable_detr": _DETR3,
    "detr": _DETR,
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 150, "<|extra_200|>": 151}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "sam": {"vision_config": {"window_size": 4}},
    "janus": {"vq_config": {"base_channels": 32, "embed_dim": 8, "num_embeddings": 32}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"head_dim": 8},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 64, "num_feedforward_networks": 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "lw_detr": {"image_size": 64},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "mpnet": {"relative_attention_num_buckets": 32},
    "omdet-turbo": {"use_timm_backbone": False},
    "reformer": {"axial_pos_embds": False},
    "table-transformer": _DETR,
    "time_series_transformer": _SERIES,
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}}
    },
    "qwen2_vl": {"text_config": _THREE_AXES},
    "qwen2_vl_text": _THREE_AXES,
    "qwen2_5_vl": {"text_config": _THREE_AXES},
    "qwen2_5_vl_text": _THREE_AXES,
    "paddleocr_vl": {"text_config": _THREE_AXES},
    "glm46v": {"text_config": _THREE_AXES},
    "glm4v": {"text_config": _THREE_AXES},
    "glm4v_moe": {"text_config": _HALF_AXES},
    "glm4v_moe_text": _HALF_AXES,
    "glm4v_text": _THREE_AXES,
    "glm_image": {"text_config": _THREE_AXES},
    "glm_image_text": _THREE_AXES,
    "glm_ocr": {"text_config": _THREE_AXES},
    "glm_ocr_text": _THREE_AXES,
    "glmga": {"text_config": _THREE_AXES},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gemma4_assistant": {
        "_start": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
    },
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "bit": {"num_groups": 8},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_routed_experts": 4}
    },
    "dots3_note": {"vision_config": {"adapter_in_dim": 64, "adapter_input_size": 64}},
    "informer": _SERIES,
    "autoformer": _SERIES,
    "swin": _SWIN,
    "swinv2": _SWIN,
    "swin2sr": _SWIN,
    "donut-swin": _SWIN,
    "maskformer-swin": _SWIN,
    "mask2former": {"backbone_config": _SWIN},
    "maskformer": {"backbone_config": _SWIN},
    "oneformer": {"backbone_config": _SWIN},
    "upernet": {"backbone_config": _RESNET},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "udop": {"relative_attention_num_buckets": 32, "relative_bias_args": [{"type": "1d"}]},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "xlnet": {"d_head": 16},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "attn_layer_period": 2, "attn_layer_offset": 1},
}

# Arguments of the forward.
INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "lxmert": lambda model: {
        "input_ids": _ids(model),
        "visual_feats": torch.randn(2, 4, model.config.visual_feat_dim),
        "visual_pos": torch.rand(2, 4, 4),
    },
    "pix2struct": lambda model: {
        "flattened_patches": torch.rand(2, 16, 2 + model.config.vision_config.patch_embed_hidden_size),
        "decoder_input_ids": _ids(model),
    },
    "decision_transformer": lambda model: {
        "states": torch.randn(2, 3, model.config.state_dim),
        "actions": torch.randn(2, 3, model.config.act_dim),
        "returns_to_go": torch.randn(2, 3, 1),
        "rewards": torch.randn(2, 3, 1),
        "timesteps": torch.arange(3).expand(2, 3),
        "attention_mask": torch.ones(2, 3),
    },
    "blip_2_qformer": lambda model: {
        "query_embeds": torch.randn(2, 4, model.config.hidden_size),
        "encoder_hidden_states": torch.randn(2, 6, model.config.encoder_hidden_size),
    },
    "clap": lambda model: {"input_ids": _ids(model), "input_features": torch.randn(2, 1, 64, 64)},
    "dia": lambda model: {
        "input_ids": _ids(model),
        "decoder_input_ids": torch.randint(5, 60, (2, 5, model.config.decoder_config.num_channels)),
    },
    "kyutai_speech_to_text": lambda model: {"input_ids": torch.randint(5, 60, (2, 6, model.config.num_codebooks + 1))},
    "siglip2_vision_model": lambda model: {
        "pixel_values": torch.randn(2, 16, 3 * model.config.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
    "siglip2": lambda model: {
        "input_ids": _ids(model),
        "pixel_values": torch.randn(2, 16, 3 * model.config.vision_config.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
    "timesfm": lambda model: {**_patched(model), "freq": torch.zeros(2, 1, dtype=torch.long)},
    "timesfm2_5": lambda model: _patched(model),
    "patchtst": lambda model: _channels(model),
    "patchtsmixer": lambda model: _channels(model),
    "seggpt": lambda model: {
        name: torch.randn(2, 3, *model.config.image_size)
        for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    },
    "video_llama_3_vision": lambda model: {
        "pixel_values": torch.randn(32, 3 * model.config.patch_size**2),
        "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "merge_sizes": torch.tensor([2, 2]),
    },
    "wav2vec2-bert": lambda model: {"input_features": torch.randn(2, 16, model.config.feature_projection_input_dim)},
    "pe_audio": lambda model: {"input_ids": _ids(model), "input_values": torch.randn(2, 1, 4096)},
    "pe_audio_encoder": lambda model: {"input_values": torch.randn(2, 1, 4096)},
    "time_series_transformer": lambda model: _series(model),
    "informer": lambda model: _series(model),
    "autoformer": lambda model: _series(model),
}


def _ids(model: Any) -> torch.Tensor:
    return torch.arange(5, 13).expand(2, 8)


def _patched(model: Any) -> dict[str, Any]:
    values = torch.rand(2, 4 * model.config.patch_length)
    return {"past_values": values, "past_values_padding": torch.zeros_like(values, dtype=torch.long)}


def _channels(model: Any) -> dict[str, Any]:
    return {"past_values": torch.rand(2, model.config.context_length, model.config.num_input_channels)}


def _series(model: Any) -> dict[str, Any]:
    past = model.config.context_length + max(model.config.lags_sequence)
    features = model.config.num_time_features
    return {
        "past_values": torch.rand(2, past),
        "past_time_features": torch.rand(2, past, features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.rand(2, model.config.prediction_length),
        "future_time_features": torch.rand(2, model.config.prediction_length, features),
    }


# Modules (a pattern of their paths) whose softmax mixes something other than tokens, with what it is.
MIXTURES: dict[str, tuple[str, str]] = {
    "inkling2": (r".*(final_input|attention_input|mlp_input)", "its softmax mixes residual streams"),
    "inkling2_text": (r".*(final_input|attention_input|mlp_input)", "its softmax mixes residual streams"),
    "deepseek_v4": (r"model\.layers\.\d+", "its softmax mixes residual streams"),
}

# Types whose models are made of parts that the library does not have, with the reason.
ELSEWHERE: dict[str, str] = {}
