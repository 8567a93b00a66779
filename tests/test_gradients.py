"""Strengths that are tensors: their gradient is that of finite differences, at the neutral value as at every other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import (
    ACT,
    PAG,
    PASTA,
    VAR,
    VHR,
    HeadGate,
    Intervention,
    SoftPAG,
    SpotLight,
    Where,
    ZeroTuning,
    steer,
)
from attnsteer.testing import HOSTS

Make = Callable[[Any], Intervention]
SPANS = [[(1, 3), (4, 5)], [(2, 6)]]
LAYERS = Where(layers=[0, 1])
# Method, its neutral value, others; with the door that the strength goes through.
TEXT: dict[str, tuple[Make, list[float]]] = {
    "ZeroTuning": (lambda v: ZeroTuning(None, v, where=LAYERS), [1.0, 0.4, 6.0]),
    "PASTA": (lambda v: PASTA(SPANS, None, v, where=LAYERS), [1.0, 0.2, 3.0]),
    "PASTA include": (lambda v: PASTA(SPANS, None, v, "include", where=LAYERS), [1.0, 0.2]),
    "PASTA released": (lambda v: PASTA.released_code(SPANS, None, v, where=LAYERS), [1.0, 0.2]),
    "ACT": (lambda v: ACT(None, v, 0.12, where=LAYERS), [0.95, 0.4, 0.05]),
    "SpotLight": (lambda v: SpotLight(SPANS, v, where=LAYERS), [0.3, 0.6]),
    "SpotLight pooled": (lambda v: SpotLight.released_code(SPANS, v, where=LAYERS), [0.6]),
    "HeadGate": (lambda v: HeadGate({(0, 1): v, (1, 0): v}), [1.0, 0.0, -0.5]),
}
IMAGE: dict[str, tuple[Make, list[float]]] = {
    "VAR": (lambda v: VAR((3, 17), 1.6, 0.2, 0.2, v, where=LAYERS), [0.01, 0.6]),
    "VHR": (lambda v: VHR(v, where=LAYERS), [1.0, 1.7, -0.5]),
}
# Where a bound ends at the neutral value, the difference is taken to one side.
BOUNDS = {"ACT": (1.0, -1), "VAR": (0.0, 1), "SpotLight": (0.0, 1), "SoftPAG": (0.0, 1)}
CASES = [
    *((n, make, v, "llama") for n, (make, values) in TEXT.items() for v in values),
    *((n, make, v, "llava") for n, (make, values) in IMAGE.items() for v in values),
    ("ACT", TEXT["ACT"][0], 1.0, "llama"),
    ("VAR", IMAGE["VAR"][0], 0.0, "llava"),
    ("SpotLight", TEXT["SpotLight"][0], 0.0, "llama"),
]


def in_double(model: nn.Module) -> nn.Module:
    """The model in float64 throughout: root mean squares are taken in float32 by the library, too coarse for differences."""

    def norm(module: Any, hidden: Tensor) -> Tensor:
        return module.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(norm, module)
    return model


@pytest.mark.parametrize(("name", "make", "value", "host"), CASES, ids=[f"{n}-{v}-{h}" for n, _, v, h in CASES])
@pytest.mark.parametrize("reference", [False, True], ids=["fast", "explicit map"])
def test_the_gradient_is_that_of_finite_differences(
    name: str, make: Make, value: float, host: str, reference: bool
) -> None:
    case = HOSTS[host]
    model = in_double(case.build())
    inputs = case.inputs(model, 2, None, 3)
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    plain = case.run(model, inputs)
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(strength: Any) -> Tensor:
        with steer(model, make(strength), control=True, reference=reference):
            out = case.run(model, inputs)
        return (out * weight).flatten(1).sum(dim=1)

    one = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    each = torch.full((2,), value, dtype=torch.float64, requires_grad=True)
    (shared,) = torch.autograd.grad(loss(one).sum(), one)
    (own,) = torch.autograd.grad(loss(each).sum(), each)
    neutral, side = BOUNDS.get(name, (None, 0))
    step = 1e-5
    with torch.no_grad():
        if value == neutral:
            # Second order to one side.
            f = [loss(value + side * i * step) for i in range(3)]
            wanted = side * (-3 * f[0] + 4 * f[1] - f[2]) / (2 * step)
        else:
            wanted = (loss(value + step) - loss(value - step)) / (2 * step)
    # Of SpotLight at target 0 every share is above the target, so that the strength has no effect to first order.
    assert bool((wanted.abs() > 1e-4).all()) or (name, value) in {("SpotLight", 0.0)}, wanted
    torch.testing.assert_close(own, wanted, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(shared, wanted.sum(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("make", "value", "side"),
    [
        (lambda v: SoftPAG(2.0, v, where=Where(layers=[1], kinds="self")), 0.0, 1),
        (lambda v: SoftPAG(2.0, v, where=Where(layers=[1], kinds="self")), 0.4, 0),
        (lambda v: SoftPAG(2.0, v, where=Where(layers=[1], kinds="self")), 1.0, -1),
        (lambda v: SoftPAG(v, 0.5, where=Where(layers=[1], kinds="self")), 0.0, 0),
        (lambda v: PAG(v, where=Where(layers=[1], kinds="self")), 3.0, 0),
    ],
    ids=["strength 0", "strength", "strength 1", "scale 0", "scale of PAG"],
)
def test_guidance_has_the_gradient_of_finite_differences(make: Make, value: float, side: int) -> None:
    """Two samples, each with an unconditional and a conditional row."""
    case = HOSTS["sd"]
    model = case.build().double()
    inputs = {k: v.double() if torch.is_floating_point(v) else v for k, v in case.inputs(model, 4, None, 3).items()}
    weight = torch.randn(4, *inputs["sample"].shape[1:], generator=torch.Generator().manual_seed(0)).double()

    def loss(strength: Any) -> Tensor:
        with steer(model, make(strength), control=True) as run, run.branches("uncond", "cond"):
            out = case.run(model, inputs)
        return (out * weight).flatten(1).sum(dim=1).view(2, 2).sum(dim=0)

    one = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    each = torch.full((2,), value, dtype=torch.float64, requires_grad=True)
    (shared,) = torch.autograd.grad(loss(one).sum(), one)
    (own,) = torch.autograd.grad(loss(each).sum(), each)
    step = 1e-5
    with torch.no_grad():
        if side:
            f = [loss(value + side * i * step) for i in range(3)]
            wanted = side * (-3 * f[0] + 4 * f[1] - f[2]) / (2 * step)
        else:
            wanted = (loss(value + step) - loss(value - step)) / (2 * step)
    assert bool((wanted.abs() > 1e-4).all())
    torch.testing.assert_close(own, wanted, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(shared, wanted.sum(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", TEXT)
def test_what_a_call_of_inference_mode_left_is_no_hindrance(name: str) -> None:
    """Tensors that are made once and kept may be wanted for a gradient later."""
    make, values = TEXT[name]
    host = HOSTS["llama"]
    model = host.build()
    inputs = host.inputs(model, 2, None, 0)
    value = make(values[-1])
    found = []
    for before in (False, True):
        with steer(model, value):
            if before:
                with torch.inference_mode():
                    model(**inputs)
            model.zero_grad()
            model(**inputs).logits.square().mean().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 3
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-7)
