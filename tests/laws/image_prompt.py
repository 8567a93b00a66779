"""A UNet pipeline with an IP-Adapter, as a host of the laws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnsteer.testing import HostCase, tiny_call, tiny_pipeline
from tests.hosts.diffusers.test_image_prompts import with_ip_adapter
from tests.hosts.families import DIM, randn


def _build() -> Any:
    pipe = tiny_pipeline("sd")
    with_ip_adapter(pipe.unet)
    pipe.set_ip_adapter_scale(0.0)
    return pipe


def _inputs(pipe: Any, batch: int, padding: str | None, seed: int) -> dict[str, Any]:
    return tiny_call("sd", batch=batch, steps=2, seed=seed)


def _run(pipe: Any, inputs: dict[str, Any]) -> Tensor:
    frames = randn(1, 3, DIM, seed=9)
    embeds = torch.cat([torch.zeros_like(frames), frames]).to(pipe.unet.dtype)
    return pipe(**inputs, ip_adapter_image_embeds=[embeds])[0]


IMAGE_PROMPT = HostCase("sd-ip-pipeline", "pipeline", _build, _inputs, _run)
