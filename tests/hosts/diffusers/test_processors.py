"""Every attention processor class of diffusers is wrapped, exchanged for its SDPA form, or refused by name."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import PAG, HeadGate, SoftPAG, Where, sites, steer
from attnsteer.call import AttnCall, Reweight
from attnsteer.errors import UnsupportedHost
from attnsteer.hosts.diffusers.host import DiffusersHost
from attnsteer.hosts.diffusers.processors import is_eager, usable
from attnsteer.hosts.diffusers.streams import LINEAR
from attnsteer.hosts.sdpa.rebind import names_called
from attnsteer.intervention import Intervention
from attnsteer.site import Site
from attnsteer.testing import tiny_call, tiny_denoiser, tiny_denoiser_inputs, tiny_pipeline
from tests.hosts.diffusers.common import at, relative
from tests.hosts.families import FAMILIES, forward


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
    "CustomDiffusionXFormersAttnProcessor",
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
# The map is taken apart where it meets the values; sliced ones run the eager form of theirs in their slices.
EAGER = {"AttnProcessor", "AttnAddedKVProcessor", "CustomDiffusionAttnProcessor", "IPAdapterAttnProcessor"}
EXCHANGED = {
    "SlicedAttnProcessor": "AttnProcessor",
    "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor",
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "XFormersAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "XFormersJointAttnProcessor": "JointAttnProcessor2_0",
}


def test_every_processor_class_has_its_place() -> None:
    classes = processor_classes()
    assert len(classes) >= 115
    named = {name for name, cls in classes.items() if names_called(cls.__call__)}
    assert len(named) >= 95
    assert set(classes) - named == REFUSED | LINEAR_ONES | set(EXCHANGED) | EAGER
    assert {n for n, cls in classes.items() if is_eager(object.__new__(cls))} == EAGER
    assert {n for n in classes if LINEAR.search(n)} == LINEAR_ONES


@pytest.mark.parametrize("name", [*sorted(REFUSED), *EXCHANGED])
def test_refused_by_name_or_exchanged(name: str) -> None:
    cls = processor_classes()[name]
    processor = object.__new__(cls)
    if isinstance(processor, nn.Module):
        nn.Module.__init__(processor)
    if name in EXCHANGED:
        assert type(usable(processor)).__name__ == EXCHANGED[name]
        return
    module = type("AnAttention", (nn.Linear,), {})(2, 2)
    module.processor = processor
    site = Site("attn", 0, "self", 2, 2, module=module)
    host = DiffusersHost(tiny_denoiser("sd"))
    with pytest.raises(UnsupportedHost, match=name):
        host.check(site, SimpleNamespace(method=HeadGate({(0, 0): 0.5})))  # type: ignore[arg-type]


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
        with steer(pipe, gates, PAG(3.0), control=True):
            assert relative(pipe(**call)[0], expected) < 5e-6
    else:
        plain = pipe(**call)[0]
        with steer(pipe, PAG(3.0)):
            assert relative(pipe(**call)[0], expected) < 5e-6
        with steer(pipe, *everywhere, control=True):
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


@pytest.mark.parametrize("how", ["eager", "sliced"])
@torch.no_grad()
def test_old_processors_keep_the_scale_and_the_bits_of_the_module(how: str) -> None:
    """`attn.scale` is the eager processors' own: an identity gate is bit-identical, a closed one zeroes the head."""
    model = tiny_denoiser("sd")
    inputs = tiny_denoiser_inputs("sd", model)
    set_plain(SimpleNamespace(unet=model, enable_attention_slicing=model.set_attention_slice), how)
    site = sites(model)[2]
    site.module.scale *= 0.7
    plain = forward(model, inputs)
    every = {(s.layer, h): 1.0 for s in sites(model) for h in range(s.heads)}
    with steer(model, HeadGate(every), control=True):
        assert torch.equal(forward(model, inputs), plain)
    with steer(model, HeadGate({(site.layer, 0): 0.0}, where=at([site.name]))):
        ours = forward(model, inputs)
    site.module.to_v.weight[: site.module.to_v.out_features // site.heads] = 0
    assert relative(ours, forward(model, inputs)) < 5e-6
    assert relative(ours, plain) > 1e-3


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
