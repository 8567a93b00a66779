"""Attention processors of diffusers: copies whose attention primitive asks our runtime, and SDPA forms of old processors."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...call import AttnCall
from ...engine import SiteRuntime
from ...errors import UnsupportedHost
from ...kernels import Attention
from ...site import Site
from ..base import imported
from ..exact import check_exact
from ..sdpa.host import counting, patch_forward, same_kernel, sdpa_primitive
from ..sdpa.rebind import DISPATCH, SDPA, helpers, names_called, primitive_count, rebind
from ..sdpa.written import Account, attach_written
from .clock import STEERED, DenoiserClock, ProcessorCall
from .contrast import Collected, NegativeText
from .image_prompt import Unscaled, check_order
from .plans import PICTURE, Plan, always_one, plan_of

if TYPE_CHECKING:
    from ...undo import Journal

# What comes after query, key and value in F.scaled_dot_product_attention and in diffusers' dispatch_attention_fn.
OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "attention_kwargs")


def usable(processor: Any) -> Any:
    """What runs in a processor's place while an edit acts: the processor itself wherever its attention can be reached.

    Sliced ones compute what the eager ones do, slice by slice; those of xformers have an SDPA form, with the module's own scale.
    """
    if names_called(type(processor).__call__) or is_eager(processor) or isinstance(processor, nn.Module):
        return processor
    import diffusers.models.attention_processor as known

    name = type(processor).__name__
    twin = name.removeprefix("Sliced") if name.startswith("Sliced") else f"{name.removeprefix('XFormers')}2_0"
    found = getattr(known, twin, None) if twin != name else None
    return processor if found is None else found()


def is_eager(processor: Any) -> bool:
    """Whether its code takes whole maps from `get_attention_scores` and multiplies them with the values by `torch.bmm`."""
    code = getattr(inspect.unwrap(type(processor).__call__), "__code__", None)
    names = set() if code is None else set(code.co_names)
    return {"get_attention_scores", "bmm", "torch"} <= names and "slice_size" not in names


def attach_processor(runtime: SiteRuntime, clock: DenoiserClock, journal: Journal) -> None:
    """Exchange the processor of a site for a copy whose attention primitive asks `runtime`."""
    module, site = runtime.site.module, runtime.site
    own = module.processor
    processor = usable(own)
    original = inspect.unwrap(type(processor).__call__)
    running = clock.calls[site.path] = ProcessorCall()
    streams = _Streams.of(processor, original, runtime)
    unscaled = Unscaled(site.path, processor) if streams.pictured else None
    primitive = functools.partial(_primitive, runtime, clock, running, streams)
    primitives: dict[str, Any] = {}
    if is_eager(processor):
        eager = _Eager(module, getattr(own, "slice_size", None), primitive)
        primitives["torch"] = eager.torch
        seen = lambda attn: _Scoring(attn)  # noqa: E731
    else:
        scale = float(module.scale) if type(processor) is not type(own) else None
        primitives[SDPA] = primitive(torch.nn.functional.scaled_dot_product_attention, scale=scale)
        seen = lambda attn: attn  # noqa: E731
    dispatch = original.__globals__.get(DISPATCH)
    if dispatch is not None:
        primitives[DISPATCH] = primitive(dispatch, rows_first=True)
    for name, helper in helpers(original).items():
        primitives[name] = rebind(helper, dict(primitives))
    copied = rebind(original, primitives)
    names = list(inspect.signature(original).parameters)[2:]
    # Another form is there for edits only: without one, the model's own code runs.
    exchanged = type(processor) is not type(own)

    @functools.wraps(original)
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if exchanged and not clock.active(runtime):
            running.ran = True
            return own(attn, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden, text = given.get("hidden_states"), given.get("encoder_hidden_states")
        apart = isinstance(hidden, Tensor) and isinstance(text, Tensor)
        # Of a sequence in blocks, how many calls come before the last.
        running.blocks = len(given.get("segments") or ()) if streams.plan is not None else 0
        running.primitives, running.image_rows = 0, hidden.shape[1] if apart else None
        if isinstance(clock.contrast, NegativeText) and site.name in clock.contrast.names:
            running.collecting = True
            try:
                running.negative = clock.contrast.attention(copied, self, seen(attn), given, site.path)
            finally:
                running.collecting, running.primitives = False, 0
        own_scale = unscaled is None or not streams.pictures(clock.active(runtime))
        running.image_prompt = None if own_scale else unscaled.begin(given)
        out = copied(self if own_scale else unscaled.processor, seen(attn), *args, **kwargs)
        if not running.primitives and clock.active(runtime):
            raise UnsupportedHost(
                f"{site.path}: {type(self).__name__} computed its attention without the primitive that it names, so nothing "
                "was edited. Leave this site out of Where, or set another processor or attention backend."
            )
        running.negative = running.image_prompt = None
        clock.end_if_captured()
        return out

    steered = _steered_processor(processor, __call__, own)
    clock.steered[site.path] = module
    _exchange(module, steered, journal)


def _primitive(
    runtime: SiteRuntime,
    clock: DenoiserClock,
    running: ProcessorCall,
    streams: _Streams,
    base: Callable[..., Tensor],
    rows_first: bool = False,
    scale: float | None = None,
    fused: bool = True,
) -> Callable[..., Tensor]:
    """A stand-in for an attention primitive in one processor; the model's own stays the base kernel.

    Args:
        base: the primitive. rows_first: it takes [B, N, H, d], as `dispatch_attention_fn` does; else [B, H, N, d].
        scale: of a module whose processor gives none to its primitive; None: what the primitive is given.
        fused: whether `base` is torch's SDPA.
    """
    site = runtime.site

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if scale is not None:
            kwargs["scale"] = scale
        if running.collecting:
            raise Collected(lambda q: base(q, key, value, *args, **kwargs))
        running.primitives += 1
        running.ran = True
        active = clock.active(runtime)
        active = streams.acting(running.primitives, running.blocks, active) if active else active
        if not active:
            return base(query, key, value, *args, **kwargs)
        if query.ndim != 4:
            raise UnsupportedHost(f"{site.path} attends on {query.ndim}-D tensors; [B, H, N, d] is needed.")
        options = dict(zip(OPTIONS, args, strict=False)) | kwargs
        blind = streams.blind(active)
        mask = None if blind else _plain_mask(site, query, key, options, rows_first)
        factor = options.get("scale")
        q, k, v = (t.transpose(1, 2) for t in (query, key, value)) if rows_first else (query, key, value)
        own = streams.own(running.primitives, running.blocks)
        call = clock.call(
            site, q.shape[0], q.shape[2], k.shape[2], q.device, running.image_rows, running.primitives, own
        )
        if clock.contrast is not None:
            if callable(running.negative):
                found = running.negative(query[clock.contrast.rows])
                running.negative = found.transpose(1, 2) if rows_first else found
            apart = site.kind == "joint" and running.image_rows is not None
            call.facts["contrast"] = clock.contrast.fact(running.negative, apart)
        factor = float(q.shape[-1] ** -0.5 if factor is None else factor)
        if running.image_prompt is not None and running.primitives > 1:
            call.facts["image_prompt"], own = running.image_prompt(base(query, key, value, *args, **kwargs))
            return runtime(Attention(q, k, v, factor), lambda: own, call, active)
        att = Attention(q, k, v, factor, mask=mask, causal=bool(options.get("is_causal")) and not blind)
        if rows_first:
            run_base = lambda: base(query, key, value, *args, **kwargs).transpose(1, 2)  # noqa: E731
            return runtime(att, run_base, call, active).transpose(1, 2)
        # Without `enable_gqa` the broadcast of one kv head runs another kernel than ours.
        plain = fused and (options.get("enable_gqa") or q.shape[1] == k.shape[1])
        same = functools.partial(same_kernel, att) if plain else None
        return runtime(att, lambda: base(query, key, value, *args, **kwargs), call, active, same)

    return attend


class _Scoring:
    """Stands for an attention module inside an eager processor: the scores are kept apart until values meet them."""

    def __init__(self, attn: nn.Module):
        self._attn = attn

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> _Scores:
        """What would be a map [B H, n, m]."""
        return _Scores(query, key, attention_mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


class _Scores:
    """The queries and keys of a map that is not computed yet."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None):
        self.query, self.key, self.mask = query, key, mask


class _Eager:
    """`torch` for the code of an eager processor: where the map meets the values, the attention is asked of the runtime.

    Attributes:
        torch: the module, with another `bmm`.
    """

    def __init__(self, module: nn.Module, slices: int | None, steered: Callable[..., Any]):
        self._module, self._slices = module, slices
        self._attend = steered(self._base, scale=float(module.scale), fused=False)
        self.torch = types.ModuleType("torch")
        self.torch.__dict__.update(torch.__dict__)
        self.torch.bmm = self._bmm

    def _bmm(self, first: Any, second: Tensor, **kwargs: Any) -> Tensor:
        if not isinstance(first, _Scores):
            return torch.bmm(first, second, **kwargs)
        heads = self._module.heads
        fold = lambda t: t.view(-1, heads, *t.shape[1:])  # noqa: E731
        mask = first.mask
        if mask is not None and mask.shape[0] == len(first.query):
            mask = fold(mask)
        elif mask is not None:
            mask = mask[:, None]
        return self._attend(fold(first.query), fold(first.key), fold(second), attn_mask=mask).flatten(0, 1)

    def _base(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        """The model's own computation, in its slices."""
        attn, heads = self._module, q.shape[1]
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        mask = attn_mask
        if mask is not None:
            mask = mask.flatten(0, 1) if mask.shape[0] * mask.shape[1] == len(q) else mask[:, 0]
        if self._slices is None:
            return torch.bmm(attn.get_attention_scores(q, k, mask), v).unflatten(0, (-1, heads))
        out = v.new_zeros(len(q), q.shape[1], v.shape[-1])
        for start in range(0, len(q), self._slices):
            part = slice(start, start + self._slices)
            scores = attn.get_attention_scores(q[part], k[part], None if mask is None else mask[part])
            out[part] = torch.bmm(scores, v[part])
        return out.unflatten(0, (-1, heads))


def _plain_mask(site: Site, query: Tensor, key: Tensor, options: dict[str, Any], rows_first: bool) -> Tensor | None:
    """The mask of one call, broadcastable to [B, H, n, m]; raises where the call is not plain attention."""
    mask = options.get("attn_mask")
    if options.get("dropout_p"):
        raise UnsupportedHost(f"{site.path} runs with dropout {options['dropout_p']}; call eval() on the model first.")
    others = options.get("attention_kwargs") or options.get("parallel_config") is not None
    if others or not (mask is None or isinstance(mask, Tensor)):
        raise UnsupportedHost(
            f"{site.path} uses backend-specific attention_kwargs, block masks or context parallelism, which an exact edit "
            "cannot follow; turn them off."
        )
    if rows_first and mask is not None and mask.ndim == 2 and mask.shape == (query.shape[0], key.shape[1]):
        # One validity per key.
        return mask[:, None, None]
    return mask


def attach_direct(runtime: SiteRuntime, clock: DenoiserClock, journal: Journal) -> None:
    """Exchange the SDPA that a module without a processor calls itself, as Mochi's pooler of the prompt does."""
    site = runtime.site
    running = clock.calls[site.path] = ProcessorCall()

    def make_call(batch: int, rows: int, keys: int, device: torch.device) -> AttnCall:
        return clock.call(site, batch, rows, keys, device, None)

    primitive = sdpa_primitive(runtime, make_call, clock.active)

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        running.ran = True
        return primitive(*args, **kwargs)

    patch_forward(site.module, counting(site, attend, lambda: clock.active(runtime)), journal)


def attach_followed(runtime: SiteRuntime, clock: DenoiserClock, journal: Journal) -> None:
    """Follow the softmax that a module without a processor takes itself, as those for faces in ConsisID do."""
    site = runtime.site
    running = clock.calls[site.path] = ProcessorCall()
    checked: list[bool] = []

    def acting() -> tuple[int, ...]:
        running.ran = True
        return clock.active(runtime)

    def make_call(batch: int, rows: int, keys: int, device: torch.device) -> AttnCall:
        return clock.call(site, batch, rows, keys, device, None)

    def check(att: Attention, own: Callable[[Tensor], Tensor]) -> None:
        if not checked:
            check_exact(site, att, own)
            checked.append(True)

    attach_written(runtime, Account(acting, make_call, check), journal)


def attach_linear(runtime: SiteRuntime, clock: DenoiserClock, journal: Journal) -> None:
    """Linear attention: values are read at `to_v`, head outputs are edited on their way into `to_out`."""
    module, site = runtime.site.module, runtime.site
    processor = module.processor
    original = inspect.unwrap(type(processor).__call__)

    def edit(out: Tensor, values: Tensor) -> Tensor:
        active = clock.active(runtime)
        if not active:
            return out
        call = clock.call(site, out.shape[0], out.shape[1], out.shape[1], out.device, None)
        heads, v = (t.unflatten(-1, (site.heads, -1)).transpose(1, 2) for t in (out, values))
        # No map exists: q is there for its shape only, and methods that would need it are refused earlier.
        att = Attention(heads, v, v, 1.0)
        return runtime(att, lambda: heads, call, active).transpose(1, 2).flatten(2, 3)

    @functools.wraps(original)
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, _Linear(attn, edit), *args, **kwargs)

    _exchange(module, _steered_processor(processor, __call__, processor), journal)


class _Linear:
    """Stands for a linear attention module inside its processor: `to_v` is read, what enters `to_out` is edited."""

    def __init__(self, attn: nn.Module, edit: Callable[[Tensor, Tensor], Tensor]):
        self._attn, self._edit = attn, edit
        self._values: list[Tensor] = []
        self.to_out = [lambda out: attn.to_out[0](edit(out, self._values.pop())), *attn.to_out[1:]]

    def to_v(self, x: Tensor) -> Tensor:
        """The module's own values, remembered."""
        values = self._attn.to_v(x)
        self._values.append(values)
        return values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


def _steered_processor(processor: Any, call: Callable[..., Any], original: Any) -> Any:
    """An object of the processor's class, name and state with another `__call__`; copies of it are copies of `original`."""

    def reduce_ex(self: Any, protocol: int) -> Any:
        # A pickle must not name a class that exists while something is steered.
        return copy.copy, (original,)

    cls = type(
        type(processor).__name__, (type(processor),), {"__call__": call, "__reduce_ex__": reduce_ex, STEERED: True}
    )
    steered = object.__new__(cls)
    # The same dictionary, so that weights, scales and backends set on the original hold here too.
    object.__setattr__(steered, "__dict__", vars(processor))
    return steered


def _known_to_hooks(own: Any, steered: Any, journal: Journal) -> None:
    """Where hooks of diffusers look processors up by their class (its PAG guider does), ours is found as its own."""
    for registry in imported("diffusers", "hooks._helpers.AttentionProcessorRegistry"):
        try:
            known = registry.get(type(own))
        except ValueError:
            continue
        registry.register(type(steered), known)
        journal.add(lambda r=registry: r._registry.pop(type(steered), None))


def _exchange(module: nn.Module, processor: Any, journal: Journal) -> None:
    """Put `processor` in the place of the module's own, and refuse others, until undone."""
    _known_to_hooks(module.processor, processor, journal)
    place = module._modules if "processor" in module._modules else vars(module)
    old = place["processor"]
    place["processor"] = processor

    def undo() -> None:
        place["processor"] = old

    journal.add(undo)
    if hasattr(module, "set_processor"):
        journal.wrap(module, "set_processor", functools.partial(_only, processor))


def _only(own: Any, inner: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `set_processor` of a steered module: its own may be put back, as pipelines do that exchange others."""
    if processor is not own:
        raise exchanged("the attention processors of a steered model cannot be exchanged: the edit would vanish")
    return inner(processor, *args, **kwargs)


def exchanged(what: str) -> UnsupportedHost:
    """The error for an attention processor that took the place of a steered one."""
    return UnsupportedHost(
        f"{what}. Detach first (leave the `with` block or call remove()), change the processors, then steer again."
    )


class _Streams:
    """Which methods act in which primitive call of a processor that computes several attentions.

    All of them go into the same heads: sums (image prompts, added to the text's), differences, rows of one sequence. A gate on a
    head's output is thus a gate on each; a method that reads or edits the map has some of them in mind, which the plan names.
    """

    def __init__(self, runtime: SiteRuntime, name: str, plan: Plan | None, repeats: bool):
        self.runtime, self.name, self.plan = runtime, name, plan
        # Without a plan: one place in the code, a loop over the samples, each of which is the attention meant.
        self.repeats = repeats
        bounds = [bound for bound, _ in runtime.entries]
        self._gates = frozenset(i for i, b in enumerate(bounds) if b.method.linear and b.doors == {"output"})
        self.pictured = frozenset(i for i, b in enumerate(bounds) if "image_prompt" in b.method.needs)
        check_order(runtime, self._gates, self.pictured)
        self._values = frozenset(i for i, b in enumerate(bounds) if b.method.linear and runtime.site.kind == "self")
        self._parts = {i: self._acts_in(i, b.where.parts) for i, b in enumerate(bounds)} if plan is not None else {}

    def _acts_in(self, i: int, chosen: tuple[str, ...] | None) -> tuple[str, ...]:
        """The parts of the plan in which an intervention acts."""
        if i in self.pictured:
            return (PICTURE,)
        if chosen is not None:
            return chosen
        return self.plan.parts if i in self._gates else self.plan.main

    @classmethod
    def of(cls, processor: Any, call: Callable[..., Any], runtime: SiteRuntime) -> _Streams:
        """Those of a processor."""
        repeats = primitive_count(call) < 2 or always_one(processor)
        return cls(runtime, type(processor).__name__, plan_of(runtime.site.module, processor), repeats)

    def acting(self, number: int, blocks: int, active: tuple[int, ...]) -> tuple[int, ...]:
        """Those of `active` that act in the `number`-th primitive call, from 1, of a processor."""
        if self.plan is None:
            if number > 1 and not self.repeats and any(i not in self._gates for i in active):
                raise UnsupportedHost(
                    f"{self.runtime.site.path}: {self.name} computes several attentions in one call, and which one is meant is not "
                    "known. Leave this site out of Where; gates on head outputs act in all of them."
                )
            return active
        part = self.plan.part(number, blocks)
        return tuple(i for i in active if part in self._parts[i])

    def own(self, number: int, blocks: int) -> str | None:
        """Where the rows' own keys stand in a call; None where the plan does not say."""
        return None if self.plan is None else self.plan.own.get(self.plan.part(number, blocks), "")

    def pictures(self, active: tuple[int, ...]) -> bool:
        """Whether one that acts on image prompts is among `active`."""
        return any(i in self.pictured for i in active)

    def blind(self, active: tuple[int, ...]) -> bool:
        """Whether nothing that acts asks which keys a row sees, so that the form of the mask does not matter."""
        return all(i in self._gates or i in self._values for i in active)
