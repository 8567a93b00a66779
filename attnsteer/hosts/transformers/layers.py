"""What methods need of the layers around their sites: the prompt without its images, beside the real one."""

from __future__ import annotations

import contextlib
import contextvars
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...engine import SiteRuntime
from ...errors import UnsupportedHost
from ...tokens import Tokens
from .forward import Stack
from .outer_calls import CURRENT, Outer, entry

# (head outputs [B, H, n, d] of the image-free prompt, index [B] of each sample's last token) -> edited outputs or None.
Edit = Callable[[Tensor, Tensor], Tensor | None]


def block_of(path: str) -> str:
    """Name of the layer that holds an attention module; "" where there is none."""
    found = re.match(r"(.*\.\d+)(\.|$)", path)
    return found[1] if found else ""


class PlainPass:
    """Stands in the place of a `Forward` where the model runs as it is, and nothing of it is noted."""

    passes = True

    def attend(
        self, runtime: SiteRuntime, name: str, base: Callable[..., Any], *call: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention; `call`: its arguments, those by keyword last."""
        *given, options = call
        return base(*given, **options)

    def layer(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own layer."""
        return inner(*args, **kwargs)


class ImageFree:
    """The prompt of one prefill without its images, carried through the same layers one step behind.

    Nothing of it is computed before a method asks; then the layers up to the asking site run on the shorter prompt, and
    the site's outputs for it pass through the method's edit, so that later layers see both prompts edited alike. Only
    layers that hand a tensor on to each other can be run in this way; others are refused.

    It stands in the place of a `Forward` in its own passes, so that layers and attention ask it instead.
    """

    passes = True

    def __init__(self, stack: Stack, blocks: Sequence[tuple[str, nn.Module]], outer: Outer):
        self.stack, self.outer = stack, outer
        self.names = [name for name, _ in blocks]
        self.blocks = [block for _, block in blocks]
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._recording = False
        self._hidden: Tensor | None = None
        self._last: Tensor | None = None
        self._next = 0
        self._edit: tuple[str, Edit] | None = None

    def at(self, path: str, tokens: Tokens, edit: Edit) -> None:
        """Run on to the site `path`, and its outputs through `edit`."""
        index = self.names.index(block_of(path))
        if self._hidden is None:
            self._start(tokens)
        if index < self._next:
            raise UnsupportedHost(f"{path}: the image-free prompt has passed this layer already; it runs forward only.")
        with torch.no_grad():
            for i in range(self._next, index + 1):
                self._edit = (path, edit) if i == index else None
                args, kwargs = self._calls[i]
                self._hidden = self._quietly(self.blocks[i], self._hidden, *args, **kwargs)
        self._next, self._edit = index + 1, None

    def attend(
        self,
        runtime: SiteRuntime,
        name: str,
        base: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of an image-free pass; its head outputs are edited at the site that asked."""
        out, weights = base(module, query, key, value, mask, **options)
        if self._edit is None or self._edit[0] != runtime.site.path:
            return out, weights
        edited = self._edit[1](out.transpose(1, 2), self._last)
        return out if edited is None else edited.transpose(1, 2), weights

    def layer(self, inner: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer in a pass of ours: at first only what it is given is noted."""
        if not self._recording:
            return inner(hidden_states, *args, **kwargs)
        if self._hidden is not None and hidden_states is not self._hidden:
            raise UnsupportedHost(
                f"{type(self.stack.module).__name__} changes the hidden states between its layers, so a prompt without its images "
                "cannot be carried through them one by one."
            )
        self._hidden = hidden_states
        self._calls.append((args, kwargs))
        return hidden_states

    def _start(self, tokens: Tokens) -> None:
        length = tokens.length if tokens.prompt is None else min(tokens.length, tokens.prompt)
        order, mask = _without_images(tokens, length)
        self._last = mask.sum(dim=-1) - 1
        calls = self.stack.outer
        whole = calls.model if calls.family is not None and calls.family.text_alone else self.stack.module
        inputs = {"input_ids": tokens.ids, **self.outer.roles}
        inputs = {name: t[:, :length].gather(1, order).masked_fill(~mask, 0) for name, t in inputs.items()}
        self._recording = True
        try:
            with torch.no_grad():
                # Positions, masks and embeddings are the model's own business: it gets a plain text prompt.
                self._quietly(whole, **inputs, attention_mask=mask.long(), use_cache=False)
        finally:
            self._recording = False
        if len(self._calls) != len(self.blocks):
            raise UnsupportedHost(
                f"{type(whole).__name__} ran {len(self._calls)} of {len(self.blocks)} layers for a prompt without images; it "
                "cannot be carried through them one by one."
            )

    def _quietly(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of the model in a context of its own, which neither our account nor the library's recorders note."""

        def run() -> Any:
            with entry(CURRENT, self.stack.run, self), contextlib.ExitStack() as stack:
                if self.stack.module.training:
                    # Layers that checkpoint say that this pass, which takes no gradients, takes none.
                    stack.enter_context(warnings.catch_warnings())
                    warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
                return call(*args, **kwargs)

        return contextvars.Context().run(run)


def _without_images(tokens: Tokens, length: int) -> tuple[Tensor, Tensor]:
    """(slots, validity) [B, n'] of the text alone in the first `length` slots, padded on the right.

    So positions count from its first token.
    """
    if tokens.ids is None:
        raise UnsupportedHost(
            "the prompt without its images is built from input_ids, which this call does not have. Pass input_ids, or enter "
            "run.images(processor_output) around the call."
        )
    keep = ~tokens.image[:, :length].to(tokens.ids.device)
    if tokens.valid is not None:
        keep = keep & tokens.valid[:, :length].to(keep.device)
    counts = keep.sum(dim=-1)
    if not bool((counts > 0).all()):
        raise UnsupportedHost("a sample has no token besides its image, so there is no prompt without it.")
    order = torch.argsort((~keep).to(torch.int8), dim=-1, stable=True)[:, : int(counts.max())]
    mask = torch.arange(order.shape[1], device=keep.device) < counts[:, None]
    return order, mask
