"""transformers: attention functions are exchanged through the library's own interface, per sub-config."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..call import FEW_ROWS
from ..engine import Bound, CallContext, SiteRuntime
from ..errors import CompositionError, UnsupportedHost
from ..kernels import Attention
from ..site import Site
from .base import Host, imported
from .generic import same_kernel
from .layers import ImageFree, block_of, residual_hook
from .prompts import PromptWatch, outer_modules, watch_prompts
from .sequence import SequenceClock, key_positions, valid_at

PREFIX = "attnsteer_"
BASES = ("sdpa", "eager", "flex_attention")
RUNTIME = "_attnsteer_runtime"
# From this many rows on, the check of a site runs the model's own kernel on the rows that it looks at only.
LONG = 256
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)
_LOCK = threading.Lock()
# Names and configs in use, counted over all live steerings, so that the last one restores them.
_NAMES: dict[str, int] = {}
_CONFIGS: dict[int, list[Any]] = {}


class TransformersHost(Host):
    """Language, vision-language and encoder models of transformers, bare, in a `Pipeline`, or wrapped (peft)."""

    provides = frozenset({"tokens", "residual", "image_free", "phases"})

    def __init__(self, target: Any):
        super().__init__(target)
        self.model = _module(target)
        self._sites: list[Site] | None = None
        self._stacks: dict[str, str] = {}

    @classmethod
    def takes(cls, target: Any) -> bool:
        module = _module(target)
        kinds = imported("transformers", "modeling_utils.PreTrainedModel")
        return isinstance(module, nn.Module) and any(isinstance(m, kinds) for m in module.modules() if kinds)

    def sites(self) -> list[Site]:
        if self._sites is None:
            self._sites = self._find()
            kinds = {s.modality for s in self._sites}
            self.main = ("text",) if "text" in kinds else tuple(sorted(kinds))
        return self._sites

    def _find(self) -> list[Site]:
        found, counters = [], {}
        names = {name: module for name, module in self.model.named_modules()}
        for name, module in names.items():
            if not _looks_up_attention(module) or not hasattr(getattr(module, "config", None), "_attn_implementation"):
                continue
            stack_name, stack = _nearest_model(name, names)
            block = re.match(r"(.*\.\d+)(\.|$)", name)
            order = counters.setdefault((stack_name, name.split(".")[0]), {})
            position = order.setdefault(block[1] if block else name, len(order))
            layer = getattr(module, "layer_idx", None)
            heads, kv = _head_counts(module)
            cross = bool(getattr(module, "is_cross_attention", False)) or bool(_CROSS.search(name))
            causal = bool(getattr(module, "is_causal", False)) and not cross
            decoder = causal or cross or "decoder" in name
            self._stacks[name] = stack_name
            found.append(
                Site(
                    name=name,
                    layer=layer if isinstance(layer, int) else position,
                    kind="cross" if cross else "self",
                    heads=heads,
                    kv_heads=kv,
                    modality=_modality(stack),
                    stack="decoder" if decoder else "encoder",
                    causal=causal,
                    module=module,
                )
            )
        return found

    def check(self, site: Site, bound: Bound) -> None:
        name = site.module.config._attn_implementation
        base = name.removeprefix(PREFIX)
        if base not in BASES:
            raise UnsupportedHost(
                f"{site.path} runs {base!r} attention, which hides what an exact edit needs; attnsteer handles {BASES}. "
                'Call model.set_attn_implementation("sdpa") first.'
            )
        if base == "eager" and not hasattr(sys.modules[type(site.module).__module__], "eager_attention_forward"):
            raise UnsupportedHost(
                f"{site.path} runs eager attention of {type(site.module).__name__}, whose module has no "
                'eager_attention_forward to build on. Call model.set_attn_implementation("sdpa") if it is supported.'
            )
        if RUNTIME in vars(site.module):
            raise CompositionError(
                f"{site.path} is steered already; give all interventions to one call: steer(model, first, second)."
            )

    def attach(self, run: Any, journal: Any) -> None:
        clocks: dict[str, SequenceClock] = {}
        names = dict(self.model.named_modules())
        looks_ahead = [b.method for b in run.bounds if b.method.looks_ahead]
        stacks = sorted({self._stacks[path] for path in run.runtimes})
        watch = watch_prompts(run, outer_modules(names, stacks), journal)
        for path, runtime in run.runtimes.items():
            module = runtime.site.module
            stack = self._stacks[path]
            if stack not in clocks:
                clock = clocks[stack] = SequenceClock(run)
                clock.stateful = id(run)
                clock.refuse = _refusal(looks_ahead)
                hook = names[stack].register_forward_pre_hook(_stack_hook(clock, watch, names[stack]), with_kwargs=True)
                journal.add(hook.remove)
                journal.add(names[stack].register_forward_hook(_finish_hook(clock, watch)).remove)
                journal.add(clock.forget)
            attached = _Attached(runtime, clocks[stack])
            journal.set_attr(module, RUNTIME, attached)
            needs = {need for bound, _ in runtime.entries for need in bound.method.needs}
            if "residual" in needs:
                hook = residual_hook(attached, watch)
                journal.add(names[block_of(path)].register_forward_pre_hook(hook, with_kwargs=True).remove)
            if "image_free" in needs and clocks[stack].image_free is None:
                blocks = {
                    block_of(s.name): names[block_of(s.name)] for s in self.sites() if self._stacks[s.name] == stack
                }
                clocks[stack].image_free = ImageFree(watch, names[stack], list(blocks.items()))
            _switch(module.config, journal)
        if looks_ahead:
            _refuse_assisted(self.model, looks_ahead[0], journal)


class _Attached:
    """What hangs on a steered attention module."""

    def __init__(self, runtime: SiteRuntime, clock: SequenceClock):
        self.runtime = runtime
        self.clock = clock
        self.checked = False
        self.residual: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> None:
        # A copy of a steered model is a plain model of another owner; it must not report to this run.
        return None


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
    clock = attached.clock
    if clock.image_free is not None and clock.image_free.active:
        out, weights = base(module, query, key, value, attention_mask, *args, **kwargs)
        edited = clock.image_free.attention(attached.runtime.site.path, out.transpose(1, 2))
        return edited.transpose(1, 2), weights
    residual, attached.residual = attached.residual, None
    run = attached.runtime.run
    decode = run.frozen or (clock.past > 0 and query.shape[2] == 1 and not clock.in_prompt)
    phase = "decode" if decode else "prefill"
    active = attached.runtime.active(phase, None, None)
    if not active:
        return base(module, query, key, value, attention_mask, *args, **kwargs)
    more = {"residual": residual}
    return _steered(attached, name, base, phase, active, more, module, query, key, value, attention_mask, args, kwargs)


def _steered(
    attached: _Attached,
    name: str,
    base: Callable[..., Any],
    phase: str,
    active: tuple[int, ...],
    more: dict[str, Any],
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
    ctx = _context(attached, phase, att, key.shape[2])
    ctx.context |= more

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


def _context(attached: _Attached, phase: str, att: Attention, slots: int) -> CallContext:
    clock, site, run = attached.clock, attached.runtime.site, attached.runtime.run
    n, m, device = att.shape[2], att.shape[3], att.q.device
    tokens = clock.tokens
    ctx = CallContext(phase=phase, frozen=run.frozen)
    if tokens is None or tokens.batch != att.shape[0]:
        # The attention module was called on its own, or the stack folds other axes into the batch.
        ctx.row_position = torch.arange(n, device=device)
        ctx.key_position = torch.arange(m, device=device)
        ctx.context = {"tokens": None, "past": 0}
        return ctx
    if clock.past == 0:
        clock.fresh(site.path)
    ctx.states = clock.states()
    ctx.context = {"tokens": tokens, "past": clock.past, "cached": clock.cache is not None}
    if clock.image_free is not None:
        ctx.context["image_free"] = functools.partial(clock.image_free.at, site.path, tokens)
    move = lambda t: None if t is None else t.to(device)  # noqa: E731
    valid = move(tokens.valid)
    ctx.row_position = torch.arange(clock.past, clock.past + n, device=device)
    if valid is not None:
        ctx.row_valid = valid[:, clock.past : clock.past + n]
    if site.kind == "cross":
        ctx.key_position = torch.arange(m, device=device)
        ctx.key_valid = move(clock.cross_valid)
        ctx.context["cross"] = True
        return ctx
    ctx.key_position = key_positions(clock.past, clock.new, slots, device)[:m]
    ctx.key_valid = valid_at(valid, ctx.key_position, tokens.length)
    return ctx


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


def _switch(config: Any, journal: Any) -> None:
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


def _stack_hook(clock: SequenceClock, watch: PromptWatch, stack: nn.Module) -> Callable[..., None]:
    names = list(inspect.signature(stack.forward).parameters)

    @torch.compiler.disable
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if watch.silent:
            return
        values = dict(zip(names, args, strict=False)) | kwargs
        data = next((values[k] for k in ("input_ids", "inputs_embeds") if isinstance(values.get(k), Tensor)), None)
        if data is None:
            data = next((v for v in values.values() if isinstance(v, Tensor)), None)
            clock.tokens = None
            if data is None or "hidden_states" not in values:
                return
        clock.start(values, data.shape[0], data.shape[1], watch.said)

    return before


def _finish_hook(clock: SequenceClock, watch: PromptWatch) -> Callable[..., None]:
    @torch.compiler.disable
    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if watch.silent:
            return
        parts = output if isinstance(output, (tuple, list)) else (getattr(output, "past_key_values", None),)
        if clock.image_free is not None:
            clock.image_free.forget()
        clock.finish(next((p for p in parts if hasattr(p, "get_seq_length")), None))

    return after


def _refusal(methods: list[Any]) -> Callable[[int, int], str | None]:
    """Why a shortened cache cannot be followed, or None where it can."""

    def reason(past: int, seen: int) -> str | None:
        for method in methods:
            if past and not method.follows_crop:
                return (
                    f"the cache was cut back from {seen} to {past} tokens, and {type(method).__name__} keeps sums over the "
                    "rows that were cut. Start a new cache, or use a decode mode that does not move its statistics."
                )
        return None

    return reason


def _refuse_assisted(model: Any, method: Any, journal: Any) -> None:
    """Assisted decoding feeds its first candidates together with the prompt."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedHost(
            "assisted decoding feeds candidate tokens together with the prompt, so they would move the prompt statistics of "
            f"{type(method).__name__}. Generate without assistant_model and prompt_lookup_num_tokens."
        )

    for module in model.modules():
        if hasattr(module, "_get_candidate_generator"):
            journal.set_attr(module, "_get_candidate_generator", refuse)


def _module(target: Any) -> Any:
    """The model inside a pipeline or a compiled wrapper."""
    pipeline = imported("transformers", "pipelines.base.Pipeline")
    if pipeline and isinstance(target, pipeline):
        target = target.model
    return getattr(target, "_orig_mod", target)


def _looks_up_attention(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and ("ALL_ATTENTION_FUNCTIONS" in code.co_names or "get_interface" in code.co_names)


def _nearest_model(name: str, names: dict[str, nn.Module]) -> tuple[str, nn.Module]:
    from transformers import PreTrainedModel

    while name:
        name = name.rpartition(".")[0]
        if isinstance(names[name], PreTrainedModel):
            return name, names[name]
    return "", names[""]


def _modality(stack: nn.Module) -> str:
    name = getattr(stack, "main_input_name", "input_ids")
    # Towers that are called with patches in place of pixels, or with queries (a Q-Former's outputs are image tokens).
    if name.startswith("pixel") or re.search(r"(Vision|VisionModel|QFormer)Config$", type(stack.config).__name__):
        return "vision"
    return "audio" if name in ("input_features", "input_values") else "text"


def _head_counts(module: nn.Module) -> tuple[int, int]:
    config = module.config
    heads = None
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        heads = heads or _int(module, name)
    projection, dim = getattr(module, "q_proj", None), _int(module, "head_dim")
    if heads is None and projection is not None and dim and hasattr(projection, "out_features"):
        heads = projection.out_features // dim
    for name in ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"):
        heads = heads or _int(config, name)
    if not heads:
        raise UnsupportedHost(f"{type(module).__name__} does not say how many heads it has.")
    groups = _int(module, "num_key_value_groups")
    kv = heads // groups if groups else _int(module, "num_key_value_heads") or heads
    return heads, kv


def _int(owner: Any, name: str) -> int | None:
    value = getattr(owner, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
