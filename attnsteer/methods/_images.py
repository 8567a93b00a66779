"""What methods on images share: which keys are image tokens, and the refusals where that is not known."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError, UnsupportedHost
from ..tokens import Tokens


def check_images(tokens: Tokens, name: str) -> None:
    """Raise a SelectionError where a sample of a whole prompt has no image, or where its images are is not known."""
    image = tokens.image_mask()
    if tokens.more_to_come:
        return
    rows = (~image.any(dim=-1)).nonzero()[:, 0].tolist()
    if rows:
        raise SelectionError(
            f"{name}: there is no image in the prompt of sample {', '.join(map(str, rows))} of {tokens.batch}. Steer the "
            "calls with images only; if the prompt comes in chunks, enter run.chunked_prefill() for them."
        )


def image_tokens(call: AttnCall, name: str) -> tuple[Tokens, Tensor]:
    """The tokens of a call, and bool [B, T] of those that are images, on the call's device.

    Raises:
        UnsupportedHost: the tokens are not known. SelectionError: where the images are is not, or a sample has none.
    """
    tokens = call.context.get("tokens")
    if tokens is None:
        raise UnsupportedHost(
            f"{call.site.path} ran outside its model's forward, so tokens and images are not known; call the model itself."
        )
    if call.phase == "prefill":
        check_images(tokens, name)
    return tokens, tokens.image_mask().to(call.key_position.device)


def at_keys(mask: Tensor, call: AttnCall) -> Tensor:
    """A token mask [B, T] as a key set [B, 1, m] of a call; slots behind T are not in it."""
    m, seen = len(call.key_position), call.context["past"] + call.q.shape[2]
    # A window cache hands out its last slots, a static one its unused ones as well.
    start = max(0, seen - m)
    mask = mask[:, start : start + m]
    return torch.nn.functional.pad(mask, (0, m - mask.shape[1]))[:, None]
