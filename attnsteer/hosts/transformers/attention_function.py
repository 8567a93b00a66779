"""The attention function that is registered with transformers: the model's own, edited where a steering asks for it."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...engine import SiteRuntime
from ...errors import UnsupportedHost
from ...kernels import Attention
from ...site import Site
from ..exact import check_exact
from ..sdpa.host import same_kernel
from . import traced
from .forward import Forward, forward_of
from .outer_calls import KEY, UNTRACED
from .shortening import seen

# The name under which our attention function is registered.
NAME = "attnsteer"
BASES = ("sdpa", "eager", "flex_attention")
# Bases that have not run where this library is tested: the check of each site decides (docs/backends.md).
FLASH = ("flash_attention_2", "flash_attention_3")
# From this many rows on, the check of a site runs the model's own kernel on the rows that it looks at only.
LONG = 256
_LOCK = threading.Lock()
# The runtime of each steered attention module. A copy of a module is another one, and not steered.
_RUNTIMES: weakref.WeakKeyDictionary[nn.Module, SiteRuntime] = weakref.WeakKeyDictionary()


def steered_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The base function, edited where a run asks for it."""
    if torch.compiler.is_compiling():
        seam = module.config._attnsteer_seam
        own = kwargs.get(KEY, {}).get(id(seam.runtime.run))
        if isinstance(own, traced.Traced):
            kwargs.pop(KEY)
            name = module.config._attn_implementation_internal or "eager"
            options = _options(args) | kwargs
            return traced.attend(own, seam, problem, name, module, query, key, value, attention_mask, options)
    elif attention_mask is None and query.shape[2] == 1:
        out = _again(module, query, key, value, args, kwargs)
        if out is not None:
            return out, None
    return _untraced(module, query, key, value, attention_mask, *args, **kwargs)


def _again(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The output [B, 1, H, dv] of a decode step that only does again what the step before did; None: it is another."""
    seam = getattr(getattr(module, "config", None), "_attnsteer_seam", None)
    forward = None if seam is None else forward_of(seam.runtime.run, kwargs)
    steps = getattr(forward, "steps", None)
    step = steps.get(seam.runtime.site.path) if steps else None
    if step is None or key.shape[2] != forward.past + 1 or module.training or args:
        return None
    # A shallow copy of a module is another one, and not steered.
    if seam.runtime.site.module is not module:
        return None
    q, k, v = Attention.cast(query, key, value)
    if not step.takes(q, k, v, kwargs.get("scaling")):
        return None
    name = module.config.__dict__.get("_attn_implementation_internal") or "eager"
    if name != "sdpa":
        return None

    def base() -> Tensor:
        options = {k: v for k, v in kwargs.items() if k != KEY}
        return _base_function(module, name)(module, query, key, value, None, **options)[0].transpose(1, 2)

    return step(q, k, v, base).transpose(1, 2).contiguous()


# Traced code would bake in what this forward is; a graph break here keeps compiled models honest.
@torch.compiler.disable(reason=UNTRACED)
def _untraced(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    name = module.config.__dict__.get("_attn_implementation_internal") or "eager"
    base = _base_function(module, name)
    runtime = _RUNTIMES.get(module)
    if runtime is None:
        return base(module, query, key, value, attention_mask, *args, **kwargs)
    forward = forward_of(runtime.run, kwargs)
    kwargs.pop(KEY, None)
    if forward is None:
        raise UnsupportedHost(
            f"{runtime.site.path}: this attention call carries no account of its rows. The forward of its model was exchanged "
            "while it is steered (by a hook that was removed, a replica, a copy), or the module was called by itself, or a "
            "checkpoint that is re-entrant computes it again. Call the steered model, or detach first."
        )
    if not isinstance(forward, Forward):
        # The prompt without its images, which passes beside the real one; the packed requests of continuous batching.
        options = _options(args) | kwargs
        return forward.attend(runtime, name, base, module, query, key, value, attention_mask, options)
    active = runtime.active(forward.phase, None, None, forward.mixed)
    if not active:

        def given() -> Attention:
            options = _options(args) | kwargs
            att = problem(module, name, query, key, value, attention_mask, options)

            def rows(index: Tensor) -> Tensor:
                out = base(module, query, key, value, attention_mask, *args, **kwargs)[0]
                return out.transpose(1, 2).index_select(2, index)

            _check_once(runtime, forward, name, attention_mask, att, rows)
            return att

        seen(runtime.run, module, runtime.site.modality, given)
        return base(module, query, key, value, attention_mask, *args, **kwargs)
    return _steered(runtime, forward, name, base, active, module, query, key, value, attention_mask, args, kwargs)


def _steered(
    runtime: SiteRuntime,
    forward: Forward,
    name: str,
    base: Callable[..., Any],
    active: tuple[int, ...],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    options = _options(args) | kwargs
    check_base(runtime.site, name)
    dropout = options.get("dropout") if module.training else None
    runtime.check_dropout(active, dropout or 0.0)
    runtime.check_device(query)
    att = problem(module, name, query, key, value, attention_mask, options)
    B, _, n, m = att.shape
    call = forward.call(runtime, B, n, m, key.shape[2], att.q.device)

    weights: list[Tensor | None] = [None]

    def run_base() -> Tensor:
        out, weights[0] = base(module, query, key, value, attention_mask, *args, **kwargs)
        return out.transpose(1, 2)

    def base_rows(index: Tensor) -> Tensor:
        if att.shape[2] < LONG or name not in ("sdpa", "eager") or options.get("position_bias") is not None:
            return run_base().index_select(2, index)
        # A long prompt is not computed a second time for a few of its rows.
        part = att.take(index)
        return base(module, part.q, part.k, part.v, part.mask, *args, **kwargs)[0].transpose(1, 2)

    if runtime.reads_map(active):
        _check_once(runtime, forward, name, attention_mask, att, base_rows)
    maps: list[Any] | None = [] if name == "eager" else None
    same = functools.partial(same_kernel, att) if name == "sdpa" else None
    steps = None if dropout else _may_go_on(forward, name, att, runtime.site.kind)
    out = runtime(att, run_base, call, active, same, maps, sdpa=name == "sdpa", packs=True, steps=steps)
    if maps and weights[0] is None:
        # Every row was edited, so nothing asked for the base's output; its map is handed out with the edits in it.
        run_base()
    return out.transpose(1, 2).contiguous(), traced.edited_weights(weights[0], maps) if maps else weights[0]


def _may_go_on(forward: Forward, name: str, att: Attention, kind: str) -> dict[str, Any] | None:
    """Where a decode step is put that may be done again: over a cache that grows, of which the row sees all."""
    alike = att.q.dtype == att.k.dtype == att.v.dtype and att.q.shape[-1] == att.v.shape[-1]
    whole = att.mask is None and att.softcap is None and att.sinks is None and att.shape[3] == forward.past + 1
    return forward.steps if name == "sdpa" and kind == "self" and alike and whole else None


def _check_once(
    runtime: SiteRuntime, forward: Forward, name: str, mask: Any, att: Attention, rows: Callable[[Tensor], Tensor]
) -> None:
    """Raise where a site's own kernel computes something else than `att`; looked at in its first call with each kernel."""
    added = name == "eager" and isinstance(mask, Tensor) and mask.dtype == torch.bool
    key = (id(runtime.site.module), name, added)
    if key in forward.stack.exact:
        return
    why = (
        "attention_mask is bool, and eager attention adds it to the scores as 0 and 1, so that it hides nothing. Give a float mask "
        'with torch.finfo(dtype).min where a key is hidden, or call model.set_attn_implementation("sdpa").'
    )
    check_exact(runtime.site, att, rows, why if added else None)
    forward.stack.exact.add(key)


def _options(args: tuple[Any, ...]) -> dict[str, Any]:
    # The library names its arguments; positional extras exist only in old third-party code.
    return dict(zip(("dropout", "scaling"), args, strict=False))


def problem(
    module: nn.Module, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
) -> Attention:
    """What the base function of this name computes from its arguments."""
    # Rotary tables leave q and k in fp32 beside a v in half precision.
    q, k, v = Attention.cast(q, k, v)
    n = q.shape[2]
    scale = options.get("scaling")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    causal = False
    if name == "sdpa":
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = bool(causal) and n > 1 and mask is None
        if causal and k.shape[2] > n:
            # As the library does: an empty static cache is longer than what it holds.
            k, v = k[:, :, :n], v[:, :, :n]
    elif name in FLASH:
        mask, causal = _flash_mask(module, mask, options, q, k)
    elif name == "flex_attention" and mask is not None and not isinstance(mask, Tensor):
        mask = _flex_mask(mask, q, k)
    if isinstance(mask, Tensor) and mask.shape[-1] > k.shape[2]:
        mask = mask[..., : k.shape[2]]
    bias = options.get("position_bias")
    if bias is not None:
        mask, causal = _with_position_bias(bias[..., : k.shape[2]], mask, causal, n, k.shape[2]), False
    sinks = options.get("s_aux")
    return Attention(q, k, v, float(scale), mask=mask, causal=causal, softcap=options.get("softcap"), sinks=sinks)


def _with_position_bias(bias: Tensor, mask: Tensor | None, causal: bool, n: int, m: int) -> Tensor:
    if mask is None and causal:
        mask = torch.ones(n, m, dtype=torch.bool, device=bias.device).tril()[None, None]
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _flex_mask(block_mask: Any, q: Tensor, k: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(block_mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device=q.device)


def _flash_mask(
    module: nn.Module, mask: Any, options: dict[str, Any], q: Tensor, k: Tensor
) -> tuple[Tensor | None, bool]:
    """(mask, causal flag) of what flash-attention computes: padding [B, m] or None, its causal flag lower-right aligned."""
    n, m, window = q.shape[2], k.shape[2], options.get("sliding_window")
    if "cu_seq_lens_q" in options or (mask is not None and mask.shape != (q.shape[0], m)):
        raise UnsupportedHost(
            "flash attention is steered on padded batches [B, tokens] only: not on packed sequences, nor on a cache of fixed size. "
            'Call model.set_attn_implementation("sdpa").'
        )
    given = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if given is None else given)
    valid = None if mask is None else mask[:, None, None].to(torch.bool)
    if window is None or window >= m:
        if not causal or n in (1, m):
            return valid, causal and n > 1
        window = m
    behind = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
    seen = (behind < window) & ((behind >= 0) if causal else (behind > -window))
    return seen[None, None] if valid is None else seen & valid, False


def check_base(site: Site, name: str) -> None:
    """Raise where the model's attention hides what an exact edit needs."""
    if name not in BASES + FLASH:
        raise UnsupportedHost(
            f"{site.path} runs {name!r} attention, which hides what an exact edit needs; attnsteer handles {BASES + FLASH}. "
            'Call model.set_attn_implementation("sdpa") first.'
        )


def _base_function(module: nn.Module, name: str) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = home(module)
    table = getattr(own, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    if name == "eager" and name not in table:
        return own.eager_attention_forward
    return table[name]


def plain_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """The model's own attention function "sdpa" or "eager", without a paged cache."""
    return _base_function(module, name)


def home(module: nn.Module) -> Any:
    """The module of the library that an attention module's forward stands in; FSDP2 derives a class of its own from it."""
    return sys.modules[type(module).forward.__module__]


def attach_module(runtime: SiteRuntime, journal: Any) -> None:
    """Let an attention module look up our function; undone by the journal."""
    module = runtime.site.module
    with _LOCK:
        if not _RUNTIMES:
            _register()
        _RUNTIMES[module] = runtime
    journal.add(lambda: _release(module))
    own = home(module)
    table = getattr(own, "ALL_ATTENTION_FUNCTIONS", None)
    if table is None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table
    seam = traced.Seam(runtime, table, getattr(own, "eager_attention_forward", None))
    journal.set_attr(module, "config", view(module.config, seam, asks_for_name(module)))


def _release(module: nn.Module) -> None:
    with _LOCK:
        _RUNTIMES.pop(module, None)
        if not _RUNTIMES:
            _unregister()


def _register() -> None:
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, steered_attention)


def _unregister() -> None:
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface._global_mapping.pop(NAME, None)


class _Name(str):
    """Our name, which says that it is the base's too: the library's table finds our function, a comparison finds the base."""

    __slots__ = ("_config",)

    def __new__(cls, config: Any) -> _Name:
        made = super().__new__(cls, NAME)
        made._config = config
        return made

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or base_name(self._config) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def asks_for_name(module: nn.Module) -> bool:
    """Whether a module's own code compares the implementation's name: an indexer's mask is applied under some only."""
    own = [vars(c).values() for c in type(module).__mro__ if c.__module__ != nn.Module.__module__]
    codes = (getattr(inspect.unwrap(f), "__code__", None) for values in own for f in values if callable(f))
    return any(
        "_attn_implementation" in code.co_names and any(base in _words(code.co_consts) for base in BASES)
        for code in codes
        if code is not None
    )


def _words(constants: Any) -> set[str]:
    """The strings among the constants of a code object, also those in tuples."""
    found = {c for c in constants if isinstance(c, str)}
    return found.union(*(_words(c) for c in constants if isinstance(c, (tuple, frozenset))))


def view(config: Any, seam: traced.Seam | None = None, asked: bool = False) -> Any:
    """A live view of `config` with our implementation's name; `asked`: one that equals the base's name as well.

    Only attention modules see it, so model code, library checks and mask functions read what they always read; a later change of
    the config is seen through it. Copies and pickles of it are the config itself.
    """
    kind = type(config)
    name = _Name(config) if asked else NAME
    made = type(
        kind.__name__,
        (kind,),
        {
            "__module__": kind.__module__,
            "_attnsteer_seam": seam,
            "_attn_implementation": property(lambda self: name, lambda self, value: None),
            "__deepcopy__": lambda self, memo: copy.deepcopy(config, memo),
            # A builtin, so that a pickle can be read where this library is not installed.
            "__reduce_ex__": lambda self, protocol: (max, ([config],)),
        },
    )
    seen = object.__new__(made)
    object.__setattr__(seen, "__dict__", config.__dict__)
    return seen


def base_name(config: Any) -> str:
    """The implementation that the model runs now."""
    found = config.__dict__.get("_attn_implementation_internal")
    return "eager" if found is None else found
