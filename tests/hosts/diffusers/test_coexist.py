"""Steering beside accelerate hooks, ControlNet, adapters, feature caches, two experts, and after exceptions."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor

from attnsteer import PAG, SEG, HeadGate, SoftPAG, Where, sites, steer
from attnsteer.errors import NeverFired, SelectionError, UnsupportedHost
from attnsteer.testing import tiny_call, tiny_denoiser, tiny_denoiser_inputs, tiny_pipeline
from tests.hosts.diffusers.common import at, denoiser, paths, relative
from tests.hosts.families import forward, randn

# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize(
    "method",
    [SoftPAG(3.0, 0.5), HeadGate({(0, 0): 0.3}, where=Where(branches="cond")), HeadGate({(0, 0): 0.3})],
    ids=str,
)
def test_a_call_in_another_thread_is_right_or_refused(method: Any) -> None:
    """While a pass runs, which edits act and whose rows these are is said for its thread alone."""
    model = tiny_denoiser("sd")
    calls = [tiny_denoiser_inputs("sd", model, 2, seed=seed) for seed in (0, 1)]
    found: list[Any] = []

    def other() -> None:
        with torch.no_grad(), run.branches("uncond", "cond"):
            try:
                found.append(model(**calls[1])[0])
            except UnsupportedHost as error:
                found.append(str(error))

    def meanwhile(*_: Any) -> None:
        hook.remove()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with torch.no_grad(), steer(model, method) as run, run.branches("uncond", "cond"):
        alone = [model(**call)[0] for call in calls]
        for module in (model.down_blocks[0], model.mid_block, model.up_blocks[-1]):
            hook = module.register_forward_hook(meanwhile)
            assert torch.equal(model(**calls[0])[0], alone[0])
        for out in found:
            if isinstance(out, str):
                assert "two threads call a steered UNet2DConditionModel at once" in out
            else:
                assert torch.equal(out, alone[1])
        assert len(found) == 3
        # Behind each other they may.
        found.clear()
        other()
        assert torch.equal(found[0], alone[1])


# ------------------------------------------------------------------------------------------------ accelerate


def hook(model: torch.nn.Module) -> None:
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True, place_submodules=False))


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("unhook_first", [False, True], ids=["detach_first", "unhook_first"])
@pytest.mark.parametrize("hook_first", [False, True], ids=["steer_first", "hook_first"])
def test_hooks_of_accelerate_in_any_order(name: str, hook_first: bool, unhook_first: bool) -> None:
    pipe = tiny_pipeline(name)
    model, call = denoiser(name, pipe), tiny_call(name, steps=2)
    method = PAG(3.0, where=at(paths(pipe)[2:3]))
    plain = pipe(**call)[0]
    with steer(pipe, method):
        expected = pipe(**call)[0]
    if hook_first:
        hook(model)
        handle = steer(pipe, method)
    else:
        handle = steer(pipe, method)
        hook(model)
    assert torch.equal(pipe(**call)[0], expected)
    if unhook_first:
        remove_hook_from_module(model)
        assert torch.equal(pipe(**call)[0], expected)
        handle.remove()
    else:
        handle.remove()
        assert torch.equal(pipe(**call)[0], plain)
        remove_hook_from_module(model)
    assert torch.equal(pipe(**call)[0], plain)
    assert model.forward.__func__ is type(model).forward
    assert "_old_forward" not in vars(model)


def test_hooks_on_every_module() -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=2)
    with steer(pipe, PAG(3.0)):
        expected = pipe(**call)[0]
    add_hook_to_module(pipe.unet, AlignDevicesHook(execution_device="cpu"))
    for module in pipe.unet.modules():
        if not list(module.children()):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    with steer(pipe, PAG(3.0)):
        assert torch.equal(pipe(**call)[0], expected)


def test_hooks_of_diffusers() -> None:
    """Layerwise casting and other registry hooks replace a module's forward."""
    pipe = tiny_pipeline("sd3")
    call = tiny_call("sd3", steps=2)
    method = PAG(3.0, where=Where(layers=[2]))
    with steer(pipe, method):
        expected = pipe(**call)[0]
    plain = pipe(**call)[0]

    class Twice(ModelHook):
        def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
            return (2 * output[0],)

    seen = []

    class Seen(ModelHook):
        def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
            seen.append(output[0])
            return output

    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)
    registry.register_hook(Twice(), "twice")
    doubled = pipe(**call)[0]
    assert relative(doubled, plain) > 1e-2
    run = steer(pipe, method)
    both = pipe(**call)[0]
    run.remove()
    # the hook is there as before, and takes part in both passes
    assert torch.equal(pipe(**call)[0], doubled)
    assert relative(both, doubled) > 1e-3
    registry.remove_hook("twice")
    with steer(pipe, method):
        assert relative(pipe(**call)[0], expected) < 5e-6
    assert torch.equal(pipe(**call)[0], plain)
    # Hooked while steered, it stands outside, and unhooked after: what it does to the prediction it does to the term.
    run = steer(pipe, method)
    registry.register_hook(Seen(), "seen")
    assert relative(pipe(**call)[0], expected) < 5e-6
    assert seen
    registry.register_hook(Twice(), "twice")
    with pytest.raises(UnsupportedHost, match=r"counts 2\.00 times"):
        pipe(**call)
    run.remove()
    registry.remove_hook("seen")
    assert torch.equal(pipe(**call)[0], doubled)
    registry.remove_hook("twice")
    assert torch.equal(pipe(**call)[0], plain)


# ----------------------------------------------------------------------------- ControlNet, adapters, containers


def residuals(model: torch.nn.Module, batch: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """What a ControlNet would give: one residual for each skip connection and one for the middle."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, args, out: seen.extend(out[1])) for block in model.down_blocks] + [
        model.conv_in.register_forward_hook(lambda _, args, out: seen.insert(0, out))
    ]
    inputs = tiny_denoiser_inputs("sd", model, batch=batch)
    model(**inputs)
    for h in hooks:
        h.remove()
    noise = [randn(*t.shape, seed=i) * 0.3 for i, t in enumerate(seen)]
    return tuple(noise), randn(*seen[-1].shape, seed=99) * 0.3


@pytest.mark.parametrize("part", ["mid_block", "up_blocks.0"])
@torch.no_grad()
def test_controlnet_residuals_of_the_weak_pass_are_the_conditional_rows(part: str) -> None:
    model = tiny_denoiser("sd")
    inputs = tiny_denoiser_inputs("sd", model, batch=4)
    down, mid = residuals(model, 4)
    inputs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    half = {k: v[2:] if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}
    half |= {"down_block_additional_residuals": tuple(t[2:] for t in down)}
    where = at([s.name for s in sites(model) if part in s.name and s.kind == "self"])
    with steer(model, SoftPAG(3.0, 0.7, where=where)) as run, run.branches("uncond", "cond"):
        out = forward(model, inputs)
    with steer(model, SoftPAG(1.0, 0.7, where=where)) as run, run.branches("cond"):
        # one part: e_c + (e_c - e_w)
        term = forward(model, half) - forward_plain(model, half)
    expected = forward_plain(model, inputs) + 3.0 * torch.cat([term, term])
    assert relative(out, expected) < 5e-6
    assert relative(out, forward_plain(model, inputs)) > 1e-2


def forward_plain(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The class's own forward, with inside edits off: what an unsteered model gives."""
    own = vars(model).pop("forward", None)
    try:
        return forward(model, inputs)
    finally:
        if own is not None:
            vars(model)["forward"] = own


@torch.no_grad()
def test_a_t2i_adapter_reaches_both_passes() -> None:
    """The UNet empties the list that it gets, and adds some entries in place to outputs of blocks."""
    model = tiny_denoiser("sdxl")
    inputs = tiny_denoiser_inputs("sdxl", model, batch=2)
    shapes: list[Any] = []
    hooks = [b.register_forward_hook(lambda _, args, out: shapes.append(out[0].shape)) for b in model.down_blocks]
    forward(model, inputs)
    for h in hooks:
        h.remove()
    shapes = [shapes[0], (2, 64, *shapes[1][2:])]
    states = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]

    def given() -> dict[str, Any]:
        return {**inputs, "down_intrablock_additional_residuals": [s.clone() for s in states]}

    where = at([s.name for s in sites(model) if "mid_block" in s.name and s.kind == "self"])
    plain = forward(model, given())
    assert relative(forward(model, inputs), plain) > 1e-2
    cond = {k: v[1:] if isinstance(v, Tensor) and v.ndim else v for k, v in given().items()}
    cond["down_intrablock_additional_residuals"] = [s[1:].clone() for s in states]
    cond["added_cond_kwargs"] = {k: v[1:] for k, v in inputs["added_cond_kwargs"].items()}
    from tests.reference.guidance_loops import Edit, weak_forward

    weak = weak_forward(model, cond, list_of(where), Edit(), (16, 16))
    with steer(model, PAG(2.0, where=where)) as run, run.branches("uncond", "cond"):
        out = forward(model, given())
    expected = plain + 2.0 * (plain[1:] - weak)
    assert relative(out, expected) < 5e-6


def list_of(where: Where) -> list[str]:
    return [m.replace("\\", "") for m in where.modules]


# ------------------------------------------------------------------------------------------------- exceptions


@pytest.mark.parametrize("place", ["denoiser", "site", "scheduler"])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_an_exception_leaves_nothing_behind(name: str, place: str) -> None:
    pipe = tiny_pipeline(name)
    model, call = denoiser(name, pipe), tiny_call(name, steps=3)
    plain = pipe(**call)[0]
    before = {id(o): dict(vars(o)) for o in (pipe, pipe.scheduler, *model.modules())}
    count = [0]

    def fail(*_: Any, **__: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("stop")

    target = {"denoiser": model, "site": sites(pipe)[2].module.to_v, "scheduler": None}[place]
    handle = None if target is None else target.register_forward_hook(fail)
    old = pipe.scheduler.step
    if target is None:
        vars(pipe.scheduler)["step"] = lambda *a, **k: (fail(), old(*a, **k))[1]
    with (
        pytest.raises(RuntimeError, match="stop"),
        steer(pipe, PAG(3.0, where=at(paths(pipe)[1:2])), HeadGate({(0, 0): 0.5})),
    ):
        pipe(**call)
    if handle is None:
        del vars(pipe.scheduler)["step"]
    else:
        handle.remove()
    for owner in (pipe, model, *model.modules()):
        assert set(vars(owner)) <= set(before[id(owner)]) | {"_callback_tensor_inputs"}
    assert "step" not in vars(pipe.scheduler) and "prepare_latents" not in vars(pipe)
    assert "cache_context" not in vars(model) and "forward" not in vars(model)
    for module in model.modules():
        was = before[id(module)]
        assert getattr(module, "processor", None) is was.get("processor", was["_modules"].get("processor"))
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.equal(pipe(**call)[0], plain)


def test_leaving_without_a_call_says_so() -> None:
    with pytest.raises(NeverFired), steer(tiny_pipeline("sd"), PAG(3.0)):
        pass


# ------------------------------------------------------------------------------------------------ compositions


def test_weak_branches_add_up() -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=1)
    methods = [PAG(3.0), SEG(2.0, where=at(paths(pipe, "up_blocks.0"))), SoftPAG(1.5, 0.5, where=at(paths(pipe)[:1]))]
    plain = pipe(**call)[0]
    moves = []
    for method in methods:
        with steer(pipe, method):
            moves.append(pipe(**call)[0] - plain)
    for order in (methods, methods[::-1]):
        with steer(pipe, *order) as run:
            both = pipe(**call)[0]
        assert [i["inside passes"] for i in run.audit.to_dict()["interventions"]] == [1, 1, 1]
        # one DDIM step is linear in the prediction
        assert relative(both, plain + sum(moves)) < 5e-6


def test_a_gate_beside_a_weak_branch_acts_in_both_passes() -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=2)
    gate, method = HeadGate({(3, 0): 0.0}, where=Where(kinds="self")), PAG(3.0)
    module = next(s for s in sites(pipe) if s.layer == 3 and s.kind == "self").module
    with steer(pipe, gate, method) as run:
        both = pipe(**call)[0]
    calls = [r.calls for (i, _), r in run.audit.records.items() if i == 0]
    assert calls == [4]
    # the same gate in the weights: values of head 0 are zero
    with torch.no_grad():
        module.to_v.weight[: module.to_v.out_features // module.heads] = 0
    with steer(pipe, method):
        assert relative(pipe(**call)[0], both) < 5e-6


def test_a_second_steering_of_a_site_is_refused() -> None:
    from attnsteer.errors import CompositionError

    pipe = tiny_pipeline("sd")
    with steer(pipe, PAG(3.0)):
        with pytest.raises(CompositionError, match="one call"):
            steer(pipe, SoftPAG(1.0, 0.5))
        pipe(**tiny_call("sd", steps=1))


def test_a_selection_without_the_conditional_rows_is_refused() -> None:
    with pytest.raises(SelectionError, match="conditional rows"):
        PAG(3.0, where=Where(branches="uncond"))
