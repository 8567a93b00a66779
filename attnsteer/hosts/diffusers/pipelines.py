"""Which rows of a denoiser call are conditional, for each pipeline of diffusers.

Read in the pipelines' own code (diffusers 0.42.1) and checked against it by a test. A pipeline that is not listed here
has no known rows: guidance and `Where(branches=...)` refuse it instead of guessing.
"""

from __future__ import annotations

import re
from typing import Any

# One call on a doubled batch, unconditional rows first; a single batch while guidance is off.
DOUBLED = re.compile(
    r"StableDiffusion(?!.*(Pix2Pix|SAG|DiffEdit|TextImage|Paradigms|Panorama|LEdits|AttendAndExcite))|"
    r"AltDiffusion|Kolors|Sana(?!WM)|PixArt|HunyuanDiT|AuraFlow|CogVideoX|CogView3|ConsisID|Mochi|LTX(?!2|I2VLong|Latent)|"
    r"AnimateDiff|PIA|I2VGenXL|Allegro|Latte|LatentConsistency|TextToVideoSD|VideoToVideoSD|Kandinsky3|EasyAnimate|"
    r"StableAudioPipeline|Bria(Fibo(?!2)|Pipeline|ControlNet)"
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
# These rescale the combined prediction by norms: a term added to every row acts before, not after, that.
NORMALISED = re.compile(r"QwenImage(?!21)|Lumina2|LongCatImage")
UNCOND_COND = ("uncond", "cond")


def layout(pipe: Any, context: str | None, rows: int, latent_rows: int | None, turn: int) -> tuple[str, ...] | None:
    """Names of the equal parts of the batch of one denoiser call; None where they are not known.

    Args:
        context: name of the running cache context. rows: of the batch. latent_rows: of the pipeline's latents.
        turn: how many calls of the denoiser came since the last step of the scheduler.
    """
    name = caller(pipe)
    if IN_CONTEXTS.match(name) and context is not None:
        return (context,) if context in UNCOND_COND and _fits(rows, latent_rows, 1) else None
    if IN_TURN.match(name):
        return (UNCOND_COND[1 - turn],) if turn < 2 and _fits(rows, latent_rows, 1) else None
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if TRIPLED.match(name):
        parts: tuple[str, ...] = ("cond", "uncond", "uncond")
    elif DOUBLED.match(name):
        parts = UNCOND_COND
    else:
        return None
    if guided is None:
        guided = latent_rows is not None and rows != latent_rows
    parts = parts if guided else ("cond",)
    return parts if _fits(rows, latent_rows, len(parts)) else None


def caller(pipe: Any) -> str:
    """Name of the pipeline class of diffusers whose `__call__` runs; empty for one that is not of diffusers."""
    owner = next((c for c in type(pipe).__mro__ if "__call__" in vars(c)), object)
    return owner.__name__ if owner.__module__.startswith("diffusers.pipelines.") else ""


def _fits(rows: int, latent_rows: int | None, parts: int) -> bool:
    """Whether the batch holds that many parts; a pipeline that makes other calls as well fails here."""
    return latent_rows is not None and rows == parts * latent_rows
