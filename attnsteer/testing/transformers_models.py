"""Tiny random transformers models of every host family, built from configs: no network, fixed by the seed.

The weights are drawn so that attention matters (`weights.py`). Token ids 0 to 3 are reserved (padding, begin, end,
image); there is no end token, so `generate` never stops early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import transformers_inputs as prompts
from .transformers_inputs import BOS, EOS, IMAGE, PAD, VOCAB
from .weights import LOGIT_STD, randomize_

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}
_DECODER: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_CLIP_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}
_ABSOLUTE: dict[str, Any] = {"max_position_embeddings": 512}


def _decoder(**extra: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**_DECODER, **extra}


def _llava_config() -> dict[str, Any]:
    return {
        "vision_config": {**_CLIP_VISION, "model_type": "clip_vision_model"},
        "text_config": {**_DECODER, "model_type": "llama"},
        "image_token_index": IMAGE,
        "image_seq_length": 16,
        "pad_token_id": PAD,
    }


def _qwen2_vl_config() -> dict[str, Any]:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return {
        "vision_config": vision,
        # three axes of rotary frequencies (time, height, width): 2 * (2 + 3 + 3) = the head width of 16
        "text_config": {**_DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "image_token_id": IMAGE,
        "video_token_id": VOCAB - 1,
        "vision_start_token_id": VOCAB - 2,
        "vision_end_token_id": VOCAB - 3,
        "tie_word_embeddings": False,
    }


@dataclass(frozen=True)
class TinyTransformers:
    """One host family.

    Attributes:
        name: the key in `TRANSFORMERS`.
        model_class: class name in `transformers`.
        config_class: class name of its config.
        config: returns fresh keyword arguments of the config.
        inputs: `(model, batch, length, padding, seed)` to the keyword arguments of the forward.
        decoder: generates with a KV cache.
        towers: module paths of the attention stacks, the main one last; "" is the model itself.
        embedding_std: std of token embeddings (below one where the model itself multiplies them).
    """

    name: str
    model_class: str
    config_class: str
    config: Callable[[], dict[str, Any]]
    inputs: Callable[[nn.Module, int, int, str | None, int], dict[str, Tensor]] = prompts.text
    decoder: bool = True
    towers: tuple[str, ...] = ("model",)
    embedding_std: float = 1.0
    logit_std: float = LOGIT_STD

    def build(self, seed: int = 0, **config_overrides: Any) -> nn.Module:
        """The model in `eval()` mode on CPU, float32. See `tiny_transformers` for the overrides."""
        import transformers

        overrides = dict(config_overrides)
        attention = overrides.pop("attn_implementation", None)
        config = getattr(transformers, self.config_class)(**_merge(self.config(), overrides))
        if attention is not None:
            config._attn_implementation = attention
        with torch.random.fork_rng(devices=[]):  # the library's own initialisation draws from the global generator
            torch.manual_seed(seed)
            model = getattr(transformers, self.model_class)(config)
        randomize_(model, seed, self.logit_std, self.embedding_std)
        if self.decoder:
            for key in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
                setattr(model.generation_config, key, None)
            model.generation_config.pad_token_id = PAD
        return model.eval()


def _merge(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of a composite model reach its text config unless the top has the key; dicts are merged."""
    merged = dict(base)
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        elif "text_config" in merged and key not in merged and key in merged["text_config"]:
            merged["text_config"] = {**merged["text_config"], key: value}
        else:
            merged[key] = value
    return merged


_HALF_WINDOW = {"sliding_window": 5, "head_dim": 16}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

TRANSFORMERS: dict[str, TinyTransformers] = {
    tiny.name: tiny
    for tiny in (
        TinyTransformers("llama", "LlamaForCausalLM", "LlamaConfig", _decoder()),
        TinyTransformers("mistral", "MistralForCausalLM", "MistralConfig", _decoder(sliding_window=5)),
        TinyTransformers("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _decoder(head_dim=16)),
        TinyTransformers(
            "gemma2",
            "Gemma2ForCausalLM",
            "Gemma2Config",
            # a soft cap of 3 on logits of std 1.5 bends them visibly, as 50 does in the trained model
            _decoder(**_HALF_WINDOW, layer_types=_MIXED, query_pre_attn_scalar=16, attn_logit_softcapping=3.0),
            embedding_std=0.125,  # the model multiplies embeddings by sqrt(64)
        ),
        TinyTransformers(
            "gemma3_text",
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            _decoder(**_HALF_WINDOW, layer_types=_MIXED, query_pre_attn_scalar=16),
            embedding_std=0.125,
        ),
        TinyTransformers(
            "gpt_oss",
            "GptOssForCausalLM",
            "GptOssConfig",
            _decoder(
                **_HALF_WINDOW,
                layer_types=_MIXED,
                num_local_experts=4,
                num_experts_per_tok=2,
                intermediate_size=32,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            ),
        ),
        TinyTransformers("phi3", "Phi3ForCausalLM", "Phi3Config", _decoder()),
        TinyTransformers(
            "gpt2",
            "GPT2LMHeadModel",
            "GPT2Config",
            lambda: {
                **_TOKENS,
                "n_embd": 64,
                "n_layer": 3,
                "n_head": 4,
                "n_positions": 512,
                "n_inner": 96,
                "tie_word_embeddings": False,
            },
            inputs=prompts.text_absolute,
            towers=("transformer",),
        ),
        TinyTransformers(
            # Its modules call SDPA themselves; one kv head, broadcast without `enable_gqa`.
            "falcon",
            "FalconForCausalLM",
            "FalconConfig",
            lambda: {
                **_TOKENS,
                "hidden_size": 64,
                "ffn_hidden_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "multi_query": True,
                "max_position_embeddings": 512,
                "tie_word_embeddings": False,
            },
            towers=("transformer",),
        ),
        TinyTransformers(
            "bert",
            "BertModel",
            "BertConfig",
            lambda: {
                **_TOKENS,
                **_ABSOLUTE,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
            },
            inputs=prompts.text_absolute,
            decoder=False,
            towers=("encoder",),
        ),
        TinyTransformers(
            "bart",
            "BartForConditionalGeneration",
            "BartConfig",
            lambda: {
                **_TOKENS,
                **_ABSOLUTE,
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 96,
                "decoder_ffn_dim": 96,
                "decoder_start_token_id": EOS,
                "forced_eos_token_id": None,
                "scale_embedding": True,
            },
            inputs=prompts.encoder_decoder,
            towers=("model.encoder", "model.decoder"),
            embedding_std=0.125,  # multiplied by sqrt(64), and tied to the output matrix
        ),
        TinyTransformers(
            "t5",
            "T5ForConditionalGeneration",
            "T5Config",
            lambda: {
                **_TOKENS,
                "d_model": 64,
                "d_kv": 16,
                "d_ff": 96,
                "num_layers": 2,
                "num_decoder_layers": 2,
                "num_heads": 4,
                "relative_attention_num_buckets": 8,
                "relative_attention_max_distance": 16,
                "decoder_start_token_id": PAD,
            },
            inputs=prompts.encoder_decoder,
            towers=("encoder", "decoder"),
            logit_std=LOGIT_STD / 4,  # T5 does not divide by sqrt(d) = 4
        ),
        TinyTransformers(
            "llava",
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            _llava_config,
            inputs=prompts.llava,
            towers=("model.vision_tower", "model.language_model"),
        ),
        TinyTransformers(
            "qwen2_vl",
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            _qwen2_vl_config,
            inputs=prompts.qwen2_vl,
            towers=("model.visual", "model.language_model"),
        ),
        TinyTransformers(
            "vit",
            "ViTModel",
            "ViTConfig",
            lambda: {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 8,
            },
            inputs=prompts.vit,
            decoder=False,
            towers=("",),
        ),
    )
}


def _get(name: str) -> TinyTransformers:
    try:
        return TRANSFORMERS[name]
    except KeyError:
        raise KeyError(f"no tiny transformers model {name!r}; there are {', '.join(TRANSFORMERS)}") from None


def tiny_transformers(name: str, seed: int = 0, **config_overrides: Any) -> nn.Module:
    """A tiny random model of the family `name` (a key of `TRANSFORMERS`), float32, `eval()`.

    Args:
        config_overrides: fields of the config; those of a composite model reach its `text_config`, or pass
            `vision_config={...}` and `text_config={...}` to be merged. `attn_implementation` is a name, or
            for a composite model a dict by sub-config (`{"text_config": "eager", "vision_config": "sdpa"}`).
    """
    return _get(name).build(seed, **config_overrides)


def tiny_transformers_inputs(
    name: str,
    model: nn.Module,
    batch: int = 2,
    length: int = 12,
    padding: str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Keyword arguments of `model(**inputs)`: ids and mask `[batch, length]`, and what else the family takes.

    With padding "left" or "right", row b has b tokens fewer than `length` (row 0 is full). Image tokens of
    vision-language models come on top of `length`. Pass them to `generate` as well for decoders.
    """
    return _get(name).inputs(model, batch, length, padding, seed)
