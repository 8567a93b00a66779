"""Prefix reuse: the weak pass skips the blocks before the first edit, and gives what it would give without."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnsteer.hosts.diffusers.guided_forward as host
from attnsteer import PAG, SEG, HeadGate, SoftPAG, Where, steer
from attnsteer.testing import tiny_denoiser, tiny_denoiser_inputs, tiny_pipeline
from tests.hosts.diffusers.common import BOUND, at, call_of, denoiser, guidance, paths, pipeline, relative
from tests.hosts.families import FAMILIES, forward

# family, part of the edited site's name, blocks that the weak pass must not compute
CASES = [
    ("sd", "mid_block", ["down_blocks.0", "down_blocks.1", "mid_block.resnets.0"]),
    ("sdxl", "mid_block.attentions.0.transformer_blocks.1", ["mid_block.attentions.0.transformer_blocks.0"]),
    (
        "sd",
        "up_blocks.1.attentions.1",
        ["mid_block", "up_blocks.0", "up_blocks.1.resnets.0", "up_blocks.1.attentions.0"],
    ),
    ("sd", "down_blocks.1", ["down_blocks.0", "down_blocks.1.resnets.0"]),
    ("sd3", "transformer_blocks.2", ["transformer_blocks.0", "transformer_blocks.1"]),
    (
        "flux",
        "single_transformer_blocks.1",
        ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"],
    ),
    ("pixart", "blocks.2", ["transformer_blocks.0", "transformer_blocks.1"]),
    ("wan", "blocks.1", ["blocks.0"]),
    ("sana", "blocks.2", ["transformer_blocks.0", "transformer_blocks.1"]),
]


def counted(model: nn.Module, run: Any) -> tuple[Any, Counter[str]]:
    """`run()` and how often the forward of each block's first computing child ran."""
    calls: Counter[str] = Counter()

    def inner(name: str) -> nn.Module:
        """A module without children below `name`: it runs exactly when the block is computed."""
        return next(m for m in model.get_submodule(name).modules() if not list(m.children()))

    def count(name: str) -> Any:
        return lambda *_: calls.update([name])

    names = [n for n, m in model.named_modules() if n and list(m.children())]
    hooks = [inner(name).register_forward_pre_hook(count(name)) for name in names]
    try:
        return run(), calls
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize(("name", "part", "skipped"), CASES)
def test_skipped_blocks_and_the_same_result(
    name: str, part: str, skipped: list[str], cfg: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(name)
    model, call = denoiser(name, pipe), call_of(name, steps=1, **guidance(name, cfg))
    edited = [p for p in paths(pipe) if part in p][-1:]
    method = PAG(3.0, joint="joint_identity", where=at(edited))
    plain, once = counted(model, lambda: pipe(**call)[0])
    with steer(pipe, method):
        reused, calls = counted(model, lambda: pipe(**call)[0])
    with monkeypatch.context() as patch:
        patch.setattr(host, "modules_down_to", lambda *_: [])
        with steer(pipe, method):
            computed, every = counted(model, lambda: pipe(**call)[0])
    for block in skipped:
        assert calls[block] == once[block] > 0, block
        assert every[block] > once[block]
    assert calls[edited[0]] == every[edited[0]] > once[edited[0]]
    # without CFG the rows are the very same; with it they were computed in a larger batch
    assert relative(reused, computed) < BOUND
    assert relative(reused, plain) > 1e-3
    if not cfg:
        assert torch.equal(reused, computed)


@pytest.mark.parametrize("part", ["mid_block", "up_blocks.1.attentions.1"])
@torch.no_grad()
def test_the_same_to_the_last_digits_in_double_precision(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_denoiser("sd").double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny_denoiser_inputs("sd", model).items()}
    method = PAG(3.0, where=Where(modules=f"{part}.*attn1"))
    results = []
    for way in (host.modules_down_to, lambda *_: []):
        monkeypatch.setattr(host, "modules_down_to", way)
        with steer(model, method) as run, run.branches("uncond", "cond"):
            results.append(forward(model, inputs))
    # the embedding of the time step is single precision in every model
    assert relative(*results) < 1e-13


def test_several_edited_layers_reuse_up_to_the_first() -> None:
    pipe = pipeline("sd3")
    call = call_of("sd3", steps=1)
    with steer(pipe, PAG(3.0, where=Where(layers=[1, 3]))):
        _, calls = counted(pipe.transformer, lambda: pipe(**call)[0])
    assert calls["transformer_blocks.0"] == 1
    assert calls["transformer_blocks.1"] == calls["transformer_blocks.2"] == calls["transformer_blocks.3"] == 2


def test_every_weak_branch_has_a_prefix_of_its_own() -> None:
    pipe = pipeline("sd3")
    call = call_of("sd3", steps=1)
    methods = [
        PAG(3.0, where=Where(layers=[1])),
        SEG(2.0, where=Where(layers=[3])),
        SoftPAG(1.0, 0.5, where=Where(layers=[2])),
    ]
    with steer(pipe, *methods):
        _, calls = counted(pipe.transformer, lambda: pipe(**call)[0])
    assert [calls[f"transformer_blocks.{i}"] for i in range(4)] == [1, 2, 3, 4]


@torch.no_grad()
def test_what_changed_in_place_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_denoiser("sd")
    inputs = tiny_denoiser_inputs("sd", model)
    original = type(model.mid_block).forward

    def spoiling(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return original(self, args[0].mul_(0.5), *args[1:], **kwargs)

    def guided() -> Tensor:
        with (
            steer(model, SoftPAG(3.0, 0.5, where=Where(modules="mid_block.*attn1"))) as run,
            run.branches("uncond", "cond"),
        ):
            return forward(model, inputs)

    monkeypatch.setattr(type(model.mid_block), "forward", spoiling)
    ours, calls = counted(model, guided)
    assert calls["down_blocks.0"] == 1 and calls["down_blocks.1"] == 2
    monkeypatch.setattr(host, "modules_down_to", lambda *_: [])
    assert relative(ours, guided()) < BOUND


@torch.no_grad()
def test_a_block_that_runs_twice_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_denoiser("sd")
    inputs = tiny_denoiser_inputs("sd", model)
    block = model.down_blocks[0].resnets[0]
    original = type(model.mid_block).forward

    def again(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        extra = block(torch.ones(len(hidden), 32, 4, 4), args[0] if args else kwargs["temb"])
        return original(self, hidden, *args, **kwargs) + extra.mean()

    def guided() -> Tensor:
        method = SoftPAG(3.0, 0.5, where=Where(modules="mid_block.*attn1"))
        with steer(model, method) as run, run.branches("uncond", "cond"):
            return forward(model, inputs)

    monkeypatch.setattr(type(model.mid_block), "forward", again)
    ours = guided()
    monkeypatch.setattr(host, "modules_down_to", lambda *_: [])
    assert relative(ours, guided()) < BOUND


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_inference_mode_and_gradients(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_denoiser("sd")
    inputs = tiny_denoiser_inputs("sd", model)
    method = SoftPAG(3.0, 0.5, where=Where(modules="mid_block.*attn1"))

    def guided() -> tuple[Tensor, Tensor | None]:
        sample = inputs["sample"].clone().requires_grad_(mode is torch.enable_grad)
        with steer(model, method) as run, run.branches("uncond", "cond"), mode():
            out = model(**{**inputs, "sample": sample}, return_dict=False)[0]
            grad = torch.autograd.grad(out.square().sum(), sample)[0] if mode is torch.enable_grad else None
        return out.detach().clone(), grad

    (ours, grad), calls = counted(model, guided)
    assert calls["down_blocks.0"] == 1
    monkeypatch.setattr(host, "modules_down_to", lambda *_: [])
    expected, wanted = guided()
    assert relative(ours, expected) < BOUND
    if grad is not None:
        assert relative(grad, wanted) < 1e-5


@torch.no_grad()
def test_a_gate_before_the_weak_edit_is_part_of_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline("sd")
    call = call_of("sd", steps=2)
    methods = HeadGate({(0, 0): -1.0}, where=Where(kinds="self", branches="cond")), PAG(3.0)
    with steer(pipe, *methods):
        ours = pipe(**call)[0]
    monkeypatch.setattr(host, "modules_down_to", lambda *_: [])
    with steer(pipe, *methods):
        assert relative(ours, pipe(**call)[0]) < BOUND
    with steer(pipe, PAG(3.0)):
        assert relative(ours, pipe(**call)[0]) > 1e-3


@pytest.mark.parametrize(
    "name", ["hunyuandit", "auraflow", "mochi", "animatediff", "hunyuanvideo", "unet3d", "kandinsky5"]
)
@torch.no_grad()
def test_other_families_give_the_same_with_and_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    from attnsteer import sites

    chosen = [s for s in sites(model) if s.kind in ("self", "joint") and s.modality == "image"]
    method = SoftPAG(1.0, 0.7, where=at([chosen[len(chosen) // 2].name]))

    @functools.wraps(forward)
    def guided() -> Tensor:
        with steer(model, method) as run, run.branches("uncond", "cond"):
            return forward(model, inputs)

    ours = guided()
    assert relative(ours, forward(model, inputs)) > 1e-4
    monkeypatch.setattr(host, "modules_down_to", lambda *_: [])
    assert relative(ours, guided()) < BOUND
