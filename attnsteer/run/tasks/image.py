"""Pictures from prompts: one seeded generator for each sample, so that batches do not matter to it; and what is in them."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import asdict
from typing import Any

from ...errors import RunError
from .. import store
from ..loaded import Loaded
from . import Request, sample_fields

# pixels: a hash of the picture's values, by which two of them are the same.
RECORD_KEYS = ("image", "pixels")
# Of models whose pictures have an exact detector.
DETECTED = ("detected", "valid")
SAMPLE_KEYS = ("prompt", "phrases", "boxes", "category", "side", "level", "relations")
UNIT = "images"
DECODING: dict[str, Any] = {}
# Generators of one seed are this far from those of the next.
STRIDE = 1_000_003


def answer(loaded: Loaded, request: Request) -> tuple[list[dict[str, Any]], list[int]]:
    """Records with `image`, the path of the PNG in the run folder, `detected` and `valid`."""
    import torch

    generators = [torch.Generator().manual_seed(seed_of(request.seed, s["index"])) for s in request.samples]
    pictures = loaded.target(
        prompt=[s["prompt"] for s in request.samples], generator=generators, output_type="pt", **request.decoding
    ).images
    pictures = pictures.detach().float().cpu()
    if not bool(pictures.isfinite().all()):
        bad = [s["id"] for s, p in zip(request.samples, pictures, strict=True) if not bool(p.isfinite().all())]
        raise RunError(
            f"the pictures of {', '.join(bad[:3])} have values that are not finite; use model.dtype float32, or a smaller "
            "strength."
        )
    read = loaded.detector(pictures) if loaded.detector is not None else [None] * len(pictures)
    scores: Any = [{}] * len(pictures)
    if request.score_pictures is not None:
        scores = request.score_pictures(pictures, [s["prompt"] for s in request.samples])
    records = []
    for sample, picture, found, scored in zip(request.samples, pictures, read, scores, strict=True):
        values = (picture.clamp(0, 1) * 255).round().byte()
        path = f"{request.images}/{file_name(sample['id'])}.png"
        store.write_atomic(request.folder / path, png(values))
        record = {**sample_fields(sample, SAMPLE_KEYS), "image": path}
        record["pixels"] = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
        if found is not None:
            record |= {"detected": [asdict(o) for o in found.objects], "valid": found.valid}
        records.append({**record, **scored})
    return records, [1] * len(records)


def seed_of(seed: int, index: int) -> int:
    """The generator's seed of a sample: its index for the seed 0."""
    return seed * STRIDE + index


def png(values: Any) -> bytes:
    """The PNG of a picture, uint8 [3, h, w]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(values.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def file_name(name: str) -> str:
    """A name for a file: the id where it is one, else with a hash for what had to go."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:100]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
