"""The clock of a token sequence: past length, padding, tokens, and state that follows the cache."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedHost
from ...tokens import Tokens

# (arguments of the stack, batch, new tokens, cached tokens) -> token ids and image tokens of the call [B, n], both None
# where not known, and the length of the whole prompt where it was announced.
Said = Callable[[dict[str, Any], int, int, int], tuple[Tensor | None, Tensor | None, int | None]]
STATE = "_attnsteer_states"
FOLLOWED = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "reset")


class SequenceClock:
    """What one stack of layers is doing now; filled before each forward of the stack.

    Attributes:
        past: tokens in the cache before this call. new: tokens of this call. tokens: their roles.
        cross_valid: bool [B, S] validity of the encoder's tokens, for cross-attention.
        total: slots of the whole prompt, where they were announced. image_free: the prompt without its images, if needed.
        places: what is known of the call's rows and keys, kept for its layers.
    """

    def __init__(self, run: Any) -> None:
        self.past = 0
        self.new = 0
        self.tokens: Tokens | None = None
        self.cross_valid: Tensor | None = None
        self.cache: Any = None
        self.stateful: int | None = None
        self.refuse: Callable[[int, int], str | None] | None = None
        self.run = run
        self.total: int | None = None
        self.image_free: Any = None
        self.places: dict[Any, Any] = {}
        self.store: dict[Any, Any] = {}
        self._seen: list[weakref.ref] = []

    def start(self, values: dict[str, Any], batch: int, new: int, said: Said) -> None:
        """Read one call's arguments (by name) of the stack's forward; `said` is what the outer calls told."""
        cache = values.get("past_key_values")
        self.cache = cache if hasattr(cache, "get_seq_length") else None
        self.past = int(self.cache.get_seq_length()) if self.cache is not None else 0
        self.new = new
        self.places = {}
        self.cross_valid = _two_d(values.get("encoder_attention_mask"))
        length = self.past + new
        store = self.store = self._follow(self.cache, fresh=self.past == 0) if self.cache is not None else {}
        previous: Tokens | None = store.get("tokens")
        valid = self._valid(values.get("attention_mask"), previous, batch)
        if valid is not None and valid.shape[1] < length:
            raise UnsupportedHost(
                f"attention_mask has {valid.shape[1]} columns for {length} tokens ({self.past} cached): the cached ones "
                "need their validity too. Pass a mask over all tokens so far."
            )
        if valid is not None:
            valid = valid[:, :length]
        if previous is not None and self.past < previous.length and self.refuse is not None:
            reason = self.refuse(self.past, previous.length)
            if reason:
                raise UnsupportedHost(reason)
        ids, image, self.total = said(values, batch, new, self.past)
        if self.past and previous is not None and ids is not None and previous.ids is not None:
            ids = (
                torch.cat([previous.ids[:, : self.past].to(ids.device), ids], dim=1)
                if len(previous.ids) == batch
                else None
            )
        elif self.past:
            ids = None
        self.tokens = Tokens(batch=batch, length=length, valid=valid, ids=ids)
        self.tokens.more_to_come = length < self.total if self.total is not None else self.run.chunked
        self.tokens.prompt = self._prompt(previous, length)
        if previous is not None and self.past:
            self.tokens._resolved = previous._resolved
        self.tokens.image = self._image(previous, image)
        store["tokens"] = self.tokens

    @property
    def in_prompt(self) -> bool:
        """Whether this call is declared to be a part of the prompt, however many tokens it has."""
        return self.run.chunked or (self.total is not None and self.past + self.new <= self.total)

    def _prompt(self, previous: Tokens | None, length: int) -> int | None:
        """Slots of the prompt after this call."""
        if self.past and (self.run.frozen or (self.new == 1 and not self.in_prompt)):
            return None if previous is None else previous.prompt
        # Assisted decoding feeds candidates together with the prompt.
        return length if self.total is None else min(length, self.total)

    def _image(self, previous: Tokens | None, new: Tensor | None) -> Tensor | None:
        """bool [B, T] over all tokens so far; `new` [B, n] are those of this call."""
        tokens = self.tokens
        moving = not self.past or (not self.run.frozen and (self.new > 1 or self.in_prompt))
        if isinstance(self.run.told, tuple) and moving:
            image = torch.zeros(tokens.batch, tokens.length, dtype=torch.bool)
            for row, ranges in zip(image, tokens.spans(self.run.told), strict=True):
                for start, stop in ranges:
                    row[start:stop] = True
            return image
        if not self.past:
            return new
        if previous is None or previous.image is None or len(previous.image) != tokens.batch:
            return None
        old = previous.image[:, : self.past]
        return torch.cat([old, old.new_zeros(tokens.batch, self.new) if new is None else new.to(old.device)], dim=1)

    def _valid(self, mask: Any, previous: Tokens | None, batch: int) -> Tensor | None:
        """bool [B, T] over all tokens so far, from a 2-D mask or from the 4-D ones of `generate` on static caches."""
        if isinstance(mask, dict):
            mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
        if not isinstance(mask, Tensor) or mask.ndim == 2:
            return _two_d(mask)
        if self.past:
            # A 4-D mask counts slots of the cache; what is padding was learnt at the prefill.
            if previous is None or previous.valid is None:
                return None
            old = previous.valid[:, : self.past]
            return torch.cat([old, old.new_ones(batch, self.new)], dim=1)
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        # A token that is not padding sees itself.
        return seen[:, 0, :, : self.new].diagonal(dim1=-2, dim2=-1).expand(batch, -1)

    def fresh(self, path: str) -> None:
        """Drop the state of a site at the start of a sequence: recomputation must find what the first pass found."""
        states = self.states()
        for key in [k for k in states if k[1] == path]:
            del states[key]

    def finish(self, cache: Any) -> None:
        """After a forward that made its own cache: the state of this sequence moves onto it."""
        if self.cache is None and hasattr(cache, "get_seq_length"):
            self._follow(cache, fresh=True).update(self.store)

    def states(self) -> dict[Any, dict[str, Any]]:
        """The per-sequence state dictionaries: on the cache, so that they follow it, also through deepcopy."""
        return self.store.setdefault(("run", self.stateful), {})

    def _follow(self, cache: Any, fresh: bool) -> dict[Any, Any]:
        store = vars(cache).get(STATE)
        if store is None or fresh:
            store = {}
            setattr(cache, STATE, store)
            for name in FOLLOWED:
                if hasattr(type(cache), name):
                    # A bound method, because deepcopy rebinds those to the copied cache.
                    setattr(cache, name, types.MethodType(_FOLLOWERS[name], cache))
            self._seen.append(weakref.ref(cache))
        return store

    def forget(self) -> None:
        """Take everything off the caches that were seen."""
        for ref in self._seen:
            cache = ref()
            if cache is not None:
                for name in (STATE, *FOLLOWED):
                    vars(cache).pop(name, None)
        self._seen.clear()
        self.cache = self.tokens = self.cross_valid = None
        self.places = {}
        self.store = {}


def key_positions(past: int, new: int, m: int, device: torch.device) -> Tensor:
    """Absolute position of each of the m key slots of a cached self-attention call, [m].

    A window cache hands out its last slots, a static one all of its slots (the unused ones at the end).
    """
    return torch.arange(m, device=device) + max(0, past + new - m)


def valid_at(valid: Tensor | None, position: Tensor, length: int) -> Tensor | None:
    """`valid` [B, T] read at `position` [m]; slots beyond the sequence are invalid."""
    unused = position >= length
    if valid is None:
        return None if not bool(unused.any()) else (~unused)[None]
    inside = position.clamp_max(valid.shape[1] - 1)
    return valid[:, inside] & ~unused


def _two_d(mask: Any) -> Tensor | None:
    """A padding mask as bool [B, T]; anything else is no padding mask."""
    return mask.to(torch.bool) if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _each_tensor(cache: Any, change: Callable[[Tensor], Tensor]) -> None:
    for key, value in vars(cache).get(STATE, {}).items():
        if key == "tokens":
            value.take(change(torch.arange(value.batch)))
        else:
            for state in value.values():
                for name, tensor in state.items():
                    if isinstance(tensor, Tensor) and tensor.ndim:
                        state[name] = change(tensor)


def _reorder(self: Any, beam_idx: Tensor) -> Any:
    result = type(self).reorder_cache(self, beam_idx)
    _each_tensor(self, lambda t: t.index_select(0, beam_idx.to(t.device)))
    return result


def _repeat(self: Any, repeats: int) -> Any:
    result = type(self).batch_repeat_interleave(self, repeats)
    _each_tensor(self, lambda t: t.repeat_interleave(repeats, dim=0))
    return result


def _select(self: Any, indices: Tensor) -> Any:
    result = type(self).batch_select_indices(self, indices)
    _each_tensor(self, lambda t: t[indices])
    return result


def _reset(self: Any) -> Any:
    vars(self).get(STATE, {}).clear()
    return type(self).reset(self)


_FOLLOWERS = {
    "reorder_cache": _reorder,
    "batch_repeat_interleave": _repeat,
    "batch_select_indices": _select,
    "reset": _reset,
}
