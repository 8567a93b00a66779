"""Writes a trained model as a folder that stock `from_pretrained` loads, weights in half precision."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .loop import Curve


def publish(name: str, models: dict[str, Any], others: dict[str, Any], out: Path, curves: dict[str, Curve]) -> Path:
    """Save parts by sub-folder ("" is the folder itself), and the training record beside them.

    Returns:
        the folder, `out/name`.
    """
    folder = out / name
    for part, model in models.items():
        model.to("cpu", torch.float16).save_pretrained(folder / part)
    for part, other in others.items():
        other.save_pretrained(folder / part)
    record = {stage: asdict(curve) for stage, curve in curves.items()}
    (folder / "training.json").write_text(json.dumps(record), encoding="utf-8")
    return folder
