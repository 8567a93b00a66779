"""Tiny random diffusion pipelines of every family, and the official PAG pipelines of the same parts.

Pipelines are the stock classes of diffusers around the denoisers of `denoisers.py`. `tiny_call` gives fixed initial
latents, so that two calls with the same arguments start from the same noise; only ancestral schedulers draw more,
from the `generator` that the caller may add.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .denoisers import text_mask, tiny_denoiser
from .diffusers_parts import (
    LATENT,
    NEGATIVE_PROMPT,
    PROMPT,
    TEXT_DIM,
    TEXT_TOKENS,
    flow_euler,
    flow_multistep,
    randn,
    tiny_clip_text_encoder,
    tiny_clip_tokenizer,
    tiny_scheduler,
    tiny_vae,
)


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
            "prompt_embeds": randn(batch, TEXT_TOKENS, width, seed=seed + 11),
            "negative_prompt_embeds": randn(batch, TEXT_TOKENS, width, seed=seed + 12),
        }
        if pooled:
            result["pooled_prompt_embeds"] = randn(batch, TEXT_DIM, seed=seed + 13)
            result[negative_pooled] = randn(batch, TEXT_DIM, seed=seed + 14)
        if mask:
            result[mask] = text_mask(batch, 0)
            result[f"negative_{mask}"] = text_mask(batch, 2)
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
            lambda: flow_euler(shift=3.0),
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
            lambda: flow_euler(shift=3.0),
            _embeds(TEXT_DIM, pooled=True),
            _grid(8),
            _IMAGE,
            _vae_only,
        ),
        TinyPipeline(
            "flux",
            "FluxPipeline",
            "transformer",
            lambda: flow_euler(shift=3.0, use_dynamic_shifting=True),
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
            lambda: flow_multistep("DPMSolverMultistepScheduler"),
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
            lambda: flow_multistep("UniPCMultistepScheduler"),
            _embeds(TEXT_DIM),
            _video,
            {"height": 64, "width": 64, "num_frames": 5, "guidance_scale": 5.0},
            lambda seed: {},
        ),
        TinyPipeline(
            "qwenimage",
            "QwenImagePipeline",
            "transformer",
            lambda: flow_euler(shift=3.0, use_dynamic_shifting=True),
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
    call["latents"] = randn(*tiny.latents(batch, call["height"], call["width"]), seed=seed + 10)
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
