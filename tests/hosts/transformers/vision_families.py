"""Tiny random vision-language models of every type in the table of the transformers host, and prompts with images for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnsteer.testing.transformers_models import randomize_

PAD, BOS, IMAGE, VIDEO, START, TAG = 0, 1, 3, 4, 5, 6
VOCAB, FIRST = 61, 8
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": BOS,
    "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 16,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": TAG,
}


@dataclass(frozen=True)
class VisionFamily:
    """One model type.

    Attributes:
        kind: prefix of the class names in transformers. config: its arguments. block: the token ids of one image.
        pixels: one entry for each image, True for a wide one (Qwen only) -> the arguments that bring them in.
        types: the argument that marks image tokens. bidirectional: prompt rows see later keys.
    """

    kind: str
    config: Callable[[], dict[str, Any]]
    block: tuple[int, ...]
    pixels: Callable[[list[bool], torch.Generator], dict[str, Tensor]]
    types: str | None = None
    bidirectional: bool = False


def _square(wide: list[bool], g: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(len(wide), 3, 16, 16, generator=g)}


def _qwen(wide: list[bool], g: torch.Generator) -> dict[str, Tensor]:
    grids = torch.tensor([[1, 4, 8 if w else 4] for w in wide])
    return {
        "pixel_values": torch.randn(int(grids.prod(dim=-1).sum()), 3 * 2 * 4 * 4, generator=g),
        "image_grid_thw": grids,
    }


def _llava_next(wide: list[bool], g: torch.Generator) -> dict[str, Tensor]:
    n = len(wide)
    return {
        "pixel_values": torch.randn(n, 2, 3, 16, 16, generator=g),
        "image_sizes": torch.tensor([[16, 16]] * n),
    }


def _instructblip(wide: list[bool], g: torch.Generator) -> dict[str, Tensor]:
    return {**_square(wide, g), "qformer_input_ids": torch.full((len(wide), 3), FIRST)}


FAMILIES: dict[str, VisionFamily] = {
    "llava": VisionFamily(
        "Llava",
        lambda: {"vision_config": CLIP, "text_config": {**TEXT, "model_type": "llama"}, "image_token_index": IMAGE},
        (IMAGE,) * 16,
        _square,
        "mm_token_type_ids",
    ),
    # Base image of 16, then one tile of 4 x 4 with a newline token for each row.
    "llava_next": VisionFamily(
        "LlavaNext",
        lambda: {
            "vision_config": CLIP,
            "text_config": {**TEXT, "model_type": "llama"},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[16, 16]],
        },
        (IMAGE,) * 36,
        _llava_next,
        "mm_token_type_ids",
    ),
    "qwen2_vl": VisionFamily(
        "Qwen2VL",
        lambda: {
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
            "text_config": {**TEXT, "rope_parameters": ROPE},
            **QWEN_IDS,
        },
        (START, *(IMAGE,) * 4, TAG),
        _qwen,
        "mm_token_type_ids",
    ),
    "qwen2_5_vl": VisionFamily(
        "Qwen2_5_VL",
        lambda: {
            "vision_config": {
                "depth": 1, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
                "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0],
            },
            "text_config": {**TEXT, "rope_parameters": ROPE},
            **QWEN_IDS,
        },
        (START, *(IMAGE,) * 4, TAG),
        _qwen,
        "mm_token_type_ids",
    ),
    "qwen3_vl": VisionFamily(
        "Qwen3VL",
        lambda: {
            "vision_config": {
                "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
                "patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            },
            "text_config": {**TEXT, "rope_parameters": {**ROPE, "rope_theta": 10000.0}},
            **QWEN_IDS,
        },
        (START, *(IMAGE,) * 4, TAG),
        _qwen,
        "mm_token_type_ids",
    ),
    "internvl": VisionFamily(
        "InternVL",
        lambda: {
            "vision_config": {**SIGLIP, "image_size": [16, 16], "patch_size": [4, 4]},
            "text_config": {**TEXT, "model_type": "qwen2"},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
        (START, *(IMAGE,) * 4, TAG),
        _square,
    ),
    # Two tiles of one image, with a tag between them.
    "idefics3": VisionFamily(
        "Idefics3",
        lambda: {
            "vision_config": SIGLIP,
            "text_config": {**TEXT, "model_type": "llama"},
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
        },
        (START, *(IMAGE,) * 4, TAG, *(IMAGE,) * 4, START),
        lambda wide, g: {"pixel_values": torch.randn(1, 2 * len(wide), 3, 16, 16, generator=g)},
    ),
    "smolvlm": VisionFamily(
        "SmolVLM",
        lambda: {
            "vision_config": SIGLIP,
            "text_config": {**TEXT, "model_type": "llama"},
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
        },
        (START, *(IMAGE,) * 4, TAG, *(IMAGE,) * 4, START),
        lambda wide, g: {"pixel_values": torch.randn(1, 2 * len(wide), 3, 16, 16, generator=g)},
    ),
    "paligemma": VisionFamily(
        "PaliGemma",
        lambda: {
            "vision_config": {**SIGLIP, "projection_dim": 32},
            "text_config": {**TEXT, "model_type": "gemma"},
            "image_token_index": IMAGE,
            "projection_dim": 32,
        },
        (IMAGE,) * 16,
        _square,
        bidirectional=True,
    ),
    "gemma3": VisionFamily(
        "Gemma3",
        lambda: {
            "vision_config": SIGLIP,
            "text_config": {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "image_token_index": IMAGE,
            "mm_tokens_per_image": 4,
            "boi_token_index": START,
            "eoi_token_index": TAG,
        },
        (START, *(IMAGE,) * 4, TAG),
        _square,
        "token_type_ids",
        bidirectional=True,
    ),
    "instructblip": VisionFamily(
        "InstructBlip",
        lambda: {
            "vision_config": {**SIGLIP},
            "qformer_config": {
                "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 32, "encoder_hidden_size": 32, "cross_attention_frequency": 1,
            },
            "text_config": {**TEXT, "model_type": "llama"},
            "image_token_index": IMAGE,
            "num_query_tokens": 4,
        },
        (IMAGE,) * 4,
        _instructblip,
    ),
}  # fmt: skip
_BUILT: dict[str, nn.Module] = {}


def build(name: str) -> nn.Module:
    """The tiny model (one for the whole test run: tests leave it as they found it)."""
    if name not in _BUILT:
        import transformers

        family = FAMILIES[name]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            config = getattr(transformers, f"{family.kind}Config")(**family.config())
            model = getattr(transformers, f"{family.kind}ForConditionalGeneration")(config)
        randomize_(model, 0)
        for module in model.modules():
            generation = getattr(module, "generation_config", None)
            if generation is not None:
                generation.eos_token_id, generation.pad_token_id = None, PAD
        _BUILT[name] = model.eval()
    return _BUILT[name]


def prompts(
    name: str, layout: list[list[Any]], padding: str = "left", seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """(arguments of the model, bool [B, n] of the image tokens): a sample is a list of text lengths, "image" and "wide"."""
    family, g = FAMILIES[name], torch.Generator().manual_seed(seed)
    wide_block = (START, *(IMAGE,) * 8, TAG)
    rows = []
    for sample in layout:
        row: list[int] = []
        for part in sample:
            if isinstance(part, int):
                row += torch.randint(FIRST, VOCAB, (part,), generator=g).tolist()
            else:
                row += wide_block if part == "wide" else family.block
        rows.append(row)
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(length - len(row), length) if padding == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = torch.tensor(row), 1
    counts = [sum(isinstance(part, str) for part in sample) for sample in layout]
    wide = [part == "wide" for sample in layout for part in sample if isinstance(part, str)]
    inputs = {"input_ids": ids, "attention_mask": mask, **family.pixels(wide, g)}
    if name in ("idefics3", "smolvlm"):
        # [samples, tiles of each, ...]: samples with fewer get empty ones.
        given = inputs["pixel_values"][0].split([2 * n for n in counts])
        inputs["pixel_values"] = nn.utils.rnn.pad_sequence(given, batch_first=True)
    image = ids == IMAGE
    if family.types and name not in ("llava", "llava_next"):
        inputs[family.types] = image.long()
    if name == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs, image
