"""The part of the sweep for modular pipelines: one of each family, with the parts of the classic pipeline that stands beside it.

As `pipelines.py`, and in need of the same checkout of the library's tests.
"""

from __future__ import annotations

import pkgutil
from typing import Any

import torch

from . import pipelines
from .pipeline_builds import Built, built, randomized
from .pipeline_loops import Loop
from .rows import Row

versions = pipelines.versions

# Family -> (its blocks, the classic pipeline that has the parts). Of the others no small pipeline is recorded.
FAMILIES = {
    "cosmos": ("Cosmos3OmniBlocks", "Cosmos3OmniPipeline"),
    "flux": ("FluxAutoBlocks", "FluxPipeline"),
    "flux2": ("Flux2AutoBlocks", "Flux2Pipeline"),
    "helios": ("HeliosAutoBlocks", "HeliosPipeline"),
    "hunyuan_video1_5": ("HunyuanVideo15AutoBlocks", "HunyuanVideo15Pipeline"),
    "krea2": ("Krea2AutoBlocks", "Krea2Pipeline"),
    "ltx": ("LTXAutoBlocks", "LTXPipeline"),
    "ltx2": ("LTX2AutoBlocks", "LTX2Pipeline"),
    "qwenimage": ("QwenImageAutoBlocks", "QwenImagePipeline"),
    "stable_diffusion_3": ("StableDiffusion3AutoBlocks", "StableDiffusion3Pipeline"),
    "stable_diffusion_xl": ("StableDiffusionXLAutoBlocks", "StableDiffusionXLPipeline"),
    "wan": ("WanBlocks", "WanPipeline"),
    "z_image": ("ZImageAutoBlocks", "ZImagePipeline"),
}
# Arguments that a modular pipeline has in its guider, or not at all.
LEFT_OUT = ("output_type", "return_dict", "guidance_scale", "true_cfg_scale", "cfg_normalization", "cfg_truncation")


def names() -> list[str]:
    """The families of modular pipelines."""
    import diffusers.modular_pipelines as library

    pipelines.tests()
    return sorted(m.name for m in pkgutil.iter_modules(library.__path__) if m.ispkg)


def prepare(name: str) -> None:
    """Import what builds `name`."""
    if name in FAMILIES:
        pipelines.prepare(FAMILIES[name][1])


class Modular:
    """A modular pipeline with the parts of a classic one, up to the latents."""

    def __init__(self, family: str, classic: Built):
        import diffusers.modular_pipelines as library
        from diffusers.guiders import ClassifierFreeGuidance

        self.classic = classic
        blocks = getattr(library, FAMILIES[family][0])()
        if "decode" in blocks.sub_blocks:
            blocks.sub_blocks.pop("decode")
        self.pipe = blocks.init_pipeline()
        specs = self.pipe._component_specs
        parts = {k: v for k, v in classic.pipe.components.items() if v is not None and k in specs}
        if "guider" in specs:
            kind = specs["guider"].type_hint or ClassifierFreeGuidance
            parts["guider"] = kind(guidance_scale=3.0)
        self.pipe.update_components(**parts)
        if hasattr(self.pipe, "disable_safety_checker"):
            self.pipe.disable_safety_checker()
        self.pipe.set_progress_bar_config(disable=True)
        randomized(self.pipe)

    def inputs(self) -> dict[str, Any]:
        """The arguments of one call."""
        given = {k: v for k, v in self.classic.inputs().items() if k not in LEFT_OUT}
        if "negative_prompt" in {p.name for p in self.pipe.blocks.inputs}:
            given.setdefault("negative_prompt", "ugly")
        return given


def measure(name: str) -> Row:
    """Build one of the family small, and measure it."""
    if name not in FAMILIES:
        return Row(name, name, reason="no small pipeline of the family is recorded")
    row = Row(name, FAMILIES[name][0])

    def loop() -> Loop | str:
        classic, reason = built(FAMILIES[name][1])
        if classic is None:
            return reason
        torch.manual_seed(0)
        return Loop(Modular(name, classic))

    return pipelines.measured(row, loop)
