"""The attention sites of a ComfyUI diffusion model, under the names and numbers that they have in diffusers.

A UNet of that program numbers its blocks through (`input_blocks.4`, `middle_block`, `output_blocks.5`); here they are named as
diffusers names them, so that a selection means the same in both. Nothing is imported: a model is known by its parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import UnsupportedHost
from ...site import Site

# Where a call comes from: (block, number of the transformer block in it, "self" or "cross"), or ("double" or "single", number),
# or ("double", number, "self") for the attention of the image alone that some blocks of SD3.5 have behind the joint one.
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Layout:
    """The sites of one model.

    Attributes:
        family: "unet", "flux" or "sd3". keys: where a call comes from -> its site.
        modules: by a site's path, the model's own module.
    """

    family: str
    keys: dict[Key, Site]
    modules: dict[str, nn.Module]

    @property
    def sites(self) -> list[Site]:
        """In the order of diffusers."""
        return list(self.keys.values())


def layout_of(model: Any) -> Layout:
    """The sites of a diffusion model.

    Raises:
        UnsupportedHost: where its blocks are, or in what order its streams lie, is not known.
    """
    if all(hasattr(model, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        return _unet(model)
    if type(model).__name__ == "Flux" and hasattr(model, "double_blocks") and hasattr(model, "single_blocks"):
        return _flux(model)
    if hasattr(model, "joint_blocks") and all(hasattr(b, "context_block") for b in model.joint_blocks):
        return _sd3(model)
    raise UnsupportedHost(
        f"where the attention of {type(model).__name__} sits, and which of its rows are the image, is not known here. Known are "
        "UNets (SD1.x, SD2.x, SDXL), Flux and SD3; other models are steered in diffusers."
    )


def _unet(model: Any) -> Layout:
    keys: dict[Key, Site] = {}
    modules: dict[str, nn.Module] = {}
    layer = 0
    for block, name, transformer in _transformers(model):
        # Its blocks over time call attention too, with the same facts.
        video = hasattr(transformer, "time_stack")
        for d, inner in enumerate(transformer.transformer_blocks):
            for kind, attribute in (("self", "attn1"), ("cross", "attn2")):
                module = getattr(inner, attribute, None)
                if module is None:
                    continue
                refused = "it stands beside attention over time, from which its calls cannot be told" if video else ""
                if kind == "self" and getattr(inner, "disable_self_attn", False):
                    refused = "it attends to the text in the place of the image"
                site = _site(f"{name}.transformer_blocks.{d}.{attribute}", layer, kind, int(module.heads), refused)
                keys[block, d, kind] = site
                modules[site.path] = module
            layer += 1
    return Layout("unet", keys, modules)


def _transformers(model: Any) -> list[tuple[tuple[str, int], str, Any]]:
    """[(block as the program calls it, diffusers' name, spatial transformer)], in the order of diffusers."""
    found = []
    level = within = 0
    for n, block in enumerate(model.input_blocks):
        names = [type(part).__name__ for part in block]
        if any(name.startswith("Downsample") for name in names):
            level, within = level + 1, 0
            continue
        found += [(("input", n), f"down_blocks.{level}.attentions.{within}", t) for t in _attending(block)]
        within += any("ResBlock" in name for name in names)
    found += [(("middle", 0), "mid_block.attentions.0", t) for t in _attending(model.middle_block or ())]
    level = within = 0
    for n, block in enumerate(model.output_blocks):
        found += [(("output", n), f"up_blocks.{level}.attentions.{within}", t) for t in _attending(block)]
        within += 1
        if any(type(part).__name__.startswith("Upsample") for part in block):
            level, within = level + 1, 0
    return found


def _attending(block: Any) -> list[Any]:
    return [part for part in block if hasattr(part, "transformer_blocks")]


def _flux(model: Any) -> Layout:
    keys: dict[Key, Site] = {}
    modules: dict[str, nn.Module] = {}
    layer = 0
    for kind, name, blocks in (
        ("double", "transformer_blocks", model.double_blocks),
        ("single", "single_transformer_blocks", model.single_blocks),
    ):
        for i, block in enumerate(blocks):
            site = _site(f"{name}.{i}.attn", layer, "joint", int(model.num_heads), "")
            keys[kind, i] = site
            modules[site.path] = block
            layer += 1
    return Layout("flux", keys, modules)


def _sd3(model: Any) -> Layout:
    keys: dict[Key, Site] = {}
    modules: dict[str, nn.Module] = {}
    for i, block in enumerate(model.joint_blocks):
        site = _site(f"transformer_blocks.{i}.attn", i, "joint", int(model.num_heads), "")
        keys["double", i] = site
        modules[site.path] = block
        if block.x_block.x_block_self_attn:
            site = _site(f"transformer_blocks.{i}.attn2", i, "self", int(model.num_heads), "")
            keys["double", i, "self"] = site
            modules[site.path] = block
    return Layout("sd3", keys, modules)


def _site(name: str, layer: int, kind: str, heads: int, refused: str) -> Site:
    # The program's module stays untouched: a steering marks the module of a site.
    stand_in = nn.Module()
    return Site(name, layer, kind, heads, heads, "image", "denoiser", refused=refused, module=stand_in)
