"""Skip-layer guidance against diffusers' own in the SD3 pipeline, and against hand-written loops for other families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import SLG, SoftPAG, Where, sites, steer
from attnsteer.errors import NeverFired, SelectionError, UnsupportedHost
from attnsteer.hosts.diffusers.bypass import Bypass, blocks_of
from attnsteer.testing import tiny_denoiser, tiny_denoiser_inputs, tiny_pipeline
from tests.hosts.diffusers.common import BOUND, EFFECT, at, call_of, guidance, paths, pipeline, relative
from tests.hosts.diffusers.test_prefix import counted
from tests.hosts.families import forward
from tests.reference import guidance_loops
from tests.reference.guidance_loops import Edit, guided_latents
from tests.reference.skipped_blocks import skipped


@pytest.mark.parametrize(("name", "blocks"), [("sd3", [1]), ("sd35", [1, 2])])
def test_equal_to_diffusers_own(name: str, blocks: list[int]) -> None:
    pipe = pipeline(name)
    call = call_of(name, batch=2, steps=12)
    own = pipe(**call, skip_guidance_layers=blocks)[0]
    plain = pipe(**call)[0]
    with steer(pipe, SLG(where=Where(layers=blocks))) as run:
        ours = pipe(**call)[0]
    # Steps 1 and 2 of 12: strictly inside 0.01 and 0.2 of them.
    assert run.audit.extra[0]["inside passes"] == 2
    assert relative(ours, own) < BOUND
    assert relative(plain, own) > EFFECT
    assert torch.equal(pipe(**call)[0], plain)


@pytest.mark.parametrize("steps", [5, 20, 28, 50])
def test_the_window_is_that_of_diffusers(steps: int) -> None:
    from attnsteer.branches import BranchInputs

    calls = [BranchInputs({}, ("cond",), 1, None, {}, step=i, steps=steps) for i in range(steps)]
    guided = [i for i, call in enumerate(calls) if SLG(where=Where(layers=[1])).guides(call)]
    assert guided == [i for i in range(steps) if i > steps * 0.01 and i < steps * 0.2]
    assert [c.step for c in calls if SLG(1.0, None, 0.5).guides(c)] == [i for i in range(steps) if i < steps * 0.5]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("sd", ["mid_block.attentions.0.transformer_blocks.0"]),
        ("sdxl", ["mid_block.attentions.0.transformer_blocks.1", "up_blocks.0.attentions.0.transformer_blocks.0"]),
        ("flux", ["transformer_blocks.1", "single_transformer_blocks.0"]),
        ("pixart", ["transformer_blocks.1"]),
        ("sana", ["transformer_blocks.0", "transformer_blocks.2"]),
        ("wan", ["blocks.1"]),
        ("sd35", ["transformer_blocks.0"]),
    ],
)
def test_equal_to_a_hand_written_loop(name: str, blocks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own guidance: doubled batches, and one call per branch (Flux with true CFG, Wan)."""
    pipe = pipeline(name)
    call = call_of(name, steps=3, **guidance(name, True))
    monkeypatch.setattr(guidance_loops, "edited", skipped)
    expected = guided_latents(name, pipe, call, blocks, Edit(), lambda i: 3.0 if i > 0 else 0.0)
    plain = pipe(**call)[0]
    inside = [p for p in paths(pipe) if any(p.startswith(f"{b}.") for b in blocks)]
    with steer(pipe, SLG(3.0, 0.0, None, where=at(inside))):
        ours = pipe(**call)[0]
    assert relative(ours, expected) < BOUND
    assert relative(plain, expected) > 1e-3
    assert torch.equal(pipe(**call)[0], plain)


@pytest.mark.parametrize("name", ["sd", "flux", "sana"])
def test_heads_switched_off_are_the_zero_target(name: str) -> None:
    """SoftPAG's zero target is compared with dense maps elsewhere."""
    pipe, where = pipeline(name), Where(layers=[1], heads=(0,), kinds=("self", "joint"))
    call = call_of(name, steps=2)
    with steer(pipe, SoftPAG(2.0, 1.0, target="zero", where=where)):
        expected = pipe(**call)[0]
    with steer(pipe, SLG(2.0, None, None, where=where)):
        ours = pipe(**call)[0]
    assert torch.equal(ours, expected)
    assert relative(pipe(**call)[0], expected) > 1e-4


def test_each_sample_has_its_own_scale() -> None:
    pipe, where = pipeline("sd3"), Where(layers=[2])
    call = call_of("sd3", batch=3, steps=2)
    plain = pipe(**call)[0]
    outs = {}
    for scale in (2.0, 0.5, (2.0, None, 0.5)):
        with steer(pipe, SLG(scale, None, None, where=where)):
            outs[scale] = pipe(**call)[0]
    each = outs[2.0, None, 0.5]
    assert torch.equal(each[1], plain[1])
    assert relative(each[0], outs[2.0][0]) < BOUND and relative(each[2], outs[0.5][2]) < BOUND


def test_blocks_before_are_reused_and_left_out_ones_are_not_computed() -> None:
    pipe = pipeline("sd3")
    call = call_of("sd3", steps=2)
    with steer(pipe, SLG(3.0, 0.0, None, where=Where(layers=[2]))):
        # The first weak pass computes the block, to see what it gives.
        pipe(**call)
        _, calls = counted(pipe.transformer, lambda: pipe(**call)[0])
    assert [calls[f"transformer_blocks.{i}"] for i in range(4)] == [2, 2, 2, 3]


def test_several_weak_branches_add_up() -> None:
    pipe = pipeline("sd3")
    call = call_of("sd3", steps=1)
    methods = [SLG(2.0, None, None, where=Where(layers=[1])), SoftPAG(3.0, 0.5, where=Where(layers=[2]))]
    plain = pipe(**call)[0]
    terms = []
    for method in methods:
        with steer(pipe, method):
            terms.append(pipe(**call)[0] - plain)
    with steer(pipe, *methods):
        both = pipe(**call)[0]
    # One Euler step is linear in the prediction.
    assert relative(both, plain + terms[0] + terms[1]) < BOUND


@torch.no_grad()
def test_residuals_of_a_controlnet_are_added_behind_a_block_that_is_left_out() -> None:
    model = tiny_denoiser("sd3")
    inputs = tiny_denoiser_inputs("sd3", model)
    inputs["block_controlnet_hidden_states"] = [
        torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)
    ]
    strong = forward(model, inputs)
    weak = forward(model, {**inputs, "skip_layers": [1]})
    with steer(model, SLG(3.0, None, None, where=Where(layers=[1]))) as run, run.branches("cond"):
        ours = forward(model, inputs)
    assert relative(ours, strong + 3.0 * (strong - weak)) < BOUND and relative(ours, strong) > EFFECT


@torch.no_grad()
def test_streams_of_equal_shape_are_told_apart_by_diffusers_own_table() -> None:
    model = tiny_denoiser("sd3")
    inputs = tiny_denoiser_inputs("sd3", model)
    inputs["encoder_hidden_states"] = torch.randn(2, 64, inputs["encoder_hidden_states"].shape[-1])
    strong, weak = forward(model, inputs), forward(model, {**inputs, "skip_layers": [2]})
    with steer(model, SLG(3.0, None, None, where=Where(layers=[2]))) as run, run.branches("cond"):
        assert relative(forward(model, inputs), strong + 3.0 * (strong - weak)) < BOUND


def test_a_block_of_unknown_streams_is_refused() -> None:
    class Pair(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Any:
            return b * 2, a * 2

    stack = torch.nn.Module()
    stack.blocks = torch.nn.ModuleList([Pair()])
    bypass = Bypass(stack, blocks_of(["blocks.0.attn"]))
    with pytest.raises(UnsupportedHost, match=r"blocks\.0 \(Pair\).*not known"), bypass.on():
        stack.blocks[0](torch.ones(2, 3), torch.ones(2, 3))
    bypass = Bypass(stack, ["blocks.0"])
    with bypass.on():
        out = stack.blocks[0](torch.zeros(2, 3), torch.ones(2, 4))
    assert [t.shape[1] for t in out] == [4, 3] and bool(out[0].eq(1).all())
    assert "forward" not in vars(stack.blocks[0])
    with pytest.raises(UnsupportedHost, match="no numbered block"):
        blocks_of(["attn"])


def test_compiled_blocks_are_left_out_and_a_whole_model_is_refused() -> None:
    torch._dynamo.reset()
    pipe = tiny_pipeline("flux", num_layers=1)
    call = call_of("flux", steps=2)
    method = SLG(3.0, None, None, where=Where(modules=r"single_transformer_blocks\.0\.attn"))
    with steer(pipe, method):
        expected = pipe(**call)[0]
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with steer(pipe, method):
        assert relative(pipe(**call)[0], expected) < BOUND
    whole = tiny_pipeline("sd3", num_layers=3)
    whole.transformer = torch.compile(whole.transformer, backend="eager")
    with pytest.raises(UnsupportedHost, match="compiled as a whole"):
        steer(whole, SLG(where=Where(layers=[1])))
    torch._dynamo.reset()


def test_what_cannot_be_meant_is_refused() -> None:
    pipe = pipeline("sd3")
    with pytest.raises(SelectionError, match="no choice of blocks carries over"):
        steer(pipe, SLG())
    with pytest.raises(SelectionError, match="9"):
        steer(pipe, SLG.released_code())
    with pytest.raises(SelectionError, match="start < stop"):
        SLG(start=0.5, stop=0.2)
    model = tiny_denoiser("sd3")
    with (
        pytest.raises(UnsupportedHost, match="how many steps"),
        steer(model, SLG(where=Where(layers=[1]))) as run,
        run.branches("uncond", "cond"),
    ):
        forward(model, tiny_denoiser_inputs("sd3", model))
    # Of three steps none lies in the default window.
    with pytest.raises(NeverFired), steer(pipe, SLG(where=Where(layers=[1]))):
        pipe(**call_of("sd3", steps=3))
    assert len({s.layer for s in sites(pipe)}) == 4
