"""Tiny random denoisers of every family of diffusers: no network, fixed by the seed.

They are drawn by `randomize_`: no output projection is zero and the maps are far from uniform, so that an edit of any
attention layer, or of the prompt, moves the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .diffusers_parts import LATENT, TEXT_DIM, TEXT_TOKENS, randn
from .weights import randomize_


def text_mask(batch: int, offset: int) -> Tensor:
    """`[batch, TEXT_TOKENS]` of 0 and 1: the last tokens of a row are padding, a different number per row."""
    lengths = torch.tensor([TEXT_TOKENS - 2 - (row + offset) % 4 for row in range(batch)])
    return (torch.arange(TEXT_TOKENS)[None] < lengths[:, None]).long()


def _unet_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    return {
        "sample": randn(batch, 4, LATENT, LATENT, seed=seed),
        "timestep": torch.tensor(601),
        "encoder_hidden_states": randn(batch, TEXT_TOKENS, model.config.cross_attention_dim, seed=seed + 1),
    }


def _sdxl_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    size = 8.0 * LATENT
    added = {
        "text_embeds": randn(batch, TEXT_DIM, seed=seed + 2),
        "time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size]] * batch),
    }
    return {**_unet_inputs(model, batch, seed), "added_cond_kwargs": added}


def _sd3_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, LATENT, LATENT, seed=seed),
        "encoder_hidden_states": randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "pooled_projections": randn(batch, TEXT_DIM, seed=seed + 2),
        "timestep": torch.full((batch,), 601.0),
    }


def _flux_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    side = LATENT // 2
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(side * side, 3).float()
    inputs = {
        "hidden_states": randn(batch, side * side, 16, seed=seed),
        "encoder_hidden_states": randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "pooled_projections": randn(batch, TEXT_DIM, seed=seed + 2),
        "timestep": torch.full((batch,), 0.601),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    if model.config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


def _pixart_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, LATENT, LATENT, seed=seed),
        "encoder_hidden_states": randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "encoder_attention_mask": text_mask(batch, 0),
        "timestep": torch.full((batch,), 601),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sana_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, LATENT // 2, LATENT // 2, seed=seed),
        "encoder_hidden_states": randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "encoder_attention_mask": text_mask(batch, 0),
        "timestep": torch.full((batch,), 601.0),
    }


def _wan_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, 2, LATENT // 2, LATENT // 2, seed=seed),
        "encoder_hidden_states": randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "timestep": torch.full((batch,), 601.0),
    }


def _qwenimage_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    side = LATENT // 2
    return {
        "hidden_states": randn(batch, side * side, 16, seed=seed),
        "encoder_hidden_states": randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "encoder_hidden_states_mask": text_mask(batch, 0),
        "timestep": torch.full((batch,), 0.601),
        "img_shapes": [[(1, side, side)]] * batch,
    }


@dataclass(frozen=True)
class TinyDenoiser:
    """One denoiser family.

    Attributes:
        name: the key in `DENOISERS`.
        model_class: class name in `diffusers`.
        config: its keyword arguments.
        inputs: `(model, batch, seed)` to the keyword arguments of one forward.
        kinds: the attention kinds it has ("self", "cross", "joint").
        two_calls: its pipeline calls it once per guidance branch, instead of once on a doubled batch.
    """

    name: str
    model_class: str
    config: dict[str, Any]
    inputs: Callable[[nn.Module, int, int], dict[str, Any]]
    kinds: tuple[str, ...]
    two_calls: bool = False

    def build(self, seed: int = 0, **overrides: Any) -> nn.Module:
        """The model in `eval()` mode on CPU, float32; `overrides` replace config entries."""
        import diffusers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(diffusers, self.model_class)(**{**self.config, **overrides})
        return randomize_(model, seed).eval()


_UNET: dict[str, Any] = {
    "sample_size": LATENT,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),  # for UNets of this kind: the number of heads
}
_SD3: dict[str, Any] = {
    "sample_size": LATENT,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT_DIM,
    "caption_projection_dim": 64,
    "pooled_projection_dim": TEXT_DIM,
    "pos_embed_max_size": LATENT,
}

DENOISERS: dict[str, TinyDenoiser] = {
    tiny.name: tiny
    for tiny in (
        TinyDenoiser(
            "sd",
            "UNet2DConditionModel",
            {
                **_UNET,
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                "cross_attention_dim": TEXT_DIM,
            },
            _unet_inputs,
            ("self", "cross"),
        ),
        TinyDenoiser(
            "sdxl",
            "UNet2DConditionModel",
            {
                **_UNET,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": 2 * TEXT_DIM,
                "transformer_layers_per_block": (1, 2),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + TEXT_DIM,
            },
            _sdxl_inputs,
            ("self", "cross"),
        ),
        TinyDenoiser("sd3", "SD3Transformer2DModel", _SD3, _sd3_inputs, ("joint",)),
        TinyDenoiser(
            "sd35",
            "SD3Transformer2DModel",
            {**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
            _sd3_inputs,
            ("joint", "self"),
        ),
        TinyDenoiser(
            "flux",
            "FluxTransformer2DModel",
            {
                "in_channels": 16,
                "num_layers": 2,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": TEXT_DIM,
                "pooled_projection_dim": TEXT_DIM,
                "axes_dims_rope": (4, 6, 6),
            },
            _flux_inputs,
            ("joint",),
            two_calls=True,
        ),
        TinyDenoiser(
            "pixart",
            "PixArtTransformer2DModel",
            {
                "sample_size": LATENT,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 3,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "cross_attention_dim": 64,
                "caption_channels": TEXT_DIM,
            },
            _pixart_inputs,
            ("self", "cross"),
        ),
        TinyDenoiser(
            "sana",
            "SanaTransformer2DModel",
            {
                "sample_size": LATENT // 2,
                "patch_size": 1,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 3,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "num_cross_attention_heads": 4,
                "cross_attention_head_dim": 16,
                "cross_attention_dim": 64,
                "caption_channels": TEXT_DIM,
            },
            _sana_inputs,
            ("self", "cross"),
        ),
        TinyDenoiser(
            "wan",
            "WanTransformer3DModel",
            {
                "patch_size": (1, 2, 2),
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 3,
                "attention_head_dim": 24,
                "num_attention_heads": 2,
                "text_dim": TEXT_DIM,
                "freq_dim": 32,
                "ffn_dim": 96,
                "rope_max_seq_len": 32,
            },
            _wan_inputs,
            ("self", "cross"),
            two_calls=True,
        ),
        TinyDenoiser(
            "qwenimage",
            "QwenImageTransformer2DModel",
            {
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 4,
                "num_layers": 3,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": TEXT_DIM,
                "axes_dims_rope": (4, 6, 6),
            },
            _qwenimage_inputs,
            ("joint",),
            two_calls=True,
        ),
    )
}


def tiny_denoiser(name: str, seed: int = 0, **config_overrides: Any) -> nn.Module:
    """The bare denoiser of the pipeline `name` (a key of `DENOISERS`), float32, `eval()`."""
    if name not in DENOISERS:
        raise KeyError(f"no tiny denoiser {name!r}; there are {', '.join(DENOISERS)}")
    return DENOISERS[name].build(seed, **config_overrides)


def tiny_denoiser_inputs(name: str, model: nn.Module, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one forward; the result is `model(**inputs, return_dict=False)[0]`."""
    return DENOISERS[name].inputs(model, batch, seed)
