"""The attention function that is registered with transformers, and the configs that point to it."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import kernels
from ...call import FEW_ROWS
from ...engine import CallContext, SiteRuntime
from ...errors import UnsupportedHost
from ...kernels import Attention
from ...site import Site
from ..sdpa.host import same_kernel
from .sequence_clock import SequenceClock, key_positions, valid_at

PREFIX = "attnsteer_"
RUNTIME = "_attnsteer_runtime"
# From this many rows on, the check of a site runs the model's own kernel on the rows that it looks at only.
LONG = 256
_LOCK = threading.Lock()
# Names and configs in use, counted over all live steerings, so that the last one restores them.
_NAMES: dict[str, int] = {}
_CONFIGS: dict[int, list[Any]] = {}


class Attached:
    """What hangs on a steered attention module."""

    def __init__(self, runtime: SiteRuntime, clock: SequenceClock):
        self.runtime = runtime
        self.clock = clock
        self.checked = False
        self.residual: Tensor | None = None

    def phase(self, rows: int) -> str:
        """Whether a call of so many query rows is "prefill" or "decode"."""
        return phase_of(self.runtime.run, self.clock, rows)

    def __deepcopy__(self, memo: Any) -> None:
        # A copy of a steered model is a plain model of another owner; it must not report to this run.
        return None


def phase_of(run: Any, clock: SequenceClock, rows: int) -> str:
    """Whether a call of so many query rows is "prefill" or "decode"."""
    decode = run.frozen or (clock.past > 0 and rows == 1 and not clock.in_prompt)
    return "decode" if decode else "prefill"


# Traced code would bake in whether a run is attached; a graph break here keeps compiled models honest.
@torch.compiler.disable
def steered_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered with transformers: the base function, edited where a run asks for it."""
    name = module.config._attn_implementation.removeprefix(PREFIX)
    base = _base_function(module, name)
    attached = vars(module).get(RUNTIME)
    if attached is None:
        return base(module, query, key, value, attention_mask, *args, **kwargs)
    beside = attached.clock.image_free
    if beside is not None and beside.active:
        out, weights = base(module, query, key, value, attention_mask, *args, **kwargs)
        return beside.attention(attached.runtime.site.path, out.transpose(1, 2)).transpose(1, 2), weights
    phase = attached.phase(query.shape[2])
    active = attached.runtime.active(phase, None, None)
    if not active:
        attached.residual = None
        return base(module, query, key, value, attention_mask, *args, **kwargs)
    return _steered(attached, name, base, phase, active, module, query, key, value, attention_mask, args, kwargs)


def _steered(
    attached: Attached,
    name: str,
    base: Callable[..., Any],
    phase: str,
    active: tuple[int, ...],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    # The library names its arguments; positional extras exist only in old third-party code.
    options = dict(zip(("dropout", "scaling"), args, strict=False)) | kwargs
    if module.training and options.get("dropout"):
        raise UnsupportedHost(
            f"{attached.runtime.site.path} runs with attention dropout {options['dropout']} in training mode; "
            "an exact edit is not defined there. Call model.eval() first."
        )
    att = _problem(module, name, query, key, value, attention_mask, options)
    ctx = context(attached, phase, att.shape, key.shape[2], att.q.device)

    weights: list[Tensor | None] = [None]

    def run_base() -> Tensor:
        out, weights[0] = base(module, query, key, value, attention_mask, *args, **kwargs)
        return out.transpose(1, 2)

    if name == "eager":
        ctx.maps = []

    def base_rows(index: Tensor) -> Tensor:
        if att.shape[2] < LONG or name == "flex_attention" or options.get("position_bias") is not None:
            return run_base().index_select(2, index)
        # A long prompt is not computed a second time for a few of its rows.
        part = att.take(index)
        return base(module, part.q, part.k, part.v, part.mask, *args, **kwargs)[0].transpose(1, 2)

    if not attached.checked:
        _check_exact(attached.runtime.site, att, base_rows)
        attached.checked = True
    same = name == "sdpa" and same_kernel(att, FEW_ROWS)
    out = attached.runtime(att, run_base, ctx, active, same)
    if ctx.maps and weights[0] is None:
        # Every row was edited, so nothing asked for the base's output; its map is handed out with the edits in it.
        run_base()
    return out.transpose(1, 2).contiguous(), _edited_weights(weights[0], ctx.maps)


def _edited_weights(weights: Tensor | None, maps: list[Any] | None) -> Tensor | None:
    """The map that an eager model hands out, as edited: `output_attentions` must not show the unedited one."""
    if weights is None or not maps:
        return weights
    weights = weights.clone()
    for heads, A in maps:
        weights[:, slice(None) if heads is None else list(heads)] = A.to(weights.dtype)
    return weights


def _problem(
    module: nn.Module, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
) -> Attention:
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


def context(
    attached: Attached, phase: str, shape: tuple[int, int, int, int], slots: int, device: torch.device
) -> CallContext:
    """What the clock knows about a call of this shape (B, H, n, m); `slots`: of the cache, m or more."""
    clock, site, run = attached.clock, attached.runtime.site, attached.runtime.run
    B, _, n, m = shape
    tokens = clock.tokens
    ctx = CallContext(phase=phase, frozen=run.frozen)
    residual, attached.residual = attached.residual, None
    if tokens is None or tokens.batch != B or clock.new != n:
        # The attention module was called on its own, or the stack folds other axes into the batch.
        ctx.row_position = torch.arange(n, device=device)
        ctx.key_position = torch.arange(m, device=device)
        ctx.context = {"tokens": None, "past": 0}
        return ctx
    if clock.past == 0:
        clock.fresh(site.path)
    ctx.states = clock.states()
    ctx.context = {"tokens": tokens, "past": clock.past, "cached": clock.cache is not None, "residual": residual}
    if clock.image_free is not None:
        ctx.context["image_free"] = functools.partial(clock.image_free.at, site.path, tokens)
    if site.kind == "cross":
        ctx.context["cross"] = True
    # The same for all layers with as many keys.
    key = (site.kind == "cross", m, slots, device)
    if key not in clock.places:
        clock.places[key] = _places(clock, *key)
    ctx.row_position, ctx.row_valid, ctx.key_position, ctx.key_valid = clock.places[key]
    return ctx


def _places(
    clock: SequenceClock, cross: bool, m: int, slots: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Row positions [n] and validity, key positions [m] and validity, of the running call."""
    move = lambda t: None if t is None else t.to(device)  # noqa: E731
    valid = move(clock.tokens.valid)
    stop = clock.past + clock.new
    rows = torch.arange(clock.past, stop, device=device)
    row_valid = None if valid is None else valid[:, clock.past : stop]
    if cross:
        return rows, row_valid, torch.arange(m, device=device), move(clock.cross_valid)
    keys = key_positions(clock.past, clock.new, slots, device)[:m]
    return rows, row_valid, keys, valid_at(valid, keys, clock.tokens.length)


def _check_exact(site: Site, att: Attention, base_rows: Callable[[Tensor], Tensor]) -> None:
    """A few rows of our own definition against the model's kernel: a transform we do not know must raise."""
    n = att.shape[2]
    index = torch.unique(torch.tensor([0, n // 3, (2 * n) // 3, n - 1], device=att.q.device))
    with torch.no_grad():
        out = base_rows(index).detach().to(att.stat_dtype)
        sub = att.take(index)
        A = kernels.dense(sub)
        b, h, r, m = A.shape
        ours = torch.matmul(A.reshape(b, h // att.groups, att.groups * r, m), att.v.detach().to(A.dtype))
        ours = ours.reshape(b, h, r, -1)
    seen = A.sum(dim=-1, keepdim=True) > 0
    error = ((ours - out).abs() * seen).amax()
    size = (out.abs() * seen).amax().clamp_min(1e-3)
    limit = 5e-2 if att.q.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if not bool(error <= limit * size):
        raise UnsupportedHost(
            f"{site.path}: the model's attention is not softmax(q k^T * scale + mask) v as its arguments say "
            f"(relative difference {float(error / size):.2g}); it does something else inside, so an edit could not be exact. "
            "Please report the model type."
        )


def _base_function(module: nn.Module, name: str) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = sys.modules[type(module).__module__]
    table = getattr(own, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    if name == "eager" and name not in table:
        return own.eager_attention_forward
    return table[name]


def switch(config: Any, journal: Any) -> None:
    """Point a config to our function on top of its present one; the last steering to leave restores it."""
    with _LOCK:
        entry = _CONFIGS.get(id(config))
        if entry is None:
            old = config._attn_implementation
            entry = _CONFIGS[id(config)] = [config, config._attn_implementation_internal, 0]
            _register(old)
            config._attn_implementation_internal = PREFIX + old
        entry[2] += 1
    journal.add(lambda: _release(config))


def _release(config: Any) -> None:
    with _LOCK:
        entry = _CONFIGS[id(config)]
        entry[2] -= 1
        if entry[2] == 0:
            del _CONFIGS[id(config)]
            name = config._attn_implementation_internal
            config._attn_implementation_internal = entry[1]
            _unregister(name)


def _register(base: str) -> None:
    """One function, and the base's own mask function, under one name per base (a mask's form depends on it)."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    name = PREFIX + base
    if not _NAMES.get(name):
        AttentionInterface.register(name, steered_attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    _NAMES[name] = _NAMES.get(name, 0) + 1


def _unregister(name: str) -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    _NAMES[name] -= 1
    if not _NAMES[name]:
        del _NAMES[name]
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
