"""A forward of a steered stack inside compiled code: its account in tensors, and what its sequence keeps from call to call.

Compiled code is one graph for all calls with the same shapes. So nothing that differs from step to step is a number of Python here,
no tensor is read, and no context variable asked: what a forward is travels as a keyword, what a sequence keeps stands on its cache.
What this form cannot carry leaves the graph (`why_not`) and runs uncompiled, or raises under `fullgraph`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import kernels
from ...account import Samples, Track
from ...call import AttnCall
from ...engine import SiteRuntime
from ...errors import SelectionError, UnsupportedHost
from ...tokens import Tokens, is_text
from .cache_state import FOLLOWED, STATE, Follower, Sequence, States
from .outer_calls import OuterFacts

if TYPE_CHECKING:
    from .forward import Stack

# What compiled calls give a method.
NEEDS = frozenset({"tokens", "images", "residual"})


class Kept:
    """What a sequence whose prompt ran in compiled code keeps: as `Sequence`, with the prompt's slots only."""

    compiled = False

    def __init__(self, batch: int, prompt: int, valid: Tensor | None, image: Tensor | None, states: States):
        self.batch_rows, self.prompt, self.valid, self.image, self.states = batch, prompt, valid, image, states
        self.repeats: Samples | None = None
        self.resolved: dict[int, Any] = {}

    @staticmethod
    def of(sequence: Sequence) -> Kept:
        """Of a sequence whose prompt ran uncompiled."""
        tokens = sequence.tokens
        kept = Kept(tokens.batch, sequence.prompt, tokens.valid, tokens.image, sequence.states)
        kept.repeats, kept.resolved = tokens.repeats, tokens.resolved_spans
        return kept

    def sequence(self, past: int) -> Sequence:
        """The same for calls that are not compiled, `past` slots being filled now."""
        tokens = Tokens(self.batch_rows, past, _longer(self.valid, past, True), None, _longer(self.image, past, False))
        tokens.prompt, tokens.repeats = self.prompt, self.repeats
        return Sequence(tokens, self.prompt, None, self.states)

    def batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Batch rows were reordered, repeated or dropped; `change` does so to a tensor with the batch first."""
        rows = change(torch.arange(self.batch_rows)).tolist()
        self.valid, self.image = (
            t if t is None or len(t) != self.batch_rows else change(t) for t in (self.valid, self.image)
        )
        self.repeats = (Samples.plain(self.batch_rows) if self.repeats is None else self.repeats).taken(rows)
        self.batch_rows = len(rows)
        for state in self.states.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[name] = change(value)


def _longer(roles: Tensor | None, length: int, fill: bool) -> Tensor | None:
    """Roles [B, T] of the slots up to `length`: those behind T are generated tokens."""
    if roles is None or roles.shape[1] >= length:
        return roles
    return torch.nn.functional.pad(roles, (0, length - roles.shape[1]), value=fill)


class TracedTokens(Tokens):
    """Roles of the tokens of a compiled call, of which nothing can be read."""

    def spans(self, spans: Any, tokenizer: Any = None) -> Any:
        known = self._resolved.get(id(spans))
        if known is not None:
            return known[1]
        if isinstance(spans, str) or any(is_text(s) for s in spans) or any(is_text(i) for s in spans for i in s):
            raise SelectionError(
                "strings cannot be looked for in compiled code: run the prompt uncompiled (the model that was given to "
                "torch.compile, over the same cache), or give (start, stop) token ranges."
            )
        of_row = self.samples.rows(len(spans))
        found = [list(spans[i]) for i in of_row]
        late = [pair for row in found for pair in row if pair[1] > self.length]
        if late and self.prompt == self.length:
            raise SelectionError(f"span {late[0]} ends after the {self.length} tokens of this prompt.")
        return found


class Traced:
    """One forward of one stack in compiled code; see `forward.Forward`, whose place it takes.

    Attributes:
        past: slots in the cache before it: a number, or a 0-d tensor. known: as many of them as are known in numbers.
        valid: bool [B, T] of the first T slots, later ones being valid; None: all are. border: slots of the prompt; None: all.
        flags: bool [2] on the device, set where something was wrong (see `flags_of`); read when the steering ends.
    """

    def __init__(
        self,
        stack: Stack,
        batch: int,
        past: Any,
        known: int,
        new: int,
        device: torch.device,
        valid: Tensor | None,
        border: Any,
        phase: str,
        tokens: TracedTokens | None,
        states: States,
        residual: Tensor | None = None,
    ):
        self.stack, self.batch, self.past, self.known, self.new, self.device = stack, batch, past, known, new, device
        self.valid, self.border, self.phase, self.tokens = valid, border, phase, tokens
        self.states, self.residual = states, residual
        # What the sequence kept before this forward.
        self.before: States = {}

    def entering(self, hidden: Tensor) -> Traced:
        """The same with the hidden states that enter a layer."""
        return Traced(
            self.stack, self.batch, self.past, self.known, self.new, self.device,
            self.valid, self.border, self.phase, self.tokens, self.states, hidden,
        )  # fmt: skip

    def rows(self) -> Track:
        """What each row is."""
        return self._track(torch.arange(self.new, device=self.device) + self.past, False)

    def keys(self, size: int, slots: int) -> Track:
        """What each key is; a window cache hands out its last slots, a static one also those that hold nothing yet."""
        slot, length = torch.arange(size, device=self.device), self.past + self.new
        if isinstance(length, Tensor):
            return self._track(slot + (length - slots).clamp_min(0), True)
        return self._track(slot + max(0, length - slots), slots > length)

    def _track(self, slot: Tensor, empty: bool) -> Track:
        yes = torch.ones((), dtype=torch.bool, device=self.device).expand(1, slot.shape[0])
        used = (slot < self.past + self.new)[None] if empty else yes
        valid, index = used, slot[None]
        if self.valid is not None:
            table, size = self.valid, self.valid.shape[1]
            at, behind = slot.clamp_max(size - 1), slot >= size
            valid = (table[:, at] | behind) & used
            count = table.long().cumsum(dim=-1)
            index = torch.where(behind, count[:, -1:] + (slot - size), count[:, at] - 1)
        generated = ~yes if self.border is None else (slot >= self.border)[None]
        padded = empty or self.valid is not None
        return Track(slot, index, torch.zeros_like(slot)[None], valid, generated, padded=padded)

    def call(self, runtime: SiteRuntime, keys: int, slots: int) -> AttnCall:
        """The call of one site with `keys` keys; `slots`: of the cache, `keys` or more."""
        cross = runtime.site.kind == "cross"
        make = (lambda: Track.plain(keys, self.device)) if cross else (lambda: self.keys(keys, slots))
        facts: dict[str, Any] = {"tokens": self.tokens, "residual": self.residual}
        return AttnCall(
            runtime.site,
            self.rows,
            make,
            host="transformers",
            phase=self.phase,
            past=self.known,
            samples=None if self.tokens is None else self.tokens.repeats,
            states=self.states,
            facts=facts,
        )


def why_not(stack: Stack) -> str | None:
    """Why the forwards of a stack cannot be traced now; None: they can."""
    run = stack.run
    if run.scopes:
        return "a block such as run.freeze() is entered"
    if run.measure or run.reference or run.choices.names or run.audit.parts is not None:
        return "the steering measures, or acts by request"
    if stack.untraceable is not None:
        return stack.untraceable
    return "the model is in training mode" if stack.module.training else None


def untraceable(stack: Stack, direct: bool) -> str | None:
    """Why a stack is never traced; found once, when it is attached."""
    for bound in stack.bounds:
        lacking = [need for need in bound.method.needs if need not in NEEDS]
        if lacking or bound.method.observes or bound.method.pools_heads:
            return f"{bound.name} needs {lacking or 'what it reads'} of each call"
        if bound.doors != {"output"} and any(
            r.site.kind == "cross" and any(b is bound for b, _ in r.entries) for r in stack.runtimes.values()
        ):
            return f"{bound.name} acts on cross-attention, whose padding travels with the encoder"
    if direct:
        return "modules call SDPA by themselves"
    if any(r.shards is not None for r in stack.runtimes.values()):
        return "heads are divided over processes"
    if stack.outer.adapted is not None or stack.tower:
        return "its rows are not those of a plain prompt"
    return None


def begin(stack: Stack, values: dict[str, Any], own: Any) -> Traced | None:
    """The account of one compiled forward; None where its arguments need to be read.

    Args:
        own: what came with the call for this steering: `OuterFacts`, or what `generate` has prepared.
    """
    data = values.get("input_ids")
    data = values.get("inputs_embeds") if data is None else data
    if data is None:
        return None
    batch, new = data.shape[0], data.shape[1]
    cache = values.get("past_key_values")
    cache = cache if hasattr(cache, "get_seq_length") else None
    past: Any = 0 if cache is None else cache.get_seq_length()
    filled = isinstance(past, Tensor) or past > 0
    # The layers of a static cache count in place.
    past = past + 0
    kept = _kept(stack, cache) if filled else None
    if kept == "other":
        return None
    mask, total, image = values.get("attention_mask"), getattr(own, "total", None), getattr(own, "image", None)
    given = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    # The image tokens of a whole `generate` are not those of this call.
    image = image if isinstance(own, OuterFacts) else None
    # What edits head outputs alone asks nothing of rows and keys.
    needs = any("tokens" in b.method.needs or b.doors != {"output"} for b in stack.bounds)
    timed = any(b.timed or b.where.rows is not None for b in stack.bounds)
    if not filled:
        if mask is not None and given is None and (needs or timed):
            return None
        if cache is None and mask is None and values.get("position_ids") is not None and not values.get("use_cache"):
            # Positions may pack several sequences into a row.
            return None
        if total is not None and total != new:
            return None
        if given is not None and given.shape[1] > new:
            given = given[:, :new]
        if image is not None and image.shape != (batch, new):
            return None
        return _made(stack, batch, 0, 0, new, data.device, given, None, "prefill", new, image, {}, None, {})
    if new > 1 and (needs or timed):
        # A turn of a conversation, a chunk, or a cache that was reset: told apart by reading only.
        return None
    border, known = past, 0 if isinstance(past, Tensor) else past
    prompt, states, repeats, resolved = None, {}, None, {}
    if kept is not None:
        if kept.batch_rows != batch:
            return None
        border = prompt = kept.prompt
        known = kept.prompt if isinstance(past, Tensor) else past
        # A copy: what a method writes in a step that only decodes is seen in that step only, so that all steps are the same.
        states = {key: dict(state) for key, state in kept.states.items()}
        given = kept.valid if given is None else given
        image, repeats, resolved = kept.image, kept.repeats, kept.resolved
    made = _made(
        stack, batch, past, known, new, data.device, given, border, "decode", prompt, image, states, repeats, resolved
    )
    made.before = {} if kept is None else kept.states
    return made


def _made(
    stack: Stack, batch: int, past: Any, known: int, new: int, device: torch.device, valid: Tensor | None, border: Any,
    phase: str, prompt: int | None, image: Tensor | None, states: States, repeats: Samples | None, resolved: dict[int, Any],
) -> Traced:  # fmt: skip
    tokens = TracedTokens(batch=batch, length=known + new, valid=valid, image=image, prompt=prompt)
    tokens.repeats, tokens._resolved = repeats, resolved
    return Traced(stack, batch, past, known, new, device, valid, border, phase, tokens, states)


def _kept(stack: Stack, cache: Any) -> Any:
    """What is kept on a cache for this stack: None where there is nothing, "other" where it cannot be carried on."""
    store = getattr(cache, STATE, None)
    found = None if store is None else store.get(stack.memory.key)
    if found is None or isinstance(found, Kept):
        return found
    if found.tokens is None or found.prompt is None or found.request is not None or found.tokens.virtual:
        return "other"
    found.compiled = True
    return Kept.of(found)


def finish(stack: Stack, forward: Traced, values: dict[str, Any], output: Any) -> None:
    """After a compiled forward over a prompt: its cache keeps what the next ones need."""
    if forward.phase != "prefill":
        _check_still(stack, forward)
        return
    cache = values.get("past_key_values")
    if cache is None and not isinstance(output, (tuple, list)):
        cache = getattr(output, "past_key_values", None)
    if not hasattr(cache, "get_seq_length"):
        return
    kept = Kept(forward.batch, forward.new, forward.valid, forward.tokens.image, forward.states)
    store = getattr(cache, STATE, None)
    if store is None:
        setattr(cache, STATE, {stack.memory.key: kept})
        for name in FOLLOWED:
            if hasattr(type(cache), name):
                setattr(cache, name, Follower(cache, name))
    else:
        store[stack.memory.key] = kept


def _check_still(stack: Stack, forward: Traced) -> None:
    """Raise where a step that decodes has changed what its sequence keeps: the next step would not find it."""
    for (index, site, heads), state in forward.states.items():
        before = forward.before.get((index, site, heads), {})
        for name, value in state.items():
            old = before.get(name)
            if value is not old and (isinstance(value, Tensor) or value != old):
                raise UnsupportedHost(
                    f"method {index} at {site} changes call.state[{name!r}] at each generated token, which compiled code does not "
                    "carry on. Decode uncompiled, or use a mode that keeps the prompt's."
                )


class Seam:
    """What compiled code needs to know of one attention module; it stands on the view of the module's config."""

    def __init__(self, runtime: SiteRuntime, table: Any, eager: Callable[..., Any] | None):
        self.runtime, self.table, self.eager = runtime, table, eager

    def base(self, name: str) -> Callable[..., Any]:
        """The model's own attention function."""
        if name == "eager" and self.eager is not None and name not in self.table:
            return self.eager
        return self.table[name]


def attend(
    forward: Traced,
    seam: Seam,
    problem: Callable[..., Any],
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """One attention call of a steered module in compiled code."""
    base, runtime = seam.base(name), seam.runtime
    active = runtime.active(forward.phase, None, None, False)
    if not active:
        return base(module, query, key, value, mask, **options)
    if name not in ("sdpa", "eager"):
        raise UnsupportedHost(f"{runtime.site.path}: {name} is not steered inside compiled code; use sdpa.")
    if query.shape[0] != forward.batch or query.shape[2] != forward.new:
        raise UnsupportedHost(f"{runtime.site.path}: its rows are not those of its model; steer it uncompiled.")
    weights: list[Tensor | None] = [None]

    def run_base() -> Tensor:
        out, weights[0] = base(module, query, key, value, mask, **options)
        return out.transpose(1, 2)

    att = problem(module, name, query, key, value, mask, options)
    call = forward.call(runtime, att.shape[3], key.shape[2])
    maps: list[Any] | None = [] if name == "eager" else None
    out = runtime(att, run_base, call, active, None, maps, sdpa=name == "sdpa", packs=False)
    if maps and weights[0] is None:
        run_base()
    return out.transpose(1, 2).contiguous(), edited_weights(weights[0], maps) if maps else weights[0]


def edited_weights(weights: Tensor | None, maps: list[Any] | None) -> Tensor | None:
    """The map that an eager model hands out, as edited: `output_attentions` must not show the unedited one."""
    if weights is None or not maps:
        return weights
    weights = weights.clone()
    for heads, A in maps:
        weights[:, slice(None) if heads is None else list(heads)] = A.to(weights.dtype)
    return weights


def prepare(stack: Stack) -> None:
    """Make what a first compiled call would make: compiled code would be compiled anew after that."""
    kernels.causal_with_mask()
    for path, runtime in stack.runtimes.items():
        for phase in ("prefill", "decode"):
            runtime.partition(runtime.active(phase, None, None))
        device = next(iter(runtime.site.module.parameters()), torch.empty(0)).device
        for bound, _ in runtime.entries:
            stack.run.audit.record(bound.index, path).place(device)
