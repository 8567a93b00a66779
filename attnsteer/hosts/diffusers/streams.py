"""What the rows of an attention call are: self, cross or joint, and where text and image lie in a joint sequence.

`structures.json` has what the probe (`probe.py`) found in each class, by name pattern of its sites; it is written by
`python -m attnsteer.testing.sweep.structures` and checked by a test. The expressions below are for what it does not list, such as
a site that only some configs have; where neither knows the order, a method that needs it has the model looked at when it is
called, or raises.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
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
POOLER = re.compile(r"(^|\.)pooler$|^local_facial_extractor\.")
# Classes without a processor whose rows attend to something else.
CROSSING = re.compile(r"Cross|Pool|Perceiver")
LINEAR = re.compile(r"SanaLinear")
# Models whose rows lie differently in each sample: padding stands between the streams, or the caller says where they are.
RAGGED = re.compile(r"Lumina2|ZImage|OmniGen|Ideogram4|HunyuanVideo15|HiDream")


@functools.cache
def _structures() -> dict[str, dict[str, list[Any]]]:
    return json.loads(Path(__file__).with_name("structures.json").read_text(encoding="utf-8"))


def pattern_of(name: str, first: int = 0) -> str:
    """A site's name with a star for each number of a block; `first`: for so many of them only (0: all)."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name, count=first)


def structure_of(model: nn.Module, name: str) -> tuple[str, tuple[str, ...], str] | None:
    """(kind, order, place of the own keys) that the probe has found for a site; the last two empty where they are not fixed.

    The kind "own" is that of rows of one stream that see themselves and further keys.
    """
    known = _structures().get(type(model).__name__, {})
    found = known.get(pattern_of(name)) or known.get(pattern_of(name, 1))
    return None if found is None else (found[0], tuple(found[1]), found[2])


def listed_kind(kind: str, order: tuple[str, ...]) -> str:
    """The kind of a site by what the probe says: rows without text, beside a register or among further keys, are "self"."""
    alone = kind == "own" or (kind == "joint" and bool(order) and "text" not in order and "audio" not in order)
    return "self" if alone else kind


def kind_of(name: str, module: nn.Module, model: nn.Module) -> str:
    """ "self", "cross" or "joint"."""
    known = structure_of(model, name)
    if known is not None and known[0] != "?":
        return listed_kind(known[0], known[1])
    unet = hasattr(model, "down_blocks")
    if not hasattr(module, "processor"):
        return "cross" if CROSSING.search(type(module).__name__) else "self"
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


def modality_of(name: str, model: nn.Module) -> str:
    """ "text" for the layers that see the prompt alone, "audio" for those of a sound beside the video, else "image"."""
    known = structure_of(model, name)
    if known is not None and known[1] in (("text",), ("audio",)):
        return known[1][0]
    return "text" if PROMPT_ONLY.search(name) or POOLER.search(name) else "image"


def own_place(site: Any, model: nn.Module) -> str:
    """Where the rows' own keys stand among further ones: "first" or "last"; "" where there are none or it is not known."""
    known = structure_of(model, site.name)
    if known is not None and known[2]:
        return known[2]
    # Configs of one UNet class differ in their processors; those that append own keys to the text's do so behind it.
    added = "AddedKV" in type(getattr(site.module, "processor", None)).__name__
    return "last" if added and not getattr(site.module, "only_cross_attention", False) else ""


def order_of(site: Any, model: nn.Module) -> tuple[str, ...]:
    """The streams in a site's rows, in order: one for self and cross attention; empty where it is not known."""
    if site.kind != "joint":
        return (site.modality,)
    known = structure_of(model, site.name)
    if (
        known is not None
        and set(known[1]) == {"image", "text"}
        and len(known[1]) == 2
        and not RAGGED.search(type(model).__name__)
    ):
        return known[1]
    processor = type(site.module.processor).__name__
    if IMAGE_FIRST.match(processor):
        return ("image", "text")
    return ("text", "image") if TEXT_FIRST.match(processor) else ()
