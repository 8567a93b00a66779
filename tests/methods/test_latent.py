"""`LatentLoss`: a user's own loss, what saves time and memory, schedulers, stops, composition, and putting all back."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import PAG, AttendAndExcite, LatentLoss, Where, steer
from attnsteer.errors import NeverFired, NotFinite, SelectionError, UnsupportedHost
from attnsteer.hosts.diffusers.latents import Latents
from attnsteer.maps.words_to_image import Maps
from attnsteer.testing import SCHEDULERS, tiny_denoiser, tiny_pipeline, tiny_scheduler
from attnsteer.testing.fingerprint import fingerprint

from .latent_common import call_of, double, far


@dataclass(frozen=True)
class LookLeft(LatentLoss):
    """The attention to a word moves into the left half of the image."""

    word: str = "cube"

    def loss(self, maps: Maps) -> Tensor:
        A, _ = maps.words([self.word])
        left = A[..., : A.shape[-1] // 2].sum(dim=(-2, -1)) / A.sum(dim=(-2, -1))
        return 1 - left.mean(dim=1)


def losses_of(pipe: Any, method: LatentLoss, call: dict[str, Any]) -> tuple[Tensor, list[list[float]], dict[str, int]]:
    """(final latents, the losses of each gradient pass, counts of the audit)."""
    seen: list[list[float]] = []

    class Watched(type(method)):
        def loss(self, maps: Maps) -> Tensor:
            value = super().loss(maps)
            seen.append(value.detach().tolist())
            return value

    watched = Watched(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})
    with steer(pipe, watched) as run:
        out = pipe(**call)[0]
    return out, seen, run.audit.extra[0]


def test_a_loss_of_ones_own_in_ten_lines_falls() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=2)
    plain = pipe(**call)[0]
    out, seen, counts = losses_of(pipe, LookLeft(step_size=300.0, until=1.0, decay=1.0), call)
    assert counts["latent updates"] == counts["gradient passes"] == 2
    assert far(out, plain) > 1e-3
    out, seen, _ = losses_of(pipe, LookLeft(step_size=100.0, word="ball", updates=6, until=1), call)
    values = [row[0] for row in seen]
    assert len(values) == 6 and values[-1] < values[0] - 0.01


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_early_stop_and_checkpointing_leave_the_gradient_unchanged(name: str) -> None:
    pipe, call = double(name), call_of(name, batch=2, steps=2)
    method = AttendAndExcite([(2, 3)], {0: 0.9}, 1, until=2, compete="all")
    model = getattr(pipe, "unet", None) or pipe.transformer
    last = model.conv_out if hasattr(model, "conv_out") else model.proj_out
    calls = []
    hook = last.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    outs = {}
    for key, options in {
        "both": {},
        "whole": {"early_stop": False},
        "checkpointed": {"early_stop": False, "checkpointing": True},
        "checkpointed and stopped": {"checkpointing": True},
    }.items():
        calls.clear()
        with steer(pipe, method.new(**options)) as run:
            outs[key] = pipe(**call)[0]
        assert sum(calls) == (run.audit.extra[0]["gradient passes"] if not options.get("early_stop", True) else 0)
        assert run.audit.extra[0]["latent updates"] > 0
        # What a checkpointed block that was cut short had set up is gone.
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    hook.remove()
    assert torch.equal(outs["both"], outs["whole"])
    assert far(outs["checkpointed"], outs["whole"]) < 1e-12
    assert far(outs["checkpointed and stopped"], outs["whole"]) < 1e-12
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@pytest.mark.parametrize("name", [*SCHEDULERS, "pndm-prk"])
def test_blind_calls_are_those_whose_latent_the_scheduler_does_not_use(name: str) -> None:
    config = {"skip_prk_steps": False} if name.endswith("prk") else {}
    scheduler = tiny_scheduler(name.split("-")[0], **config)
    scheduler.set_timesteps(4)
    pipe = type("Pipe", (), {"scheduler": scheduler})()
    latents = Latents(pipe)
    g = torch.Generator().manual_seed(0)
    z, blind = torch.randn(1, 4, 4, 4, generator=g, dtype=torch.float64), []
    for t in scheduler.timesteps:
        scheduler.scale_model_input(z, t)
        noise = torch.randn(z.shape, generator=g, dtype=torch.float64)
        outs = []
        for start in (z, z + 1.0):
            # The scheduler as it is, twice.
            once = copy.deepcopy(scheduler)
            drawn = {"generator": torch.Generator().manual_seed(1)} if "ancestral" in name else {}
            outs.append(once.step(noise, t, start, **drawn).prev_sample)
        blind.append(latents.blind)
        # Heun's second half divides by what it multiplied with.
        assert (far(*outs) < 1e-12) == latents.blind
        z = scheduler.step(noise, t, z, **drawn).prev_sample
    assert sum(blind) == {"pndm": 1, "heun": 3, "pndm-prk": 9}.get(name, 0)


def flags(pipe: Any) -> list[Any]:
    """What the attachment and the gradient passes touch."""
    model = pipe.unet
    own = [sorted(vars(thing)) for thing in (pipe, pipe.scheduler, model)]
    return [
        own,
        [p.requires_grad for p in model.parameters()],
        model.is_gradient_checkpointing,
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("broken", [None, "loss", "denoiser"])
def test_everything_is_put_back(broken: str | None) -> None:
    pipe, call = tiny_pipeline("sd"), call_of("sd", text=True, steps=2)
    call["latents"] = call["latents"].float()
    plain, before = pipe(**call)[0], (fingerprint(pipe.unet), flags(pipe))
    next(pipe.unet.parameters()).requires_grad_(False)
    before = (fingerprint(pipe.unet), flags(pipe))

    class Failing(LookLeft):
        def loss(self, maps: Maps) -> Tensor:
            if broken == "loss" and maps.index == 1:
                raise RuntimeError("broken on purpose")
            return super().loss(maps)

    method = Failing(until=1.0, step_size=100.0, checkpointing=True)
    if broken is None:
        with steer(pipe, method):
            assert not torch.equal(pipe(**call)[0], plain)
    else:
        hook = None
        with pytest.raises(RuntimeError, match="on purpose"), steer(pipe, method) as run:
            if broken == "denoiser":
                hook = pipe.unet.mid_block.register_forward_hook(_fail)
            try:
                pipe(**call)
            finally:
                if hook is not None:
                    hook.remove()
                # While it is attached, a failed pass leaves parameters and flags as they were.
                assert flags(pipe)[1:] == before[1][1:] and run.branch is None
    assert (fingerprint(pipe.unet), flags(pipe)) == before
    assert torch.equal(pipe(**call)[0], plain)


def _fail(*_: Any) -> None:
    raise RuntimeError("broken on purpose")


def test_a_loss_that_is_not_finite_names_the_call_and_the_site_and_keeps_the_last_good_latent() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=3)

    class Bad(LookLeft):
        def loss(self, maps: Maps) -> Tensor:
            value = super().loss(maps)
            return value * float("nan") if maps.index == 1 else value

    with (
        pytest.raises(NotFinite, match=r"the loss .*call 1 of 3.*down_blocks\.0.*attn2") as caught,
        steer(pipe, Bad(until=1.0)),
    ):
        pipe(**call)
    assert caught.value.index == 1 and caught.value.latent.shape == (1, 4, 16, 16)
    assert bool(torch.isfinite(caught.value.latent).all())
    pipe, call = tiny_pipeline("sd"), {**call, "latents": call["latents"].float()}
    pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q.weight.data.fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"the map of unet\.down_blocks\.0.*call 0 of 3"), steer(pipe, LookLeft()):
        pipe(**call)


def test_gradients_are_refused_in_inference_mode_before_the_first_step() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=2)
    steps = []
    with torch.inference_mode(), pytest.raises(UnsupportedHost, match="inference_mode"), steer(pipe, LookLeft()):
        pipe(**call, callback_on_step_end=lambda p, i, t, k: steps.append(i) or k)
    assert not steps


def test_targets_without_a_latent_are_refused() -> None:
    with pytest.raises(UnsupportedHost, match="needs latent"):
        steer(tiny_denoiser("sd"), LookLeft())
    pipe = tiny_pipeline("sd")
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(UnsupportedHost, match=r"takes gradients .* compiled"):
        steer(pipe, LookLeft())
    with pytest.raises(SelectionError, match="needs where="):
        steer(tiny_pipeline("pixart"), LookLeft())


def test_losses_of_the_wrong_form_are_refused() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, batch=2, steps=1)
    for bad, message in (
        (lambda maps: maps.text().mean(), r"returned \(\); .* a tensor \[2\]"),
        (lambda maps: maps.text().detach().mean(dim=(1, 2, 3)), "does not depend on the maps"),
        (lambda maps: 1.0, "returned float"),
    ):
        kind = type("Bad", (LookLeft,), {"loss": lambda self, maps, bad=bad: bad(maps)})
        with pytest.raises(SelectionError, match=message), steer(pipe, kind(until=1.0)):
            pipe(**call)
    with pytest.raises(NotImplementedError, match="defines no loss"), steer(pipe, LatentLoss(until=1.0)):
        pipe(**call)


def test_step_size_zero_changes_nothing_and_runs_no_pass() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=2)
    plain = pipe(**call)[0]
    with steer(pipe, AttendAndExcite("cube", step_size=0.0), control=True) as run:
        assert torch.equal(pipe(**call)[0], plain)
    assert "gradient passes" not in run.audit.extra[0]
    with pytest.raises(NeverFired, match="changed nothing"), steer(pipe, AttendAndExcite("cube", step_size=0.0)):
        pipe(**call)


def test_a_relative_step_is_a_fraction_of_the_latent() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, batch=2, steps=1)
    moved = {}

    class Watched(LookLeft):
        def around(self, forward: Any, inputs: Any, run: Any) -> Any:
            before = inputs.loop.latent(inputs, "test")
            out = super().around(forward, inputs, run)
            moved["by"] = (inputs.loop.latent(inputs, "test") - before).flatten(1).norm(dim=1) / before.flatten(1).norm(
                dim=1
            )
            return out

    with steer(pipe, Watched(step_size=0.03, relative=True, until=1.0)):
        pipe(**call)
    assert torch.allclose(moved["by"], torch.full((2,), 0.03, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pipelines(dtype: torch.dtype) -> None:
    """Maps and losses are fp32, the latent keeps the pipeline's dtype; a relative step moves it by what was asked."""
    pipe = tiny_pipeline("sd").to(dtype)
    call = call_of("sd", text=True, steps=2)
    call["latents"], seen = call["latents"].to(dtype), []

    class Watched(LookLeft):
        def loss(self, maps: Maps) -> Tensor:
            value = super().loss(maps)
            seen.append((maps.text().dtype, value.dtype))
            return value

    plain = pipe(**call)[0]
    with steer(pipe, Watched(step_size=0.1, relative=True, until=1.0)):
        out = pipe(**call)[0]
    assert out.dtype == dtype and bool(torch.isfinite(out).all())
    assert far(out, plain) > 0.01 and set(seen) == {(torch.float32, torch.float32)}


def test_a_flat_loss_moves_nothing() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=1)

    class Flat(LookLeft):
        def loss(self, maps: Maps) -> Tensor:
            return super().loss(maps) * 0.0

    plain = pipe(**call)[0]
    for relative in (False, True):
        method = Flat(relative=relative, until=1.0)
        with steer(pipe, method, control=True) as run:
            assert torch.equal(pipe(**call)[0], plain)
        assert run.audit.extra[0]["gradient passes"] and not run.audit.fired(0)
        with pytest.raises(NeverFired, match="changed nothing"), steer(pipe, method):
            pipe(**call)


def test_each_sample_stops_by_itself() -> None:
    """`stop_loss` between the two samples' losses: one moves, the other ends as without the method."""
    pipe, call = double("sd"), call_of("sd", text=True, batch=2, steps=2)
    plain = pipe(**call)[0]
    _, seen, _ = losses_of(pipe, LookLeft(until=1), call)
    low, high = sorted(range(2), key=lambda b: seen[0][b])
    out, _, counts = losses_of(pipe, LookLeft(until=1, stop_loss=sum(seen[0]) / 2), call)
    assert counts["latent updates"] == 1
    assert torch.equal(out[low], plain[low]) and far(out[high], plain[high]) > 1e-4


def test_where_selects_steps_and_heads() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=4)
    with steer(pipe, LookLeft(until=1.0, where=Where(steps=(0.25, 0.75), heads=[1]))) as run:
        pipe(**call)
    assert run.audit.extra[0]["latent updates"] == 2
    assert {r.heads for r in run.audit.records.values()} == {1}


def test_composition_with_a_weak_branch_acts_on_the_moved_latent_in_either_order() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=1)
    method, weak, kept = LookLeft(until=1.0, step_size=300.0), PAG(2.0), {}

    class Kept(LookLeft):
        def around(self, forward: Any, inputs: Any, run: Any) -> Any:
            out = super().around(forward, inputs, run)
            kept["z"] = inputs.loop.latent(inputs, "test").clone()
            return out

    with steer(pipe, Kept(until=1.0, step_size=300.0)):
        pipe(**call)
    with steer(pipe, weak):
        expected = pipe(**{**call, "latents": kept["z"]})[0]
    for order in ((method, weak), (weak, method)):
        with steer(pipe, *order):
            assert far(pipe(**call)[0], expected) < 1e-12


def test_two_losses_follow_each_other() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=1)
    first, second = LookLeft(until=1.0, step_size=200.0), AttendAndExcite("ball", {}, until=1.0)
    outs = []
    for methods in ((first,), (second,), (first, second)):
        with steer(pipe, *methods) as run:
            outs.append(pipe(**call)[0])
    assert [run.audit.extra[i]["latent updates"] for i in (0, 1)] == [1, 1]
    assert far(outs[2], outs[0]) > 1e-3 and far(outs[2], outs[1]) > 1e-3


def test_hyper_parameters_are_checked() -> None:
    for bad in (
        {"step_size": -1.0}, {"updates": 0}, {"decay": 2.0}, {"until": 1.5}, {"size": 1}, {"include": "first"}, {"compete": "some"},
        {"sharpness": 0.0}, {"max_refinements": -1}, {"thresholds": {0: 2.0}}, {"where": Where(rows="text")},
    ):  # fmt: skip
        with pytest.raises(SelectionError, match=next(iter(bad)) if "where" not in bad else "leave out"):
            AttendAndExcite("cube", **bad)
