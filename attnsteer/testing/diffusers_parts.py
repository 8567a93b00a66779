"""Parts of the tiny diffusion pipelines: sizes, schedulers, tokenizer, text encoder and autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .weights import randomize_

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


def randn(*shape: int, seed: int) -> Tensor:
    """Normal noise from a private generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def flow_euler(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def flow_multistep(name: str) -> Any:
    import diffusers

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return getattr(diffusers, name)(**flow)


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
