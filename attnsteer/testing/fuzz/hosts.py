"""The models of the fuzz, and what each can be given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..transformers_inputs import IMAGE, PAD
from ..transformers_models import TinyTransformers, tiny_transformers

WINDOW = 5
TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
FORMS = ("none", "2d", "positions", "bool", "float", "bias", "tree")
# Decoding by `generate`.
GENERATE = ("beams", "guided", "lookup", "assisted", "uncached", "static")
WAYS = ("whole", "decode", "score", "chunks", "crop", "rewind", "reorder", *GENERATE)
START, END = 4, 5


@dataclass(frozen=True)
class Host:
    """One model.

    Attributes:
        build: makes it. window: slots that a row of a window layer sees, or None. mixed: whether other layers see all.
        forms: of masks that it takes; ways: of calling it. image: token ids of an image, which follow the second token.
        side: of the image, in pixels. types: what `token_type_ids` mark: "image" tokens, or the text of the "suffix"; None: it
            takes none.
    """

    build: Callable[[], nn.Module]
    window: int | None = None
    mixed: bool = False
    forms: tuple[str, ...] = FORMS
    ways: tuple[str, ...] = WAYS
    image: tuple[int, ...] = ()
    side: int = 16
    types: str | None = None

    def pixels(self, batch: int, seed: int) -> dict[str, Tensor]:
        """The arguments that bring in an image for each sample."""
        g = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(batch, 3, self.side, self.side, generator=g)} if self.image else {}


# `generate` without a cache takes what it generated for a part of the prefix that sees both ways.
SEEN = {"forms": ("none", "2d"), "ways": ("whole", "decode", "score", "chunks", "crop", "rewind", "reorder", "beams")}


def _tiny(name: str, **overrides: Any) -> Callable[[], nn.Module]:
    return lambda: tiny_transformers(name, **overrides)


def _vision(kind: str, **config: Any) -> Callable[[], nn.Module]:
    return TinyTransformers(
        kind, f"{kind}ForConditionalGeneration", f"{kind}Config", lambda: config, embedding_std=0.18
    ).build


HOSTS: dict[str, Host] = {
    "llama": Host(_tiny("llama")),
    "qwen3": Host(_tiny("qwen3")),
    "phi3": Host(_tiny("phi3")),
    "gpt2": Host(_tiny("gpt2")),
    "mistral": Host(_tiny("mistral"), WINDOW),
    "gemma2": Host(_tiny("gemma2"), WINDOW, mixed=True),
    "gemma3_text": Host(_tiny("gemma3_text"), WINDOW, mixed=True),
    "gpt_oss": Host(_tiny("gpt_oss"), WINDOW, mixed=True),
    # It calls SDPA itself; attention and MLP stand side by side.
    "falcon": Host(_tiny("falcon")),
    "falcon_grouped": Host(_tiny("falcon", new_decoder_architecture=True, num_kv_heads=2)),
    # Biases by position come from the padding mask, so it takes no other, and no static cache, whose mask is longer.
    "falcon_alibi": Host(
        _tiny("falcon", alibi=True, parallel_attn=False, multi_query=False),
        forms=("none", "2d"),
        ways=tuple(w for w in WAYS if w != "static"),
    ),
    "llava": Host(_tiny("llava"), image=(IMAGE,) * 16, side=32, **SEEN),
    # The image, and what stands before the suffix, see each other, so nothing of it can be cut off.
    "paligemma": Host(
        _vision(
            "PaliGemma",
            vision_config={**SIGLIP, "projection_dim": 32},
            text_config={**TEXT, "model_type": "gemma"},
            image_token_index=IMAGE,
            projection_dim=32,
        ),
        image=(IMAGE,) * 16,
        types="suffix",
        forms=SEEN["forms"],
        ways=tuple(w for w in SEEN["ways"] if w != "crop"),
    ),
    # The tokens of an image see each other, also where that goes beyond the window.
    "gemma3": Host(
        _vision(
            "Gemma3",
            vision_config=SIGLIP,
            text_config={
                **TEXT,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
            boi_token_index=START,
            eoi_token_index=END,
        ),
        WINDOW,
        mixed=True,
        image=(START, *(IMAGE,) * 4, END),
        types="image",
        **SEEN,
    ),
}


@functools.cache
def model_of(host: str, assistant: bool = False) -> nn.Module:
    """The tiny model, built once; or another one that foretells its tokens."""
    return HOSTS["llama" if assistant else host].build()
