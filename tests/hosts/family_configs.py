"""Configs and inputs of the tiny denoisers in `families`."""

from __future__ import annotations

from typing import Any

import torch

from tests.hosts.shapes import DIM, TEXT, B, Family, ids, image, randn, text, times, valid, video


def _cog(channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": image(channels),
        "encoder_hidden_states": text(),
        "timestep": times(),
        "original_size": torch.tensor([[64.0, 64.0]] * B),
        "target_size": torch.tensor([[64.0, 64.0]] * B),
        "crop_coords": torch.zeros(B, 2),
    }


def _packed(width: int = 16, axes: int = 3, pooled: bool = False, time: float = 0.6) -> dict[str, Any]:
    inputs = {
        "hidden_states": randn(B, 16, width, seed=1),
        "encoder_hidden_states": text(),
        "timestep": times(time),
        "img_ids": ids(4, axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }
    return {**inputs, "pooled_projections": randn(B, DIM, seed=3)} if pooled else inputs


_PACKED = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": DIM,
    "axes_dims_rope": (4, 6, 6),
}
_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": DIM,
    "rope_axes_dim": (4, 6, 6),
}

FAMILIES: dict[str, Family] = {
    "hunyuandit": Family(
        "HunyuanDiT2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2, "hidden_size": 32,
            "num_layers": 4, "cross_attention_dim": DIM, "cross_attention_dim_t5": DIM, "pooled_projection_dim": 16,
            "text_len": TEXT, "text_len_t5": TEXT, "sample_size": 8, "use_style_cond_and_image_meta_size": False,
        },
        lambda: {
            "hidden_states": image(), "timestep": times(), "encoder_hidden_states": text(),
            "text_embedding_mask": valid(), "encoder_hidden_states_t5": randn(B, TEXT, DIM, seed=4),
            "text_embedding_mask_t5": valid(), "image_rotary_emb": (torch.ones(16, 16), torch.zeros(16, 16)),
        },
    ),
    "auraflow": Family(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": DIM, "caption_projection_dim": 32, "pos_embed_max_size": 64,
        },
        lambda: {"hidden_states": image(), "encoder_hidden_states": text(), "timestep": times(0.6)},
        order="text image",
        only_joint={"num_mmdit_layers": 0},
    ),
    "cogvideox": Family(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
            "text_embed_dim": DIM, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
            "max_text_seq_length": TEXT,
        },
        lambda: {"hidden_states": randn(B, 2, 4, 8, 8, seed=1), "encoder_hidden_states": text(), "timestep": times()},
        order="text image",
    ),
    "lumina2": Family(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 1,
            "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 4, 4),
            "axes_lens": (32, 32, 32), "cap_feat_dim": DIM,
        },
        lambda: {
            "hidden_states": image(), "timestep": times(0.6), "encoder_hidden_states": text(),
            "encoder_attention_mask": valid(),
        },
    ),
    "ltx": Family(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
            "cross_attention_dim": 32, "num_layers": 2, "caption_channels": DIM,
        },
        lambda: {
            "hidden_states": randn(B, 32, 8, seed=1), "encoder_hidden_states": text(), "timestep": times(),
            "encoder_attention_mask": valid(), "num_frames": 2, "height": 4, "width": 4,
        },
    ),
    "mochi": Family(
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "pooled_projection_dim": 16,
            "in_channels": 4, "text_embed_dim": DIM, "time_embed_dim": 8, "max_sequence_length": TEXT,
        },
        lambda: {
            "hidden_states": video(), "encoder_hidden_states": text(), "timestep": times(),
            "encoder_attention_mask": valid(),
        },
        order="image text",
    ),
    "cogview4": Family(
        "CogView4Transformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "text_embed_dim": DIM, "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        _cog,
        order="text image",
    ),
    "cogview3": Family(
        "CogView3PlusTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "text_embed_dim": DIM, "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
        },
        _cog,
        order="text image",
    ),
    "hunyuanvideo": Family(
        "HunyuanVideoTransformer3DModel",
        {**_HUNYUAN, "in_channels": 4, "out_channels": 4, "guidance_embeds": False, "pooled_projection_dim": 16},
        lambda: {
            "hidden_states": video(), "timestep": times(), "encoder_hidden_states": text(),
            "encoder_attention_mask": valid(), "pooled_projections": randn(B, 16, seed=3),
        },
        order="image text",
        only_joint={"num_layers": 0},
    ),
    "hunyuanvideo15": Family(
        "HunyuanVideo15Transformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_refiner_layers": 1,
            "text_embed_dim": DIM, "rope_axes_dim": (4, 6, 6), "in_channels": 4, "out_channels": 4,
            "text_embed_2_dim": 16, "image_embed_dim": 16, "task_type": "t2v",
        },
        lambda: {
            "hidden_states": video(), "timestep": times(), "encoder_hidden_states": text(),
            "encoder_attention_mask": valid(), "encoder_hidden_states_2": randn(B, TEXT, 16, seed=4),
            "encoder_attention_mask_2": valid(), "image_embeds": randn(B, 3, 16, seed=5),
        },
        order="image text",
    ),
    "hunyuanimage": Family(
        "HunyuanImageTransformer2DModel",
        {**_HUNYUAN, "in_channels": 4, "out_channels": 4, "rope_axes_dim": (8, 8)},
        lambda: {
            "hidden_states": image(), "timestep": times(), "encoder_hidden_states": text(),
            "encoder_attention_mask": valid(),
        },
        order="image text",
        only_joint={"num_layers": 0},
    ),
    "chroma": Family(
        "ChromaTransformer2DModel",
        {**_PACKED, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda: _packed(),
        order="text image",
        only_joint={"num_layers": 0},
    ),
    "bria": Family(
        "BriaTransformer2DModel",
        _PACKED,
        lambda: _packed(),
        order="text image",
        only_joint={"num_layers": 0},
    ),
    "briafibo": Family(
        "BriaFiboTransformer2DModel",
        {**_PACKED, "text_encoder_dim": 16},
        lambda: {**_packed(), "text_encoder_layers": [randn(B, TEXT, 16, seed=6)] * 3},
        text=("encoder_hidden_states", "text_encoder_layers"),
        order="text image",
        only_joint={"num_layers": 0, "num_single_layers": 3},
    ),
    "longcat": Family(
        "LongCatImageTransformer2DModel",
        {**_PACKED, "pooled_projection_dim": DIM},
        lambda: _packed(),
        order="text image",
        only_joint={"num_layers": 0},
    ),
    "ovis": Family(
        "OvisImageTransformer2DModel",
        {**_PACKED, "out_channels": 16},
        lambda: _packed(),
        order="text image",
        only_joint={"num_layers": 0},
    ),
    "flux2": Family(
        "Flux2Transformer2DModel",
        {**_PACKED, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16, "guidance_embeds": False},
        lambda: _packed(axes=4),
        order="text image",
        only_joint={"num_layers": 0},
    ),
    "allegro": Family(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "cross_attention_dim": 48,
            "sample_height": 8, "sample_width": 8, "sample_frames": 2, "caption_channels": DIM,
        },
        lambda: {
            "hidden_states": video(), "encoder_hidden_states": text(), "timestep": times(),
            "encoder_attention_mask": valid(),
            "image_rotary_emb": (((torch.ones(32, 8), torch.zeros(32, 8)),) * 3, (torch.arange(32)[None],) * 3),
        },
    ),
    "latte": Family(
        "LatteTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
            "cross_attention_dim": 32, "sample_size": 8, "patch_size": 2, "norm_type": "ada_norm_single",
            "caption_channels": DIM, "video_length": 2, "norm_elementwise_affine": False, "attention_bias": True,
        },
        lambda: {"hidden_states": video(), "encoder_hidden_states": text(), "timestep": times()},
    ),
    "kandinsky5": Family(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4, "in_text_dim": DIM, "in_text_dim2": 16, "time_dim": 16, "out_visual_dim": 4,
            "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
        },
        lambda: {
            "hidden_states": randn(B, 2, 8, 8, 4, seed=1), "encoder_hidden_states": text(), "timestep": times(),
            "pooled_projections": randn(B, 16, seed=3),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)], "text_rope_pos": torch.arange(TEXT),
        },
    ),
    "cosmos": Family(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
            "text_embed_dim": DIM, "adaln_lora_dim": 4, "max_size": (4, 8, 8), "concat_padding_mask": False,
        },
        lambda: {"hidden_states": video(), "timestep": times(0.6), "encoder_hidden_states": text()},
    ),
    "lumina": Family(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 2, "multiple_of": 16,
            "cross_attention_dim": DIM,
        },
        lambda: {
            "hidden_states": image(), "timestep": times(0.6), "encoder_hidden_states": text(), "encoder_mask": valid(),
            "image_rotary_emb": torch.ones(4, 4, 8, dtype=torch.complex64), "cross_attention_kwargs": {},
        },
    ),
    "dit": Family(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "norm_num_groups": 4,
            "num_embeds_ada_norm": 10,
        },
        lambda: {"hidden_states": image(), "timestep": times().long(), "class_labels": torch.tensor([1, 2])},
        text=("class_labels",),
    ),
    "stableaudio": Family(
        "StableAudioDiTModel",
        {
            "sample_size": 16, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
            "num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 32, "time_proj_dim": 8,
            "global_states_input_dim": 16, "cross_attention_input_dim": DIM,
        },
        lambda: {
            "hidden_states": randn(B, 4, 16, seed=1), "timestep": times(0.6), "encoder_hidden_states": text(),
            "global_hidden_states": randn(B, 1, 16, seed=3),
            "rotary_embedding": (torch.ones(17, 8), torch.zeros(17, 8)),
        },
    ),
    "prx": Family(
        "PRXTransformer2DModel",
        {"in_channels": 4, "context_in_dim": DIM, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": (8, 8)},
        lambda: {"hidden_states": image(), "timestep": times(0.6), "encoder_hidden_states": text()},
    ),
    "skyreels": Family(
        "SkyReelsV2Transformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": DIM,
            "freq_dim": 8, "ffn_dim": 32, "num_layers": 2,
        },
        lambda: {"hidden_states": video(), "timestep": times(), "encoder_hidden_states": text()},
    ),
    "joyimage": Family(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": DIM, "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        lambda: {"hidden_states": video(), "timestep": times(), "encoder_hidden_states": text()},
        order="image text",
    ),
    "hidream": Family(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [DIM, DIM], "text_emb_dim": 16,
            "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (8, 4, 4), "max_resolution": (8, 8),
            "llama_layers": [0, 1], "force_inference_output": True,
        },
        lambda: {
            "hidden_states": image(), "timesteps": times(), "encoder_hidden_states_t5": text(),
            "encoder_hidden_states_llama3": randn(2, B, TEXT, DIM, seed=4), "pooled_embeds": randn(B, 16, seed=3),
        },
        text=("encoder_hidden_states_t5", "encoder_hidden_states_llama3"),
    ),
    "easyanimate": Family(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
            "sample_width": 8, "sample_height": 8, "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 8,
            "text_embed_dim": DIM, "time_position_encoding_type": "3d_rope", "add_noise_in_inpaint_model": False,
        },
        lambda: {"hidden_states": video(), "timestep": times(), "encoder_hidden_states": text()},
        order="text image",
        only_joint={"mmdit_layers": 0},
    ),
    "animatediff": Family(
        "UNetMotionModel",
        {
            "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": DIM,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "num_attention_heads": 2,
            "motion_num_attention_heads": 2, "motion_max_seq_length": 4,
        },
        lambda: {"sample": video(), "timestep": torch.tensor(601), "encoder_hidden_states": text().repeat_interleave(2, 0)},
    ),
    "unet3d": Family(
        "UNet3DConditionModel",
        {
            "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": DIM,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 8,
        },
        lambda: {"sample": video(), "timestep": torch.tensor(601), "encoder_hidden_states": text()},
    ),
    "svd": Family(
        "UNetSpatioTemporalConditionModel",
        {
            "in_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": DIM,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "num_attention_heads": (2, 4),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "num_frames": 2,
        },
        lambda: {
            "sample": randn(B, 2, 4, 8, 8, seed=1), "timestep": torch.tensor(601),
            "encoder_hidden_states": text(length=1), "added_time_ids": torch.ones(B, 3),
        },
    ),
    "kandinsky3": Family(
        "Kandinsky3UNet",
        {
            "time_embedding_dim": 16, "groups": 4, "attention_head_dim": 8, "layers_per_block": 3,
            "block_out_channels": (16, 16, 32, 32), "cross_attention_dim": DIM, "encoder_hid_dim": DIM,
        },
        lambda: {
            "sample": image(), "timestep": torch.tensor(601), "encoder_hidden_states": text(),
            "encoder_attention_mask": valid(),
        },
    ),
    "cascade": Family(
        "StableCascadeUNet",
        {
            "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": DIM,
            "block_out_channels": (32, 32), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1), "clip_text_pooled_in_channels": DIM, "switch_level": (False,), "dropout": (0.0, 0.0),
        },
        lambda: {"sample": image(), "timestep_ratio": times(0.6), "clip_text_pooled": text(length=1)},
        text=("clip_text_pooled",),
    ),
    "sanavideo": Family(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
            "caption_channels": DIM, "sample_size": 8,
        },
        lambda: {"hidden_states": video(), "encoder_hidden_states": text(), "timestep": times()},
    ),
    "zimage": Family(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": DIM, "axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32],
        },
        lambda: {"x": list(randn(B, 4, 1, 8, 8, seed=1)), "t": times(0.6), "cap_feats": list(text())},
        text=("cap_feats",),
    ),
    "omnigen": Family(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "num_layers": 2,
            "pad_token_id": 0, "vocab_size": 16, "max_position_embeddings": 64, "original_max_position_embeddings": 64,
            "pos_embed_max_size": 8, "time_step_dim": 8, "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        lambda: {
            "hidden_states": image(), "timestep": times(0.6), "input_ids": torch.ones(B, TEXT, dtype=torch.long),
            "input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(B, 23, 23).tril(),
            "position_ids": torch.arange(23)[None].expand(B, -1),
        },
        text=("input_ids",),
    ),
}  # fmt: skip
