"""What the outer calls of a transformers model say of the tokens that an inner stack sees as embeddings only.

Each call has its own answers: they are handed on within the thread or task that makes the call, and nothing is kept on a module.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedHost
from ..base import imported
from .image_tokens import Family, brings_images, check_whole, family_of, image_tokens, placeholders

# The keyword under which a forward is told what its caller knows: by steering, an `Outer` above a stack, a `Forward` in it.
KEY = "attnsteer_call"
# Arguments of `generate` that have one entry per prompt.
PROMPTS = ("input_ids", "inputs", "inputs_embeds", "input_features", "input_values")
UNTRACED = (
    "attnsteer: a steered model is neither exported nor traced, which would keep the account of one call for all calls"
)


class OuterFacts:
    """What the outer model of a vision-language type says of one compiled call.

    Attributes:
        image: bool [B, n], the image tokens of the call, or None. ids, mask: its token ids and padding mask, or None.
        generation: the `generate` that prepared it, or None. total: slots of the prompt of that, or None.
    """

    def __init__(self, image: Tensor | None, ids: Tensor | None, mask: Tensor | None, generation: Any):
        self.image, self.ids, self.mask, self.generation = image, ids, mask, generation
        self.total = None if generation is None else generation.total

    def outer(self) -> Outer:
        """The same for a stack that does not run compiled."""
        return Outer(self.ids, self.image, mask=self.mask, generation=self.generation)


class Prepared:
    """An account that was drawn up before its forward began, by what batches requests; it travels in place of a `Forward`."""


def refuse_tracing() -> None:
    """Raise where `torch.export` or `torch.jit.trace` runs: what a row is would be baked in."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise UnsupportedHost(f"{UNTRACED}. Detach first, or use torch.compile.")


@dataclass(frozen=True, eq=False)
class Generation:
    """One outer `generate`: its token ids and image tokens [b, N], the slots of its prompt, and how many prompts it was given,
    which it repeats for beams and several sequences; each None where not known."""

    ids: Tensor | None = None
    image: Tensor | None = None
    total: int | None = None
    prompts: int | None = None
    # The padding mask [B, T] of the call that was prepared.
    mask: Tensor | None = None
    # Prompts of other streams in it (the unconditional one of `guidance_scale`) that have no cache: slots, and ids or None.
    beside: list[tuple[int, Tensor | None]] = field(default_factory=list)
    # The call that was prepared last and has not reached a stack yet.
    pending: list[Generation] = field(default_factory=list)
    # Token ids that the decoder behind an encoder begins with; none where there is no encoder.
    decoder: list[Tensor] = field(default_factory=list)
    # Whether another stream of one prompt each runs in it (the unconditional one of `guidance_scale`).
    guided: bool = False
    # Whether it makes candidates for another model, whose prompt is not known.
    assists: bool = False

    def prompt_beside(self, ids: Tensor | None, new: int) -> int:
        """Slots of the prompt of the other stream that a call over all of its tokens so far belongs to."""
        for length, known in self.beside:
            if ids is None or known is None or _begins(ids, known):
                return min(length, new)
        self.beside.append((new, ids))
        return new


@dataclass(frozen=True, eq=False)
class Outer:
    """What one outer forward says.

    Attributes:
        ids, image: token ids and image tokens [B, n] of the call, or None. roles: arguments that shape its attention by token.
        mask: its padding mask [B, T], or None; stacks may be given another form of it.
        generation: the `generate` that prepared this call, or None. beside: the `generate` in which another stream runs.
    """

    ids: Tensor | None = None
    image: Tensor | None = None
    roles: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    generation: Generation | None = None
    beside: Generation | None = None


# What a stack is told that nothing was put around.
UNTOLD = Outer()
# By steering, of the running call; each thread and task has its own.
OUTER: ContextVar[Mapping[int, Outer]] = ContextVar("attnsteer_outer", default={})  # noqa: B039  never mutated
GENERATION: ContextVar[Mapping[int, Generation]] = ContextVar("attnsteer_generation", default={})  # noqa: B039


# The forward of a stack that runs now (`forward.Forward`): for layers that drop keywords.
CURRENT: ContextVar[Mapping[int, Any]] = ContextVar("attnsteer_forward", default={})  # noqa: B039


@contextlib.contextmanager
def entry(variable: ContextVar[Any], run: Any, value: Any) -> Iterator[None]:
    """A value of one steering in this block."""
    token = variable.set({**variable.get(), id(run): value})
    try:
        yield
    finally:
        variable.reset(token)


class OuterCalls:
    """Token ids, image tokens and prompt length, from `generate`, from the outer forwards, and from the user.

    Attributes:
        model: the innermost module of a known vision-language type above a stack of layers, and its `family`.
    """

    def __init__(self, run: Any, outer: list[nn.Module]):
        known = [m for m in outer if family_of(getattr(m, "config", None)) is not None]
        self.run = run
        self.model: nn.Module | None = known[-1] if known else None
        self.family: Family | None = None if self.model is None else family_of(self.model.config)
        # An adapter that puts learned vectors in front of the prompt (prompt and prefix tuning).
        kinds = imported("peft", "PeftModel")
        self.adapted: Any = next((m for m in outer[:1] if kinds and isinstance(m, kinds)), None)
        # The stacks inside.
        self.stacks: list[Any] = []
        # The length of a prompt is that of `generate`'s input only where no encoder reads it.
        self._lengths = not any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) for m in outer)

    def virtual(self) -> int:
        """Slots that the active adapter puts in front of a prompt."""
        config = None if self.adapted is None else self.adapted.active_peft_config
        return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0

    def watch(self, outer: list[nn.Module], journal: Any) -> None:
        """Put layers around the forwards of the outer modules, and around `generate`; undone by the journal."""
        for module in outer:
            if self.family is not None or module is self.adapted or not takes_keywords(module):
                journal.wrap(module, "forward", _Forwards(self, module))
            if callable(getattr(type(module), "generate", None)):
                journal.wrap(module, "generate", _Generates(self, module))
            if callable(getattr(type(module), "_prepare_decoder_input_ids_for_generation", None)):
                journal.wrap(module, "_prepare_decoder_input_ids_for_generation", self._decoder_prompt)
            if callable(getattr(type(module), "prepare_inputs_for_generation", None)):
                journal.wrap(module, "prepare_inputs_for_generation", self._prepared)

    def _decoder_prompt(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """What a decoder behind an encoder begins with is its prompt; the input of `generate` is the encoder's."""
        found = inner(*args, **kwargs)
        generation = GENERATION.get().get(id(self.run))
        if generation is not None and isinstance(found, tuple) and isinstance(found[0], Tensor):
            known = generation.decoder
            # Whisper begins anew for each segment; an assistant that is the model itself goes on.
            if not known or not _begins(found[0], known[0]):
                known[:] = [found[0]]
        return found

    def _prepared(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The inputs of the next forward of a `generate` say that they are."""
        inputs = inner(*args, **kwargs)
        generation = GENERATION.get().get(id(self.run))
        if generation is not None and isinstance(inputs, dict):
            mask = kwargs.get("attention_mask")
            if self._lengths and isinstance(mask, Tensor) and mask.ndim == 2:
                generation = replace(generation, mask=mask)
            if generation.decoder:
                generation = replace(generation, total=generation.decoder[0].shape[1])
            generation.pending[:] = [generation]
            inputs[KEY] = {**inputs.get(KEY, {}), id(self.run): generation}
        return inputs

    def silent(self) -> bool:
        """Whether a pass of our own runs, of which nothing is noted."""
        return getattr(CURRENT.get().get(id(self.run)), "passes", False)

    def taken(self, kwargs: dict[str, Any]) -> Generation | None:
        """What `_prepared` put there for this steering, taken out of the arguments."""
        entries = dict(kwargs.pop(KEY, {}))
        own = entries.pop(id(self.run), None)
        if entries:
            kwargs[KEY] = entries
        return own

    def of_call(self, module: nn.Module, values: Mapping[str, Any], prepared: Generation | None) -> Outer:
        """What one outer forward says, the calls around it included."""
        around = OUTER.get().get(id(self.run))
        if around is None:
            running = GENERATION.get().get(id(self.run))
            if prepared is None and running is not None and running.pending:
                # A model that drops keywords on the way: what was prepared last is this call.
                prepared = running.pending[-1]
            if prepared is not None:
                prepared.pending.clear()
            mask = None if prepared is None else prepared.mask
            around = Outer(mask=mask, generation=prepared, beside=None if prepared is not None else running)
        ids, image, roles, mask = around.ids, around.image, around.roles, around.mask
        given = values.get("attention_mask")
        if self._lengths and isinstance(given, Tensor):
            # A mask of another form says all by itself; that of a prepared call was made of the one that is known.
            mask = given if given.ndim == 2 else mask if prepared is not None else None
        if self._ours(module):
            roles = {**roles, **{n: values[n] for n in self.family.roles if isinstance(values.get(n), Tensor)}}
        if isinstance(values.get("input_ids"), Tensor):
            ids = values["input_ids"]
        if image is None and self._ours(module):
            data = next((v for v in (ids, values.get("inputs_embeds")) if isinstance(v, Tensor)), None)
            if data is not None:
                image = self._images(values, data.shape[1])
                if image is not None and around.generation is None:
                    check_whole(self.family, self.model.config, values, image)
        return replace(around, ids=ids, image=image, roles=roles, mask=mask)

    def untraceable(self) -> bool:
        """Whether compiled code must not hold the outer forwards."""
        return bool(self.run.scopes) or self.adapted is not None or any(s.untraceable for s in self.stacks)

    def traced(self, module: nn.Module, values: Mapping[str, Any], own: Any) -> OuterFacts:
        """What one outer forward says in compiled code; `own`: what was said above it, or what `generate` has prepared."""
        facts = own if isinstance(own, OuterFacts) else OuterFacts(None, None, None, own)
        image, ids, mask = facts.image, facts.ids, facts.mask
        ids = values.get("input_ids") if ids is None else ids
        given = values.get("attention_mask")
        mask = given if mask is None and isinstance(given, Tensor) and given.ndim == 2 else mask
        if image is None and self._ours(module):
            data = ids if ids is not None else values.get("inputs_embeds")
            image = None if data is None else self._images(values, data.shape[1])
        return OuterFacts(image, ids, mask, facts.generation)

    def check_generate(self, values: Mapping[str, Any]) -> None:
        """Raise where a way of decoding may be refused later: in between, or after the library has changed the model's config."""
        given = values.get("assistant_early_exit") or getattr(
            values.get("generation_config"), "assistant_early_exit", None
        )
        ahead = [b.name for b in self.run.bounds if b.method.looks_ahead]
        if ahead and _assists(values):
            raise UnsupportedHost(
                f"{ahead[0]} is attached to an assistant, whose cache is cut back into its prompt where no candidate was taken. "
                "Steer the model that it assists alone: what is generated is what that model says."
            )
        if given and ahead:
            raise UnsupportedHost(
                f"assistant_early_exit={given} cuts a cache back into its prompt, where the statistics of {ahead[0]} are unknown. "
                "Use prompt_lookup_num_tokens or another model as the assistant."
            )

    def of_generate(self, values: Mapping[str, Any], config: Any) -> Generation:
        """What the arguments of a `generate` say; `config`: the model's own generation config."""
        ids = _ids(values)
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
        given = next((values[n] for n in PROMPTS if isinstance(values.get(n), Tensor)), None)
        total, assists = data.shape[1] if data is not None and self._lengths else None, _assists(values)
        if assists and ids is not None:
            running = (g for g in GENERATION.get().values() if g.ids is not None and _begins(ids, g.ids))
            assisted = next(running, None)
            if assisted is not None:
                total, assists = assisted.total, False
        return Generation(
            ids,
            image,
            total,
            None if given is None else len(given),
            guided=_guided(values, config),
            assists=assists,
        )

    def tokens(
        self, told: Any, outer: Outer, values: Mapping[str, Any], batch: int, new: int, past: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """(token ids, image tokens) [B, n] of a stack's call, each None where not known; `told`: by `run.images`."""
        fits = lambda t: t if isinstance(t, Tensor) and t.shape == (batch, new) else None  # noqa: E731
        if isinstance(told, Mapping):
            return self._given(told, batch, new, past)
        ids, image = fits(values.get("input_ids")), fits(outer.image)
        ids = fits(outer.ids) if ids is None else ids
        generation = outer.generation
        if generation is not None:
            ids = _part(generation.ids, batch, past, new) if ids is None else ids
            image = _part(generation.image, batch, past, new) if image is None else image
        return ids, image

    def _given(self, told: Mapping[str, Any], batch: int, new: int, past: int) -> tuple[Tensor | None, Tensor | None]:
        """From the processor's output that `run.images` was given."""
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


class _Forwards:
    """Around the forward of an outer module."""

    def __init__(self, calls: OuterCalls, module: nn.Module):
        self.calls, self.module = calls, module
        self.names = list(inspect.signature(module.forward).parameters)

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not self.calls.untraceable():
            own = kwargs.get(KEY, {}).get(id(self.calls.run))
            if not isinstance(own, Prepared):
                values = dict(zip(self.names, args, strict=False)) | kwargs
                facts = self.calls.traced(self.module, values, own)
                kwargs[KEY] = {**kwargs.get(KEY, {}), id(self.calls.run): facts}
                return inner(*args, **kwargs)
        return self._untraced(inner, *args, **kwargs)

    @torch.compiler.disable(reason=UNTRACED)
    def _untraced(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_tracing()
        calls = self.calls
        if calls.silent() or isinstance(kwargs.get(KEY, {}).get(id(calls.run)), Prepared):
            return inner(*args, **kwargs)
        prepared = calls.taken(kwargs)
        values = dict(zip(self.names, args, strict=False)) | kwargs
        with entry(OUTER, calls.run, calls.of_call(self.module, values, prepared)):
            return inner(*args, **kwargs)


class _Generates:
    """Around `generate` of an outer module; a nested one of the same prompt (a wrapped model's, an assistant's) adds nothing."""

    def __init__(self, calls: OuterCalls, module: nn.Module):
        self.calls, self.module = calls, module
        self.names = list(inspect.signature(module.generate).parameters)

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        run = self.calls.run
        values = dict(zip(self.names, args, strict=False)) | kwargs
        around, ids = GENERATION.get().get(id(run)), _ids(values)
        if around is not None and (around.ids is None or ids is None or _begins(ids, around.ids)):
            # One whose own prompt only begins like that, whose decoder begins otherwise or which alone is guided is none of these.
            config = getattr(self.module, "generation_config", None)
            alike = (
                ids is None or around.ids is None or (ids.shape == around.ids.shape and _alike(values, config, around))
            )
            if alike or _assists(values):
                return inner(*args, **kwargs)
        self.calls.check_generate(values)
        with entry(GENERATION, run, self.calls.of_generate(values, getattr(self.module, "generation_config", None))):
            return inner(*args, **kwargs)


def _assists(values: Mapping[str, Any]) -> bool:
    """Whether a `generate` makes candidates for another model."""
    return bool(getattr(values.get("generation_config"), "is_assistant", False))


def _guided(values: Mapping[str, Any], config: Any) -> bool:
    """Whether a `generate` runs its prompt a second time without its condition."""
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance

    configs = (values.get("generation_config"), config)
    scales = [values.get("guidance_scale"), *(getattr(c, "guidance_scale", None) for c in configs)]
    scale = next((s for s in scales if s is not None), 1)
    return scale != 1 or any(isinstance(p, Guidance) for p in values.get("logits_processor") or ())


def _ids(values: Mapping[str, Any]) -> Tensor | None:
    """The token ids [B, n] of the arguments of a `generate`, or None."""
    ids = values.get("input_ids", values.get("inputs"))
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.ndim == 2 else None


def _begins(ids: Tensor, prompt: Tensor) -> bool:
    """Whether the rows of `ids` begin with those of `prompt`."""
    return len(ids) == len(prompt) and torch.equal(ids[:, : prompt.shape[1]], prompt.to(ids.device))


def _alike(values: Mapping[str, Any], config: Any, around: Generation) -> bool:
    """Whether a `generate` of the same prompt is not told to be another one than `around`."""
    given = values.get("decoder_input_ids")
    same = not isinstance(given, Tensor) or not around.decoder or torch.equal(given, around.decoder[0].to(given.device))
    return same and _guided(values, config) == around.guided


def takes_keywords(module: nn.Module) -> bool:
    """Whether a forward hands keywords on that it does not know, so that it needs no layer around it."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


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
