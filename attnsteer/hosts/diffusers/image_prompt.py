"""Image prompts of UNets (IP-Adapter): the attention to them is a stream of its own, whose scale a method may take over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...bound import Bound
from ...call import ImagePrompt
from ...engine import SiteRuntime
from ...errors import CompositionError, UnsupportedHost
from ...site import Site

NAME = "IPAdapter"


def check_image_prompt(site: Site, processor: Any, bound: Bound) -> None:
    """Raise an UnsupportedHost where a site has no image prompt of its own, or several."""
    scale = getattr(processor, "scale", None)
    if NAME not in type(processor).__name__ or not isinstance(scale, list):
        raise UnsupportedHost(
            f"{bound.name} acts on the attention to an image prompt, and {site.path} ({type(processor).__name__}) has none. Load "
            "an IP-Adapter into a UNet first, pipe.load_ip_adapter(...); in transformers it is no cross-attention."
        )
    if len(scale) != 1:
        raise UnsupportedHost(
            f"{bound.name}: {site.path} has {len(scale)} IP-Adapters, and which one is meant is not known. Load one."
        )


def check_order(runtime: SiteRuntime, gates: frozenset[int], pictured: frozenset[int]) -> None:
    """Raise a CompositionError where a method that sets the image prompt's scale would undo what came before it."""
    for later in sorted(pictured):
        bound, heads = runtime.entries[later]
        for i in sorted(i for i in gates | pictured if i < later):
            first, others = runtime.entries[i]
            if heads is None or others is None or set(heads) & set(others):
                raise CompositionError(
                    f"{runtime.site.path}: {bound.name} would undo what {first.name} before it did to the image prompt. Put "
                    f"{first.name} after it, or give them other heads."
                )


class Unscaled:
    """A processor that adds its image prompt with the factor one, so that the scale is the runtime's to set.

    Attributes:
        processor: of the same class, with the same weights; the pipeline's own scale stays on the original.
    """

    def __init__(self, path: str, processor: Any):
        self._path, self._own = path, processor
        self.processor = object.__new__(type(processor))
        vars(self.processor).update(vars(processor))
        vars(self.processor)["scale"] = [1.0]

    def begin(self, given: dict[str, Any]) -> Callable[[Tensor], tuple[ImagePrompt, Tensor]]:
        """What turns the output for the image prompt of a call into what a method sees, and into what the pipeline would add.

        Args:
            given: the arguments of the processor.

        Raises:
            UnsupportedHost: images with masks, or tokens that are not told apart from the text.
        """
        text, (scale,) = given.get("encoder_hidden_states"), self._own.scale
        if given.get("ip_adapter_masks") is not None or isinstance(scale, list):
            raise UnsupportedHost(
                f"{self._path}: its image prompts have masks, or a scale for each image; then each image has a softmax of its own. "
                "Leave ip_adapter_masks out to attend to all of them together."
            )
        if not isinstance(text, tuple):
            raise UnsupportedHost(
                f"{self._path}: the image prompt came as part of the text; give ip_adapter_image to the pipeline."
            )
        # [B, images, tokens, D]; a resampler may have put all images into one line.
        shape = text[1][0].shape
        images, tokens = (shape[1], shape[2]) if len(shape) == 4 else (1, shape[1])
        return functools.partial(_seen, images, tokens, float(scale))


def _seen(images: int, tokens: int, scale: float, out: Tensor) -> tuple[ImagePrompt, Tensor]:
    return ImagePrompt(images, tokens, scale, out), out if scale == 1.0 else out * scale
