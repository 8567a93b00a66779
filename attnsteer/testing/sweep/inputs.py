"""Inputs that a small model may take: several, most telling first; the sweep uses the first with which it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .hints import INPUTS
from .small_configs import VOCAB

BATCH, LENGTH, DECODER = 2, 9, 5


def candidates(model: nn.Module, name: str) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the forward."""
    if name in INPUTS:
        yield INPUTS[name](model)
    takes = list(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    text = _text(model, takes)
    others = [n for n in ("pixel_values", "input_features", "input_values", "pixel_values_videos") if n in takes]
    if main != "input_ids" and main in takes and main not in others:
        others.insert(0, main)
    if text and main == "input_ids":
        yield text
    for other in others:
        for data in _data(model, other):
            if text:
                yield {**text, other: data}
            decoder = {k: v for k, v in text.items() if k.startswith("decoder_")}
            yield {other: data, **decoder}
    if text:
        yield text
        yield {"input_ids": text.get("input_ids", ids(LENGTH))}


def ids(length: int, seed: int = 0) -> Tensor:
    """Token ids [2, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB - 60, (BATCH, length), generator=generator)


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _text(model: nn.Module, takes: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if "input_ids" in takes:
        found["input_ids"] = ids(LENGTH)
        if "attention_mask" in takes:
            mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
            mask[1, -2:] = 0
            found["attention_mask"] = mask
    if "decoder_input_ids" in takes:
        found["decoder_input_ids"] = ids(DECODER, seed=1)
    return found


def _sub(config: Any) -> list[Any]:
    """A config and those inside it, outermost first."""
    from transformers import PreTrainedConfig

    inside = [c for c in vars(config).values() if isinstance(c, PreTrainedConfig)]
    return [config, *(d for c in inside for d in _sub(c))]


def _found(model: nn.Module, *names: str) -> Any:
    for config in _sub(model.config):
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                return value
    return None


def _data(model: nn.Module, name: str) -> Iterator[Tensor]:
    if name in ("input_values", "input_waveform"):
        yield noise(BATCH, 800)
        bins = _found(model, "num_mel_bins", "n_mels") or 16
        length = _found(model, "max_length") or 64
        yield noise(BATCH, length, bins)
        return
    if "feature" in name:
        bins = (
            _found(
                model, "num_mel_bins", "feature_size", "n_mels", "num_channels", "input_feat_per_channel", "input_dim"
            )
            or 16
        )
        frames = 2 * (_found(model, "max_source_positions") or 24)
        yield noise(BATCH, bins, frames)
        yield noise(BATCH, frames, bins)
        yield noise(BATCH, 1, frames, bins)
        return
    channels = _found(model, "num_channels", "in_channels", "in_chans", "input_channels") or 3
    size = _found(model, "image_size", "img_size", "input_size", "resolution") or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frames = _found(model, "num_frames", "frames_per_clip") or 4
    if "video" in name:
        yield noise(BATCH, frames, channels, height, width)
        return
    yield noise(BATCH, channels, height, width)
    yield noise(BATCH, frames, channels, height, width)
    yield noise(BATCH, channels, 64, 64)
    yield noise(BATCH, channels, 128, 128)
