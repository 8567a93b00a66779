"""Language models whose layers from some one on see fewer tokens of the prompt than the layers before.

Hidden states, positions and masks are gathered in front of that layer; the caches of the layers behind are shorter, and every later
call has its mask cut alike. What was left out is kept on the cache, so that it follows beams, copies and saved caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import kernels
from ...bound import Bound
from ...errors import CompositionError, ContractError, SelectionError, UnsupportedHost
from ...kernels import Attention
from .cache_state import STATE, Memory
from .layers import block_of
from .outer_calls import KEY as ACCOUNT
from .outer_calls import OUTER, UNTRACED, Outer, OuterFacts, Prepared, entry, refuse_tracing

# The call of a shortened model that runs, by steering; each thread and task has its own.
CALL: ContextVar[Mapping[int, Any]] = ContextVar("attnsteer_shortening", default={})  # noqa: B039  never mutated
# Rows of a call that are compared with the model's own, where the error is measured.
SAMPLED = 64
# Arguments of layers that are known to have an axis of tokens, and are cut; any other one is refused.
KNOWN = ("hidden_states", "attention_mask", "position_ids", "position_embeddings", "cache_position", "cu_seq_lens_q")


@dataclass(frozen=True)
class LayerInputs:
    """What enters a layer in a prompt, for `around` of a method that needs "layers".

    Attributes:
        hidden: [B, n, D]. slots: int64 [B, N], where the image tokens of each sample stand, ascending.
    """

    hidden: Tensor
    slots: Tensor
    call: Any = field(repr=False)
    index: Tensor | None = None
    rows: Tensor | None = None

    @property
    def images(self) -> int:
        """N, the image tokens of each sample."""
        return self.slots.shape[1]

    @property
    def tokens(self) -> Tensor:
        """The image tokens as they enter the layer, [B, N, D]."""
        return _gather(self.hidden, self.slots)

    def scores(self) -> Tensor:
        """What the last token of the prompt gives each image token in the layer before, [B, H, N] in fp32; exact."""
        return self.call.scores(self.slots)

    def tower(self) -> tuple[Tensor, Tensor]:
        """Of the image tower's last layer but one: (what its class token gives each patch, summed over heads [B, N]; the patches'
        keys, the mean over heads [B, N, d])."""
        return self.call.tower(self.images)

    def kept(self, slots: Tensor) -> LayerInputs:
        """The same with the image tokens at `slots` [B, K] only."""
        slots = slots.sort(dim=1).values
        return self._with(slots, _gather(self.hidden, slots), merged=False)

    def merged(self, tokens: Tensor, slots: Tensor) -> LayerInputs:
        """The same with `tokens` [B, K, D] in place of all image tokens, at `slots` [B, K], ascending."""
        return self._with(slots, tokens, merged=True)

    def _with(self, slots: Tensor, tokens: Tensor, merged: bool) -> LayerInputs:
        B, n, D = self.hidden.shape
        text = torch.ones(B, n, dtype=torch.bool, device=slots.device).scatter(1, self.slots, False)
        text = text.nonzero()[:, 1].reshape(B, n - self.images)
        index, order = torch.cat([text, slots], dim=1).sort(dim=1, stable=True)
        hidden = _gather(torch.cat([_gather(self.hidden, text), tokens], dim=1), order)
        # Rows that come out as those of a token: merged ones are no token's.
        rows = torch.where(order < text.shape[1], index, -1) if merged else index
        return replace(self, hidden=hidden, index=index, rows=rows)


@dataclass
class Kept:
    """What the layers behind have of a prompt of `slots` slots: those at `index` [B, L]; `numbered`: positions have no gaps."""

    slots: int
    index: Tensor
    numbered: bool

    def batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Batch rows of the cache were reordered, repeated or dropped."""
        self.index = change(self.index)

    @property
    def gone(self) -> int:
        """How many slots of the prompt they lack."""
        return self.slots - self.index.shape[1]

    def columns(self, t: Tensor) -> Tensor:
        """A tensor with all slots so far in its last axis and the batch (or 1) in its first, without those that are gone."""
        B = len(self.index)
        t = t.expand(B, *t.shape[1:])
        index = self.index.view(B, *(1,) * (t.ndim - 2), -1).expand(*t.shape[:-1], -1)
        return torch.cat([t[..., : self.slots].gather(-1, index), t[..., self.slots :]], dim=-1)


class Call:
    """One forward of the language model."""

    def __init__(
        self, owner: Shortening, values: dict[str, Any], image: Tensor | None, last: Tensor, kept: Kept | None
    ):
        self.owner, self.image, self.last, self.kept = owner, image, last, kept
        self.values, self.rows = values, None
        self._scores: Tensor | None = None

    def see(self, module: nn.Module, make: Callable[[], Attention]) -> None:
        """The attention of the layer before, of which the last row is read."""
        if self.image is None or module is not self.owner.scored:
            return
        att = make()
        mask = _row_of(att, self.last)
        if att.causal:
            seen = (torch.arange(att.shape[3], device=att.q.device) <= self.last[:, None])[:, None, None]
            mask = (
                seen
                if mask is None
                else mask & seen
                if mask.dtype == torch.bool
                else mask.masked_fill(~seen, -torch.inf)
            )
        # One row of each sample.
        self._scores = kernels.dense(att.replace(q=_gather_rows(att.q, self.last), mask=mask, causal=False))[:, :, 0]

    def scores(self, slots: Tensor) -> Tensor:
        """[B, H, N]."""
        if self._scores is None:
            raise UnsupportedHost(
                f"{self.owner.bound.name}: the attention of layer {self.owner.first - 1} did not run through the model's "
                "interface, so its scores are not known."
            )
        return self._scores.gather(-1, slots[:, None].expand(-1, self._scores.shape[1], -1))

    def tower(self, images: int) -> tuple[Tensor, Tensor]:
        """See `LayerInputs.tower`."""
        seen, B = TOWER.get().get(id(self.owner.run)), len(self.last)
        if seen is None or not seen:
            raise UnsupportedHost(
                f"{self.owner.bound.name}: the image tower did not run in this call; pass the images with the prompt."
            )
        score, keys = seen[-1]
        if len(score) != B or score.shape[1] != images:
            raise UnsupportedHost(
                f"{self.owner.bound.name}: the tower saw {len(score)} images of {score.shape[1]} patches, and the prompt has {B} "
                f"samples of {images} image tokens. One image for each sample, and a token for each patch, are needed."
            )
        return score, keys


# What the image tower's layer gave in the outer call that runs, by steering.
TOWER: ContextVar[Mapping[int, list[Any]]] = ContextVar("attnsteer_tower", default={})  # noqa: B039


class Shortening:
    """Around the forwards of a language model and of its layers.

    Attributes:
        first: the first layer that sees fewer tokens. scored: the attention module whose last row is read, or None.
    """

    def __init__(
        self, run: Any, bound: Bound, stack: nn.Module, blocks: list[nn.Module], scored: nn.Module | None, path: str
    ):
        self.run, self.bound, self.stack, self.blocks, self.scored, self.path = run, bound, stack, blocks, scored, path
        self.first = bound.method.layer
        self.names = list(inspect.signature(stack.forward).parameters)
        self.memory = Memory()

    @classmethod
    def attach(cls, run: Any, host: Any, names: Mapping[str, nn.Module], journal: Any) -> None:
        """Put the layers on, where a method asks for it.

        Raises:
            CompositionError: another method is attached too. UnsupportedHost: layers that do not see the whole sequence.
        """
        bounds = [b for b in run.bounds if "layers" in b.method.needs]
        if not bounds:
            return
        if len(run.bounds) > 1:
            others = ", ".join(b.name for b in run.bounds if b is not bounds[0])
            raise CompositionError(
                f"{bounds[0].name} shortens the sequence inside the model, where {others} would count tokens that are gone. Attach "
                "it alone."
            )
        text = [s for s in host.sites() if s.modality == "text" and s.kind == "self" and block_of(s.name)]
        stacks = {host.stack_of(s) for s in text}
        if len(stacks) != 1:
            raise UnsupportedHost(f"{bounds[0].name} shortens one language model, and this target has {len(stacks)}.")
        stack = names[stacks.pop()]
        config = getattr(stack, "config", None)
        other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if other or getattr(config, "sliding_window", None):
            raise UnsupportedHost(
                f"{bounds[0].name}: layers of this model see a window of the sequence "
                f"({', '.join(sorted(map(str, other))) or 'sliding'}), whose slots would not be those of the cache. Use a model "
                "whose layers see all tokens."
            )
        blocks = list(dict.fromkeys(block_of(s.name) for s in text))
        first = bounds[0].method.layer
        scored = next((s for s in text if block_of(s.name) == blocks[first - 1]), None) if first else None
        site = next(iter(run.sites))
        own = cls(
            run, bounds[0], stack, [names[b] for b in blocks], None if scored is None else scored.module, site.path
        )
        for number, block in enumerate(own.blocks):
            if first and number >= first:
                journal.wrap(block, "forward", _Layer(own, number))
        journal.wrap(stack, "forward", own)
        if site.modality == "vision":
            journal.wrap(host.model, "forward", own.watch_tower)
            if callable(getattr(type(host.model), "generate", None)):
                journal.wrap(host.model, "generate", own.watch_tower)
        journal.add(own.memory.forget)

    def watch_tower(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """The calls in which the image tower runs before the language model does."""
        if id(self.run) in TOWER.get():
            return inner(*args, **kwargs)
        with entry(TOWER, self.run, []):
            return inner(*args, **kwargs)

    @torch.compiler.disable(reason=UNTRACED)
    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_tracing()
        if CALL.get().get(id(self.run), self) is None:
            # The pass beside, with which the error is measured.
            return inner(*args, **kwargs)
        values = dict(zip(self.names, args, strict=False)) | kwargs
        self._check(values)
        cache = values.get("past_key_values")
        cache = cache if hasattr(cache, "get_seq_length") else None
        past = 0 if cache is None else int(cache.get_seq_length())
        hidden, image = values.get("inputs_embeds"), self._image(values)
        kept = None if cache is None or not past else vars(cache).get(STATE, {}).get(self.memory.key)
        if past and image is not None:
            raise UnsupportedHost(
                f"{self.bound.name}: a second image, or a part of one, comes in over a cache of {past} tokens, where the scores of "
                "the first are gone. Start a new cache with all images, or detach for this turn."
            )
        self.run.audit.count(self.bound.index, "guided calls")
        if image is None and kept is None:
            self.run.audit.moved(self.bound.index, torch.tensor(False))
            return inner(*args, **kwargs)
        new = hidden.shape[1] if hidden is not None else values["input_ids"].shape[1]
        if past == 0 and cache is not None:
            vars(cache).get(STATE, {}).pop(self.memory.key, None)
        if kept is not None:
            self._check_cut(kept, cache, values, past, new)
        call = Call(self, values, image, self._last(values, new) if image is not None else torch.zeros(1), kept)
        plain = self._beside(inner, values) if image is not None and self.run.measure else None
        if self.first == 0:
            values = self._before_all(call, values, past, new)
        with entry(CALL, self.run, call):
            output = inner(**values)
        self._finish(call, cache, output, new)
        if plain is not None:
            self._measure(call, plain, output)
        return output

    def _check(self, values: Mapping[str, Any]) -> None:
        name = self.bound.name
        own = values.get(ACCOUNT, {})
        if any(isinstance(v, OuterFacts) for v in own.values()):
            raise UnsupportedHost(f"{name}: compiled code has one mask for all layers. Do not compile the model.")
        if values.get("cache") is not None or any(isinstance(v, Prepared) for v in own.values()):
            raise UnsupportedHost(
                f"{name}: requests of continuous batching share one paged cache with one length. Use generate."
            )
        cache = values.get("past_key_values")
        if cache is not None and getattr(cache, "is_compileable", False):
            raise UnsupportedHost(
                f"{name}: a {type(cache).__name__} has one length for all layers, and those from layer {self.first} on are "
                "shorter. Use the default cache."
            )
        if self.stack.training and any(getattr(m, "gradient_checkpointing", False) for m in self.stack.modules()):
            raise UnsupportedHost(
                f"{name}: layers that a checkpoint computes again would not find what was dropped. Call eval()."
            )
        config = self.stack.config
        for what in ("output_hidden_states", "output_attentions"):
            if values.get(what) or (values.get(what) is None and getattr(config, what, False)):
                raise UnsupportedHost(
                    f"{name}: {what} would be of several lengths. Leave it out, or use attnsteer.capture."
                )
        for what in ("deepstack_visual_embeds", "visual_pos_masks"):
            if values.get(what) is not None:
                raise UnsupportedHost(
                    f"{name}: this model adds image features in later layers ({what}), by the slots of all tokens."
                )
        positions = values.get("position_ids")
        if isinstance(positions, Tensor) and positions.ndim > 2 and self.first == 0:
            raise UnsupportedHost(
                f"{name}: this model counts positions from the length of its cache along several axes. Use layer=1 or more."
            )
        if isinstance(values.get("attention_mask"), dict):
            raise UnsupportedHost(f"{name}: this model takes several masks by the kind of layer.")

    def _image(self, values: Mapping[str, Any]) -> Tensor | None:
        """bool [B, n] of a call with images, or None."""
        outer: Outer | None = OUTER.get().get(id(self.run))
        told = self.run.scope.images
        hidden = values.get("inputs_embeds")
        if not isinstance(hidden, Tensor):
            return None
        image = None if outer is None else outer.image
        if told is not None:
            raise UnsupportedHost(
                f"{self.bound.name} reads where images are from the call, not from run.images; pass the images with it."
            )
        if image is None or image.shape != hidden.shape[:2] or not bool(image.any()):
            return None
        return image.to(hidden.device)

    def _last(self, values: Mapping[str, Any], new: int) -> Tensor:
        """int64 [B], the slot of each prompt's last token."""
        hidden, mask = values["inputs_embeds"], values.get("attention_mask")
        B, end = len(hidden), new
        outer = OUTER.get().get(id(self.run))
        if outer is not None and outer.generation is not None and outer.generation.total is not None:
            # A step without a cache brings the prompt again, and what was generated behind it.
            end = min(end, outer.generation.total)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return torch.full((B,), end - 1, device=hidden.device)
        valid = mask[:, :end].to(torch.bool).long()
        return (end - 1 - valid.flip(-1).argmax(dim=-1)).expand(B)

    def _check_cut(self, kept: Kept, cache: Any, values: Mapping[str, Any], past: int, new: int) -> None:
        layer = min(self.first, len(cache.layers) - 1)
        behind = int(cache.get_seq_length(layer))
        mask = values.get("attention_mask")
        whole = past + (kept.gone if self.first == 0 else 0)
        wrong = whole < kept.slots or (self.first and behind != past - kept.gone)
        wrong = wrong or (isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != whole + new)
        if wrong:
            raise UnsupportedHost(
                f"{self.bound.name}: the cache was cut back into its prompt of {kept.slots} tokens, or its mask is of another "
                f"length (it holds {past} tokens before layer {self.first}, {behind} behind). Copy the cache where it is to be "
                "gone on with."
            )

    def inputs(self, call: Call, hidden: Tensor) -> LayerInputs:
        """What `around` is shown."""
        counts = call.image.sum(dim=1).tolist()
        if min(counts) != max(counts):
            raise SelectionError(
                f"{self.bound.name}: the samples of this batch have {min(counts)} to {max(counts)} image tokens, and all must lose "
                "the same number. Batch prompts with equally many."
            )
        B = len(hidden)
        slots = call.image.expand(B, -1).nonzero()[:, 1].reshape(B, -1)
        return LayerInputs(hidden, slots, call)

    def shorten(self, call: Call, hidden: Tensor) -> LayerInputs | None:
        """What the layers behind see of a prompt; None: all of it."""
        inputs, method = self.inputs(call, hidden), self.bound.method
        try:
            found = method.around(lambda given: given, inputs, self.run)
        except Exception as error:
            error.add_note(f"attnsteer: raised in {self.bound.name}.around before layer {self.first}.")
            raise
        if not isinstance(found, LayerInputs):
            raise ContractError(
                f"{self.bound.name}.around returned a {type(found).__name__}; return what forward(inputs) gave."
            )
        self.run.audit.moved(self.bound.index, torch.tensor(found.index is not None))
        if found.index is None:
            return None
        call.kept = Kept(hidden.shape[1], found.index, method.positions == "renumber")
        call.rows = found.rows
        return found

    def _before_all(self, call: Call, values: dict[str, Any], past: int, new: int) -> dict[str, Any]:
        """The arguments of the stack for the shorter prompt, or for what comes after it."""
        mask, positions, own = values.get("attention_mask"), values.get("position_ids"), dict(values)
        if call.image is not None:
            hidden = values["inputs_embeds"]
            found = self.shorten(call, hidden)
            if found is None:
                return own
            if mask is None:
                # Without one, positions with gaps are taken for those of several packed sequences.
                mask = hidden.new_ones(hidden.shape[:2], dtype=torch.long)
            own["inputs_embeds"], index = found.hidden, found.index
            if positions is None:
                positions = torch.arange(new, device=index.device)[None]
            positions = positions.expand(len(index), -1).gather(1, index)
            if call.kept.numbered:
                positions = torch.arange(index.shape[1], device=index.device)[None]
        else:
            whole = past + call.kept.gone
            if positions is None:
                positions = torch.arange(whole, whole + new, device=call.kept.index.device)[None]
            if call.kept.numbered:
                positions = positions - call.kept.gone
        if isinstance(mask, Tensor):
            if mask.ndim != 2:
                raise UnsupportedHost(
                    f"{self.bound.name} before the language model takes masks [B, tokens], not {list(mask.shape)}."
                )
            own["attention_mask"] = mask = call.kept.columns(mask)
            if call.kept.numbered and call.image is not None:
                positions = (mask.long().cumsum(dim=-1) - 1).clamp_min(0)
        own["position_ids"] = positions
        own.pop("cache_position", None)
        return own

    def _finish(self, call: Call, cache: Any, output: Any, new: int) -> None:
        """Remember what is gone, and give rows their places back."""
        if call.kept is None:
            return
        parts = output if isinstance(output, (tuple, list)) else (getattr(output, "past_key_values", None),)
        given = cache if cache is not None else next((p for p in parts if hasattr(p, "get_seq_length")), None)
        if given is not None and call.image is not None:
            self.memory.put(given, call.kept)
        if call.image is None:
            return
        if isinstance(output, tuple):
            raise UnsupportedHost(f"{self.bound.name}: call the model with return_dict=True.")
        hidden = output.last_hidden_state
        B, _, D = hidden.shape
        full = hidden.new_full((B, new + 1, D), torch.nan)
        # Rows of no token go to a place behind the last.
        at = torch.where(call.rows < 0, new, call.rows)
        output.last_hidden_state = full.scatter(1, at[..., None].expand(-1, -1, D), hidden)[:, :new]

    def _beside(self, inner: Any, values: Mapping[str, Any]) -> Tensor:
        """What the whole prompt gives, [B, n, D]."""
        own = {**values, "past_key_values": None, "use_cache": False}
        with torch.no_grad(), entry(CALL, self.run, None):
            return inner(**own).last_hidden_state

    def _measure(self, call: Call, plain: Tensor, output: Any) -> None:
        record = self.run.audit.record(self.bound.index, self.path)
        record.see(0, "prefill")
        if call.kept is None:
            return
        n, images = plain.shape[1], int(call.image[0].sum())
        index = torch.arange(0, n, -(-n // SAMPLED), device=plain.device)
        index = torch.unique(torch.cat([index, call.last.to(index.device)]))
        mask = call.values.get("attention_mask")
        keep = ~call.image[:, index]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            keep = keep & mask[:, index].to(torch.bool)
        moved = (output.last_hidden_state - plain)[:, index][keep].detach().float().norm()
        record.err(moved / plain[:, index][keep].float().norm())
        record.keep(torch.tensor(1.0 - call.kept.gone / images))


class _Layer:
    """Around the forward of a layer that sees fewer tokens."""

    def __init__(self, owner: Shortening, number: int):
        self.owner, self.number = owner, number

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        call = CALL.get().get(id(owner.run))
        if call is None:
            return inner(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        if call.image is not None and self.number == owner.first:
            found = owner.shorten(call, hidden)
            if found is not None:
                hidden = found.hidden
        kept = call.kept
        if kept is None:
            return inner(*args, **kwargs)
        own = {name: self._cut(call, name, value) for name, value in kwargs.items() if name != "hidden_states"}
        return inner(hidden, *args[1:], **own)

    def _cut(self, call: Call, name: str, value: Any) -> Any:
        """An argument of the layer, for fewer tokens."""
        kept, prompt = call.kept, call.image is not None
        n = kept.slots
        if name == "attention_mask" and isinstance(value, Tensor):
            if prompt and value.ndim == 4 and value.shape[2] > 1:
                index = kept.index[:, None, :, None]
                value = value.expand(len(kept.index), *value.shape[1:])
                value = value.gather(2, index.expand(-1, value.shape[1], -1, value.shape[3]))
            return kept.columns(value)
        if not prompt:
            return value
        if name == "position_embeddings":
            return tuple(_positions(t, kept) for t in value)
        if name == "position_ids" and isinstance(value, Tensor):
            return _positions(value[..., None], kept)[..., 0]
        if name == "cache_position":
            return value[: kept.index.shape[1]]
        if name not in KNOWN and isinstance(value, Tensor) and n in value.shape[:3]:
            raise UnsupportedHost(
                f"{self.owner.bound.name}: layers of this model take {name} {list(value.shape)} by the slots of all tokens, which "
                "would have to be cut in a way that is not known."
            )
        return value


def _positions(t: Tensor, kept: Kept) -> Tensor:
    """A tensor [..., n, d] by token, with the batch (or 1) in the axis before the tokens, for the kept ones."""
    index, B = kept.index, len(kept.index)
    t = t.expand(*t.shape[:-3], B, *t.shape[-2:])
    shape = (*t.shape[:-2], index.shape[1], t.shape[-1])
    return t.gather(-2, index[..., None].expand(shape))


def _gather(t: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, K] of t [B, n, D]."""
    return t.gather(1, index[..., None].expand(-1, -1, t.shape[-1]))


def _gather_rows(q: Tensor, last: Tensor) -> Tensor:
    """Row `last` [B] of q [B, H, n, d]."""
    B, H, _, d = q.shape
    return q.gather(2, last.to(q.device)[:, None, None, None].expand(B, H, 1, d))


def _row_of(att: Attention, last: Tensor) -> Tensor | None:
    """The mask of row `last` [B], or None."""
    mask = att.mask4()
    if mask is None or mask.shape[2] == 1:
        return mask
    mask = mask.expand(len(last), *mask.shape[1:])
    return mask.gather(2, last.to(mask.device)[:, None, None, None].expand(-1, mask.shape[1], 1, mask.shape[3]))


def seen(run: Any, module: nn.Module, modality: str, make: Callable[[], Attention]) -> None:
    """An attention call in which nothing acts: its last row may be what a method scores by."""
    call = CALL.get().get(id(run))
    if call is not None and modality == "text":
        call.see(module, make)
    elif modality == "vision" and id(run) in TOWER.get():
        att = make()
        p = kernels.dense(att.take(torch.zeros(1, dtype=torch.long, device=att.q.device)))
        TOWER.get()[id(run)].append((p[:, :, 0, 1:].sum(dim=1), att.k[:, :, 1:].float().mean(dim=1)))


__all__ = ["Shortening", "seen"]
