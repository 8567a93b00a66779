"""Rows over the tokens of an image: taken as a vision-language model's calls pass, and brought onto the image's grid."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..captured import checked_rows, chosen_rows, map_rows, places
from ..errors import SelectionError, UnsupportedHost, brief
from ..heads import HeadSet
from ..intervention import Intervention
from ..parameters import whole
from ..steering import steer
from ..where import Where


@dataclass(frozen=True)
class ImageRows:
    """Rows of one attention call over the image tokens.

    Attributes:
        layer: of the site. heads: those that were taken. rows: int64 [r], numbers of the rows. map: fp32 [H, r, N], probabilities
            over all keys, of the N image tokens alone, in their order. first: whether the call has the prompt's rows.
    """

    layer: int
    heads: tuple[int, ...]
    rows: Tensor
    map: Tensor
    first: bool


@dataclass(frozen=True)
class _OverImage(Intervention):
    """Takes rows over the image tokens; edits nothing."""

    rows: Any = "last"
    gradients: bool = False
    after_image: bool = False
    tokenizer: Any = field(default=None, compare=False, repr=False)
    found: list[ImageRows] = field(default_factory=list, compare=False, repr=False)

    observes = True
    kinds = ("self",)
    needs = ("tokens", "images")

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Take the chosen rows, for the image's keys."""
        if call.map.shape[0] != 1:
            raise SelectionError(
                f"{call.map.shape[0]} samples at {call.site.path}: readers of images take one at a time."
            )
        image = call.image_keys()[0, 0]
        if not bool(image.any()):
            raise SelectionError("there is no image in the prompt, so there is nothing of it to read.")
        if self.after_image:
            chosen = call.at_rows(call.tokens.after_image().to(image.device)) & ~call.generates
        else:
            chosen = chosen_rows(call, self.rows, self.tokenizer).expand(1, -1)
        at, there = places(chosen)
        if not at.shape[1]:
            return
        if self.gradients and not torch.is_grad_enabled():
            raise UnsupportedHost(
                "rows with gradients are taken of forwards with gradients enabled, not of `generate`."
            )
        rows = map_rows(call, at)[0][..., image].float()
        index = call.rows.index.expand(1, -1).gather(1, at)[0]
        self.found.append(
            ImageRows(
                call.site.layer, call.heads, index, rows if self.gradients else rows.detach(), call.phase == "prefill"
            )
        )


@contextlib.contextmanager
def over_image(
    model: Any,
    layers: Sequence[int] | None = None,
    rows: Any = "last",
    heads: HeadSet | None = None,
    gradients: bool = False,
    after_image: bool = False,
    tokenizer: Any = None,
) -> Iterator[list[ImageRows]]:
    """Take rows over the image tokens from all calls in the block, for one sample; outputs stay as they are.

    Args:
        layers: of the language model; None: all. rows: as of `capture`. after_image: in place of `rows`, all rows of the prompt
            behind its image.
    """
    where = Where(kinds="self") if layers is None else Where(layers=list(layers), kinds="self")
    if heads is not None:
        where = where & Where(heads=heads)
    reader = _OverImage(checked_rows(rows), gradients, after_image, tokenizer, where=where)
    with steer(model, reader):
        yield reader.found


def checked_layers(name: str, layers: Any) -> tuple[int, ...]:
    """Layers as numbers.

    Raises:
        SelectionError: they are none.
    """
    listed = list(layers) if isinstance(layers, (list, tuple, range)) else [layers]
    numbers = [whole(i) for i in listed]
    if not numbers or any(i is None or i < 0 for i in numbers):
        raise SelectionError(f"{name}: layers={brief(layers)}; give layer numbers, counted from 0.")
    return tuple(dict.fromkeys(numbers))


def text_depth(model: Any) -> int:
    """How many layers the language model has."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    count = getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise UnsupportedHost(f"how many layers {type(model).__name__} has is not known; give layers=.")
    return count


def share(model: Any, start: float, stop: float) -> tuple[int, ...]:
    """The layers from a fraction of the depth to another, at least one."""
    depth = text_depth(model)
    first = min(round(start * depth), depth - 1)
    return tuple(range(first, max(first + 1, round(stop * depth))))


def image_grid(model: Any, inputs: Mapping[str, Any], count: int, grid: Any = None) -> tuple[int, int]:
    """(height, width) of the image tokens of one image.

    Args:
        inputs: of the model's call, with the processor's grid where it has one. count: image tokens of the prompt. grid: as the
            user says.

    Raises:
        SelectionError: it is not known, or does not make `count` tokens. It is never guessed from their number.
    """
    found = _told(grid) if grid is not None else _of_inputs(model, inputs)
    if found is None:
        raise SelectionError(
            f"the grid of the {count} image tokens of {type(model).__name__} is not known (no image_grid_thw, no patch size that "
            "fits); give grid=(height, width)."
        )
    if found[0] * found[1] != count:
        raise SelectionError(
            f"a grid of {found[0]} x {found[1]} has {found[0] * found[1]} cells, and the prompt has {count} image tokens (several "
            "images, tiles, or tokens between rows?). Give one image, and grid=(height, width)."
        )
    return found


def _told(grid: Any) -> tuple[int, int]:
    sides = [whole(i) for i in grid] if isinstance(grid, (list, tuple)) else []
    if len(sides) != 2 or not all(i is not None and i > 0 for i in sides):
        raise SelectionError(f"grid={brief(grid)}: give (height, width) in image tokens.")
    return sides[0], sides[1]


def _of_inputs(model: Any, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    thw = inputs.get("image_grid_thw")
    if isinstance(thw, Tensor):
        merge = getattr(vision, "spatial_merge_size", None)
        if thw.ndim != 2 or len(thw) != 1 or int(thw[0, 0]) != 1 or not isinstance(merge, int):
            return None
        return int(thw[0, 1]) // merge, int(thw[0, 2]) // merge
    patch, values = getattr(vision, "patch_size", None), inputs.get("pixel_values")
    if isinstance(patch, int) and isinstance(values, Tensor) and values.ndim == 4 and len(values) == 1:
        return values.shape[2] // patch, values.shape[3] // patch
    return None


def prepared(model: Any, processor: Any, images: Any, text: str) -> Any:
    """The processor's output for one prompt, on the model's device.

    Raises:
        SelectionError: the text does not say where the images are, has places for others, or is none.
    """
    token = getattr(processor, "image_token", None)
    if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
        raise SelectionError(
            f"the text {brief(text)} is no text, or has half of a character (a lone surrogate); give a string."
        )
    if isinstance(token, str) and token not in text:
        raise SelectionError(f"the text {brief(text)} has no {token!r}, which stands where the image is.")
    try:
        batch = processor(images=images, text=text, return_tensors="pt")
    except ValueError as error:
        # Places for more pictures than there are.
        raise SelectionError(
            f"the processor does not take the text {brief(text)} with this picture ({error})."
        ) from error
    device = next(model.parameters()).device
    return batch.to(device)


def generated(model: Any, inputs: Any, max_new_tokens: int, options: Mapping[str, Any]) -> Tensor:
    """The ids [T] that `generate` puts behind a prompt; greedy unless `options` say otherwise.

    Raises:
        SelectionError: no token, or several answers, are asked for.
    """
    count = whole(max_new_tokens)
    if count is None or count < 1:
        raise SelectionError(f"max_new_tokens={brief(max_new_tokens)}: give a whole number of at least 1.")
    if options.get("num_return_sequences", 1) not in (None, 1):
        raise SelectionError(
            f"num_return_sequences={brief(options['num_return_sequences'])}: one answer is read; leave it out."
        )
    made = model.generate(**inputs, **{"do_sample": False, **options, "max_new_tokens": count})
    made = made if isinstance(made, Tensor) else made.sequences
    return made[0, inputs["input_ids"].shape[1] :]


def decoded(processor: Any, ids: Tensor) -> str:
    """A text without special tokens."""
    return getattr(processor, "tokenizer", processor).decode(ids, skip_special_tokens=True).strip()
