"""What methods on images share: which keys are image tokens, and the refusals where that is not known."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError
from ..tokens import Tokens


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
