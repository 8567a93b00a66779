"""Attention processors of diffusers: wrapped copies whose attention primitive is ours, and the twins of old forms."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...call import AttnCall
from ...engine import SiteRuntime
from ...errors import UnsupportedHost
from ...site import Site
from ..sdpa.host import problem, sdpa_primitive
from ..sdpa.rebind import DISPATCH, SDPA, names_called, primitive_count, rebind

if TYPE_CHECKING:
    from .clock import DenoiserClock


class Local:
    """What one processor call was given and did: rows of its own stream, whether text came apart, primitive calls.

    Attributes:
        image: rows of `hidden_states` where the text came as a second argument, else None.
    """

    __slots__ = ("calls", "image")

    def __init__(self) -> None:
        self.calls: int = 0
        self.image: int | None = None


def usable(processor: Any) -> Any:
    """The processor itself, or the SDPA form of an eager, sliced or xformers one that has no weights of its own."""
    if names_called(type(processor).__call__) or isinstance(processor, nn.Module):
        return processor
    import diffusers.models.attention_processor as known

    plain = re.sub(r"^(XFormers|Sliced)", "", type(processor).__name__)
    twin = getattr(known, f"{plain}2_0", None)
    return processor if twin is None else twin()


def attach_processor(runtime: SiteRuntime, clock: DenoiserClock, journal: Any) -> None:
    """Exchange the processor of a site for a copy whose attention primitive asks `runtime`."""
    module, site = runtime.site.module, runtime.site
    processor = usable(module.processor)
    original = inspect.unwrap(type(processor).__call__)
    local = Local()
    main = _main_call(type(processor).__name__, original)

    def make_call(batch: int, rows: int, keys: int, device: torch.device) -> AttnCall:
        return clock.call(site, batch, rows, keys, device, local.image)

    def gate(primitive: Callable[..., Tensor], base: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def chosen(*args: Any, **kwargs: Any) -> Tensor:
            local.calls += 1
            if main is None or main(local.calls, site, clock.active(runtime)):
                return primitive(*args, **kwargs)
            return base(*args, **kwargs)

        return chosen

    sdpa = torch.nn.functional.scaled_dot_product_attention
    primitives = {SDPA: gate(sdpa_primitive(runtime, make_call, clock.active), sdpa)}
    dispatch = original.__globals__.get(DISPATCH)
    if dispatch is not None:
        primitives[DISPATCH] = gate(_dispatch_primitive(runtime, make_call, clock.active, dispatch), dispatch)
    copied = rebind(original, primitives)
    names = list(inspect.signature(original).parameters)[2:]

    @functools.wraps(original)
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden, text = given.get("hidden_states"), given.get("encoder_hidden_states")
        apart = isinstance(hidden, Tensor) and isinstance(text, Tensor)
        local.calls, local.image = 0, hidden.shape[1] if apart else None
        out = copied(self, attn, *args, **kwargs)
        if not local.calls and clock.active(runtime):
            raise UnsupportedHost(
                f"{site.path}: {type(self).__name__} computed its attention without the primitive that it names, so nothing "
                "was edited. Leave this site out of Where, or set another processor or attention backend."
            )
        clock.finished()
        return out

    _exchange(module, _twin(processor, __call__), journal)


def attach_linear(runtime: SiteRuntime, clock: DenoiserClock, journal: Any) -> None:
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
        att = problem(heads, v, v, None, False, 1.0)
        return runtime(att, lambda: heads, call, active).transpose(1, 2).flatten(2, 3)

    @functools.wraps(original)
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, _Linear(attn, edit), *args, **kwargs)

    _exchange(module, _twin(processor, __call__), journal)


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


def _twin(processor: Any, call: Callable[..., Any]) -> Any:
    """An object of the processor's class, name and state with another `__call__`."""
    cls = type(type(processor).__name__, (type(processor),), {"__call__": call})
    wrapped = object.__new__(cls)
    # The same dictionary, so that weights, scales and backends set on the original hold here too.
    object.__setattr__(wrapped, "__dict__", vars(processor))
    return wrapped


def _exchange(module: nn.Module, processor: Any, journal: Any) -> None:
    place = module._modules if "processor" in module._modules else vars(module)
    old = place["processor"]
    place["processor"] = processor

    def undo() -> None:
        place["processor"] = old

    journal.add(undo)
    if hasattr(module, "set_processor"):

        def refuse(*_: Any, **__: Any) -> None:
            raise UnsupportedHost(
                "the attention processors of a steered model cannot be exchanged: the edit would vanish. Detach first "
                "(leave the `with` block or call remove()), change the processors, then steer again."
            )

        journal.set_attr(module, "set_processor", refuse)


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


def _dispatch_primitive(
    runtime: SiteRuntime,
    make_call: Callable[[int, int, int, torch.device], AttnCall],
    acting: Callable[[SiteRuntime], tuple[int, ...]],
    base: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """A stand-in for diffusers' `dispatch_attention_fn` ([B, N, H, d]); the chosen backend stays the base kernel."""

    def primitive(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = acting(runtime)
        if not active:
            return base(query, key, value, *args, **kwargs)
        names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "attention_kwargs")
        options = dict(zip(names, args, strict=False)) | kwargs
        mask = options.get("attn_mask")
        if options.get("dropout_p"):
            raise UnsupportedHost(f"{runtime.site.path} runs with dropout; call eval() on the model first.")
        others = options.get("attention_kwargs") or options.get("parallel_config") is not None
        if others or not (mask is None or isinstance(mask, Tensor)):
            raise UnsupportedHost(
                f"{runtime.site.path} uses backend-specific attention_kwargs, block masks or context parallelism, which an "
                "exact edit cannot follow; turn them off."
            )
        if mask is not None and mask.ndim == 2 and mask.shape == (query.shape[0], key.shape[1]):
            # One validity per key.
            mask = mask[:, None, None]
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        call = make_call(q.shape[0], q.shape[2], k.shape[2], q.device)
        att = problem(q, k, v, mask, bool(options.get("is_causal")), options.get("scale"))
        run_base = lambda: base(query, key, value, *args, **kwargs).transpose(1, 2)  # noqa: E731
        return runtime(att, run_base, call, active).transpose(1, 2)

    return primitive
