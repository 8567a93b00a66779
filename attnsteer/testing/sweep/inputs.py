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
    parameters = inspect.signature(model.forward).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    for given in _candidates(model, list(parameters)):
        yield given | {n: v for n in needed if n not in given for v in [_needed(model, n, given)] if v is not None}


def _candidates(model: nn.Module, takes: list[str]) -> Iterator[dict[str, Any]]:
    main = getattr(model, "main_input_name", "input_ids")
    text = _text(model, takes)
    if "grid_thw" in takes:
        yield _patches(model, next(n for n in ("hidden_states", "pixel_values", takes[0]) if n in takes))
    others = [n for n in ("pixel_values", "input_features", "input_values", "pixel_values_videos") if n in takes]
    if main != "input_ids" and main in takes and main not in others:
        others.insert(0, main)
    if text and main == "input_ids":
        yield text
    for other in others:
        for data in _data(model, other):
            if mask := next(
                (n for n in (f"{other}_mask", "feature_attention_mask", "input_features_mask") if n in takes), None
            ):
                for axis in (-1, 1):
                    yield {**text, other: data, mask: torch.ones(BATCH, data.shape[axis], dtype=torch.long)}
            if text:
                yield {**text, other: data}
            decoder = {k: v for k, v in text.items() if k.startswith("decoder_")}
            yield {other: data, **decoder}
    if text:
        yield text
        yield {"input_ids": text.get("input_ids", ids(model, LENGTH))}
    for name in ("inputs_embeds", "query_embeds", "hidden_states"):
        if name in takes:
            yield {name: noise(BATCH, LENGTH, _found(model, "hidden_size", "d_model") or 64)}
    yield {}


def _patches(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Two images of four by four patches, in rows, as towers of Qwen-VL's kind take them."""
    size = _found(model, "patch_size") or 8
    frames, channels = (
        _found(model, "temporal_patch_size") or 1,
        _found(model, "in_channels", "in_chans", "num_channels") or 3,
    )
    return {name: noise(32, channels * frames * size * size), "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}


def _needed(model: nn.Module, name: str, given: dict[str, Any]) -> Any:
    """An argument that the forward cannot do without, or None."""
    first = next((v for v in given.values() if isinstance(v, Tensor)), None)
    length = (
        LENGTH
        if first is None or first.ndim < 2
        else first.shape[-1 if name.endswith("_mask") and "feature" in name else 1]
    )
    if name == "bbox":
        return torch.tensor([1, 2, 10, 12]).expand(BATCH, LENGTH, 4)
    if name.endswith("mask"):
        return torch.ones(BATCH, length, dtype=torch.long)
    if name in ("input_ids", "decoder_input_ids"):
        return ids(model, LENGTH)
    if name in ("grid_thw", "image_grid_thw"):
        return torch.tensor([[1, 4, 4], [1, 4, 4]])
    if name in ("hidden_states", "inputs_embeds", "query_embeds", "encoder_hidden_states"):
        return noise(BATCH, LENGTH, _found(model, "hidden_size", "d_model") or 64)
    return next(_data(model, name), None) if "pixel" in name or "feature" in name or "values" in name else None


def ids(model: nn.Module, length: int, seed: int = 0) -> Tensor:
    """Token ids [2, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    try:
        size = model.get_input_embeddings().num_embeddings
    except (NotImplementedError, AttributeError):
        size = min(
            (c.vocab_size for c in _sub(model.config) if isinstance(getattr(c, "vocab_size", None), int)), default=VOCAB
        )
    return torch.randint(5, max(6, min(size, VOCAB - 60)), (BATCH, length), generator=generator)


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _text(model: nn.Module, takes: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if "input_ids" in takes:
        found["input_ids"] = ids(model, LENGTH)
        if "attention_mask" in takes:
            mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
            mask[1, -2:] = 0
            found["attention_mask"] = mask
    if "bbox" in takes:
        found["bbox"] = _needed(model, "bbox", found)
    if "decoder_input_ids" in takes:
        found["decoder_input_ids"] = ids(model, DECODER, seed=1)
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
        yield noise(BATCH, 1, 960)
        yield noise(BATCH, 6000)
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
        yield noise(BATCH, frames, 128)
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
    yield noise(BATCH, 2, channels, 64, 64)
    yield noise(BATCH, channels, 64, 64)
    yield noise(BATCH, channels, 128, 128)
