"""Every attention processor class of diffusers is wrapped, exchanged for its SDPA form, or refused by name."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import PAG, HeadGate, SoftPAG, Where, sites, steer
from attnsteer.call import AttnCall, Reweight
from attnsteer.errors import UnsupportedHost
from attnsteer.hosts.diffusers import DiffusersHost
from attnsteer.hosts.processors import usable
from attnsteer.hosts.rebind import names_called
from attnsteer.hosts.streams import LINEAR
from attnsteer.intervention import Intervention
from attnsteer.site import Site
from attnsteer.testing import tiny_call, tiny_denoiser, tiny_denoiser_inputs, tiny_pipeline
from tests.guidance.common import at, relative
from tests.hosts.families import DIM, FAMILIES, B, forward, randn


@functools.cache
def processor_classes() -> dict[str, type]:
    """All classes below diffusers.models that are processors by name and can be called."""
    import diffusers.models

    found = {}
    for module in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        for name, cls in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(cls) and "Processor" in name and "__call__" in vars(cls):
                found[name] = cls
    return found


# Of a second attention function of their own, or of weights that have no SDPA form.
REFUSED = {
    "CustomDiffusionAttnProcessor",
    "CustomDiffusionXFormersAttnProcessor",
    "IPAdapterAttnProcessor",
    "IPAdapterXFormersAttnProcessor",
    "LTX2VideoVaeNeighborhoodNattenProcessor",
    "SanaMultiscaleAttnProcessor2_0",
}
LINEAR_ONES = {
    "SanaLinearAttnProcessor2_0",
    "SanaLinearAttnProcessor3_0",
    "PAGCFGSanaLinearAttnProcessor2_0",
    "PAGIdentitySanaLinearAttnProcessor2_0",
}
EXCHANGED = {
    "AttnProcessor": "AttnProcessor2_0",
    "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "XFormersAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "XFormersJointAttnProcessor": "JointAttnProcessor2_0",
}


def test_every_processor_class_has_its_place() -> None:
    classes = processor_classes()
    assert len(classes) >= 115
    named = {name for name, cls in classes.items() if names_called(cls.__call__)}
    assert len(named) >= 95
    assert set(classes) - named == REFUSED | LINEAR_ONES | set(EXCHANGED)
    assert {n for n in classes if LINEAR.search(n)} == LINEAR_ONES


@pytest.mark.parametrize("name", [*REFUSED, *EXCHANGED])
def test_refused_by_name_or_exchanged(name: str) -> None:
    cls = processor_classes()[name]
    processor = object.__new__(cls)
    if isinstance(processor, nn.Module):
        nn.Module.__init__(processor)
    if name in EXCHANGED:
        assert type(usable(processor)).__name__ == EXCHANGED[name]
        return
    module = nn.Linear(2, 2)
    module.processor = processor
    site = Site("attn", 0, "self", 2, 2, module=module)
    host = DiffusersHost(tiny_denoiser("sd"))
    with pytest.raises(UnsupportedHost, match=name):
        host.check(site, None)  # type: ignore[arg-type]


def set_plain(pipe: Any, how: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor, XFormersAttnProcessor

    if how == "sliced":
        pipe.enable_attention_slicing(1)
    else:
        pipe.unet.set_attn_processor({"eager": AttnProcessor, "xformers": XFormersAttnProcessor}[how]())


@pytest.mark.parametrize("how", ["eager", "sliced", "xformers"])
def test_old_processors_are_exchanged_while_steered(how: str) -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=2)
    with steer(pipe, PAG(3.0)):
        expected = pipe(**call)[0]
    set_plain(pipe, how)
    before = [s.module.processor for s in sites(pipe)]
    # xformers itself is not here: only the steered sites can run
    everywhere = SoftPAG(3.0, 0.0, where=Where(kinds=("self",))), HeadGate({(0, 0): 1.0}, where=Where(kinds="cross"))
    if how == "xformers":
        gates = HeadGate({(s.layer, 0): 1.0 for s in sites(pipe)})
        with steer(pipe, gates, PAG(3.0)):
            assert relative(pipe(**call)[0], expected) < 5e-6
    else:
        plain = pipe(**call)[0]
        with steer(pipe, PAG(3.0)):
            assert relative(pipe(**call)[0], expected) < 5e-6
        with steer(pipe, *everywhere):
            assert relative(pipe(**call)[0], plain) < 5e-6
        assert torch.equal(pipe(**call)[0], plain)
    assert all(s.module.processor is p for s, p in zip(sites(pipe), before, strict=True))


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "pixart", "hunyuandit", "auraflow", "cogvideox", "wan"])
def test_fused_projections(name: str) -> None:
    if name in FAMILIES:
        model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    else:
        model = tiny_denoiser(name)
        inputs = tiny_denoiser_inputs(name, model)
    first = next(s for s in sites(model) if s.kind in ("self", "joint"))
    gate = HeadGate({(first.layer, 1): -2.0}, where=at([first.name]))
    with steer(model, gate):
        expected = forward(model, inputs)
    model.fuse_qkv_projections()
    plain = forward(model, inputs)
    assert relative(expected, plain) > 1e-3
    with steer(model, gate):
        assert relative(forward(model, inputs), expected) < 5e-6
    assert torch.equal(forward(model, inputs), plain)


def test_processors_cannot_be_exchanged_while_steered() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    pipe = tiny_pipeline("sd")
    with steer(pipe, PAG(3.0)):
        for change in (
            pipe.fuse_qkv_projections,
            pipe.enable_attention_slicing,
            lambda: pipe.unet.set_attn_processor(AttnProcessor()),
        ):
            with pytest.raises(UnsupportedHost, match="Detach first"):
                change()
        pipe(**tiny_call("sd", steps=1))
    pipe.unet.set_attn_processor(AttnProcessor())


# ------------------------------------------------------------------------------------------ attention backends


@pytest.mark.parametrize("backend", ["_native_math", "flex"])
@pytest.mark.parametrize("name", ["flux", "wan", "qwenimage"])
@torch.no_grad()
def test_the_chosen_backend_stays_the_base_kernel(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    model = tiny_denoiser(name)
    inputs = tiny_denoiser_inputs(name, model)
    site = next(s for s in sites(model) if s.kind in ("self", "joint"))
    methods = HeadGate({(site.layer, 1): -2.0}, where=at([site.name])), Boost(where=at([site.name], heads=(0,)))
    plain = forward(model, inputs)
    with steer(model, *methods):
        expected = forward(model, inputs)
    key, calls = AttentionBackendName(backend), [0]
    original = _AttentionBackendRegistry._backends[key]

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        # flex attention is not compiled here: the same function by its definition
        return original(*args, **kwargs) if backend != "flex" else plain_attention(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, key, counted)
    # setting a model's backend sets that of the process too
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    for local in (True, False):
        calls[0] = 0
        if local:
            model.set_attention_backend(backend)
            forward(model, inputs)
            every = calls[0]
            with steer(model, *methods):
                ours = forward(model, inputs)
            assert calls[0] == 2 * every
            model.reset_attention_backend()
        else:
            with attention_dispatch.attention_backend(backend), steer(model, *methods):
                ours = forward(model, inputs)
            assert calls[0] == every
        assert relative(ours, expected) < 5e-6
    assert relative(expected, plain) > 1e-3
    monkeypatch.undo()
    assert torch.equal(forward(model, inputs), plain)


@dataclass(frozen=True)
class Boost(Intervention):
    """Doubles the weight of the first three keys."""

    def weights(self, call: AttnCall) -> Reweight:
        return Reweight((((torch.arange(call.k.shape[2]) < 3)[None, None], 2.0),))


def plain_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    mask = attn_mask if attn_mask is None or attn_mask.ndim == 4 else attn_mask[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


# --------------------------------------------------------------------------------- several attentions in one call


def entering(module: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What enters the output projection of an attention module in one forward."""
    seen: list[Tensor] = []
    hook = module.to_out[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    forward(model, inputs)
    hook.remove()
    assert len(seen) == 1
    return seen[0]


def with_ip_adapter(model: nn.Module, tokens: int = 4) -> None:
    """An image-prompt adapter with random weights, loaded the way the pipelines load one."""
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    width = model.config.cross_attention_dim
    state["image_proj"] = {
        "proj.weight": randn(tokens * width, DIM, seed=7) / 6,
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    for number, name in enumerate(model.attn_processors):
        if name.endswith("attn2.processor"):
            heads = model.get_submodule(name.removesuffix(".processor"))
            shape = (heads.to_k.out_features, width)
            state["ip_adapter"][f"{number}.to_k_ip.weight"] = randn(*shape, seed=number) / 6
            state["ip_adapter"][f"{number}.to_v_ip.weight"] = randn(*shape, seed=number + 50) / 6
    model._load_ip_adapter_weights([state], low_cpu_mem_usage=False)


def test_an_image_prompt_is_not_the_text_attention() -> None:
    model = tiny_denoiser("sd")
    with_ip_adapter(model)
    inputs = {**tiny_denoiser_inputs("sd", model), "added_cond_kwargs": {"image_embeds": [randn(2, 1, DIM, seed=9)]}}
    site = next(s for s in sites(model) if s.kind == "cross")
    assert type(site.module.processor).__name__ == "IPAdapterAttnProcessor2_0"
    both = entering(site.module, model, inputs)
    site.module.processor.scale = [0.0]
    text = entering(site.module, model, inputs)
    site.module.processor.scale = [1.0]
    image = both - text
    assert relative(text, both) > 1e-2
    gates = {(site.layer, head): 0.0 for head in range(site.heads)}
    with steer(model, HeadGate(gates, where=Where(kinds="cross"))) as run:
        gated = entering(site.module, model, inputs)
        # scales set on the adapter while steered still hold
        site.module.processor.scale = [0.0]
        assert not entering(site.module, model, inputs).any()
        site.module.processor.scale = [1.0]
    assert relative(gated, image) < 1e-5
    assert run.audit.records[0, site.path].calls == 2
    assert torch.equal(entering(site.module, model, inputs), both)


def test_pag_with_an_image_prompt_is_the_official_one() -> None:
    from attnsteer.testing import official_pag

    pipe = tiny_pipeline("sd")
    with_ip_adapter(pipe.unet)
    embeds = [torch.cat([torch.zeros(1, 1, DIM), randn(1, 1, DIM, seed=9)])]
    call = {**tiny_call("sd", steps=3), "ip_adapter_image_embeds": embeds}
    official = official_pag("sd", pipe)
    official.register_to_config(requires_safety_checker=False)
    expected = official(**call, pag_scale=3.0)[0]
    with steer(pipe, PAG(3.0)):
        assert relative(pipe(**call)[0], expected) < 5e-6
    assert relative(pipe(**call)[0], expected) > 1e-2


@pytest.mark.parametrize("name", ["wan", "skyreels"])
def test_image_keys_of_image_to_video_are_not_the_text_attention(name: str) -> None:
    extra = {"image_dim": 16, "added_kv_proj_dim": {"wan": 48, "skyreels": 32}[name]}
    if name == "wan":
        model = tiny_denoiser("wan", **extra)
        inputs = tiny_denoiser_inputs("wan", model)
    else:
        model, inputs = FAMILIES[name].build(**extra), FAMILIES[name].inputs()
    # the processor takes the last 512 tokens for text
    inputs["encoder_hidden_states"] = randn(B, 512, DIM, seed=3)
    inputs["encoder_hidden_states_image"] = randn(B, 5, 16, seed=4)
    site = next(s for s in sites(model) if s.kind == "cross")
    module = site.module
    both = entering(module, model, inputs)
    weight = module.add_v_proj.weight.clone(), module.add_v_proj.bias.clone()
    with torch.no_grad():
        module.add_v_proj.weight.zero_(), module.add_v_proj.bias.zero_()
        text = entering(module, model, inputs)
        module.add_v_proj.weight.copy_(weight[0]), module.add_v_proj.bias.copy_(weight[1])
    gates = {(site.layer, head): 0.0 for head in range(site.heads)}
    with steer(model, HeadGate(gates, where=Where(kinds="cross"))):
        gated = entering(module, model, inputs)
    assert relative(text, both) > 1e-2
    assert relative(gated, both - text) < 1e-5
