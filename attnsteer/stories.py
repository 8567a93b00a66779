"""`story`: the frames of a story in rounds, each from all frames of the round before (Story-Adapter, arXiv 2410.06244)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import SelectionError, UnsupportedHost, brief
from .where import Where

# Arguments of the pipeline that the loop gives.
OWN = frozenset({
    "prompt", "generator", "latents", "ip_adapter_image", "ip_adapter_image_embeds", "output_type", "return_dict",
    "num_images_per_prompt",
})  # fmt: skip


@dataclass(frozen=True)
class Story:
    """What `story` made.

    Attributes:
        prompts: one for each frame. scales: lambda of each round behind the first pictures, which are made from text alone.
        rounds: the pictures, `rounds[r][i]` that of frame i after r rounds.
    """

    prompts: tuple[str, ...]
    scales: tuple[float, ...]
    rounds: tuple[tuple[Any, ...], ...]

    @property
    def frames(self) -> tuple[Any, ...]:
        """The pictures of the last round."""
        return self.rounds[-1]


def story(
    pipe: Any,
    prompts: Sequence[str],
    *,
    rounds: int = 10,
    scales: Sequence[float] | None = None,
    seed: int = 0,
    size: int | None = 256,
    batch_size: int = 1,
    first: Sequence[Any] | None = None,
    where: Where | None = None,
    **call: Any,
) -> Story:
    """Make the frames of a story that agree in their characters: round 0 from text alone, each later round from all frames before.

    Args:
        pipe: a UNet pipeline with one IP-Adapter (`pipe.load_ip_adapter(...)`) and its image encoder.
        prompts: of the frames, at least one.
        rounds: rounds with references. scales: their lambda; None: `StoryAdapter.schedule(rounds)`, 0.3 to 0.5.
        seed: of the noise, the same for all frames and rounds, as in the official code.
        size: side to which frames are scaled before the image encoder's own processing (256 there); None: as they are.
        batch_size: frames in one call of the pipeline.
        first: pictures in the place of round 0. where: where the references are attended to; None: all cross-attention.
        call: further arguments of the pipeline, the same for all frames.

    Raises:
        UnsupportedHost: no IP-Adapter, or no image encoder. SelectionError: no prompt, a number of scales or of first pictures
            that does not fit, or an argument that the loop itself gives.
    """
    from PIL import Image

    from .methods.story_adapter import StoryAdapter

    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(t, str) for t in prompts):
        raise SelectionError("story(prompts=...) is a list of texts, one for each frame.")
    texts, where = tuple(prompts), Where() if where is None else where
    if scales is not None and not isinstance(scales, (list, tuple)):
        raise SelectionError(f"story(scales={brief(scales)}): give a list of numbers, one for each round.")
    steps = StoryAdapter.schedule(rounds) if scales is None else scales
    methods = [StoryAdapter(scale, frames=len(texts), where=where) for scale in steps]
    if first is not None and not (isinstance(first, (list, tuple)) and all(isinstance(p, Image.Image) for p in first)):
        raise SelectionError(f"story(first={brief(first)}): give a list of PIL pictures, one for each frame.")
    if first is not None and len(first) != len(texts):
        raise SelectionError(f"story: first has {len(first)} pictures for {len(texts)} frames; give one for each.")
    own = sorted(OWN & set(call))
    if own:
        raise SelectionError(f"story gives {', '.join(own)} itself; leave it out.")
    for name, value, least in (("batch_size", batch_size, 1), ("size", size, 1), ("seed", seed, 0)):
        if not (name == "size" and value is None) and (type(value) is not int or not least <= value < 2**63):
            raise SelectionError(f"story({name}={brief(value)}): give an integer of at least {least}.")
    if getattr(pipe, "image_encoder", None) is None:
        raise UnsupportedHost(
            f"story needs a pipeline with an IP-Adapter and its image encoder, and this {type(pipe).__name__} has none: "
            "pipe.load_ip_adapter(...) first."
        )
    # The UNet wants some image; at strength zero it is not looked at.
    blank = [Image.new("RGB", (64, 64))]
    pictures = [tuple(first)] if first is not None else [
        _round(pipe, texts, blank, StoryAdapter(0.0), seed, batch_size, call)
    ]  # fmt: skip
    for method in methods:
        references = [p if size is None else p.resize((size, size)) for p in pictures[-1]]
        pictures.append(_round(pipe, texts, references, method, seed, batch_size, call))
    return Story(texts, tuple(float(m.scale) for m in methods), tuple(pictures))


def _round(
    pipe: Any, prompts: tuple[str, ...], references: list[Any], method: Any, seed: int, batch: int, call: dict[str, Any]
) -> tuple[Any, ...]:
    """One picture for each prompt, all with the same references."""
    import torch

    from .steering import steer

    made: list[Any] = []
    # The pipeline's own scale may be the same, so changing nothing is no error.
    with steer(pipe, method, control=True):
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            # On the CPU, so that a seed means the same on every device.
            noise = [torch.Generator().manual_seed(seed) for _ in part]
            made += pipe(prompt=part, generator=noise, ip_adapter_image=[references], output_type="pil", **call).images
    return tuple(made)
