"""The part of the sweep for modular pipelines: one of each family, with the parts of the classic pipeline that stands beside it.

As `pipelines.py`, and in need of the same checkout of the library's tests.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

import torch

from . import pipelines
from .pipeline_builds import Built, built, randomized
from .pipeline_loops import Loop
from .pipeline_siblings import _like
from .rows import Row

versions = pipelines.versions

# Family -> (its blocks, the classic pipeline that has the parts). Of the others no small pipeline is recorded.
FAMILIES = {
    "cosmos": ("Cosmos3OmniBlocks", "Cosmos3OmniPipeline"),
    "flux": ("FluxAutoBlocks", "FluxPipeline"),
    "flux2": ("Flux2AutoBlocks", "Flux2Pipeline"),
    "helios": ("HeliosAutoBlocks", "HeliosPipeline"),
    "ltx": ("LTXAutoBlocks", "LTXPipeline"),
    "qwenimage": ("QwenImageAutoBlocks", "QwenImagePipeline"),
    "stable_diffusion_3": ("StableDiffusion3AutoBlocks", "StableDiffusion3Pipeline"),
    "stable_diffusion_xl": ("StableDiffusionXLAutoBlocks", "StableDiffusionXLPipeline"),
    "wan": ("WanBlocks", "WanPipeline"),
    "z_image": ("ZImageAutoBlocks", "ZImagePipeline"),
}
# Family -> (its blocks, the denoisers in their recorded small configs, the arguments of a call behind the text encoder, those of
# its guider). Where no classic pipeline has parts that fit, the blocks from the prompt's embeddings to the latents are measured.
BARE: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "anima": (
        "AnimaAutoBlocks",
        {"transformer": "CosmosTransformer3DModel", "extra_pos_embed_type": None},
        lambda: {
            "height": 64,
            "width": 64,
            **{
                f"{side}{key}": value
                for seed, side in enumerate(("", "negative_"))
                for key, value in {
                    "qwen_prompt_embeds": _random(1, 4, 16, seed=seed),
                    "qwen_attention_mask": torch.ones(1, 4, dtype=torch.long),
                    "t5_input_ids": torch.arange(5)[None],
                    "t5_attention_mask": torch.ones(1, 5, dtype=torch.long),
                }.items()
            },
        },
    ),
    # Its blocks have sigmas of their own, no scheduler and no guider.
    "echo": (
        "EchoBlocks",
        {"transformer": "LTX2VideoTransformer3DModel", "audio_in_channels": 16, "audio_out_channels": 16},
        lambda: {
            "connector_prompt_embeds": _random(1, 16, 16),
            "connector_audio_prompt_embeds": _random(1, 16, 16, seed=1),
            "connector_attention_mask": torch.ones(1, 16),
            "height": 64,
            "width": 64,
            "num_frames": 9,
            "sigmas": (1.0, 0.5, 0.0),
        },
    ),
    "ernie_image": (
        "ErnieImageAutoBlocks",
        {"transformer": "ErnieImageTransformer2DModel"},
        lambda: {
            "prompt_embeds": [_random(6, 16)],
            "negative_prompt_embeds": [_random(6, 16, seed=1)],
            "height": 128,
            "width": 128,
        },
    ),
    "flux3": (
        "Flux3AutoBlocks",
        {"transformer": "Flux3Transformer2DModel"},
        lambda: {
            "prompt_embeds": _random(1, 6, 32),
            "negative_prompt_embeds": _random(1, 6, 32, seed=1),
            "height": 128,
            "width": 128,
        },
    ),
    "hunyuan_video1_5": (
        "HunyuanVideo15AutoBlocks",
        {"transformer": "HunyuanVideo15Transformer3DModel", "in_channels": 65, "out_channels": 32},
        lambda: {
            "prompt_embeds": _random(1, 6, 16),
            "negative_prompt_embeds": _random(1, 6, 16, seed=1),
            "prompt_embeds_2": _random(1, 4, 8),
            "negative_prompt_embeds_2": _random(1, 4, 8, seed=1),
            "batch_size": 1,
            "height": 64,
            "width": 64,
            "num_frames": 5,
            **{f"{side}prompt_embeds_mask": torch.ones(1, 6) for side in ("", "negative_")},
            **{f"{side}prompt_embeds_mask_2": torch.ones(1, 4) for side in ("", "negative_")},
        },
    ),
    "ideogram4": (
        "Ideogram4AutoBlocks",
        {"transformer": "Ideogram4Transformer2DModel", "unconditional_transformer": "Ideogram4Transformer2DModel"},
        lambda: {
            "text_features": _random(1, 6, 24),
            "text_lengths": torch.tensor([6]),
            "height": 256,
            "width": 256,
            "guidance_schedule": [3.0, 3.0],
        },
    ),
    "krea2": (
        "Krea2AutoBlocks",
        {"transformer": "Krea2Transformer2DModel"},
        lambda: {
            "prompt_embeds": _random(1, 4, 3, 16),
            "negative_prompt_embeds": _random(1, 4, 3, 16, seed=1),
            "height": 128,
            "width": 128,
            **{f"{side}prompt_embeds_mask": torch.ones(1, 4, dtype=torch.bool) for side in ("", "negative_")},
        },
    ),
    "ltx2": (
        "LTX2AutoBlocks",
        {"transformer": "LTX2VideoTransformer3DModel"},
        lambda: {
            **{
                f"{side}connector_{kind}prompt_embeds": _random(1, 16, 32, seed=seed)
                for seed, side in enumerate(("", "negative_"))
                for kind in ("", "audio_")
            },
            **{f"{side}connector_attention_mask": torch.ones(1, 16) for side in ("", "negative_")},
            "height": 64,
            "width": 64,
            "num_frames": 9,
            "batch_size": 1,
            "dtype": torch.float32,
        },
    ),
    "minimax_h3": (
        "MiniMaxH3Blocks",
        {"transformer": "MiniMaxH3Transformer3DModel", "in_channels": 24, "audio_in_channels": 32},
        lambda: {
            "prompt_embeds": _random(1, 4, 8),
            "text_token_tags": torch.ones(4, dtype=torch.long),
            "height": 64,
            "width": 64,
            "num_frames": 124,
        },
    ),
    "minimax_music3": (
        "MiniMaxMusic3Blocks",
        {"transformer": "MiniMaxMusic3Transformer1DModel"},
        lambda: {"frame_hiddens": _random(1, 12, 16)},
    ),
    "qwenimage21": (
        "QwenImage21AutoBlocks",
        {"transformer": "QwenImage21Transformer2DModel"},
        lambda: {
            "prompt_embeds": _random(1, 6, 16),
            "negative_prompt_embeds": _random(1, 6, 16, seed=1),
            "height": 64,
            "width": 64,
            **{f"{side}prompt_embeds_mask": torch.ones(1, 6, dtype=torch.bool) for side in ("", "negative_")},
            **{f"{side}image_pad_mask": torch.zeros(1, 6, dtype=torch.bool) for side in ("", "negative_")},
        },
    ),
    "wan_animate_2": (
        "WanAnimate2Blocks",
        {},
        lambda: {
            "driving_video_pixels": _random(1, 3, 5, 32, 32),
            "reference_image_latents": _random(20, 1, 4, 4, seed=1),
            "segment_frame_length": 5,
            "effective_segment": 4,
            "num_segments": 1,
            "height": 32,
            "width": 32,
            "condition_clip_context": _random(1, 4, 1280, seed=2),
            "denoiser_input_fields": {"encoder_hidden_states_image": _random(1, 4, 1280, seed=3)},
            "prompt_ref_embeds": _random(1, 8, 32, seed=4),
            "prompt_embeds": _random(1, 8, 32, seed=5),
            "negative_prompt_embeds": _random(1, 8, 32, seed=6),
        },
    ),
}
# Arguments that a modular pipeline has in its guider, or not at all.
LEFT_OUT = ("output_type", "return_dict", "guidance_scale", "true_cfg_scale", "cfg_normalization", "cfg_truncation")


def names() -> list[str]:
    """The families of modular pipelines."""
    import diffusers.modular_pipelines as library

    pipelines.tests()
    return sorted(m.name for m in pkgutil.iter_modules(library.__path__) if m.ispkg)


def prepare(name: str) -> None:
    """Import what builds `name`."""
    if name in FAMILIES or name == "ltx2":
        pipelines.prepare(FAMILIES[name][1] if name in FAMILIES else "LTX2Pipeline")


class Modular:
    """A modular pipeline with the parts of a classic one, up to the latents."""

    def __init__(self, family: str, classic: Built):
        import diffusers.modular_pipelines as library
        from diffusers.guiders import ClassifierFreeGuidance

        self.classic = classic
        blocks = getattr(library, FAMILIES[family][0])()
        if "decode" in blocks.sub_blocks:
            blocks.sub_blocks.pop("decode")
        self.pipe = blocks.init_pipeline()
        specs = self.pipe._component_specs
        parts = {k: v for k, v in classic.pipe.components.items() if v is not None and k in specs}
        if "guider" in specs:
            kind = specs["guider"].type_hint or ClassifierFreeGuidance
            parts["guider"] = kind(guidance_scale=3.0)
        self.pipe.update_components(**parts)
        if hasattr(self.pipe, "disable_safety_checker"):
            self.pipe.disable_safety_checker()
        self.pipe.set_progress_bar_config(disable=True)
        randomized(self.pipe)

    def inputs(self) -> dict[str, Any]:
        """The arguments of one call."""
        given = {k: v for k, v in self.classic.inputs().items() if k not in LEFT_OUT}
        if "negative_prompt" in {p.name for p in self.pipe.blocks.inputs}:
            given.setdefault("negative_prompt", "ugly")
        return given


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _frames() -> dict[str, Any]:
    """In the place of the encoder of frames: two of its own for each, of the denoiser's width."""
    from diffusers import ConfigMixin, ModelMixin

    class Frames(ModelMixin, ConfigMixin):
        config_name = "config.json"

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            return frames.repeat_interleave(2, dim=1) * self.scale

    return {"condition_encoder": Frames()}


def _vaes() -> dict[str, Any]:
    classic, reason = built("LTX2Pipeline")
    if classic is None:
        raise RuntimeError(reason)
    return {part: classic.pipe.components[part] for part in ("vae", "audio_vae", "transformer")}


def _conditioner() -> dict[str, Any]:
    from diffusers import AnimaTextConditioner

    sizes = dict(source_dim=16, target_dim=16, model_dim=16, num_layers=1, num_attention_heads=2, target_vocab_size=32)
    return {"text_conditioner": AnimaTextConditioner(**sizes).eval()}


def _animate() -> dict[str, Any]:
    """As the library's tests have them, with a VAE of the factors that the blocks count on."""
    from diffusers import AutoencoderKLWan, WanAnimate2Transformer3DModel

    sizes = dict(dim=48, ffn_dim=64, freq_dim=32, text_dim=32, text_len=16, out_dim=16, num_heads=4, num_layers=2)
    vae = dict(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
    return {
        "transformer": WanAnimate2Transformer3DModel(in_dim=36, **sizes).eval(),
        "vae": AutoencoderKLWan(**vae).eval(),
        "scheduler": _euler(),
    }


def _euler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


HELPERS: dict[str, Callable[[], dict[str, Any]]] = {
    "anima": _conditioner,
    "ltx2": _vaes,
    "minimax_music3": _frames,
    "wan_animate_2": _animate,
}


class Bare:
    """A modular pipeline from the prompt's embeddings to the latents: its denoising blocks with a small denoiser."""

    def __init__(self, family: str):
        import importlib

        from diffusers.guiders import ClassifierFreeGuidance

        from .diffusers import build

        name, models, self.inputs_of = BARE[family]
        blocks = getattr(importlib.import_module(f"diffusers.modular_pipelines.{family}"), name)()
        for part in [part for part in blocks.sub_blocks if part != "denoise"]:
            blocks.sub_blocks.pop(part)
        self.pipe = blocks.init_pipeline()
        parts = {part: build(record)[0] for part, record in models.items() if isinstance(record, str)}
        changes = {key: value for key, value in models.items() if not isinstance(value, str)}
        if changes:
            # Channels that the blocks count on where they have no VAE to ask.
            parts["transformer"] = _like(parts["transformer"], **changes)
        if family in HELPERS:
            parts |= HELPERS[family]()
        for part, spec in self.pipe._component_specs.items():
            kind = spec.type_hint
            if part in parts or kind is None:
                continue
            if "guider" in part:
                parts[part] = (kind or ClassifierFreeGuidance)(guidance_scale=3.0)
            elif hasattr(kind, "step") and hasattr(kind, "set_timesteps"):
                parts[part] = kind()
        self.pipe.update_components(**parts)
        self.pipe.set_progress_bar_config(disable=True)
        randomized(self.pipe)

    def inputs(self) -> dict[str, Any]:
        """The arguments of one call."""
        return {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), **self.inputs_of()}


def measure(name: str) -> Row:
    """Build one of the family small, and measure it."""
    if name in BARE:

        def bare() -> Loop:
            torch.manual_seed(0)
            return Loop(Bare(name))

        return pipelines.measured(Row(name, BARE[name][0]), bare)
    if name not in FAMILIES:
        return Row(name, name, reason="no small pipeline of the family is recorded")
    row = Row(name, FAMILIES[name][0])

    def loop() -> Loop | str:
        classic, reason = built(FAMILIES[name][1])
        if classic is None:
            return reason
        torch.manual_seed(0)
        return Loop(Modular(name, classic))

    return pipelines.measured(row, loop)
