"""diffusers: attention processors are wrapped; their own code runs, with the attention primitive exchanged."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Bound, CallContext, SiteRuntime
from ..errors import CompositionError, UnsupportedHost
from ..site import Site
from .base import Host, imported
from .denoiser import DenoiserClock, wrap_denoiser
from .generic import RUNTIME, positions, problem, sdpa_primitive
from .rebind import DISPATCH, SDPA, names_called, primitive_count, rebind

# Pipeline components that predict noise or velocity; encoders, VAEs and ControlNets are not steered.
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")
# Joint sequences: which stream comes first (checked in the processors' code of diffusers 0.42.1).
IMAGE_FIRST = re.compile(r"JointAttn|Mochi|HunyuanVideo")
TEXT_FIRST = re.compile(r"Flux|Qwen|AuraFlow|CogVideoX|CogView|Bria|Chroma|LongCat|Ovis")
LINEAR = re.compile(r"SanaLinear")


class DiffusersHost(Host):
    """Pipelines and denoisers of diffusers: UNets and every transformer with attention processors."""

    provides = frozenset({"segments", "grid", "steps", "branches", "around"})

    def __init__(self, target: Any):
        super().__init__(target)
        self.main = ("image",)
        self.pipeline = target if _is_pipeline(target) else None
        self.models = _denoisers(target)
        self._sites: list[Site] | None = None

    @classmethod
    def takes(cls, target: Any) -> bool:
        return bool(_denoisers(target))

    def sites(self) -> list[Site]:
        if self._sites is None:
            self._sites = [site for name, model in self.models.items() for site in _sites_of(name, model)]
        return self._sites

    def check(self, site: Site, bound: Bound) -> None:
        if RUNTIME in vars(site.module):
            raise CompositionError(
                f"{site.path} is steered already; give all interventions to one call: steer(pipe, first, second)."
            )
        if site.linear:
            return
        processor = _usable(site.module.processor, site)
        call = type(processor).__call__
        if not names_called(call):
            raise UnsupportedHost(
                f"{site.path} uses {type(processor).__name__}, which reaches attention neither through "
                "F.scaled_dot_product_attention nor through dispatch_attention_fn; it cannot be steered exactly. "
                "Set another processor with set_attn_processor first."
            )

    def attach(self, run: Any, journal: Any) -> None:
        clocks = {name: DenoiserClock(run, name, model, self.pipeline) for name, model in self.models.items()}
        for runtime in run.runtimes.values():
            site, clock = runtime.site, clocks[runtime.site.component]
            journal.set_attr(site.module, RUNTIME, runtime)
            if site.linear:
                _attach_linear(runtime, clock, journal)
            else:
                _attach_processor(runtime, clock, journal)
        for name, model in self.models.items():
            wrap_denoiser(clocks[name], model, journal, run)


def _is_pipeline(target: Any) -> bool:
    kinds = imported("diffusers", "pipelines.pipeline_utils.DiffusionPipeline")
    return bool(kinds) and isinstance(target, kinds)


def _denoisers(target: Any) -> dict[str, nn.Module]:
    if _is_pipeline(target):
        parts = {name: getattr(target, name, None) for name in DENOISERS}
        parts = {name: getattr(m, "_orig_mod", m) for name, m in parts.items()}
        return {
            name: m
            for name, m in parts.items()
            if isinstance(m, nn.Module) and any(_has_processor(x) for x in m.modules())
        }
    model = getattr(target, "_orig_mod", target)
    kinds = imported("diffusers", "models.modeling_utils.ModelMixin")
    if kinds and isinstance(model, kinds) and any(_has_processor(m) for m in model.modules()):
        return {"": model}
    return {}


def _has_processor(module: nn.Module) -> bool:
    return hasattr(module, "set_processor") and callable(getattr(module, "processor", None))


def _sites_of(component: str, model: nn.Module) -> list[Site]:
    found = [(name, m) for name, m in model.named_modules() if _has_processor(m)]
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    found.sort(key=lambda pair: order.get(pair[0].split(".")[0], 1))
    blocks: dict[str, int] = {}
    sites = []
    for name, module in found:
        # Several attentions of one transformer block share its layer number.
        block = re.match(r"(.*\.\d+)(\.|$)", name)
        layer = blocks.setdefault(block[1] if block else name, len(blocks))
        heads, kv = _heads(module)
        processor = type(module.processor).__name__
        sites.append(
            Site(
                name=name,
                layer=layer,
                kind=_kind(name, module),
                heads=heads,
                kv_heads=kv,
                modality="image",
                stack="denoiser",
                component=component,
                linear=bool(LINEAR.search(processor)),
                module=module,
            )
        )
    return sites


def _kind(name: str, module: nn.Module) -> str:
    crossing = getattr(module, "is_cross_attention", None)
    if crossing or (crossing is None and re.search(r"attn2$|cross", name)):
        return "cross"
    single = "single" in name and re.search(r"single_(transformer_)?(blocks|layers)", name)
    return "joint" if getattr(module, "added_kv_proj_dim", None) is not None or single else "self"


def _heads(module: nn.Module) -> tuple[int, int]:
    heads = next(
        (getattr(module, n) for n in ("heads", "num_heads", "n_heads") if isinstance(getattr(module, n, None), int)),
        None,
    )
    if heads is None:
        raise UnsupportedHost(f"{type(module).__name__} does not say how many heads it has.")
    inner, inner_kv = getattr(module, "inner_dim", None), getattr(module, "inner_kv_dim", None)
    if isinstance(inner, int) and isinstance(inner_kv, int) and inner_kv != inner:
        return heads, inner_kv // (inner // heads)
    kv = next(
        (getattr(module, n) for n in ("kv_heads", "num_kv_heads") if isinstance(getattr(module, n, None), int)), heads
    )
    return heads, kv


def _usable(processor: Any, site: Site) -> Any:
    """The processor itself, or the SDPA form of an eager, sliced or xformers one."""
    name = type(processor).__name__
    if names_called(type(processor).__call__):
        return processor
    plain = re.sub(r"^(XFormers|Sliced)", "", name)
    plain = re.sub(r"XFormers", "", plain)
    import diffusers.models.attention_processor as known

    twin = getattr(known, f"{plain}2_0", None)
    if twin is None or isinstance(processor, nn.Module):
        return processor
    return twin()


class _Local:
    """What one processor call was given: lengths of the streams, and which primitive call this is."""

    __slots__ = ("calls", "hidden", "text")

    def __init__(self) -> None:
        self.calls, self.hidden, self.text = 0, 0, None


def _attach_processor(runtime: SiteRuntime, clock: DenoiserClock, journal: Any) -> None:
    module, site = runtime.site.module, runtime.site
    processor = _usable(module.processor, site)
    original = type(processor).__call__
    local = _Local()
    main = _main_call(type(processor).__name__, original)

    def context() -> CallContext:
        return clock.context(site, _segments(site, type(processor).__name__, local, clock))

    def gate(primitive: Callable[..., Tensor], base: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if main is None:
            return primitive

        def chosen(*args: Any, **kwargs: Any) -> Tensor:
            local.calls += 1
            return primitive(*args, **kwargs) if main(local.calls, clock, site) else base(*args, **kwargs)

        return chosen

    sdpa = torch.nn.functional.scaled_dot_product_attention
    primitives = {SDPA: gate(sdpa_primitive(runtime, context), sdpa)}
    dispatch = inspect.unwrap(original).__globals__.get(DISPATCH)
    if dispatch is not None:
        primitives[DISPATCH] = gate(_dispatch_primitive(runtime, context, dispatch), dispatch)
    copied = rebind(original, primitives)
    names = list(inspect.signature(original).parameters)
    text_at = names.index("encoder_hidden_states") - 3 if "encoder_hidden_states" in names else None

    @functools.wraps(inspect.unwrap(original))
    def __call__(self: Any, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        text = kwargs.get("encoder_hidden_states")
        if text is None and text_at is not None and 0 <= text_at < len(args):
            text = args[text_at]
        local.calls = 0
        local.hidden = hidden_states.shape[1] if isinstance(hidden_states, Tensor) and hidden_states.ndim > 1 else 0
        local.text = text.shape[1] if isinstance(text, Tensor) and text.ndim > 1 else None
        return copied(self, attn, hidden_states, *args, **kwargs)

    twin = type(type(processor).__name__, (type(processor),), {"__call__": __call__})
    wrapped = object.__new__(twin)
    # The same dictionary, so that weights, scales and backends set on the original hold here too.
    object.__setattr__(wrapped, "__dict__", vars(processor))
    _set_processor(module, wrapped, journal)


def _set_processor(module: nn.Module, processor: Any, journal: Any) -> None:
    place = module._modules if "processor" in module._modules else vars(module)
    old = place["processor"]
    place["processor"] = processor

    def undo() -> None:
        place["processor"] = old

    journal.add(undo)


def _main_call(name: str, call: Callable[..., Any]) -> Callable[[int, DenoiserClock, Site], bool] | None:
    """Which primitive calls of a processor with several are the text or self attention itself; None: all.

    Image-prompt streams (IP-Adapter, image-to-video) are separate attentions over other keys.
    """
    if primitive_count(call) < 2:
        return None
    if "IPAdapter" in name:
        return lambda number, clock, site: number == 1
    if name.startswith(("WanAttn", "SkyReels")):
        # Image keys, where there are any, come first.
        return lambda number, clock, site: (
            number == (2 if site.kind == "cross" and site.module.add_k_proj is not None else 1)
        )

    def refuse(number: int, clock: DenoiserClock, site: Site) -> bool:
        if number > 1:
            raise UnsupportedHost(
                f"{site.path}: {name} computes several attentions in one call, and which one is meant is not known. "
                "Leave this site out of Where."
            )
        return True

    return refuse


def _dispatch_primitive(
    runtime: SiteRuntime, make_context: Callable[[], CallContext], base: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """A stand-in for diffusers' `dispatch_attention_fn` ([B, N, H, d]); the chosen backend stays the base kernel."""

    def primitive(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ctx = make_context()
        active = runtime.active(None, ctx.step, ctx.steps)
        if not active:
            return base(query, key, value, *args, **kwargs)
        names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "attention_kwargs")
        options = dict(zip(names, args, strict=False)) | kwargs
        if options.get("dropout_p"):
            raise UnsupportedHost(f"{runtime.site.path} runs with dropout; call eval() on the model first.")
        if options.get("attention_kwargs") or options.get("parallel_config") is not None:
            raise UnsupportedHost(
                f"{runtime.site.path} uses backend-specific attention_kwargs or context parallelism, which an exact edit "
                "cannot follow; turn them off."
            )
        mask = options.get("attn_mask")
        if mask is not None and mask.ndim == 2 and mask.shape == (query.shape[0], key.shape[1]):
            # Variable-length backends take one validity per key.
            mask = mask[:, None, None]
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        positions(ctx, q.shape[2], k.shape[2], q.device)
        att = problem(q, k, v, mask, bool(options.get("is_causal")), options.get("scale"))
        run_base = lambda: base(query, key, value, *args, **kwargs).transpose(1, 2)  # noqa: E731
        return runtime(att, run_base, ctx, active).transpose(1, 2)

    return primitive


def _segments(site: Site, processor: str, local: _Local, clock: DenoiserClock) -> dict[str, slice]:
    """Row roles of a call; empty where the order of the streams is not known."""
    if site.kind != "joint":
        return {"image": slice(0, local.hidden)}
    text = local.text
    hidden = local.hidden
    if text is None:
        text = clock.text_length
        if text is None:
            return {}
        hidden = hidden - text
    if IMAGE_FIRST.search(processor) and not TEXT_FIRST.search(processor):
        return {"image": slice(0, hidden), "text": slice(hidden, hidden + text)}
    if TEXT_FIRST.search(processor):
        return {"text": slice(0, text), "image": slice(text, text + hidden)}
    return {}


def _attach_linear(runtime: SiteRuntime, clock: DenoiserClock, journal: Any) -> None:
    """Linear attention: values are read at `to_v`, head outputs are edited on their way into `to_out`."""
    module, site = runtime.site.module, runtime.site
    seen: dict[str, Tensor] = {}

    def read(_: nn.Module, args: Any, out: Tensor) -> None:
        seen["v"] = out

    def edit(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        ctx = clock.context(site, {"image": slice(0, args[0].shape[1])})
        active = runtime.active(None, ctx.step, ctx.steps)
        if not active:
            return None
        out, v = (t.unflatten(-1, (site.heads, -1)).transpose(1, 2) for t in (args[0], seen.pop("v")))
        positions(ctx, out.shape[2], v.shape[2], out.device)
        # No map exists: q is there for its shape only, and methods that would need it are refused earlier.
        att = problem(out, v, v, None, False, 1.0)
        edited = runtime(att, lambda: out, ctx, active)
        return (edited.transpose(1, 2).flatten(2, 3), *args[1:])

    for handle in (module.to_v.register_forward_hook(read), module.to_out[0].register_forward_pre_hook(edit)):
        journal.add(handle.remove)
