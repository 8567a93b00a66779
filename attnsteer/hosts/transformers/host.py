"""transformers: attention functions are exchanged through the library's own interface, per sub-config.

Modules that call SDPA themselves are steered as in the generic host, under the same clock.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ...bound import Bound
from ...errors import UnsupportedHost
from ...site import Site
from ..base import Host, imported
from ..sdpa.host import reaches
from ..sdpa.softmax import heads_of, writes_attention
from ..sdpa.written import check_written
from .attention_function import attach_module, base_name, check_base, home
from .continuous import Continuous
from .direct import attach_direct, attach_followed, check_direct
from .forward import Stack, block_forward
from .image_tokens import family_of, takes_images
from .layers import ImageFree, PlainPass, block_of
from .outer_calls import CURRENT, OuterCalls, entry, outer_modules
from .shortening import Shortening
from .streams import Streams
from .traced import prepare, untraceable

if TYPE_CHECKING:
    from ...steering import Steering
    from ...undo import Journal

_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


class TransformersHost(Host):
    """Language, vision-language and encoder models of transformers, bare, in a `Pipeline`, or wrapped (peft)."""

    provides = frozenset({"tokens", "images", "residual", "image_free", "phases", "requests", "bases", "layers"})

    def __init__(self, target: Any):
        super().__init__(target)
        self.model = _module(target)
        self._sites: list[Site] | None = None
        self._stacks: dict[str, str] = {}
        # How the attention of a site is reached: "interface", "direct" (it calls SDPA itself), "written" (it writes its map out).
        self._reached: dict[str, str] = {}

    @classmethod
    def takes(cls, target: Any) -> bool:
        module = _module(target)
        kinds = imported("transformers", "modeling_utils.PreTrainedModel")
        return isinstance(module, nn.Module) and any(isinstance(m, kinds) for m in module.modules() if kinds)

    def sites(self) -> list[Site]:
        if self._sites is None:
            self._sites = self._find()
            kinds = {s.modality for s in self._sites if not s.refused}
            self.main = ("text",) if "text" in kinds else tuple(sorted(kinds))
        return self._sites

    def _find(self) -> list[Site]:
        found: list[Site] = []
        counters: dict[tuple[str, str], dict[str, int]] = {}
        names = {name: module for name, module in self.model.named_modules()}
        interfaces = {name for name, module in names.items() if _looks_up_attention(module)}
        # Beside layers that use the interface, a call of SDPA is something else: a pooling head, a mix of residuals.
        served = {_nearest_model(name, names)[0] for name in interfaces}
        modalities = _modalities(names)
        for name, module in names.items():
            how = _reached(module, name in interfaces, lambda name=name: _nearest_model(name, names)[0] in served)
            if how is None:
                continue
            heads, kv = _head_counts(module) if how != "written" else (heads_of(module),) * 2
            stack_name, stack = _nearest_model(name, names)
            block = re.match(r"(.*\.\d+)(\.|$)", name)
            order = counters.setdefault((stack_name, name.split(".")[0]), {})
            position = order.setdefault(block[1] if block else name, len(order))
            layer = _layer_number(module, block[1] if block else "")
            cross = bool(getattr(module, "is_cross_attention", False)) or bool(_CROSS.search(name))
            if isinstance(module, nn.MultiheadAttention):
                cross = cross or bool(_POOLS.search(name))
                if not block:
                    # Behind the layers of its encoder.
                    layer = 1 + max((s.layer for s in found if self._stacks[s.name] == stack_name), default=-1)
            causal = bool(getattr(module, "is_causal", _masks_causally(stack))) and not cross
            decoder = causal or cross or "decoder" in name
            self._stacks[name] = stack_name
            self._reached[name] = how
            refused = ""
            if heads is None:
                refused = f"{type(module).__name__} does not say how many heads it has; set num_heads on it"
            found.append(
                Site(
                    name=name,
                    layer=position if layer is None else layer,
                    kind="cross" if cross else "self",
                    heads=heads or 0,
                    kv_heads=kv or 0,
                    modality=modalities[stack_name],
                    stack="decoder" if decoder else "encoder",
                    causal=causal,
                    refused=refused,
                    module=module,
                )
            )
        return found

    def absent(self) -> dict[str, str]:
        # A model without a head of its own may be the language part of another one, whose images `run.images` tells.
        if takes_images(self.model) or not _has_head(self.model):
            return {}
        why = (
            f"this {type(self.model).__name__} has no images, as its config names no vision part and no image token. Steer a "
            "vision-language model, whole."
        )
        return {"images": why, "image_free": why}

    def stack_of(self, site: Site) -> str:
        """The name of the stack of layers that a site is in."""
        return self._stacks[site.name]

    def check(self, site: Site, bound: Bound) -> None:
        reason = _no_image_keys(self.model) if "images" in bound.method.needs else None
        if reason:
            raise UnsupportedHost(f"{bound.name} acts on image tokens; in this model {reason}.")
        needs = set(bound.method.needs) & {"residual", "image_free"}
        if needs and not block_of(site.name):
            raise UnsupportedHost(f"{site.path} is in no numbered layer, so {bound.name} lacks {needs}.")
        if self._reached[site.path] != "interface":
            if "image_free" in needs:
                raise UnsupportedHost(
                    f"{site.path} computes its attention by itself; a prompt without its images cannot be run beside it, which "
                    f"{bound.name} needs."
                )
            if self._reached[site.path] == "direct":
                check_direct(site)
            else:
                check_written(site, bound)
            return
        base = base_name(site.module.config)
        check_base(site, base)
        if base == "eager" and not hasattr(home(site.module), "eager_attention_forward"):
            raise UnsupportedHost(
                f"{site.path} runs eager attention of {type(site.module).__name__}, whose module has no "
                'eager_attention_forward to build on. Call model.set_attn_implementation("sdpa") if it is supported.'
            )

    def pause(self, run: Steering) -> contextlib.AbstractContextManager[None]:
        return entry(CURRENT, run, PlainPass())

    def attach(self, run: Steering, journal: Journal) -> None:
        names = dict(self.model.named_modules())
        stacks = sorted({self._stacks[path] for path in run.runtimes})
        outer = outer_modules(names, stacks)
        calls = OuterCalls(run, outer)
        for name in stacks:
            self._attach_stack(name, names, run, calls, journal)
        # Outermost last, so that what is undone first is what was put around the rest.
        calls.watch(outer, journal)
        Shortening.attach(run, self, names, journal)
        Streams.attach(run, outer, [names[name] for name in stacks], journal)
        batching = Continuous(run, {path for path, how in self._reached.items() if how != "interface"})
        for module in outer:
            batching.watch(module, journal)

    def _attach_stack(
        self, name: str, names: dict[str, nn.Module], run: Steering, calls: OuterCalls, journal: Journal
    ) -> None:
        runtimes = {path: r for path, r in run.runtimes.items() if self._stacks[path] == name}
        stack = Stack(run, name, names[name], runtimes, calls)
        for path, runtime in runtimes.items():
            _ATTACH[self._reached[path]](runtime, journal)
        needing = {path: {n for b, _ in r.entries for n in b.method.needs} for path, r in runtimes.items()}
        residual = {block_of(path) for path, needs in needing.items() if "residual" in needs}
        blocks: dict[str, nn.Module] = {}
        if any("image_free" in needs for needs in needing.values()):
            own = [s.name for s in self.sites() if self._stacks[s.name] == name]
            blocks = {block_of(site): names[block_of(site)] for site in own}
            stack.beside = functools.partial(ImageFree, stack, list(blocks.items()))
        for block in {*residual, *blocks}:
            journal.wrap(names[block], "forward", functools.partial(block_forward, run, block in residual))
        stack.untraceable = untraceable(stack, any(self._reached[path] != "interface" for path in runtimes))
        if stack.untraceable is None:
            prepare(stack)
        journal.wrap(names[name], "forward", stack)
        journal.add(stack.memory.forget)


def _no_image_keys(model: nn.Module) -> str | None:
    """Why images are no keys of this model's self-attention, or None."""
    families = (family_of(getattr(m, "config", None)) for m in model.modules())
    return next((f.refused for f in families if f is not None and f.refused), None)


def _module(target: Any) -> Any:
    """The model inside a pipeline or a compiled wrapper."""
    pipeline = imported("transformers", "pipelines.base.Pipeline")
    if pipeline and isinstance(target, pipeline):
        target = target.model
    return getattr(target, "_orig_mod", target)


def _has_head(model: nn.Module) -> bool:
    """Whether it is a whole language model: one that turns hidden states into scores of tokens."""
    found = getattr(model, "get_output_embeddings", None)
    return found is not None and found() is not None


def _looks_up_attention(module: nn.Module) -> bool:
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and ("ALL_ATTENTION_FUNCTIONS" in code.co_names or "get_interface" in code.co_names)


# Heads of encoders: a learnt query that attends to all tokens.
_POOLS = re.compile(r"(^|\.)(head|\w*pool\w*)\.")
# How a site is attached, by how its attention is reached.
_ATTACH = {"interface": attach_module, "direct": attach_direct, "written": attach_followed}


def _reached(module: nn.Module, interface: bool, served: Callable[[], bool]) -> str | None:
    """How the attention of a module is reached, or None; `served`: whether its stack has layers that use the interface."""
    if interface:
        return "interface"
    if reaches(module):
        return None if served() else "direct"
    return "written" if writes_attention(module) else None


def _nearest_model(name: str, names: dict[str, nn.Module]) -> tuple[str, nn.Module]:
    from transformers import PreTrainedModel

    while name:
        name = name.rpartition(".")[0]
        if isinstance(names[name], PreTrainedModel):
            return name, names[name]
    return "", names[""]


def _modalities(names: dict[str, nn.Module]) -> dict[str, str]:
    """Path of each library model in the target -> its modality."""
    from transformers import PreTrainedModel

    found = {name: _modality(m) for name, m in names.items() if not name or isinstance(m, PreTrainedModel)}
    # What takes neither token ids nor their embeddings carries on with what a tower made: a resampler, a connector.
    towers = [kind for kind in ("vision", "audio") if kind in found.values()]
    for name in found:
        if name and found[name] == "text" and len(towers) == 1:
            parameters = inspect.signature(names[name].forward).parameters
            if not {"input_ids", "inputs_embeds", "decoder_input_ids", "input_embeds"} & set(parameters):
                found[name] = towers[0]
    return found


def _modality(stack: nn.Module) -> str:
    name = getattr(stack, "main_input_name", "input_ids")
    # Towers that are called with patches in place of pixels, or with queries (a Q-Former's outputs are image tokens).
    config = type(getattr(stack, "config", None)).__name__
    if name.startswith("pixel") or re.search(r"(Vision|VisionModel|QFormer)Config$", config):
        return "vision"
    return "audio" if name in ("input_features", "input_values") else "text"


def _layer_number(module: nn.Module, block: str) -> int | None:
    """What the module says of its layer; None: its place among the others is the number."""
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        return None
    # A module that several layers share has no number of its own (Zamba); the layer that calls it has.
    number = block.rpartition(".")[2]
    return layer if layer >= 0 else int(number) if number else None


def _masks_causally(stack: nn.Module) -> bool:
    """Whether the code of a stack makes a causal mask for its layers, which then do not say so of themselves."""
    code = getattr(inspect.unwrap(type(stack).forward), "__code__", None)
    return code is not None and any(re.fullmatch(r"create_\w*causal_mask", name) for name in code.co_names)


def _head_counts(module: nn.Module) -> tuple[int | None, int | None]:
    """Query heads and key-value heads, or (None, None) where the module does not say."""
    config = getattr(module, "config", None)
    heads = None
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        heads = heads or _int(module, name)
    dim = _int(module, "head_dim")
    # What leaves the heads, before what enters them: a query projection may hold gates beside the queries.
    for name, size in (("o_proj", "in_features"), ("out_proj", "in_features"), ("q_proj", "out_features")):
        width = _int(getattr(module, name, None), size)
        heads = heads or (width // dim if width and dim and width % dim == 0 else None)
    for name in ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"):
        heads = heads or _int(config, name)
    if not heads:
        return None, None
    groups = _int(module, "num_key_value_groups")
    kv = heads // groups if groups else _int(module, "num_key_value_heads") or _int(module, "num_kv_heads") or heads
    return heads, kv


def _int(owner: Any, name: str) -> int | None:
    value = getattr(owner, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
