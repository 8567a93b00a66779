"""Tiny random diffusion pipelines and denoisers of every family: no network, fixed by the seed.

Pipelines are the stock classes of diffusers. Their denoisers are drawn by `randomize_`: no output projection
is zero and the maps are far from uniform, so that an edit of any attention layer, or of the prompt, moves the
final latents. `tiny_call` gives fixed initial latents, so that two calls with the same arguments start from
the same noise; only ancestral schedulers draw more, from the `generator` that the caller may add.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .transformers_models import randomize_

TEXT_TOKENS = 8
TEXT_DIM = 32
LATENT = 16
PROMPT = "a red cube and a blue ball"
NEGATIVE_PROMPT = "dark photo"

# One token each for the tiny tokenizer; any other word falls back to characters (several tokens).
_WORDS = (
    "a an the and or of on in under over with left right big small red green blue yellow white black cube "
    "ball cone cat dog fox bird car house tree photo painting dark bright is to two three"
)
WORDS = tuple(_WORDS.split())


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- schedulers

_SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
    "unipc": ("UniPCMultistepScheduler", {"steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1}),
}
SCHEDULERS: tuple[str, ...] = tuple(_SCHEDULERS)
STOCHASTIC_SCHEDULERS: tuple[str, ...] = ("euler_ancestral",)


def tiny_scheduler(kind: str, **config: Any) -> Any:
    """A scheduler configured as for Stable Diffusion: one of `SCHEDULERS`; `config` overrides its entries."""
    import diffusers

    key = kind.lower().replace("-", "_")
    key = {"eulerancestral": "euler_ancestral", "euler_a": "euler_ancestral", "dpmpp2m": "dpm++2m"}.get(key, key)
    if key not in _SCHEDULERS:
        raise KeyError(f"no tiny scheduler {kind!r}; there are {', '.join(SCHEDULERS)}")
    name, defaults = _SCHEDULERS[key]
    return getattr(diffusers, name)(**{**_SD_BETAS, **defaults, **config})


def _flow_euler(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _flow_multistep(name: str) -> Any:
    import diffusers

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return getattr(diffusers, name)(**flow)


# -------------------------------------------------------------------------------------- text encoders and VAE


def tiny_clip_tokenizer() -> Any:
    """A small `CLIPTokenizer` in memory: `WORDS` are one token each, other ASCII words several."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    vocab = letters + [f"{c}</w>" for c in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for i, c in enumerate(word[1:], start=1):
            right = c + ("</w>" if i == len(word) - 1 else "")
            if left + right not in vocab:
                vocab.append(left + right)
                merges.append((left, right))
            left += right
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocab)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=77)


def tiny_clip_text_encoder(tokenizer: Any, seed: int = 0, projection: bool = False) -> nn.Module:
    """A `CLIPTextModel` (or `...WithProjection`) of width `TEXT_DIM` that fits `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=TEXT_DIM,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    return randomize_(model, seed).eval()


def tiny_vae(seed: int = 0) -> nn.Module:
    """An `AutoencoderKL` with 4 latent channels that scales by 8, so that images can be decoded."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            sample_size=8 * LATENT,
            shift_factor=0.0,  # SD3 and FLUX add it
        )
    return randomize_(model, seed).eval()


# -------------------------------------------------------------------------------------------------- denoisers


def _text_mask(batch: int, offset: int) -> Tensor:
    """`[batch, TEXT_TOKENS]` of 0 and 1: the last tokens of a row are padding, a different number per row."""
    lengths = torch.tensor([TEXT_TOKENS - 2 - (row + offset) % 4 for row in range(batch)])
    return (torch.arange(TEXT_TOKENS)[None] < lengths[:, None]).long()


def _unet_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    return {
        "sample": _randn(batch, 4, LATENT, LATENT, seed=seed),
        "timestep": torch.tensor(601),
        "encoder_hidden_states": _randn(batch, TEXT_TOKENS, model.config.cross_attention_dim, seed=seed + 1),
    }


def _sdxl_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    size = 8.0 * LATENT
    added = {
        "text_embeds": _randn(batch, TEXT_DIM, seed=seed + 2),
        "time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size]] * batch),
    }
    return {**_unet_inputs(model, batch, seed), "added_cond_kwargs": added}


def _sd3_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _randn(batch, 4, LATENT, LATENT, seed=seed),
        "encoder_hidden_states": _randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "pooled_projections": _randn(batch, TEXT_DIM, seed=seed + 2),
        "timestep": torch.full((batch,), 601.0),
    }


def _flux_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    side = LATENT // 2
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(side * side, 3).float()
    inputs = {
        "hidden_states": _randn(batch, side * side, 16, seed=seed),
        "encoder_hidden_states": _randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "pooled_projections": _randn(batch, TEXT_DIM, seed=seed + 2),
        "timestep": torch.full((batch,), 0.601),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    if model.config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


def _pixart_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _randn(batch, 4, LATENT, LATENT, seed=seed),
        "encoder_hidden_states": _randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "encoder_attention_mask": _text_mask(batch, 0),
        "timestep": torch.full((batch,), 601),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sana_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _randn(batch, 4, LATENT // 2, LATENT // 2, seed=seed),
        "encoder_hidden_states": _randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "encoder_attention_mask": _text_mask(batch, 0),
        "timestep": torch.full((batch,), 601.0),
    }


def _wan_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _randn(batch, 4, 2, LATENT // 2, LATENT // 2, seed=seed),
        "encoder_hidden_states": _randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "timestep": torch.full((batch,), 601.0),
    }


def _qwenimage_inputs(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    side = LATENT // 2
    return {
        "hidden_states": _randn(batch, side * side, 16, seed=seed),
        "encoder_hidden_states": _randn(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1),
        "encoder_hidden_states_mask": _text_mask(batch, 0),
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


# -------------------------------------------------------------------------------------------------- pipelines


@dataclass(frozen=True)
class TinyPipeline:
    """One pipeline family.

    Attributes:
        name: the key in `PIPELINES` and `DENOISERS`.
        pipeline_class: class name in `diffusers`.
        denoiser: the attribute that holds the denoiser, "unet" or "transformer".
        scheduler: builds the stock scheduler.
        embeds: `(batch, seed)` to the prompt arguments of a call.
        latents: `(batch, height, width)` in pixels to the shape of the initial latents.
        call: further arguments of a call, with the default size and guidance.
        components: builds the other components from a seed; what is not named is None.
        pag_class: class name of the official PAG pipeline, or None.
        text: takes prompt strings (`tiny_call(name, text=True)`).
    """

    name: str
    pipeline_class: str
    denoiser: str
    scheduler: Callable[[], Any]
    embeds: Callable[[int, int], dict[str, Tensor]]
    latents: Callable[[int, int, int], tuple[int, ...]]
    call: dict[str, Any]
    components: Callable[[int], dict[str, Any]]
    pag_class: str | None = None
    text: bool = False
    init: dict[str, Any] = field(default_factory=dict)


def _embeds(
    width: int,
    pooled: bool = False,
    mask: str | None = None,
    negative_pooled: str = "negative_pooled_prompt_embeds",
) -> Callable[[int, int], dict[str, Tensor]]:
    """Embeddings `[batch, TEXT_TOKENS, width]` of prompt and negative prompt, pooled vectors, masks."""

    def build(batch: int, seed: int) -> dict[str, Tensor]:
        result = {
            "prompt_embeds": _randn(batch, TEXT_TOKENS, width, seed=seed + 11),
            "negative_prompt_embeds": _randn(batch, TEXT_TOKENS, width, seed=seed + 12),
        }
        if pooled:
            result["pooled_prompt_embeds"] = _randn(batch, TEXT_DIM, seed=seed + 13)
            result[negative_pooled] = _randn(batch, TEXT_DIM, seed=seed + 14)
        if mask:
            result[mask] = _text_mask(batch, 0)
            result[f"negative_{mask}"] = _text_mask(batch, 2)
        return result

    return build


def _grid(scale: int) -> Callable[[int, int, int], tuple[int, ...]]:
    return lambda batch, height, width: (batch, 4, height // scale, width // scale)


def _packed(batch: int, height: int, width: int) -> tuple[int, ...]:
    """FLUX and Qwen-Image: 2 by 2 patches of a 4-channel latent, in row-major order."""
    return (batch, (height // 16) * (width // 16), 16)


def _video(batch: int, height: int, width: int) -> tuple[int, ...]:
    return (batch, 4, 2, height // 8, width // 8)


def _sd_components(seed: int) -> dict[str, Any]:
    tokenizer = tiny_clip_tokenizer()
    return {
        "vae": tiny_vae(seed + 1),
        "tokenizer": tokenizer,
        "text_encoder": tiny_clip_text_encoder(tokenizer, seed + 2),
    }


def _sdxl_components(seed: int) -> dict[str, Any]:
    second = tiny_clip_tokenizer()
    return {
        **_sd_components(seed),
        "tokenizer_2": second,
        "text_encoder_2": tiny_clip_text_encoder(second, seed + 3, projection=True),
    }


def _vae_only(seed: int) -> dict[str, Any]:
    return {"vae": tiny_vae(seed + 1)}


_IMAGE: dict[str, Any] = {"height": 8 * LATENT, "width": 8 * LATENT, "guidance_scale": 5.0}

PIPELINES: dict[str, TinyPipeline] = {
    tiny.name: tiny
    for tiny in (
        TinyPipeline(
            "sd",
            "StableDiffusionPipeline",
            "unet",
            lambda: tiny_scheduler("ddim"),
            _embeds(TEXT_DIM),
            _grid(8),
            _IMAGE,
            _sd_components,
            "StableDiffusionPAGPipeline",
            text=True,
            init={"requires_safety_checker": False},
        ),
        TinyPipeline(
            "sdxl",
            "StableDiffusionXLPipeline",
            "unet",
            lambda: tiny_scheduler("euler"),
            _embeds(2 * TEXT_DIM, pooled=True),
            _grid(8),
            _IMAGE,
            _sdxl_components,
            "StableDiffusionXLPAGPipeline",
            text=True,
            init={"add_watermarker": False},
        ),
        TinyPipeline(
            "sd3",
            "StableDiffusion3Pipeline",
            "transformer",
            lambda: _flow_euler(shift=3.0),
            _embeds(TEXT_DIM, pooled=True),
            _grid(8),
            _IMAGE,
            _vae_only,
            "StableDiffusion3PAGPipeline",
        ),
        TinyPipeline(
            "sd35",
            "StableDiffusion3Pipeline",
            "transformer",
            lambda: _flow_euler(shift=3.0),
            _embeds(TEXT_DIM, pooled=True),
            _grid(8),
            _IMAGE,
            _vae_only,
        ),
        TinyPipeline(
            "flux",
            "FluxPipeline",
            "transformer",
            lambda: _flow_euler(shift=3.0, use_dynamic_shifting=True),
            _embeds(TEXT_DIM, pooled=True),
            _packed,
            # distilled guidance, heard only with `guidance_embeds`; true CFG is off until `true_cfg_scale`
            {**_IMAGE, "guidance_scale": 3.5},
            _vae_only,
        ),
        TinyPipeline(
            "pixart",
            "PixArtSigmaPipeline",
            "transformer",
            lambda: tiny_scheduler("dpm++2m"),
            _embeds(TEXT_DIM, mask="prompt_attention_mask"),
            _grid(8),
            {**_IMAGE, "use_resolution_binning": False, "negative_prompt": None},
            _vae_only,
            "PixArtSigmaPAGPipeline",
        ),
        TinyPipeline(
            "sana",
            "SanaPipeline",
            "transformer",
            lambda: _flow_multistep("DPMSolverMultistepScheduler"),
            _embeds(TEXT_DIM, mask="prompt_attention_mask"),
            _grid(32),  # without a VAE the pipeline assumes the factor of its own
            {
                "height": 256,
                "width": 256,
                "guidance_scale": 5.0,
                "use_resolution_binning": False,
                "negative_prompt": None,  # the default is "", refused beside embeddings (also PixArt)
            },
            lambda seed: {},
            "SanaPAGPipeline",
        ),
        TinyPipeline(
            "wan",
            "WanPipeline",
            "transformer",
            lambda: _flow_multistep("UniPCMultistepScheduler"),
            _embeds(TEXT_DIM),
            _video,
            {"height": 64, "width": 64, "num_frames": 5, "guidance_scale": 5.0},
            lambda seed: {},
        ),
        TinyPipeline(
            "qwenimage",
            "QwenImagePipeline",
            "transformer",
            lambda: _flow_euler(shift=3.0, use_dynamic_shifting=True),
            _embeds(TEXT_DIM, mask="prompt_embeds_mask"),
            _packed,
            {"height": 8 * LATENT, "width": 8 * LATENT, "true_cfg_scale": 4.0},
            lambda seed: {},
        ),
    )
}


def _pipeline(name: str) -> TinyPipeline:
    if name not in PIPELINES:
        raise KeyError(f"no tiny pipeline {name!r}; there are {', '.join(PIPELINES)}")
    return PIPELINES[name]


def tiny_pipeline(name: str, scheduler: Any = None, seed: int = 0, **denoiser_overrides: Any) -> Any:
    """A stock diffusers pipeline with tiny random components and the progress bar off.

    Args:
        scheduler: a scheduler, a name for `tiny_scheduler` (SD, SDXL, PixArt), or None for the usual one.
        denoiser_overrides: entries of the denoiser's config, e.g. `guidance_embeds=True` for "flux".
    """
    import diffusers

    tiny = _pipeline(name)
    pipeline_class = getattr(diffusers, tiny.pipeline_class)
    if isinstance(scheduler, str):
        scheduler = tiny_scheduler(scheduler)
    # every constructor argument without a default: None is what a pipeline takes for an absent component
    required = {
        key: None
        for key, parameter in inspect.signature(pipeline_class.__init__).parameters.items()
        if key != "self" and parameter.default is inspect.Parameter.empty
    }
    pipe = pipeline_class(
        **{
            **required,
            **tiny.init,
            **tiny.components(seed),
            "scheduler": tiny.scheduler() if scheduler is None else scheduler,
            tiny.denoiser: tiny_denoiser(name, seed, **denoiser_overrides),
        }
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_call(
    name: str,
    batch: int = 1,
    steps: int = 4,
    seed: int = 0,
    text: bool = False,
    height: int | None = None,
    width: int | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Keyword arguments for `pipe(**kwargs)`; the latents are `pipe(**kwargs)[0]`.

    Prompts are seeded embeddings, or strings with `text` ("sd" and "sdxl"). Guidance is on (5.0; 4.0 for
    "qwenimage") but for "flux", where `true_cfg_scale=4.0` turns it on; `guidance_scale=1.0` turns it off.
    Initial latents are given, in the shape that `height` and `width` (pixels) ask for; an ancestral scheduler
    wants a `generator` too.
    """
    tiny = _pipeline(name)
    if text and not tiny.text:
        raise ValueError(f"the tiny pipeline {name!r} has no text encoder: its prompts are embeddings")
    call = dict(tiny.call)
    if height is not None:
        call["height"] = height
    if width is not None:
        call["width"] = width
    if text:
        call |= {"prompt": [PROMPT] * batch, "negative_prompt": [NEGATIVE_PROMPT] * batch}
    else:
        call |= tiny.embeds(batch, seed)
    call["latents"] = _randn(*tiny.latents(batch, call["height"], call["width"]), seed=seed + 10)
    return {**call, "num_inference_steps": steps, "output_type": "latent", "return_dict": False, **overrides}


def official_pag(name: str, pipe: Any, layers: str | list[str] | None = None) -> Any:
    """The official PAG pipeline of diffusers with the components of `pipe`.

    The denoiser and the scheduler are copies, because PAG pipelines overwrite processors (and leave them
    behind after an exception). Call it with the arguments of `pipe` and `pag_scale=3.0`.

    Args:
        layers: `pag_applied_layers`; None keeps the default of diffusers.
    """
    import diffusers

    tiny = _pipeline(name)
    if tiny.pag_class is None:
        names = ", ".join(n for n, t in PIPELINES.items() if t.pag_class)
        raise ValueError(f"diffusers has no PAG pipeline for {name!r}; it has them for {names}")
    components = dict(pipe.components)
    components[tiny.denoiser] = copy.deepcopy(components[tiny.denoiser])
    components["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config)
    pag_class = getattr(diffusers, tiny.pag_class)
    known = inspect.signature(pag_class.__init__).parameters
    expected = {key: value for key, value in components.items() if key in known}
    extra = {} if layers is None else {"pag_applied_layers": layers}
    pag = pag_class(**expected, **tiny.init, **extra)
    pag.vae_scale_factor = pipe.vae_scale_factor  # without a VAE, SanaPAG assumes 8 where Sana assumes 32
    pag.set_progress_bar_config(disable=True)
    return pag


def self_attention_modules(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Path to module of every self or joint attention of a denoiser, in the order of `named_modules`."""
    return {
        path: module
        for path, module in denoiser.named_modules()
        # SD3.5's `attn2` is a self-attention: only the module knows
        if hasattr(module, "to_v") and not getattr(module, "is_cross_attention", False)
    }
