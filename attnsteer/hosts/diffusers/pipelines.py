"""How pipelines of diffusers call their denoiser for guidance, for where the values of a call do not tell (`rows.py`).

Read in the pipelines' own code (diffusers 0.42.1) and checked against it by a test. Equal prompts, class labels, and what is
joined before anybody could see it look the same on both sides; a pipeline that is not listed here is refused then.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# One call on a doubled batch, unconditional rows first; a single batch while guidance is off.
DOUBLED = re.compile(
    r"StableDiffusion(?!.*(Pix2Pix|SAG|DiffEdit|TextImage|Paradigms|Panorama|LEdits|AttendAndExcite))|"
    r"AltDiffusion|Kolors|Sana(?!WM)|PixArt|HunyuanDiT|AuraFlow|CogVideoX|CogView3|ConsisID|Mochi|LTX(?!I2VLong|2?Latent|2DFR|2Video)|"
    r"AnimateDiff|PIA|I2VGenXL|Allegro|Latte|LatentConsistency|TextToVideoSD|VideoToVideoSD|Kandinsky3|EasyAnimate|"
    r"StableAudioPipeline|DreamLite|UnCLIPImage|Bria(Fibo(?!2)|Pipeline|ControlNet)"
)
# One call on a tripled batch: text and image, image, neither.
TRIPLED = re.compile(r"StableDiffusion(XL)?InstructPix2PixPipeline")
# One call per branch, each in a cache context of its name, the conditional one first.
IN_CONTEXTS = re.compile(
    r"Flux(2Klein(Inpaint)?)?Pipeline|QwenImage|Wan(?!VideoToVideo)|SkyReelsV2(?!Diffusion)|CogView4Pipeline|"
    r"HunyuanVideoPipeline|LongCatImage|LucyEdit|OvisImage"
)
# One call per branch without a context: the first after a scheduler step is conditional, the second is not.
IN_TURN = re.compile(
    r"Flux(Img2Img|Inpaint|Kontext|KontextInpaint|ControlNet|ControlNetImg2Img|ControlNetInpaint|Control|ControlImg2Img|"
    r"ControlInpaint|Fill)Pipeline|Flux2Pipeline|VisualClozeGeneration|Chroma|ChronoEdit|CogView4Control|Kandinsky5|Krea2|"
    r"Lumina2|WanVideoToVideo|HunyuanVideo(Framepack|ImageToVideo)|HunyuanSkyreels|Cosmos2TextToImage|Cosmos2VideoToWorld|"
    r"CosmosTextToWorld|CosmosVideoToWorld"
)
UNCOND_COND = ("uncond", "cond")
# Arguments of a call by which it is guided.
GUIDES = re.compile(r"guid|cfg|negative|uncond")


@dataclass(frozen=True)
class Convention:
    """How a pipeline calls its denoiser for classifier-free guidance.

    Attributes:
        calls: "batch": one call, its batch in equal parts; "contexts": one call per branch, in a cache context of its name;
            "turns": one call per branch, the conditional one first; None: not known.
        parts: names of the parts of a guided batch, in order.
    """

    calls: str | None
    parts: tuple[str, ...] = ()


def convention_of(pipe: DiffusionPipeline | None) -> Convention:
    """The convention of a pipeline, by the class of diffusers whose `__call__` runs."""
    name = caller(pipe)
    if IN_CONTEXTS.match(name):
        return Convention("contexts")
    if IN_TURN.match(name):
        return Convention("turns")
    if TRIPLED.match(name):
        return Convention("batch", ("cond", "uncond", "uncond"))
    return Convention("batch", UNCOND_COND) if DOUBLED.match(name) else Convention(None)


def caller(pipe: DiffusionPipeline | None) -> str:
    """Name of the pipeline class of diffusers whose `__call__` runs; empty for one that is not of diffusers."""
    owner = next((c for c in type(pipe).__mro__ if "__call__" in vars(c)), object)
    return owner.__name__ if owner.__module__.startswith("diffusers.pipelines.") else ""


def one_branch(pipe: DiffusionPipeline | None, values: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether a pipeline of diffusers has nothing to guide with, neither a scale nor a negative prompt: all its rows are alike.

    A scale that the model itself is given is none of the pipeline's, nor is one of a modular pipeline, which has a guider.

    Args:
        values: arguments of a denoiser call by name.
    """
    if hasattr(pipe, "blocks") and hasattr(pipe.blocks, "inputs"):
        names = [p.name or "" for p in pipe.blocks.inputs if p.name != "guidance_scale"]
        return getattr(pipe, "guider", None) is None and not any(GUIDES.search(name) for name in names)
    if not caller(pipe):
        return False
    names = set(inspect.signature(type(pipe).__call__).parameters)
    if values.get("guidance") is not None:
        names.discard("guidance_scale")
    return not any(GUIDES.search(name) for name in names)
