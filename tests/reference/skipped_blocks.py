"""Skip-layer guidance, written out: a context in which blocks hand on what enters them.

Which arguments a block hands on is written down here by family, read in diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

# Class of a block -> the arguments that it gives back, in the order in which it does.
HANDED_ON = {
    "BasicTransformerBlock": "hidden_states",
    "SanaTransformerBlock": "hidden_states",
    "WanTransformerBlock": "hidden_states",
    "JointTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "FluxTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "FluxSingleTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "QwenImageTransformerBlock": ("encoder_hidden_states", "hidden_states"),
}


@contextmanager
def skipped(denoiser: nn.Module, blocks: Sequence[str], *_: Any) -> Iterator[None]:
    modules = [denoiser.get_submodule(name) for name in blocks]

    def forward_of(module: nn.Module) -> Any:
        names = HANDED_ON[type(module).__name__]

        def forward(hidden_states: Any = None, encoder_hidden_states: Any = None, *rest: Any, **kwargs: Any) -> Any:
            given = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
            return given[names] if isinstance(names, str) else tuple(given[name] for name in names)

        return forward

    for module in modules:
        module.forward = forward_of(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
