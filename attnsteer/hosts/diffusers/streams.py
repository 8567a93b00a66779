"""What the rows of an attention call are: self, cross or joint, and where text and image lie in a joint sequence.

The orders were found by experiment (tests/hosts/diffusers/test_families.py); a processor that is in no table here has
joint rows of unknown order, so that a method which needs the order raises.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# Processor classes whose sequence holds image rows, then text rows.
IMAGE_FIRST = re.compile(
    r"((Fused|XFormers|SD3IPAdapter)?JointAttn|Mochi(?!Vae)|HunyuanVideo|HunyuanImage|JoyImageAttn)"
)
# Text rows, then image rows.
TEXT_FIRST = re.compile(
    r"(Flux(Attn|IPAdapter)|Flux2(Attn|ParallelSelf)|QwenDouble|(Fused)?(AuraFlow|CogVideoX)|CogView4Attn|Bria(Fibo)?Attn|"
    r"LongCatImage|OvisImage|EasyAnimate)"
)
# Image rows only, attending to themselves or to the text.
PLAIN = re.compile(
    r"((Fused|Sliced|XFormers|XLAFlash|CustomDiffusion|CustomDiffusionXFormers|IPAdapter|IPAdapterXFormers|DreamLite)?AttnProcessor|"
    r"(Fused)?Hunyuan(Attn)|Allegro|LuminaAttn|StableAudio|Sana|LTX|Wan|SkyReels|CosmosAttn|Kandinsky5|AnyFlow)"
)
# Parts of a transformer that see the prompt alone.
PROMPT_ONLY = re.compile(r"(^|\.)(context_embedder|context_refiner|token_refiner|text_transformer_blocks)\.")
LINEAR = re.compile(r"SanaLinear")


def kind_of(name: str, module: nn.Module, unet: bool) -> str:
    """ "self", "cross" or "joint"."""
    processor = type(module.processor).__name__
    crossing = getattr(module, "is_cross_attention", None)
    crossing = bool(re.search(r"attn2$|cross", name)) if crossing is None else bool(crossing)
    alone = getattr(module, "added_kv_proj_dim", None) is None
    if PROMPT_ONLY.search(name):
        return "self"
    if "JointAttn" in processor:
        return "self" if alone else "joint"
    if IMAGE_FIRST.match(processor) or TEXT_FIRST.match(processor):
        return "joint"
    if PLAIN.match(processor) or (unet and alone):
        return "cross" if crossing else "self"
    return "joint"


def modality_of(name: str) -> str:
    """ "text" for the layers that see the prompt alone, else "image"."""
    return "text" if PROMPT_ONLY.search(name) else "image"


def order_of(site: Any) -> tuple[str, ...]:
    """The streams in a site's rows, in order: one for self and cross attention; empty where it is not known."""
    if site.kind != "joint":
        return (site.modality,)
    processor = type(site.module.processor).__name__
    if IMAGE_FIRST.match(processor):
        return ("image", "text")
    return ("text", "image") if TEXT_FIRST.match(processor) else ()
