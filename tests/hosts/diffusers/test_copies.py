"""Copies of a steered model or pipeline are plain, last longer than the steering, and can be steered; layers leave in any order."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from attnsteer import PAG, AttendAndExcite, HeadGate, SoftPAG, Where, steer
from attnsteer.errors import UnsupportedHost
from attnsteer.testing import tiny_call, tiny_pipeline, tiny_scheduler
from tests.hosts.diffusers.common import at, denoiser, paths, relative


def saved(thing: Any) -> Any:
    """Through `torch.save` and back."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch_save": saved,
}


def ours(model: nn.Module) -> list[str]:
    """The modules whose processor is a steered one: of a class made for it, which says how it is copied."""
    return [n for n, m in model.named_modules() if "__reduce_ex__" in vars(type(getattr(m, "processor", None)))]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_copy_of_a_steered_denoiser_is_plain_and_lasts(name: str, how: str) -> None:
    pipe = tiny_pipeline(name)
    call = tiny_call(name, steps=2)
    part = "unet" if name == "sd" else "transformer"
    method = PAG(3.0, joint="joint_identity", where=at(paths(pipe)[1:2]))
    gate = HeadGate({(0, 0): 0.0})
    plain = pipe(**call)[0]
    with steer(pipe, method, gate):
        expected = pipe(**call)[0]
        model = COPIES[how](denoiser(name, pipe))
        assert not ours(model) and ours(denoiser(name, pipe))
        # The steered one goes on as before.
        assert torch.equal(pipe(**call)[0], expected)
    assert not ours(denoiser(name, pipe))
    setattr(pipe, part, model)
    assert torch.equal(pipe(**call)[0], plain)
    with steer(pipe, method, gate):
        assert torch.equal(pipe(**call)[0], expected)
    assert torch.equal(pipe(**call)[0], plain)
    assert relative(expected, plain) > 1e-3


def test_a_copy_of_a_steered_pipeline_is_plain_and_lasts() -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=2, text=True)
    method = AttendAndExcite(["red"], where=Where(kinds="cross"))
    plain = pipe(**call)[0]
    with steer(pipe, method):
        expected = pipe(**call)[0]
        other = copy.deepcopy(pipe)
        assert torch.equal(other(**call)[0], plain)
        assert torch.equal(pipe(**call)[0], expected)
    assert torch.equal(other(**call)[0], plain)
    with steer(other, method):
        assert torch.equal(other(**call)[0], expected)
    assert torch.equal(other(**call)[0], plain)
    assert not torch.equal(expected, plain)


def test_a_copy_of_an_exchanged_processor_is_the_old_one() -> None:
    """An eager processor is steered in its SDPA form; the copy has the eager one again."""
    from diffusers.models.attention_processor import AttnProcessor

    pipe = tiny_pipeline("sd")
    pipe.unet.set_attn_processor(AttnProcessor())
    with steer(pipe, PAG(3.0)):
        other = copy.deepcopy(pipe.unet)
        pipe(**tiny_call("sd", steps=1))
    assert {type(p) for p in other.attn_processors.values()} == {AttnProcessor}
    other.set_attn_processor(AttnProcessor())


def test_save_pretrained_while_steered(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=1)
    plain = pipe(**call)[0]
    with steer(pipe, PAG(3.0), HeadGate({(0, 0): 0.0})):
        pipe(**call)
        pipe.unet.save_pretrained(tmp_path)
        keys = set(pipe.unet.state_dict())
    assert keys == set(pipe.unet.state_dict())
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(pipe(**call)[0], plain)


@pytest.mark.parametrize("first", [0, 1])
def test_two_steerings_of_one_denoiser_leave_in_any_order(first: int) -> None:
    pipe = tiny_pipeline("sd")
    call = tiny_call("sd", steps=2)
    plain = pipe(**call)[0]
    before = {id(m): dict(vars(m)) for m in (pipe, pipe.scheduler, *pipe.unet.modules())}
    gates = [
        HeadGate({(0, 0): 0.0}, where=Where(kinds="self", steps=0)),
        HeadGate({(2, 0): 0.0}, where=Where(kinds="self", steps=1)),
    ]
    alone = []
    for gate in gates:
        with steer(pipe, gate):
            alone.append(pipe(**call)[0])
    runs = [steer(pipe, gate) for gate in gates]
    both = pipe(**call)[0]
    runs[first].remove()
    assert torch.equal(pipe(**call)[0], alone[1 - first])
    runs[1 - first].remove()
    assert torch.equal(pipe(**call)[0], plain)
    assert not torch.equal(both, alone[0]) and not torch.equal(both, alone[1])
    for module in (pipe, pipe.scheduler, *pipe.unet.modules()):
        assert set(vars(module)) <= set(before[id(module)])
        assert vars(module).get("processor") is before[id(module)].get("processor")


# ------------------------------------------------------------------------------- parts exchanged under a live handle


@pytest.mark.parametrize("first", [False, True], ids=["before_a_run", "after_a_run"])
@pytest.mark.parametrize("part", ["unet", "scheduler", "both"])
@pytest.mark.parametrize("method", ["guidance", "latent"])
def test_an_exchanged_part_is_refused(method: str, part: str, first: bool) -> None:
    pipe, call = tiny_pipeline("sd"), tiny_call("sd", steps=2, text=True)
    other = tiny_pipeline("sd", seed=5)
    run = steer(pipe, PAG(3.0) if method == "guidance" else AttendAndExcite(["red"], where=Where(kinds="cross")))
    old = {"unet": pipe.unet, "scheduler": pipe.scheduler}
    expected: Tensor | None = pipe(**call)[0] if first else None
    if part != "scheduler":
        pipe.unet = other.unet
    if part != "unet":
        pipe.scheduler = tiny_scheduler("euler")
    with pytest.raises(UnsupportedHost, match=rf"\.{'unet' if part == 'both' else part} was exchanged .* Detach first"):
        pipe(**call)
    # Put back, it is steered again.
    pipe.unet, pipe.scheduler = old["unet"], old["scheduler"]
    again = pipe(**call)[0]
    assert expected is None or torch.equal(again, expected)
    run.remove()


def test_a_gate_does_not_care_for_the_scheduler_but_for_its_denoiser() -> None:
    pipe, call = tiny_pipeline("sd"), tiny_call("sd", steps=2)
    gate = HeadGate({(0, 0): 0.0})
    with steer(pipe, gate):
        pipe.scheduler = tiny_scheduler("euler")
        ours = pipe(**call)[0]
        pipe.unet, old = tiny_pipeline("sd", seed=5).unet, pipe.unet
        with pytest.raises(UnsupportedHost, match="unet was exchanged"):
            pipe(**call)
        pipe.unet = old
    assert not torch.equal(pipe(**call)[0], ours)


def test_feature_caches_put_on_by_their_function_are_seen_early_and_late() -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    def cached() -> Any:
        pipe = tiny_pipeline("wan")
        apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=10.0))
        return pipe

    call = tiny_call("wan", steps=3)
    method = SoftPAG(3.0, 0.5, where=Where(layers=[1], kinds="self"))
    plain = cached()(**call)[0]
    pipe = cached()
    with steer(pipe, method) as run:
        early = pipe(**call)[0]
    assert run.audit.to_dict()["interventions"][0]["answered from a cache"] > 0
    assert relative(early, plain) > 1e-3
    # What the passes of the steering remembered is not the pipeline's.
    assert torch.equal(pipe(**call)[0], plain)
    # Under a live handle; before the first call, because diffusers tells hooks that come later no context.
    late = tiny_pipeline("wan")
    with steer(late, method):
        apply_first_block_cache(late.transformer, FirstBlockCacheConfig(threshold=10.0))
        assert torch.equal(late(**call)[0], early)
    assert torch.equal(late(**call)[0], plain)
