"""What methods need of the layers around their sites: the residual stream, and the prompt without its images beside it."""

from __future__ import annotations

import contextvars
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedHost
from ...tokens import Tokens
from .outer_calls import PromptWatch

# (head outputs [B, H, n, d] of the image-free prompt, index [B] of each sample's last token) -> edited outputs or None.
Edit = Callable[[Tensor, Tensor], Tensor | None]


def block_of(path: str) -> str:
    """Name of the layer that holds an attention module; "" where there is none."""
    found = re.match(r"(.*\.\d+)(\.|$)", path)
    return found[1] if found else ""


def residual_hook(attached: Any, watch: PromptWatch) -> Callable[..., None]:
    """A pre-hook of a layer that hands the hidden states entering it, before any norm, to its attention."""

    @torch.compiler.disable
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not watch.silent:
            attached.residual = args[0] if args else kwargs.get("hidden_states")

    return before


class ImageFree:
    """The prompt of the running prefill without its images, carried through the same layers one step behind.

    Nothing of it is computed before a method asks; then the layers up to the asking site run on the shorter prompt, and
    the site's outputs for it pass through the method's edit, so that later layers see both prompts edited alike. Only
    layers that hand a tensor on to each other can be run in this way; others are refused.

    Attributes:
        active: a pass of it is running, so that steered attention leaves the call to `attention`.
    """

    def __init__(self, watch: PromptWatch, stack: nn.Module, blocks: Sequence[tuple[str, nn.Module]]):
        self.watch, self.stack = watch, stack
        self.names = [name for name, _ in blocks]
        self.blocks = [block for _, block in blocks]
        self.active = False
        self._tokens: Tokens | None = None
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._hidden: Tensor | None = None
        self._last: Tensor | None = None
        self._next = 0
        self._edit: tuple[str, Edit] | None = None

    def forget(self) -> None:
        """The prefill is over; hold no tensors."""
        self._tokens, self._calls, self._hidden, self._last, self._next = None, [], None, None, 0

    def at(self, path: str, tokens: Tokens, edit: Edit) -> None:
        """Run on to the site `path`, and its outputs through `edit`."""
        index = self.names.index(block_of(path))
        if self._tokens is not tokens:
            self._start(tokens)
        if index < self._next:
            raise UnsupportedHost(f"{path}: the image-free prompt has passed this layer already; it runs forward only.")
        with torch.no_grad():
            for i in range(self._next, index + 1):
                self._edit = (path, edit) if i == index else None
                args, kwargs = self._calls[i]
                self._hidden = self._quietly(self.blocks[i], self._hidden, *args, **kwargs)
        self._next, self._edit = index + 1, None

    def attention(self, path: str, out: Tensor) -> Tensor:
        """The head outputs [B, H, n, d] of an image-free pass at `path`, edited if this is the site that asked."""
        if self._edit is None or self._edit[0] != path:
            return out
        edited = self._edit[1](out, self._last)
        return out if edited is None else edited

    def _start(self, tokens: Tokens) -> None:
        self.forget()
        order, mask = _without_images(tokens)
        self._tokens, self._last = tokens, mask.sum(dim=-1) - 1
        family, model = self.watch.family, self.watch.model
        whole = model if family is not None and family.text_alone else self.stack
        inputs = {"input_ids": tokens.ids, **self.watch.roles}
        inputs = {name: t[:, : tokens.length].gather(1, order).masked_fill(~mask, 0) for name, t in inputs.items()}
        seen: list[Tensor] = []

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if seen and hidden_states is not seen[-1]:
                raise UnsupportedHost(
                    f"{type(self.stack).__name__} changes the hidden states between its layers, so a prompt without its images "
                    "cannot be carried through them one by one."
                )
            seen.append(hidden_states)
            self._calls.append((args, kwargs))
            return hidden_states

        before = [vars(block).get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = record
        try:
            with torch.no_grad():
                # Positions, masks and embeddings are the model's own business: it gets a plain text prompt.
                self._quietly(whole, **inputs, attention_mask=mask.long(), use_cache=False)
        finally:
            for block, old in zip(self.blocks, before, strict=True):
                if old is None:
                    del block.forward
                else:
                    block.forward = old
        if len(seen) != len(self.blocks):
            raise UnsupportedHost(
                f"{type(whole).__name__} ran {len(seen)} of {len(self.blocks)} layers for a prompt without images; it cannot be "
                "carried through them one by one."
            )
        self._hidden = seen[0]

    def _quietly(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of the model that no hook of ours notes, and in a context of its own: nor do the library's recorders."""
        before = self.watch.silent, self.active
        self.watch.silent = self.active = True
        try:
            return contextvars.Context().run(lambda: call(*args, **kwargs))
        finally:
            self.watch.silent, self.active = before


def _without_images(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(slots, validity) [B, n'] of the text alone, padded on the right, so that positions count from its first token."""
    if tokens.ids is None:
        raise UnsupportedHost(
            "the prompt without its images is built from input_ids, which this call does not have. Pass input_ids, or enter "
            "run.images(processor_output) around the call."
        )
    keep = ~tokens.image.to(tokens.ids.device)
    if tokens.valid is not None:
        keep = keep & tokens.valid.to(keep.device)
    counts = keep.sum(dim=-1)
    if not bool((counts > 0).all()):
        raise UnsupportedHost("a sample has no token besides its image, so there is no prompt without it.")
    order = torch.argsort((~keep).to(torch.int8), dim=-1, stable=True)[:, : int(counts.max())]
    mask = torch.arange(order.shape[1], device=keep.device) < counts[:, None]
    return order, mask
