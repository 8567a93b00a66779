"""One forward of a stack of layers: what its rows are, drawn up once and carried to every attention call of that forward.

It travels as a keyword argument that a layer around the stack's forward adds, so that threads, tasks, interrupted calls, other
streams and a checkpoint's recomputation each have their own. Models whose layers drop keywords find it in the running context.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...account import Account, Samples, Track, plain
from ...bound import Bound
from ...call import AttnCall
from ...engine import SiteRuntime
from ...errors import CompositionError, UnsupportedHost, listing
from ...intervention import Intervention
from ...scope import PLAIN, SCOPES, Scope
from ...steady import Step
from ...tokens import Tokens
from . import traced
from .cache_state import STATE, Memory, Sequence
from .masks import looks_both_ways, packed_requests, padding_mask, roles_of_mask, whole_mask
from .outer_calls import (
    CURRENT,
    GENERATION,
    KEY,
    OUTER,
    UNTOLD,
    UNTRACED,
    Outer,
    OuterCalls,
    OuterFacts,
    Prepared,
    entry,
    takes_keywords,
)


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward of one stack under one steering. Immutable; it is handed on, never looked up.

    Attributes:
        stack: what is the same for all forwards of the stack. sequence: the memory of the sequence.
        batch, past, new: batch rows, slots in the cache, rows of each; -1 where the stack sees no tokens (a vision tower).
        valid, request, prompt, phase, mixed, virtual: see `Account`. tokens: roles of the tokens so far, or None.
        encoder: bool [B, S], validity of an encoder's tokens, or None. frozen: statistics must not move.
        beside: the prompt without its images, where a method needs it. residual: hidden states that enter the layer.
        memo: what was made once for all layers. steps: of a decode step that may be done again, by site; None: it may not.
    """

    stack: Stack
    sequence: Sequence
    batch: int = -1
    past: int = 0
    new: int = -1
    device: torch.device | None = None
    valid: Tensor | None = None
    request: Tensor | None = None
    prompt: int | None = None
    phase: str = "prefill"
    mixed: bool = False
    virtual: int = 0
    tokens: Tokens | None = None
    encoder: Tensor | None = None
    frozen: bool = False
    beside: Any = None
    residual: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    steps: dict[str, Step] | None = None

    @functools.cached_property
    def account(self) -> Account:
        """Whose token each row and key is; drawn up when a method asks."""
        return Account(
            self.batch, self.past, self.new, self.device,
            valid=self.valid, request=self.request, prompt=self.prompt, phase=self.phase, mixed=self.mixed,
            virtual=self.virtual,
        )  # fmt: skip

    def call(
        self, runtime: SiteRuntime, batch: int, rows: int, keys: int, slots: int, device: torch.device
    ) -> AttnCall:
        """The call of one site with `keys` keys; `slots`: of the cache, `keys` or more."""
        site = runtime.site
        if self.batch != batch or self.new != rows:
            # The stack folds other axes into the batch, or has no tokens.
            check_no_samples(runtime)
            if self.batch > 0 and site.modality == "text":
                _check_no_tokens(runtime)
            own = plain(rows, device), plain(keys, device)
            return AttnCall(site, *own, host="transformers", phase=self.phase)
        facts: dict[str, Any] = {"tokens": self.tokens, "residual": self.residual}
        if self.beside is not None:
            facts["image_free"] = functools.partial(self.beside.at, site.path, self.tokens)
        states = self.sequence.states
        if self.past == 0 and states:
            # Layers that are computed again must find what they found the first time.
            for key in [k for k in states if k[1] == site.path]:
                del states[key]
        if self.past:
            self._check_once(site.path)
        if site.kind == "cross":
            make_keys = functools.partial(self._encoder_keys, keys)
        else:
            make_keys = lambda: self.account.keys(keys, slots)  # noqa: E731
        return AttnCall(
            site,
            lambda: self.account.rows,
            make_keys,
            host="transformers",
            phase=self.phase,
            mixed=self.mixed,
            frozen=self.frozen,
            past=self.past,
            samples=self.tokens.repeats,
            packed=self.request is not None,
            states=states,
            facts=facts,
            memo=self.memo,
        )

    def last_row(self) -> Forward:
        """The account of a layer that computes its last row only, over the keys of all of them."""
        return replace(self, past=self.past + self.new - 1, new=1, memo={})

    def _check_once(self, path: str) -> None:
        """Raise where a module runs twice in a forward over a cache: its memory would be that of its last turn for all of them."""
        ran = self.memo.setdefault("ran", set())
        if path in ran and any(state and key[1] == path for key, state in self.sequence.states.items()):
            raise UnsupportedHost(
                f"{path} runs several times in one forward of its model, and the methods there keep what they learnt from the "
                "prompt by module. Give each layer a module of its own (copy.deepcopy), or leave this one out."
            )
        ran.add(path)

    def _encoder_keys(self, keys: int) -> Track:
        valid = None if self.encoder is None else self.encoder[:, :keys]
        return Account(self.batch, 0, keys, self.device, valid=valid).keys(keys)


class Stack:
    """What a steering knows of one stack of layers, and the layer around its forward."""

    def __init__(self, run: Any, name: str, module: nn.Module, runtimes: dict[int, SiteRuntime], outer: OuterCalls):
        self.run, self.name, self.module, self.runtimes, self.outer = run, name, module, runtimes, outer
        self.names = list(inspect.signature(module.forward).parameters)
        # One that takes no other keywords than its own has layers that find the account in the running context.
        self.hands_on = takes_keywords(module)
        bounds = {b.index: b for r in runtimes.values() for b, _ in r.entries}
        self.bounds: list[Bound] = [bounds[i] for i in sorted(bounds)]
        # Those that refuse a batch without the tokens they speak of.
        self.checking = [b for b in self.bounds if type(b.method).check_tokens is not Intervention.check_tokens]
        self.sampled = [b for b in self.bounds if b.method.sample_values]
        # An image tower of a vision-language model: its batch is one of images or tiles.
        self.tower = outer.family is not None and any(r.site.modality != "text" for r in runtimes.values())
        self.memory = Memory()
        # Sites, and with which kernel, whose attention was found to be what its arguments say.
        self.exact: set[Any] = set()
        self.beside: Any = None
        # Why compiled code never holds this stack's forward, or None.
        self.untraceable: str | None = None
        outer.stacks.append(self)

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The stack's forward, with the account of its rows."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and traced.why_not(self) is None:
            own = kwargs.get(KEY, {}).get(id(self.run))
            values = dict(zip(self.names, args, strict=False)) | kwargs
            forward = None if isinstance(own, (Prepared, Forward)) else traced.begin(self, values, own)
            if forward is not None:
                kwargs[KEY] = {**kwargs.get(KEY, {}), id(self.run): forward}
                output = inner(*args, **kwargs)
                traced.finish(self, forward, values, output)
                return output
        return self._untraced(inner, *args, **kwargs)

    @torch.compiler.disable(reason=UNTRACED)
    def _untraced(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise UnsupportedHost(f"{UNTRACED}. Detach first, or use torch.compile.")
        key = id(self.run)
        running = CURRENT.get()
        if getattr(running.get(key), "passes", False):
            # A pass of ours beside the real one.
            kwargs[KEY] = {**kwargs.get(KEY, {}), key: running[key]}
            return inner(*args, **kwargs)
        own = kwargs.get(KEY, {}).get(key)
        if isinstance(own, Prepared):
            with entry(CURRENT, self.run, own):
                return inner(*args, **kwargs)
        self._check_plain(kwargs)
        told = OUTER.get().get(key)
        if told is None and KEY not in kwargs and self.outer.family is None and key not in GENERATION.get():
            told = UNTOLD
        # An outer stack hands its own account on to the towers inside.
        prepared = self.outer.taken(kwargs) if KEY in kwargs else None
        if isinstance(prepared, OuterFacts):
            # The outer model runs compiled, this stack does not.
            told, prepared = prepared.outer(), None
        elif isinstance(prepared, traced.Traced):
            prepared = None
        values = dict(zip(self.names, args, strict=False)) | kwargs
        if told is None:
            told = self.outer.of_call(self.module, values, None if isinstance(prepared, Forward) else prepared)
        forward = self.begin(values, told)
        if self.hands_on:
            kwargs[KEY] = {**kwargs.get(KEY, {}), key: forward}
        token = CURRENT.set({**running, key: forward})
        try:
            output = inner(*args, **kwargs)
        finally:
            CURRENT.reset(token)
        if not self.run.attached:
            raise CompositionError(
                f"{self.run} was removed while a forward ran, of which some layers are steered and others not. Remove it between "
                "the calls of the model."
            )
        self.finish(forward, values, output)
        if torch.is_grad_enabled() and self._checkpoints():
            self._watch_gradient(output)
        return output

    def begin(self, values: dict[str, Any], outer: Outer) -> Forward:
        """Draw up the account of one forward from its arguments."""
        scope = SCOPES.get().get(id(self.run), PLAIN)
        data = next((values[k] for k in ("input_ids", "inputs_embeds") if isinstance(values.get(k), Tensor)), None)
        tokens_known = data is not None
        if data is None:
            data = next((v for v in values.values() if isinstance(v, Tensor)), None)
            if data is None or "hidden_states" not in values:
                return Forward(self, Sequence())
        batch, new = data.shape[:2]
        cache = values.get("past_key_values")
        cache = cache if hasattr(cache, "get_seq_length") else None
        past = int(cache.get_seq_length()) if cache is not None else 0
        self._check_checkpointing(past)
        sequence = self._continued(cache, past)
        valid, request = self._roles(values, outer, sequence, batch, past, new)
        sequence.request = request
        virtual = self._virtual(values, sequence, past)
        border, total = self._border(scope, outer, sequence, past, new, virtual)
        length = past + new
        phase = "decode" if border is not None and past >= border else "prefill"
        mixed = border is not None and past < border < length
        forward = Forward(
            self, sequence, batch, past, new, data.device, valid, request, border, phase, mixed,
            virtual=virtual,
            frozen=scope.frozen,
            encoder=_encoder_mask(values["encoder_attention_mask"]) if "encoder_attention_mask" in values else None,
            beside=None if self.beside is None or not tokens_known else self.beside(outer),
        )  # fmt: skip
        tokens = self._tokens(scope, forward, outer, values, total)
        forward = replace(forward, tokens=tokens, steps=self._steps(forward))
        if self.sampled and self.tower:
            for runtime in self.runtimes.values():
                check_no_samples(runtime)
        for bound in self.sampled:
            if self.run.is_open(bound) and bound.where.active(None if mixed else phase, None, None):
                bound.method.check_samples(tokens.samples)
        for bound in self.checking:
            if self.run.is_open(bound) and bound.where.active(None if mixed else phase, None, None):
                bound.method.check_tokens(tokens)
        return forward

    def _steps(self, forward: Forward) -> dict[str, Step] | None:
        """What the sites did in the last decode step, where this forward is one more; None: it is none."""
        sequence, run = forward.sequence, self.run
        before = sequence.tokens
        one = forward.phase == "decode" and forward.new == 1 and not forward.mixed and before is not None
        # What was announced as the prompt may be another one than before.
        same = forward.prompt == sequence.prompt
        plain = same and forward.request is None and forward.beside is None and not sequence.compiled
        watched = run.measure or run.reference or run.audit.parts is not None or torch.is_grad_enabled()
        if not one or not plain or watched or forward.device.type != "cpu":
            sequence.steps = {}
            return None
        if sequence.steps and not _goes_on(before.valid, forward.valid):
            sequence.steps = {}
        return sequence.steps

    def finish(self, forward: Forward, values: dict[str, Any], output: Any) -> None:
        """After a forward that ran to its end: the sequence remembers it."""
        if forward.tokens is None:
            return
        sequence = forward.sequence
        sequence.tokens, sequence.left = forward.tokens, None
        if forward.tokens.prompt is not None:
            sequence.prompt = forward.tokens.prompt
        if forward.phase == "prefill":
            sequence.remember(forward.past)
        given = values.get("past_key_values")
        if not hasattr(given, "get_seq_length"):
            parts = output if isinstance(output, (tuple, list)) else (getattr(output, "past_key_values", None),)
            given = next((p for p in parts if hasattr(p, "get_seq_length")), None)
        if given is not None:
            # A copy of a cache is seen here first.
            self.memory.put(given, sequence)

    def _check_plain(self, values: dict[str, Any]) -> None:
        """Raise where the call is one of packed requests that nobody has told apart, or of none that could choose a steering."""
        if values.get("cache") is not None and "block_table" in values:
            raise UnsupportedHost(
                "this manager of continuous batching was made before the model was steered, or by other means than the model. Make "
                "it inside the steering: model.init_continuous_batching(...)."
            )
        if self.run.choices.names:
            raise UnsupportedHost(
                f"steerings with names ({listing(sorted(self.run.choices.names))}) are for requests of continuous batching, which "
                "choose one. For other calls give the intervention itself: steer(model, ...)."
            )

    def _checkpoints(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return self.module.training and any(getattr(m, "gradient_checkpointing", False) for m in self.module.modules())

    def _watch_gradient(self, output: Any) -> None:
        """Raise in a backward pass that comes after the steering, and before it computes layers again that are plain by now."""
        hidden = output[0] if isinstance(output, (tuple, list)) or hasattr(output, "to_tuple") else output
        if not isinstance(hidden, Tensor) or not hidden.requires_grad:
            return

        def check(gradient: Tensor) -> None:
            if not self.run.attached:
                raise UnsupportedHost(
                    f"{self.run} was removed between a forward and its backward, and gradient checkpointing computes the layers "
                    "again, without it. Call backward while it is attached."
                )

        hidden.register_hook(check)

    def _check_checkpointing(self, past: int) -> None:
        if past and self._checkpoints():
            raise UnsupportedHost(
                f"{self.name or type(self.module).__name__}: gradient checkpointing drops the cache of {past} tokens that this "
                "call brings, so its rows would not be what they seem. Call it without past_key_values, or without checkpointing."
            )

    def _continued(self, cache: Any, past: int) -> Sequence:
        """A draft of the memory of the sequence that this forward goes on with; what is stored stays as it is until its end."""
        if past == 0:
            if cache is not None:
                # So that a cache whose first forward is interrupted is known to be incomplete.
                self.memory.put(cache, Sequence())
            return Sequence()
        known = vars(cache).get(STATE, {}).get(self.memory.key)
        if known is None:
            return Sequence()
        if known.compiled and known.tokens is not None and known.prompt is not None:
            # Compiled calls went on with it; what came in by them was generated.
            known = traced.Kept.of(known)
        if isinstance(known, traced.Kept):
            known = known.sequence(past)
        length = known.length
        if past > length:
            raise UnsupportedHost(
                f"the cache holds {past} tokens, of which {length} came in by forwards of the steered model that ran to "
                "their end: one was interrupted, or something else has written to it. Start a new cache, or a copy made before."
            )
        sequence = known.draft()
        if past < length:
            self._follow_cut(sequence, past)
            # What was cut off is gone from here on: a forward that is interrupted may leave as many slots as there were.
            sequence.left = past
            self.memory.put(cache, sequence.draft())
        return sequence

    def _follow_cut(self, sequence: Sequence, past: int) -> None:
        """The cache was cut back since the last forward."""
        seen, moving = sequence.length, [b.name for b in self.bounds if not b.method.follows_crop]
        whole = sequence.cut(past)
        if moving:
            raise UnsupportedHost(
                f"the cache was cut back from {seen} to {past} tokens, and {moving[0]} keeps sums over the rows that were cut. "
                "Start a new cache, or use a decode mode that does not move its statistics."
            )
        ahead = [b.name for b in self.bounds if b.method.looks_ahead]
        if not whole and ahead:
            raise UnsupportedHost(
                f"the cache was cut back from {seen} to {past} tokens, inside its prompt, where no call of the prompt ended: the "
                f"statistics of {ahead[0]} would be those of tokens that are gone. Cut it to the end of a call (prefill the shared "
                "part by itself), or copy the cache there and continue the copies."
            )

    def _roles(
        self, values: dict[str, Any], outer: Outer, sequence: Sequence, batch: int, past: int, new: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """(valid, request) of all slots so far, [B, T] each or None."""
        mask, length, before = values.get("attention_mask"), past + new, sequence.tokens
        valid, packed = None, sequence.request
        if isinstance(mask, Tensor) and mask.ndim == 2:
            valid = mask if mask.dtype == torch.bool else mask.to(torch.bool)
        elif mask is not None and outer.mask is not None and len(outer.mask) == batch:
            # The stack was given what the library made of this one.
            valid = padding_mask(outer.mask)
        if valid is None and mask is not None:
            seen = whole_mask(mask)
            if seen is not None:
                old = None if before is None else before.valid
                # A window cache hands out its last slots; of those before nothing is seen.
                seen = torch.nn.functional.pad(seen[:, :, :length], (max(0, length - seen.shape[2]), 0))
                seen = seen.expand(batch, new, -1)
                roles = roles_of_mask(seen, past, old, packed, self._hidden(values))
                self._check_causal(seen[:, :, past:], roles[0])
                return roles
        if packed is not None:
            raise UnsupportedHost(
                "the cache holds several sequences packed into a row, and this call does not say which of them its tokens see. "
                f"Pass a mask [B, 1, {new}, {length}], or prefill each sequence in a batch row of its own."
            )
        if valid is not None:
            if valid.shape[1] < length:
                raise UnsupportedHost(
                    f"attention_mask has {valid.shape[1]} columns for {length} tokens ({past} cached): the cached ones "
                    "need their validity too. Pass a mask over all tokens so far."
                )
            return valid[:, :length] if len(valid) == batch else valid[:, :length].expand(batch, -1), None
        if past:
            if before is None or before.valid is None:
                return None, None
            if mask is None:
                if bool(before.valid[:, :past].all()):
                    return None, None
                raise UnsupportedHost(
                    f"the cache of {past} tokens holds padding, as its masks said, and this call has no attention_mask, so that "
                    f"its tokens would see it. Pass a mask [B, {length}] over all tokens so far."
                )
            # Of several masks none hides anything; what is padding was learnt at the prefill.
            old = before.valid[:, :past]
            return torch.cat([old, old.new_ones(len(old), new)], dim=1), None
        uses = values.get("use_cache")
        uses = getattr(self.module.config, "use_cache", False) if uses is None else uses
        cached = values.get("past_key_values") is not None or bool(uses)
        return None, packed_requests(values, batch, new, cached)

    def _check_causal(self, seen: Tensor, valid: Tensor | None) -> None:
        """`seen`: bool [B, n, n], the rows and keys of this call."""
        # Of a vision-language model the mask may be the library's, made of its arguments; images in it are what they are.
        causal = [b.name for b in self.bounds if b.method.causal_only and self.outer.family is None]
        if causal and looks_both_ways(seen, None if valid is None else valid[:, -seen.shape[1] :]):
            raise UnsupportedHost(
                f"attention_mask lets tokens see later ones, and {causal[0]} is defined on causal attention. If they are padding, "
                "let them see nothing or themselves only."
            )

    def _hidden(self, values: dict[str, Any]) -> Tensor | None:
        """The positions [B or 1, n] that were given beside a mask of which windows may have hidden a part; or None."""
        positions, config = values.get("position_ids"), getattr(self.module, "config", None)
        windows = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        whole = isinstance(values.get("attention_mask"), dict) or not windows
        return None if whole or not isinstance(positions, Tensor) or positions.ndim != 2 else positions

    def _virtual(self, values: dict[str, Any], sequence: Sequence, past: int) -> int:
        """Slots in front that an adapter filled: as embeddings before those of the prompt, or as a cache."""
        if sequence.tokens is not None:
            return sequence.tokens.virtual
        count = 0 if self.outer.adapted is None else self.outer.virtual()
        return count if past == count or (past == 0 and values.get("input_ids") is None) else 0

    def _border(
        self, scope: Scope, outer: Outer, sequence: Sequence, past: int, new: int, virtual: int
    ) -> tuple[int | None, int | None]:
        """(slots of the prompt, None: all of them; slots of the whole prompt where they were announced)."""
        if scope.frozen and past:
            return past if sequence.prompt is None else min(sequence.prompt, past), None
        if scope.chunked:
            total = scope.chunk_total
        elif outer.generation is not None and outer.generation.assists and past and sequence.prompt is not None:
            # Each round of candidates is a `generate` of its own, whose input is longer than the prompt.
            return sequence.prompt, sequence.prompt
        elif outer.generation is not None:
            total = outer.generation.total
        elif outer.beside is not None and outer.beside.guided and (new == 1 or not past):
            # The unconditional stream of `guidance_scale`: its first call is its prompt, also where no cache remembers it.
            border = sequence.prompt if past else outer.beside.prompt_beside(outer.ids, new)
            return border, border
        else:
            total = None
        if total is not None:
            return total + virtual, total + virtual
        begun = past > virtual or sequence.tokens is not None
        if past and begun and new == 1 and not scope.chunked:
            return past if sequence.prompt is None else sequence.prompt, None
        return None, None

    def _tokens(
        self, scope: Scope, forward: Forward, outer: Outer, values: dict[str, Any], total: int | None
    ) -> Tokens:
        past, length, before = forward.past, forward.past + forward.new, forward.sequence.tokens
        if outer is UNTOLD and scope.images is None:
            ids, image = values.get("input_ids"), None
        else:
            ids, image = self.outer.tokens(scope.images, outer, values, forward.batch, forward.new, past)
        if past:
            known = before is not None and before.ids is not None and len(before.ids) == forward.batch
            ids = torch.cat([before.ids[:, :past].to(ids.device), ids], dim=1) if known and ids is not None else None
        if forward.virtual and before is None:
            ids = self._behind_virtual(forward, outer, ids)
        tokens = Tokens(batch=forward.batch, length=length, valid=forward.valid, ids=ids, virtual=forward.virtual)
        tokens.request = forward.request
        tokens.repeats = self._repeats(forward.batch, scope, outer, before if past else None)
        tokens.more_to_come = length < total if total is not None else scope.chunked
        if forward.phase == "prefill":
            tokens.prompt = length if forward.prompt is None else min(length, forward.prompt)
        else:
            tokens.prompt = forward.sequence.prompt
        if before is not None and past and before._resolved:
            tokens.keep_spans(before, past, forward.phase == "prefill" and not forward.frozen)
        tokens.image = self._image(scope.images, forward, tokens, before, image)
        return tokens

    @staticmethod
    def _repeats(batch: int, scope: Scope, outer: Outer, before: Tokens | None) -> Samples | None:
        """Which sample each row belongs to: as told, as in the cache, or as `generate` repeats its prompts; None: each is one."""
        if scope.samples is not None and scope.samples.batch == batch:
            return scope.samples
        if before is not None and before.batch == batch:
            return before.repeats
        generation = outer.generation or outer.beside
        prompts = None if generation is None else generation.prompts
        return None if prompts in (None, batch) else Samples.repeated(prompts, batch)

    @staticmethod
    def _behind_virtual(forward: Forward, outer: Outer, ids: Tensor | None) -> Tensor | None:
        """int [B, T]: the ids of the first call, zeros for what an adapter put before them."""
        count = forward.past + forward.new - forward.virtual
        known = [ids, outer.ids, None if outer.generation is None else outer.generation.ids]
        own = next((t for t in known if isinstance(t, Tensor) and t.shape == (forward.batch, count)), None)
        return None if own is None else torch.nn.functional.pad(own, (forward.virtual, 0))

    def _image(
        self, told: Any, forward: Forward, tokens: Tokens, before: Tokens | None, new: Tensor | None
    ) -> Tensor | None:
        """bool [B, T] over all tokens so far; `new` [B, n] are those of this call."""
        past = forward.past
        if isinstance(told, tuple) and forward.phase == "prefill":
            return forward.account.ranges(told, tokens.samples)
        if not past:
            return new
        if before is None or before.image is None or len(before.image) != forward.batch:
            return None
        old = before.image[:, :past]
        if new is None:
            return torch.cat([old, old.new_zeros(forward.batch, forward.new)], dim=1)
        return torch.cat([old, new.to(old.device)], dim=1)


def _goes_on(before: Tensor | None, valid: Tensor | None) -> bool:
    """Whether the tokens so far are what they were, and those that came are valid."""
    if before is None or valid is None:
        return before is valid
    past = before.shape[1]
    return before.shape[0] == valid.shape[0] and torch.equal(valid[:, :past], before) and bool(valid[:, past:].all())


def _check_no_tokens(runtime: SiteRuntime) -> None:
    """Raise where a method asks which key is which token, and the keys of a call are those of windows or blocks."""
    for bound, _ in runtime.entries:
        if "tokens" in bound.method.needs:
            raise UnsupportedHost(
                f"{runtime.site.path} attends in windows or blocks of tokens, so which key is which token is not known, "
                f"and {bound.name} asks it. Leave this site out of Where."
            )


def check_no_samples(runtime: SiteRuntime) -> None:
    """Raise where a method has values per sample, and the rows of a call are not those of samples."""
    for bound, _ in runtime.entries:
        for name in bound.method.sample_values:
            raise UnsupportedHost(
                f"{runtime.site.path}: its batch is not one of samples (parts of images, or packed images), so "
                f"{bound.name}({name}=...) cannot have one value per sample there. Give one value for all."
            )


def _encoder_mask(mask: Any) -> Tensor | None:
    """bool [B, S]: the tokens of an encoder that some row sees."""
    if not isinstance(mask, Tensor) or mask.ndim == 2:
        return padding_mask(mask)
    return whole_mask(mask).any(dim=1)


def block_forward(run: Any, residual: bool, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a layer: what enters it travels on with the call."""
    own = kwargs.get(KEY, {}).get(id(run))
    if own is None:
        return inner(*args, **kwargs)
    if isinstance(own, traced.Traced):
        if residual:
            own = own.entering(args[0] if args else kwargs.get("hidden_states"))
            kwargs[KEY] = {**kwargs[KEY], id(run): own}
        return inner(*args, **kwargs)
    if not isinstance(own, Forward):
        return own.layer(inner, *args, **kwargs)
    if residual:
        hidden = args[0] if args else kwargs.get("hidden_states")
        kwargs[KEY] = {**kwargs[KEY], id(run): replace(own, residual=hidden)}
    return inner(*args, **kwargs)


def forward_of(run: Any, kwargs: dict[str, Any]) -> Any:
    """The running forward of a steering: from the arguments of an attention call, else from the running context; or None."""
    found = kwargs.get(KEY, {}).get(id(run))
    if found is None and not torch.compiler.is_compiling():
        found = CURRENT.get().get(id(run))
    return found
