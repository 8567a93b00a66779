"""Attention processors of diffusers: copies whose attention primitive asks our runtime, and SDPA forms of old processors."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...engine import SiteRuntime
from ...errors import UnsupportedHost
from ...kernels import Attention
from ...site import Site
from ..sdpa.host import same_kernel
from ..sdpa.rebind import DISPATCH, SDPA, names_called, primitive_count, rebind
from .contrast import Collected, NegativeText

if TYPE_CHECKING:
    from ...undo import Journal
    from .clock import DenoiserClock

# What comes after query, key and value in F.scaled_dot_product_attention and in diffusers' dispatch_attention_fn.
OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "attention_kwargs")


class ProcessorCall:
    """The running call of one processor.

    Attributes:
        primitives: attention primitives called so far. image_rows: rows of `hidden_states` where the text came as a second
            argument, else None. negative: the output for the negative prompt, where one is compared with. collecting: this
            call is made for that.
    """

    __slots__ = ("collecting", "image_rows", "negative", "primitives")

    def __init__(self) -> None:
        self.primitives = 0
        self.image_rows: int | None = None
        self.negative: Tensor | None = None
        self.collecting = False


def usable(processor: Any) -> Any:
    """The processor itself, or the SDPA form of an eager, sliced or xformers one that has no weights of its own."""
    if names_called(type(processor).__call__) or isinstance(processor, nn.Module):
        return processor
    import diffusers.models.attention_processor as known

    plain = re.sub(r"^(XFormers|Sliced)", "", type(processor).__name__)
    twin = getattr(known, f"{plain}2_0", None)
    return processor if twin is None else twin()


def attach_processor(runtime: SiteRuntime, clock: DenoiserClock, journal: Journal) -> None:
    """Exchange the processor of a site for a copy whose attention primitive asks `runtime`."""
    module, site = runtime.site.module, runtime.site
    processor = usable(module.processor)
    original = inspect.unwrap(type(processor).__call__)
    running = ProcessorCall()
    main = _main_call(type(processor).__name__, original)
    steered = functools.partial(_primitive, runtime, clock, running, main)
    primitives = {SDPA: steered(torch.nn.functional.scaled_dot_product_attention)}
    dispatch = original.__globals__.get(DISPATCH)
    if dispatch is not None:
        primitives[DISPATCH] = steered(dispatch, rows_first=True)
    copied = rebind(original, primitives)
    names = list(inspect.signature(original).parameters)[2:]

    @functools.wraps(original)
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden, text = given.get("hidden_states"), given.get("encoder_hidden_states")
        apart = isinstance(hidden, Tensor) and isinstance(text, Tensor)
        running.primitives, running.image_rows = 0, hidden.shape[1] if apart else None
        if isinstance(clock.contrast, NegativeText) and site.name in clock.contrast.names:
            running.collecting = True
            try:
                running.negative = clock.contrast.output(copied, self, attn, given, site.path)
            finally:
                running.collecting, running.primitives = False, 0
        out = copied(self, attn, *args, **kwargs)
        if not running.primitives and clock.active(runtime):
            raise UnsupportedHost(
                f"{site.path}: {type(self).__name__} computed its attention without the primitive that it names, so nothing "
                "was edited. Leave this site out of Where, or set another processor or attention backend."
            )
        running.negative = None
        clock.end_if_captured()
        return out

    _exchange(module, _steered_processor(processor, __call__, module.processor), journal)


def _primitive(
    runtime: SiteRuntime,
    clock: DenoiserClock,
    running: ProcessorCall,
    main: Callable[[int, Site, Any], bool] | None,
    base: Callable[..., Tensor],
    rows_first: bool = False,
) -> Callable[..., Tensor]:
    """A stand-in for an attention primitive in one processor; the model's own stays the base kernel.

    Args:
        main: from `_main_call`. base: the primitive. rows_first: it takes [B, N, H, d], as `dispatch_attention_fn` does; else
            [B, H, N, d].
    """
    site = runtime.site

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if running.collecting:
            out = base(query, key, value, *args, **kwargs)
            raise Collected(out.transpose(1, 2) if rows_first else out)
        running.primitives += 1
        active = clock.active(runtime)
        if not active or not (main is None or main(running.primitives, site, active)):
            return base(query, key, value, *args, **kwargs)
        if query.ndim != 4:
            raise UnsupportedHost(f"{site.path} attends on {query.ndim}-D tensors; [B, H, N, d] is needed.")
        options = dict(zip(OPTIONS, args, strict=False)) | kwargs
        mask, scale = _plain_mask(site, query, key, options, rows_first), options.get("scale")
        q, k, v = (t.transpose(1, 2) for t in (query, key, value)) if rows_first else (query, key, value)
        call = clock.call(site, q.shape[0], q.shape[2], k.shape[2], q.device, running.image_rows)
        if clock.contrast is not None:
            call.facts["contrast"] = clock.contrast.fact(
                running.negative, site.kind == "joint" and running.image_rows is not None
            )
        scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
        att = Attention(q, k, v, scale, mask=mask, causal=bool(options.get("is_causal")))
        if rows_first:
            run_base = lambda: base(query, key, value, *args, **kwargs).transpose(1, 2)  # noqa: E731
            return runtime(att, run_base, call, active).transpose(1, 2)
        # Without `enable_gqa` the broadcast of one kv head runs another kernel than ours.
        plain = options.get("enable_gqa") or q.shape[1] == k.shape[1]
        same = functools.partial(same_kernel, att) if plain else None
        return runtime(att, lambda: base(query, key, value, *args, **kwargs), call, active, same)

    return attend


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

    cls = type(type(processor).__name__, (type(processor),), {"__call__": call, "__reduce_ex__": reduce_ex})
    steered = object.__new__(cls)
    # The same dictionary, so that weights, scales and backends set on the original hold here too.
    object.__setattr__(steered, "__dict__", vars(processor))
    return steered


def _exchange(module: nn.Module, processor: Any, journal: Journal) -> None:
    """Put `processor` in the place of the module's own, and refuse others, until undone."""
    place = module._modules if "processor" in module._modules else vars(module)
    old = place["processor"]
    place["processor"] = processor

    def undo() -> None:
        place["processor"] = old

    journal.add(undo)
    if hasattr(module, "set_processor"):
        journal.wrap(module, "set_processor", _refuse_processor)


def _refuse_processor(*_: Any, **__: Any) -> None:
    raise UnsupportedHost(
        "the attention processors of a steered model cannot be exchanged: the edit would vanish. Detach first "
        "(leave the `with` block or call remove()), change the processors, then steer again."
    )


def _main_call(name: str, call: Callable[..., Any]) -> Callable[[int, Site, Any], bool] | None:
    """Which primitive calls of a processor with several are the text or self attention itself; None: all.

    Image-prompt streams (IP-Adapter, image-to-video) are separate attentions over other keys.
    """
    if primitive_count(call) < 2:
        return None
    if "IPAdapter" in name:
        return lambda number, site, active: number == 1
    if name in ("WanAttnProcessor", "SkyReelsV2AttnProcessor"):
        # Image keys, where there are any, come first.
        return lambda number, site, active: number == (2 if site.module.add_k_proj is not None else 1)

    def refuse(number: int, site: Site, active: Any) -> bool:
        if number > 1 and active:
            raise UnsupportedHost(
                f"{site.path}: {name} computes several attentions in one call, and which one is meant is not known. "
                "Leave this site out of Where."
            )
        return number == 1

    return refuse
