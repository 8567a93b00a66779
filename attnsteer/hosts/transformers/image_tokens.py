"""Where image tokens are, by model type: one table, and the few rules that read it.

The facts are those of the modelling files of transformers 5.23. A processor expands each image to copies of a placeholder
id, so the index of a token is the index of its key. A model type that is not in the table is asked for spans.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SelectionError, UnsupportedHost

# Arguments that bring images into a call; `generate` encodes them first and hands on `mm_encoder_outputs`.
PIXELS = ("pixel_values", "pixel_values_videos", "image_patches")
ENCODED = "mm_encoder_outputs"
# How configs and forwards of any vision-language model name what has to do with images.
_IMAGES = re.compile(r"vision|visual|image|pixel|video", re.IGNORECASE)


@dataclass(frozen=True)
class Family:
    """How one model type marks image tokens.

    Attributes:
        ids: config attributes that hold the placeholder ids of images and videos. The processor's `image_token_id` is not
            among them: Gemma 3's is the begin-of-image token.
        types: the argument in which 1 and 2 mark exactly the image and video tokens; None: there is none, or it also marks
            delimiters (InternVL) or means something else (PaliGemma, where 0 is the bidirectional prefix).
        size: (config, arguments) -> tokens of each image; None where that differs from image to image.
        roles: arguments by token that shape the attention of a prompt, with or without its images.
        text_alone: the model itself runs a prompt without images; else its language model has to be called.
        refused: why images of this type are not keys of self-attention.
    """

    ids: tuple[str, ...] = ("image_token_id",)
    types: str | None = "mm_token_type_ids"
    size: Callable[[Any, Mapping[str, Any]], int | None] | None = None
    roles: tuple[str, ...] = ()
    text_alone: bool = True
    refused: str | None = None


def _patches(config: Any, values: Mapping[str, Any]) -> int | None:
    """A square grid of patches, with the class token where the strategy keeps it."""
    vision = config.vision_config
    keep = values.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    return (vision.image_size // vision.patch_size) ** 2 + (keep == "full")


def _shuffled(config: Any, values: Mapping[str, Any]) -> int | None:
    """Idefics 3: a grid of patches, `scale_factor` squared of them in each token."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2


def _attribute(name: str) -> Callable[[Any, Mapping[str, Any]], int | None]:
    return lambda config, values: getattr(config, name)


_VIDEO = ("image_token_id", "video_token_id")
_CROSS = Family(refused="images are the keys of cross-attention layers, and no key of self-attention is one")

FAMILIES: dict[str, Family] = {
    "llava": Family(size=_patches),
    # Tiles without their padding and one newline token for each row of patches: all have the placeholder id.
    "llava_next": Family(),
    # Three position axes; videos of Qwen3-VL are not contiguous (time stamps between the frames).
    "qwen2_vl": Family(ids=_VIDEO),
    "qwen2_5_vl": Family(ids=_VIDEO),
    "qwen3_vl": Family(ids=_VIDEO),
    # `mm_token_type_ids` marks the start and end tokens as well.
    "internvl": Family(types=None, size=_attribute("image_seq_length")),
    # Tiles with row and column tags between them, which are text.
    "idefics3": Family(size=_shuffled),
    "smolvlm": Family(size=_shuffled),
    "paligemma": Family(
        types=None, size=lambda config, values: config.text_config.num_image_tokens, roles=("token_type_ids",)
    ),
    "gemma3": Family(types="token_type_ids", size=_attribute("mm_tokens_per_image")),
    # The tokens are Q-Former queries, without a place in the image. `generate` calls the language model by itself.
    "instructblip": Family(types=None, size=_attribute("num_query_tokens"), text_alone=False),
    "mllama": _CROSS,
    "idefics": _CROSS,
}


def family_of(config: Any) -> Family | None:
    """The row of the table for a model's config, or None."""
    return FAMILIES.get(getattr(config, "model_type", ""))


def takes_images(model: nn.Module) -> bool:
    """Whether anything in a model speaks of images: a config with a vision part or an image token, or an argument for them.

    Names of types that are not in the table are not known, so any mention counts.
    """
    # Layers share the configs of their stacks.
    for config in {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}.values():
        if family_of(config) is not None or _mentions(vars(config) if hasattr(config, "model_type") else {}):
            return True
    return bool(_IMAGES.search(" ".join(inspect.signature(model.forward).parameters)))


def _mentions(values: Mapping[str, Any]) -> bool:
    """Whether a key with a value, at any depth of a config, speaks of images."""
    for name, value in values.items():
        if value is None or name.startswith("_"):
            continue
        inner = value if isinstance(value, dict) else vars(value) if hasattr(value, "model_type") else {}
        if _IMAGES.search(name) or _mentions({k: v for k, v in inner.items() if isinstance(k, str)}):
            return True
    return False


def brings_images(values: Mapping[str, Any]) -> bool:
    """Whether a call of a model brings pixels or encoded images."""
    if any(values.get(name) is not None for name in PIXELS):
        return True
    encoded = values.get(ENCODED)
    return isinstance(encoded, Mapping) and any(part is not None for part in encoded.values())


def placeholders(family: Family, config: Any, ids: Tensor) -> Tensor:
    """bool, in the shape of `ids`: the tokens with a placeholder id."""
    known = [getattr(config, name, None) for name in family.ids]
    known = [i for i in known if isinstance(i, int)]
    if not known:
        raise UnsupportedHost(
            f"the config of this {config.model_type} has no {' or '.join(family.ids)}, so its image tokens are not known; "
            "set it, or enter run.images(spans) around the call."
        )
    return torch.isin(ids, torch.tensor(known, device=ids.device))


def image_tokens(
    family: Family, config: Any, values: Mapping[str, Any], embed: Callable[[Tensor], Tensor], new: int
) -> Tensor | None:
    """bool [B, new] of the image tokens of one call, or None where its arguments do not tell.

    Args:
        values: the arguments of the model's forward, by name. embed: its input embeddings. new: tokens of the call.
    """
    ids, embeds = values.get("input_ids"), values.get("inputs_embeds")
    with_images = brings_images(values)
    if isinstance(ids, Tensor):
        marks = placeholders(family, config, ids)
        # A placeholder id that the model generated, or one without an image behind it, is an ordinary token.
        return marks if with_images else torch.zeros_like(marks)
    types = values.get(family.types) if family.types else None
    if isinstance(types, Tensor):
        types = types[:, -new:]
        return (types == 1) | (types == 2)
    if with_images and isinstance(embeds, Tensor):
        # As the models themselves do: an embedding equal to the placeholder's is one.
        marker = embed(torch.tensor([[getattr(config, family.ids[0])]], device=embeds.device))
        return (embeds == marker.to(embeds.dtype)).all(dim=-1)
    return None


def check_whole(family: Family, config: Any, values: Mapping[str, Any], image: Tensor) -> None:
    """Raise where the image tokens of a call are not the tokens of its images: truncation cut some.

    Args:
        values: the arguments of `generate` or of a forward. image: bool [B, n], the image tokens among its tokens.

    Raises:
        SelectionError: with both counts, and the sample where it is known.
    """
    if any(values.get(name) is not None for name in PIXELS):
        size = family.size(config, values) if family.size is not None else None
        for b, found in enumerate(image.sum(dim=-1).tolist() if size else []):
            if found % size:
                raise SelectionError(_cut(f"sample {b} has {found} image tokens; each image has {size}"))
        grids = [values.get(name) for name in ("image_grid_thw", "video_grid_thw")]
        if any(grid is not None for grid in grids):
            merge = config.vision_config.spatial_merge_size**2
            _compare(image, sum(int((grid.prod(dim=-1) // merge).sum()) for grid in grids if grid is not None))
    encoded = values.get(ENCODED)
    if isinstance(encoded, Mapping):
        # A chunk of a prompt may hold a part of an image; `generate` hands on just the features of that part.
        features = [getattr(part, "pooler_output", None) for part in encoded.values()]
        parts = [t for f in features for t in (f if isinstance(f, (list, tuple)) else [f])]
        if parts and all(isinstance(t, Tensor) for t in parts):
            _compare(image, sum(t.numel() // t.shape[-1] for t in parts))


def _compare(image: Tensor, wanted: int) -> None:
    found = int(image.sum())
    if found != wanted:
        raise SelectionError(_cut(f"the prompts have {found} image tokens; their images have {wanted}"))


def _cut(what: str) -> str:
    return (
        f"an image span is cut: {what}. The prompt was probably truncated; give the processor a larger max_length, or "
        "truncation=False."
    )
