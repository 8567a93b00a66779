"""Inputs of the tiny transformers models: token ids, masks and pixels, fixed by a seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
VOCAB = 99
FIRST_TOKEN = 4


def attention_mask(batch: int, length: int, padding: str | None) -> Tensor:
    """`[batch, length]` of 0 and 1, int64: row b lacks min(b, length - 1) tokens on the padded side."""
    if padding not in (None, "left", "right"):
        raise ValueError(f"padding is None, 'left' or 'right', not {padding!r}")
    mask = torch.ones(batch, length, dtype=torch.long)
    if padding is not None:
        for row in range(batch):
            missing = min(row, length - 1)
            mask[row, slice(0, missing) if padding == "left" else slice(length - missing, length)] = 0
    return mask


def _token_ids(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(FIRST_TOKEN, VOCAB, shape, generator=generator)


def text(model: nn.Module, batch: int, length: int, padding: str | None, seed: int) -> dict[str, Tensor]:
    mask = attention_mask(batch, length, padding)
    ids = _token_ids((batch, length), torch.Generator().manual_seed(seed))
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def text_absolute(model: nn.Module, batch: int, length: int, padding: str | None, seed: int) -> dict[str, Tensor]:
    """Learned positions: left padding needs explicit `position_ids` for a row to equal the row alone."""
    inputs = text(model, batch, length, padding, seed)
    if padding == "left":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return inputs


def encoder_decoder(model: nn.Module, batch: int, length: int, padding: str | None, seed: int) -> dict[str, Tensor]:
    """The decoder's input is not padded. BART counts positions from the first column, padding included."""
    inputs = text(model, batch, length, padding, seed)
    decoder = _token_ids((batch, max(2, length // 2)), torch.Generator().manual_seed(seed + 1))
    decoder[:, 0] = model.config.decoder_start_token_id
    return {**inputs, "decoder_input_ids": decoder}


def _insert_image(inputs: dict[str, Tensor], n_image: int, head: int) -> dict[str, Tensor]:
    """Puts `n_image` image tokens after the first `head` valid tokens of each row, which grows by them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    batch, length = ids.shape
    out_ids = torch.full((batch, length + n_image), PAD)
    out_mask = torch.zeros_like(out_ids)
    for row in range(batch):
        start = int(mask[row].argmax())  # 0 but for left padding
        valid = ids[row][mask[row] == 1]
        image = torch.full((n_image,), IMAGE)
        tokens = torch.cat([valid[:head], image, valid[head:]])
        out_ids[row, start : start + len(tokens)] = tokens
        out_mask[row, start : start + len(tokens)] = 1
    return {"input_ids": out_ids, "attention_mask": out_mask}


def _pixels(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 2))


def llava(model: nn.Module, batch: int, length: int, padding: str | None, seed: int) -> dict[str, Tensor]:
    vision = model.config.vision_config
    n_image = (vision.image_size // vision.patch_size) ** 2
    inputs = _insert_image(text(model, batch, length, padding, seed), n_image, head=2)
    return {**inputs, "pixel_values": _pixels((batch, 3, vision.image_size, vision.image_size), seed)}


def qwen2_vl(model: nn.Module, batch: int, length: int, padding: str | None, seed: int) -> dict[str, Tensor]:
    vision = model.config.vision_config
    side = 8  # patches per side: 64 patches, merged two by two into 16 image tokens
    n_image = (side // vision.spatial_merge_size) ** 2
    inputs = _insert_image(text(model, batch, length, padding, seed), n_image, head=2)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        **inputs,
        "pixel_values": _pixels((batch * side * side, width), seed),
        "image_grid_thw": torch.tensor([[1, side, side]] * batch),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long(),
    }


def vit(model: nn.Module, batch: int, length: int, padding: str | None, seed: int) -> dict[str, Tensor]:
    """Images have a fixed number of tokens: `length` and `padding` have no meaning here and are ignored."""
    config = model.config
    return {"pixel_values": _pixels((batch, config.num_channels, config.image_size, config.image_size), seed)}
