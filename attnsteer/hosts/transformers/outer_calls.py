"""What the outer calls of a transformers model say about the tokens that an inner stack sees as embeddings only."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedHost
from .image_tokens import Family, brings_images, check_whole, family_of, image_tokens, placeholders

WATCH = "_attnsteer_prompt"


class PromptWatch:
    """Token ids, image tokens and prompt length, from `generate`, from the outer forwards, and from the user.

    Attributes:
        silent: nothing is noted (a pass of our own is running).
        roles: the call's arguments by token that shape its attention (see `Family.roles`).
        model: the innermost module of a known vision-language type above a stack of layers, and its `family`.
    """

    def __init__(self, run: Any, model: nn.Module | None, lengths: bool):
        self.run = run
        self.model = model
        self.family: Family | None = None if model is None else family_of(model.config)
        self.silent = False
        self.roles: dict[str, Tensor] = {}
        # The length of a prompt is that of `generate`'s input only where no encoder reads it.
        self._lengths = lengths
        self._depth = 0
        self._call: tuple[Tensor | None, Tensor | None] = (None, None)
        self._prompt: tuple[Tensor | None, Tensor | None, int | None] = (None, None, None)
        self._generating = False

    def __deepcopy__(self, memo: Any) -> None:
        # A copy of a steered model is a plain model of another owner.
        return None

    def enter(self, module: nn.Module, values: Mapping[str, Any]) -> None:
        """An outer forward begins; nested ones add what they know."""
        if self._depth == 0:
            self._call, self.roles = (None, None), {}
        self._depth += 1
        ids, image = self._call
        if self._ours(module):
            self.roles |= {name: values[name] for name in self.family.roles if isinstance(values.get(name), Tensor)}
        if isinstance(values.get("input_ids"), Tensor):
            ids = values["input_ids"]
        if image is None and self._ours(module):
            data = next((v for v in (ids, values.get("inputs_embeds")) if isinstance(v, Tensor)), None)
            if data is not None:
                image = self._images(values, data.shape[1])
                if image is not None and not self._generating:
                    check_whole(self.family, self.model.config, values, image)
        self._call = ids, image

    def leave(self) -> None:
        """An outer forward ended, perhaps by an exception."""
        self._depth -= 1

    @contextlib.contextmanager
    def generation(self, module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
        """An outer `generate` with these arguments; a nested one adds nothing."""
        if self._generating:
            yield
            return
        ids = values.get("input_ids", values.get("inputs"))
        ids = ids if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.ndim == 2 else None
        data = next((v for v in (ids, values.get("inputs_embeds")) if isinstance(v, Tensor)), None)
        image = None
        if data is not None and self.family is not None and self.family.refused is None:
            merged = isinstance(values.get("inputs_embeds"), Tensor) and not brings_images(values)
            if ids is not None and merged:
                image = placeholders(self.family, self.model.config, ids)
            else:
                image = self._images({**values, "input_ids": ids}, data.shape[1])
            if image is not None:
                check_whole(self.family, self.model.config, values, image)
        total = data.shape[1] if data is not None and self._lengths else None
        self._prompt, self._generating = (ids, image, total), True
        try:
            yield
        finally:
            self._prompt, self._generating = (None, None, None), False

    def said(
        self, values: Mapping[str, Any], batch: int, new: int, past: int
    ) -> tuple[Tensor | None, Tensor | None, int | None]:
        """(token ids [B, n], image tokens [B, n], prompt length) of a stack's call, each None where not known."""
        fits = lambda t: t if isinstance(t, Tensor) and t.shape == (batch, new) else None  # noqa: E731
        ids, image = fits(values.get("input_ids")), fits(self._call[1])
        ids = fits(self._call[0]) if ids is None else ids
        total = self.run.chunk_total if self.run.chunked else self._prompt[2]
        if self._prompt[0] is not None and ids is None:
            ids = _part(self._prompt[0], batch, past, new)
        if image is None:
            image = _part(self._prompt[1], batch, past, new)
        if isinstance(self.run.told, Mapping):
            ids, image = self._told(self.run.told, batch, new, past)
        return ids, image, total

    def _told(self, told: Mapping[str, Any], batch: int, new: int, past: int) -> tuple[Tensor | None, Tensor | None]:
        ids = told.get("input_ids")
        family = self.family or Family()
        if isinstance(ids, Tensor) and self.model is not None:
            image = placeholders(family, self.model.config, ids)
        else:
            types = told.get(family.types or "mm_token_type_ids")
            if not isinstance(types, Tensor):
                raise UnsupportedHost(
                    f"run.images: {sorted(told)} do not tell which tokens of this model are images. Give a list of (start, stop) "
                    "token ranges for each sample instead."
                )
            image = (types == 1) | (types == 2)
        return _part(ids, batch, past, new), _part(image, batch, past, new)

    def _ours(self, module: nn.Module) -> bool:
        return self.family is not None and self.family.refused is None and family_of(module.config) is self.family

    def _images(self, values: Mapping[str, Any], new: int) -> Tensor | None:
        return image_tokens(self.family, self.model.config, values, self.model.get_input_embeddings(), new)


def _part(whole: Tensor | None, batch: int, past: int, new: int) -> Tensor | None:
    """[b, N] -> [B, n], the columns of a call; samples that were repeated (beams) share theirs."""
    if not isinstance(whole, Tensor) or batch % len(whole) or past + new > whole.shape[1]:
        return None
    return whole[:, past : past + new].repeat_interleave(batch // len(whole), dim=0)


def outer_modules(names: Mapping[str, nn.Module], stacks: list[str]) -> list[nn.Module]:
    """The target itself and the library's models above the stacks of layers, outermost first."""
    from transformers import PreTrainedModel

    found = {""}
    for stack in stacks:
        parts = stack.split(".")
        found |= {
            ".".join(parts[:i]) for i in range(len(parts)) if isinstance(names[".".join(parts[:i])], PreTrainedModel)
        }
    return [names[n] for n in sorted(found - set(stacks), key=len)]


def watch_prompts(run: Any, outer: list[nn.Module], journal: Any) -> PromptWatch:
    """Hook the outer modules' forwards and `generate`; undone by the journal."""
    known = [m for m in outer if family_of(getattr(m, "config", None)) is not None]
    encoders = any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) for m in outer)
    watch = PromptWatch(run, known[-1] if known else None, lengths=not encoders)
    for module in outer:
        journal.add(module.register_forward_pre_hook(_enter_hook(watch, module), with_kwargs=True).remove)
        journal.add(module.register_forward_hook(_leave_hook(watch), always_call=True).remove)
        if callable(getattr(module, "generate", None)):
            journal.set_attr(module, WATCH, watch)
            journal.set_attr(module, "generate", types.MethodType(_generator(module), module))
    return watch


def _enter_hook(watch: PromptWatch, module: nn.Module) -> Any:
    names = list(inspect.signature(module.forward).parameters)

    @torch.compiler.disable
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not watch.silent:
            watch.enter(module, dict(zip(names, args, strict=False)) | kwargs)

    return before


def _leave_hook(watch: PromptWatch) -> Any:
    @torch.compiler.disable
    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not watch.silent:
            watch.leave()

    return after


def _generator(module: Any) -> Any:
    """`generate` of a model, with its arguments noted."""
    there = vars(module).get("generate")
    # A bound function of the copy's own: a deep copy of a steered model generates with itself.
    plain = there.__func__ if hasattr(there, "__func__") else type(module).generate

    @functools.wraps(plain)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = vars(self).get(WATCH)
        if watch is None:
            return plain(self, *args, **kwargs)
        names = list(inspect.signature(plain).parameters)[1:]
        with watch.generation(self, dict(zip(names, args, strict=False)) | kwargs):
            return plain(self, *args, **kwargs)

    return generate


__all__ = ["PromptWatch", "outer_modules", "watch_prompts"]
