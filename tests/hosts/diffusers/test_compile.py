"""torch.compile: compiled models can be steered, steered models compiled; never silently without the edit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from attnsteer import SEG, HeadGate, SoftPAG, Where, sites, steer
from attnsteer.testing import tiny_call, tiny_denoiser, tiny_denoiser_inputs, tiny_pipeline
from tests.hosts.diffusers.common import BOUND, at, denoiser, paths, relative
from tests.hosts.families import forward

# Attention in the middle block only: what is compiled is small.
SMALL = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(name: str) -> dict[str, Any]:
    return {"sd": SMALL, "sdxl": {}, "flux": {"num_layers": 1}, "sd3": {"num_layers": 2}, "sana": {"num_layers": 2}}[
        name
    ]


def joint_sites(model: Any) -> list[Any]:
    return [s for s in sites(model) if s.kind in ("self", "joint")]


@pytest.mark.parametrize("steer_first", [False, True], ids=["compile_first", "steer_first"])
@pytest.mark.parametrize(
    "name", ["sd", *(pytest.param(n, marks=pytest.mark.long) for n in ("flux", "sana", "sdxl", "sd3"))]
)
@torch.no_grad()
def test_gates_compile_as_one_graph(name: str, steer_first: bool) -> None:
    model = tiny_denoiser(name, **small(name))
    inputs = tiny_denoiser_inputs(name, model)
    site = joint_sites(model)[-1]
    gate = HeadGate({(site.layer, 0): -1.0}, where=at([site.name]))
    plain = forward(model, inputs)
    with steer(model, gate):
        expected = forward(model, inputs)
    counter = CompileCounter()
    if steer_first:
        run = steer(model, gate)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        assert relative(forward(compiled, inputs), plain) < BOUND
        run = steer(compiled, gate)
    for _ in range(3):
        assert relative(forward(compiled, inputs), expected) < BOUND
    # as many graphs as without: one here, and one of the unsteered model where that ran compiled before
    assert counter.frame_count == (1 if steer_first else 2)
    # the reference ran uncompiled, and in a steering of its own
    assert [r.calls for r in run.audit.records.values()] == [3]
    assert run.audit.fired(0)
    run.remove()
    assert relative(forward(compiled, inputs), plain) < BOUND
    assert relative(expected, plain) > 1e-3


HOW = {
    "whole": lambda pipe, name, model, **options: setattr(pipe, name, torch.compile(model, **options)),
    "method": lambda pipe, name, model, **options: model.compile(**options),
    "blocks": lambda pipe, name, model, **options: model.compile_repeated_blocks(**options),
}


def guided(name: str, method: Any) -> tuple[Any, str, nn.Module, dict[str, Any], Any, Any]:
    """A pipeline, its denoiser's attribute and module, a call, and its latents without and with the method."""
    pipe = tiny_pipeline(name, **small(name))
    part = "unet" if name in ("sd", "sdxl") else "transformer"
    call = tiny_call(name, steps=4, **({"true_cfg_scale": 4.0} if name == "flux" else {}))
    plain = pipe(**call)[0]
    with steer(pipe, method):
        expected = pipe(**call)[0]
    assert relative(expected, plain) > 1e-3
    return pipe, part, denoiser(name, pipe), call, plain, expected


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["sd", *(pytest.param(n, marks=pytest.mark.long) for n in ("flux", "sdxl", "sd3"))])
def test_guidance_of_a_compiled_model(name: str, how: str) -> None:
    layer = joint_sites(tiny_pipeline(name, **small(name)))[-1].name
    pipe, part, model, call, plain, expected = guided(name, SoftPAG(3.0, 0.5, where=at([layer])))
    counter = CompileCounter()
    HOW[how](pipe, part, model, backend=counter, fullgraph=True)
    assert relative(pipe(**call)[0], plain) < BOUND
    before = counter.frame_count
    with steer(pipe, SoftPAG(3.0, 0.5, where=at([layer]))):
        assert relative(pipe(**call)[0], expected) < BOUND
        first = counter.frame_count
        assert relative(pipe(**call)[0], expected) < BOUND
    # a graph for the strong pass and one for the weak pass, whatever the number of steps; per kind of block with "blocks"
    assert counter.frame_count == first <= before + (2 if how != "blocks" else 4)
    assert relative(pipe(**call)[0], plain) < BOUND


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_blocks_compiled_while_steered(name: str) -> None:
    layer = joint_sites(tiny_pipeline(name, **small(name)))[-1].name
    pipe, part, model, call, plain, expected = guided(name, SoftPAG(3.0, 0.5, where=at([layer])))
    counter = CompileCounter()
    with steer(pipe, SoftPAG(3.0, 0.5, where=at([layer]))):
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        assert relative(pipe(**call)[0], expected) < BOUND
        assert counter.frame_count
    assert relative(pipe(**call)[0], plain) < BOUND


@pytest.mark.parametrize("how", ["whole", "method"])
def test_guidance_compiled_after_it_was_attached(how: str) -> None:
    """The several passes cannot be one graph: refused with `fullgraph`, else run uncompiled."""
    layer = joint_sites(tiny_pipeline("sd", **SMALL))[-1].name
    method = SoftPAG(3.0, 0.5, where=at([layer]))
    pipe, part, model, call, plain, expected = guided("sd", method)
    run = steer(pipe, method)
    HOW[how](pipe, part, model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"fullgraph|disable"):
        pipe(**call)
    setattr(pipe, part, model)
    model._compiled_call_impl = None
    HOW[how](pipe, part, model, backend="eager")
    assert relative(pipe(**call)[0], expected) < BOUND
    run.remove()
    assert relative(pipe(**call)[0], plain) < BOUND


@pytest.mark.long
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(HeadGate({(0, 0): -1.0}, where=Where(kinds="self", steps=[1, 2])), marks=pytest.mark.long),
        HeadGate({(0, 0): -1.0}, where=Where(kinds="self", branches="cond")),
        pytest.param(SoftPAG(3.0, 0.5, where=Where(steps=(0.25, 0.75))), marks=pytest.mark.long),
        pytest.param(SEG(3.0, 1.0), marks=pytest.mark.long),
        pytest.param(SEG(3.0), marks=pytest.mark.long),
    ],
    ids=["steps", "branch", "window", "blur", "mean_query"],
)
def test_other_selections_and_methods(method: Any) -> None:
    if method.where.steps == (0.25, 0.75):
        method = method.new(where=at(paths(tiny_pipeline("sd", **SMALL)), steps=method.where.steps))
    pipe, part, model, call, plain, expected = guided("sd", method)
    counter = CompileCounter()
    pipe.unet = torch.compile(model, backend=counter, fullgraph=True)
    with steer(pipe, method):
        assert relative(pipe(**call)[0], expected) < BOUND
    assert counter.frame_count <= 3
    assert relative(pipe(**call)[0], plain) < BOUND


@torch.no_grad()
def test_compiled_blocks_reuse_the_prefix_too() -> None:
    pipe = tiny_pipeline("sd3")
    call = tiny_call("sd3", steps=1)
    model, method = pipe.transformer, SoftPAG(3.0, 0.5, where=Where(layers=[2]))
    with steer(pipe, method):
        expected = pipe(**call)[0]
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    calls: list[int] = []
    for index, block in enumerate(model.transformer_blocks):
        compiled = block._compiled_call_impl

        def counted(*args: Any, index: int = index, compiled: Any = compiled, **kwargs: Any) -> Any:
            calls.append(index)
            return compiled(*args, **kwargs)

        block._compiled_call_impl = counted
    with steer(pipe, method):
        assert relative(pipe(**call)[0], expected) < BOUND
    assert calls == [0, 1, 2, 3, 2, 3]
