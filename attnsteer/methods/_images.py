"""What methods on images share: which keys are image tokens, which rows speak, and the refusals where that is not known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError
from ..site import Site
from ..tokens import Tokens
from ..where import Where


def check_images(tokens: Tokens, name: str) -> None:
    """Raise a SelectionError where a sample of a whole prompt has no image, or where its images are is not known."""
    image = tokens.image_mask()
    if tokens.more_to_come or torch.compiler.is_compiling():
        return
    rows = (~image.any(dim=-1)).nonzero()[:, 0].tolist()
    if rows:
        raise SelectionError(
            f"{name}: there is no image in the prompt of sample {', '.join(map(str, rows))} of {tokens.batch}. Steer the "
            "calls with images only; if the prompt comes in chunks, enter run.chunked_prefill() for them."
        )


def image_tokens(call: AttnCall, name: str) -> Tensor:
    """bool [B, T] of the tokens so far that are images, on the call's device.

    Raises:
        SelectionError: where the images are is not known, or a sample of a whole prompt has none.
    """
    if call.phase == "prefill":
        check_images(call.tokens, name)
    return call.image_tokens()


def check_some_image(tokens: Tokens, name: str) -> None:
    """Raise a SelectionError where no sample of a whole prompt has an image, or where they are is not known; a sample without
    one among others with images is left alone."""
    if tokens.prompt == tokens.length and not tokens.more_to_come and not bool(tokens.image_mask().any()):
        raise SelectionError(
            f"{name}: there is no image in the prompt{'s' if tokens.batch > 1 else ''}. Steer calls with images only; if the "
            "prompt comes in chunks, enter run.chunked_prefill() for them."
        )


def text_layers(sites: Sequence[Site], first: int, stop: int | None = None) -> Where | None:
    """The language model's own layers from the `first` to the one before `stop`, as a selection; None where it has none there."""
    layers = sorted({s.layer for s in sites if s.modality == "text" and s.kind == "self"})[first:stop]
    return Where(layers=layers, kinds="self") if layers else None


def speaking(call: AttnCall) -> Tensor:
    """bool [B or 1, n]: the rows that a token is generated from: the end of each prompt, and generated tokens."""
    return call.prompt_end | call.generates


def behind_images(call: AttnCall) -> Tensor:
    """The tokens behind each sample's last image token, generated ones included, as a key set [B, 1, m]; of a sample without an
    image, none."""
    image = call.image_tokens()
    slots = torch.arange(image.shape[1], device=image.device)
    last = torch.where(image, slots, -1).amax(dim=-1, keepdim=True)
    behind = (call.keys.slot > last) & (last >= 0) & call.keys.valid
    return behind[:, None]


def image_bias(
    call: AttnCall,
    term: Callable[[Tensor, slice], Tensor],
    keys: Tensor | None = None,
    rows: Callable[[AttnCall], Tensor] = speaking,
) -> Tensor | None:
    """A bias [B, H, n, m] of the image's keys (or some of them) in the rows that speak, zero elsewhere; None where none speaks.

    Scores of the other rows, and where it can be told of keys before and behind the images, are not computed.

    Args:
        term: from the scores [B, H, r, s] of r rows and the keys of the given slice, fp32, zero where a row does not see a key.
        keys: bool [B, 1, m]. rows: which rows it acts on instead, bool [B or 1, n].
    """
    acts = rows(call)
    n = acts.shape[1]
    # Which rows of a prompt these are is asked once for all layers.
    index = (
        call.once("acting", lambda: acts.any(dim=0).nonzero()[:, 0]) if n > 1 else acts.new_zeros(1, dtype=torch.long)
    )
    if not len(index):
        return None
    images = call.once("image keys", call.image_keys)
    span = call.once("image span", lambda: _span(images))
    keys = (images if keys is None else keys)[:, :, None, span]
    scores = call.map.scores(index, span)
    dead = scores.isneginf() | ~keys | ~acts[:, index][:, None, :, None]
    found = term(scores.masked_fill(scores.isneginf(), 0.0), span).masked_fill(dead, 0.0)
    found = torch.nn.functional.pad(found, (span.start, images.shape[-1] - span.stop))
    if len(index) == n:
        return found
    whole = found.new_zeros(*found.shape[:2], n, found.shape[3])
    return whole.index_copy(2, index, found)


def _span(images: Tensor) -> slice:
    """From the first image key of all samples to behind the last; all keys where asking would wait for a device."""
    m = images.shape[-1]
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return slice(0, m)
    at = images.flatten(0, -2).any(dim=0).nonzero()
    return slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0)
