"""The benchmarked models: real proportions, random weights; the language model has attention sinks planted in it."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

SINK, FIRST_WORD = 1, 2
# Coordinates of the embedding that carry "any token" and "this token is a sink".
COMMON, MARK = 0, 1


@dataclass(frozen=True)
class LlamaShape:
    """A Llama-type decoder; the defaults are one layer's proportions of Llama-3.2-1B, with few layers and words."""

    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    mlp: int = 8192
    layers: int = 2
    vocab: int = 512

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class UNetShape:
    """A Stable-Diffusion-1.5-type UNet; the defaults are its own sizes."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    text_dim: int = 768
    latent: int = 64

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "channels": list(self.channels)}


@dataclass(frozen=True)
class MMDiTShape:
    """An SD3-type transformer; the block that SLG leaves out stands at the same depth as the first of SD3.5-medium's."""

    width: int = 512
    heads: int = 8
    layers: int = 10
    latent: int = 32
    skipped: int = 3

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@torch.no_grad()
def llama(shape: LlamaShape, context: int = 4096, seed: int = 0) -> nn.Module:
    """A stock `LlamaForCausalLM` in fp32 on SDPA with random weights and planted sinks.

    Every embedding has a component COMMON, that of the token SINK also a component MARK. In each head the queries
    read the first and the keys the second into the rotary pair of the lowest frequency, which hardly turns over the
    context, so that a sink token draws the attention of all later rows, with a strength of its own in each head.

    Args:
        context: tokens of the prompts to come; the strength is set for it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocab,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    words = model.model.embed_tokens.weight
    nn.init.normal_(words)
    size = shape.hidden**0.5
    words[:, [COMMON, MARK]] = 0.0
    words[:, COMMON] = 0.5 * size
    words[SINK, MARK] = 0.5 * size
    _plant(model, shape, context)
    return model


def _plant(model: nn.Module, shape: LlamaShape, context: int) -> None:
    """Write the sinks into each layer's q and k, for the sizes that its own input has after the norm."""
    lane = shape.head_dim // 2 - 1

    def at(layer: nn.Module) -> Any:
        def plant(_: nn.Module, args: Any, hidden: Tensor) -> None:
            # Logits of 5.5 to 7 over a context of 4,096: a sink then holds 2 to 7 % of a row.
            strength = torch.empty(shape.heads).uniform_(5.5, 7.0) + math.log(context / 4096)
            q, k = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
            q[:, [COMMON, MARK]] = 0.0
            k[:, [COMMON, MARK]] = 0.0
            q = q.view(shape.heads, shape.head_dim, -1)
            k = k.view(shape.kv_heads, shape.head_dim, -1)
            q[:, lane, COMMON] = strength / hidden[0, 1:, COMMON].mean()
            k[:, lane, MARK] = shape.head_dim**0.5 / hidden[0, 0, MARK]

        return layer.input_layernorm.register_forward_hook(plant)

    hooks = [at(layer) for layer in model.model.layers]
    try:
        model(prompt(shape, 64, 0), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def prompt(shape: LlamaShape, length: int, sinks: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Token ids [batch, length]: the first is a sink, as in real models, and `sinks` later ones, in the first half."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD, shape.vocab, (batch, length), generator=g)
    ids[:, 0] = SINK
    for row in range(batch):
        ids[row, 1 + torch.randperm(length // 2, generator=g)[:sinks]] = SINK
    return ids


def unet(shape: UNetShape, seed: int = 0) -> nn.Module:
    """A stock `UNet2DConditionModel` in fp32 with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=shape.latent,
        block_out_channels=shape.channels,
        cross_attention_dim=shape.text_dim,
        norm_num_groups=math.gcd(32, shape.channels[0]),
    )
    return model.eval().requires_grad_(False)


def mmdit(shape: MMDiTShape, seed: int = 0) -> nn.Module:
    """A stock `SD3Transformer2DModel` in fp32 with random weights."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=shape.latent,
        in_channels=4,
        out_channels=4,
        num_layers=shape.layers,
        attention_head_dim=shape.width // shape.heads,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.width,
        caption_projection_dim=shape.width,
        pooled_projection_dim=shape.width,
        pos_embed_max_size=shape.latent,
    )
    return model.eval().requires_grad_(False)


def excite_pipelines(model: nn.Module) -> tuple[Any, Any]:
    """(stock Stable Diffusion pipeline, diffusers' own Attend-and-Excite pipeline), on UNets that share weights.

    Parameters ask for gradients, as `from_pretrained` leaves them.
    """
    import diffusers

    model.requires_grad_(True)
    names = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    found = []
    for kind, unet in (("StableDiffusion", model), ("StableDiffusionAttendAndExcite", twin(model))):
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        parts = {"unet": unet, "scheduler": scheduler, **dict.fromkeys(names)}
        pipe = getattr(diffusers, f"{kind}Pipeline")(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        found.append(pipe)
    return found[0], found[1]


def excite_call(shape: UNetShape, side: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of one call of either pipeline, on a latent of `side`, with classifier-free guidance."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 1, 77, shape.text_dim, generator=g)
    return {
        "prompt": None,
        "prompt_embeds": text[0],
        "negative_prompt_embeds": text[1],
        "latents": torch.randn(1, 4, side, side, generator=g),
        "height": 8 * side,
        "width": 8 * side,
        "num_inference_steps": steps,
        "output_type": "latent",
        "return_dict": False,
    }


def twin(model: nn.Module) -> nn.Module:
    """A second model on the same weights, with a config of its own: one is steered while the other stays as it is."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
