"""What the tests of latent optimisation share: pipelines in double precision, hand-written rules on hand-made maps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnsteer.testing import tiny_call, tiny_pipeline
from tests.reference import latent_loops as slow

# Double precision against another order of the same operations.
EXACT = 1e-10


@functools.cache
def double(name: str, scheduler: str | None = None) -> Any:
    """A tiny pipeline in double precision, shared by the tests: steering must leave it as it was."""
    pipe = tiny_pipeline(name, scheduler=scheduler)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    return pipe


def call_of(name: str, **options: Any) -> dict[str, Any]:
    """Arguments of one call in double precision."""
    call = tiny_call(name, **options)
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}


def far(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a.detach() - b.detach()).abs().max())


def cross_layers(pipe: Any, side: int) -> list[str]:
    """Cross-attentions of the tiny UNets whose maps have this side (16: outer blocks, 8: the others)."""
    names = [n for n, _ in pipe.unet.named_modules() if n.endswith("attn2")]
    outer = lambda n: n.startswith("down_blocks.0.") or n.startswith("up_blocks.1.")  # noqa: E731
    return [n for n in names if outer(n) == (side == 16)]


def by_sample(rule: Callable[[Tensor, slow.Loss, int, int, int], Tensor], loss: Callable[..., Any]) -> slow.Optimise:
    """Each sample by itself: `rule(z, loss, i, n, b)` with `loss(b, predict)` bound to its forward."""

    def optimise(z: Tensor, predict: Callable[[int, Tensor], Tensor], i: int, n: int) -> Tensor:
        rows = []
        for b in range(len(z)):
            one = lambda x, b=b: loss(b, functools.partial(predict, b), x, i)  # noqa: E731
            rows.append(rule(z[b : b + 1], one, i, n, b))
        return torch.cat(rows)

    return optimise


def excite_loss(
    denoiser: Any,
    layers: Sequence[str],
    grid: tuple[int, int],
    words: Sequence[Sequence[Sequence[int]]],
    competing: Sequence[int],
    text: slice | None = None,
    image: slice | None = None,
) -> Callable[..., Any]:
    """The Attend-and-Excite loss of sample b, from a whole forward."""

    def loss(b: int, predict: Callable[[Tensor], Tensor], x: Tensor, i: int) -> tuple[Tensor, None]:
        with slow.recorded(denoiser, layers) as maps:
            predict(x)
        A = slow.cross_map([maps[name] for name in layers], grid, text, image)
        return slow.attend_excite(slow.word_maps(A, words[b], competing)), None

    return loss
