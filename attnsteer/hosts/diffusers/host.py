"""diffusers: attention processors are wrapped; their own code runs, with the attention primitive exchanged."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from ...bound import Bound
from ...errors import UnsupportedHost
from ...site import Site
from ..base import Host, imported
from ..sdpa.host import check_copyable, reaches
from ..sdpa.rebind import names_called
from ..sdpa.softmax import writes_attention
from ..sdpa.written import check_written
from .clock import DenoiserClock
from .guided_forward import guide
from .guiders import watch_guider
from .image_prompt import check_image_prompt
from .plans import check_plan, plan_of
from .processors import attach_direct, attach_followed, attach_linear, attach_processor, is_eager, usable
from .steps import Sampling, watch_parts
from .streams import LINEAR, kind_of, modality_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ...steering import Steering
    from ...undo import Journal

# Pipeline components that predict noise or velocity; encoders, VAEs and ControlNets are not steered.
DENOISERS = (
    "unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "prior_prior", "decoder", "super_res_first",
    "image_unet",
)  # fmt: skip

# What attention modules call their numbers of heads.
HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads", "n_head")
KEY_HEADS = ("kv_heads", "num_kv_heads", "num_key_value_heads")


class DiffusersHost(Host):
    """Pipelines and denoisers of diffusers: UNets and every transformer with attention processors."""

    provides = frozenset(
        {"segments", "grid", "steps", "branches", "around", "latent", "contrast", "prompt", "image_prompt"}
    )

    def __init__(self, target: nn.Module | DiffusionPipeline):
        super().__init__(target)
        self.main = ("image",)
        self.pipeline = target if _is_pipeline(target) else None
        if self.pipeline is None:
            # The latent belongs to the sampling loop, which a bare model does not have.
            self.provides = type(self).provides - {"latent"}
        self.owners = _denoisers(target)
        self.models = {name: _plain(owner) for name, owner in self.owners.items()}
        self._sites: list[Site] | None = None

    @classmethod
    def takes(cls, target: object) -> bool:
        return bool(_denoisers(target))

    def sites(self) -> list[Site]:
        if self._sites is None:
            self._sites = [site for name, model in self.models.items() for site in _sites_of(name, model)]
        return self._sites

    def check(self, site: Site, bound: Bound) -> None:
        if "image_prompt" in bound.method.needs:
            check_image_prompt(site, getattr(site.module, "processor", None), bound)
        if site.linear:
            return
        how = _reached(site.name, site.module, self.models[site.component])
        if how == "direct":
            check_copyable(site)
        if how == "written":
            check_written(site, bound)
        if how != "processor":
            return
        processor = usable(site.module.processor)
        plan = plan_of(site.module, processor)
        if plan is not None:
            check_plan(site, plan, bound)
        if not names_called(type(processor).__call__) and not is_eager(processor):
            raise UnsupportedHost(
                f"{site.path} uses {type(processor).__name__}, which reaches attention neither through "
                "F.scaled_dot_product_attention nor through dispatch_attention_fn; it cannot be steered exactly. "
                "Set another processor with set_attn_processor first."
            )

    def attach(self, run: Steering, journal: Journal) -> None:
        # Each loop has its own: a combined pipeline's parts sample by themselves.
        loops = {name: _loop_of(self.pipeline, model) for name, model in self.models.items()}
        samplings = {id(loop): Sampling(loop) for loop in (self.pipeline, *loops.values())}
        self.sampling = samplings[id(self.pipeline)]
        clocks = {
            name: DenoiserClock(run, name, owner, self.models[name], samplings[id(loops[name])])
            for name, owner in self.owners.items()
        }
        for runtime in run.runtimes.values():
            clock = clocks[runtime.site.component]
            how = _reached(runtime.site.name, runtime.site.module, clock.model)
            (attach_linear if runtime.site.linear else ATTACH[how])(runtime, clock, journal)
        for clock in clocks.values():
            guide(clock, [s for s in self.sites() if s.component == clock.name], journal)
        for clock in clocks.values():
            loop = loops[clock.name]
            if loop is not None and clock.runtimes:
                watch_parts(loop, {_name_in(loop, clock.model): clock.model}, samplings[id(loop)], journal)
        if self.pipeline is not None:
            watch_guider(self.pipeline, self.sampling, journal)


def _loop_of(pipe: Any, model: nn.Module) -> Any:
    """The pipeline that runs this denoiser: one that a combined pipeline holds, else itself."""
    inner = (part for part in vars(pipe or object).values() if _is_pipeline(part))
    return next((part for part in inner if _name_in(part, model)), pipe)


def _name_in(pipe: Any, model: nn.Module) -> str:
    """What a pipeline calls this denoiser; empty where it does not hold it."""
    return next((name for name in DENOISERS if _plain(getattr(pipe, name, None)) is model), "")


def _is_pipeline(target: object) -> bool:
    kinds = imported(
        "diffusers",
        "pipelines.pipeline_utils.DiffusionPipeline",
        "modular_pipelines.modular_pipeline.ModularPipeline",
    )
    return bool(kinds) and isinstance(target, kinds)


def _plain(module: object) -> Any:
    """The module below a `torch.compile` wrapper."""
    return getattr(module, "_orig_mod", module)


def _denoisers(target: object) -> dict[str, nn.Module]:
    """Component name -> denoiser, as the pipeline holds it (perhaps compiled)."""
    if _is_pipeline(target):
        parts = {name: getattr(target, name, None) for name in DENOISERS}
        return {name: part for name, part in parts.items() if _attends(_plain(part))}
    kinds = imported("diffusers", "models.modeling_utils.ModelMixin")
    model = _plain(target)
    return {"": target} if kinds and isinstance(model, kinds) and _attends(model) else {}


def _attends(model: object) -> bool:
    return isinstance(model, nn.Module) and any(_has_processor(m) for m in model.modules())


def _has_processor(module: nn.Module) -> bool:
    # Mochi's attention has no set_processor.
    known = hasattr(module, "set_processor") or "Attention" in type(module).__name__
    return known and callable(getattr(module, "processor", None))


def _sites_of(component: str, model: nn.Module) -> list[Site]:
    found = [(name, m) for name, m in model.named_modules() if _reached(name, m, model)]
    unet = hasattr(model, "down_blocks")
    if unet:
        order = {"down_blocks": 1, "mid_block": 2, "up_blocks": 3}
        found.sort(key=lambda pair: order.get(pair[0].split(".")[0], 0))
    layers: dict[str, dict[str, int]] = {}
    sites = []
    for name, module in found:
        # Several attentions of one transformer block share its layer number; the prompt's own layers count apart.
        block = re.match(r"(.*\.\d+)(\.|$)", name)
        modality = modality_of(name, model)
        numbers = layers.setdefault(modality, {})
        plan = plan_of(module, module.processor) if _has_processor(module) else None
        heads, kv, refused = *(_heads(module) if _has_processor(module) else _heads_at(name, model)), ""
        if not heads:
            refused = f"{type(module).__name__} does not say how many heads it has"
        sites.append(
            Site(
                name=name,
                layer=numbers.setdefault(block[1] if block else name, len(numbers)),
                kind=(plan.kind if plan is not None else "") or kind_of(name, module, model),
                heads=heads,
                kv_heads=kv,
                modality=modality,
                stack="denoiser",
                component=component,
                refused=refused,
                parts=() if plan is None else plan.parts,
                linear=_has_processor(module) and bool(LINEAR.search(type(module.processor).__name__)),
                module=module,
            )
        )
    return sites


# How the attention of a site is reached.
ATTACH = {"processor": attach_processor, "direct": attach_direct, "written": attach_followed}


def _reached(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """ "processor"; "direct": it calls SDPA itself, as a pooler of the prompt, or a part of an attention module; "written": it
    takes a softmax itself; None: it does not attend."""
    if _has_processor(module):
        return "processor"
    if reaches(module) and _heads_at(name, model)[0]:
        return "direct"
    return "written" if writes_attention(module) else None


def _heads_at(name: str, model: nn.Module) -> tuple[int, int]:
    """Those of a module that calls SDPA itself: its own numbers, or those of the module that it is a part of."""
    own = _heads(model.get_submodule(name))
    return own if own[0] else _heads(model.get_submodule(name.rpartition(".")[0]))


def _heads(module: nn.Module) -> tuple[int, int]:
    heads = next((getattr(module, n) for n in HEADS if isinstance(getattr(module, n, None), int)), None)
    if heads is None:
        return 0, 0
    inner, inner_kv = getattr(module, "inner_dim", None), getattr(module, "inner_kv_dim", None)
    if isinstance(inner, int) and isinstance(inner_kv, int) and inner_kv != inner:
        return heads, inner_kv // (inner // heads)
    kv = next((getattr(module, n) for n in KEY_HEADS if isinstance(getattr(module, n, None), int)), heads)
    return heads, kv
