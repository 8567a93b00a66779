"""Gradients of the differentiable kernels are those of autograd through the dense reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnsteer import kernels
from attnsteer.kernels import Attention
from tests.kernels.common import Truth, blind, close, edited, problem, truth
from tests.reference import identities

MASKS = ("none", "causal", "left padding", "float -inf", "bool per head")
QUIRKS = {
    "plain": {},
    "soft-capped": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "bias": {"bias": (2, 4)},
    "narrow values": {"dv": 3},
}
NAMES = ("q", "k", "v", "mask", "sinks", "key_bias")


def leaves(att: Attention) -> tuple[Attention, list[Tensor]]:
    """The same problem in which every float input requires a gradient."""
    inputs = {name: getattr(att, name) for name in NAMES}
    inputs = {name: t for name, t in inputs.items() if t is not None and t.is_floating_point()}
    inputs = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    return att.replace(**inputs), list(inputs.values())


def mixed(*tensors: Tensor) -> Tensor:
    """A scalar that depends on every finite entry, each with its own weight."""
    draw = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for t in tensors:
        weight = torch.randn(t.shape, generator=draw, dtype=torch.float64)
        total = total + (torch.where(torch.isfinite(t), t, 0.0) * weight).sum()
    return total


def compare(att: Attention, ours: Callable[[Attention], list[Tensor]], exact: Callable[[Truth, Tensor], list[Tensor]]):
    att, inputs = leaves(att)
    expected = torch.autograd.grad(mixed(*exact(truth(att), att.v)), inputs, allow_unused=True)
    got = torch.autograd.grad(mixed(*ours(att)), inputs, allow_unused=True)
    tol = 1e-9 if att.q.dtype == torch.float64 else 2e-4
    assert any(e is not None and e.any() for e in expected)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            assert torch.isfinite(g).all()
            close(g, torch.where(torch.isfinite(e), e, 0.0), tol)


def cases(test: Callable[..., None]) -> Callable[..., None]:
    test = pytest.mark.parametrize("mask", MASKS)(test)
    return pytest.mark.parametrize("quirk", QUIRKS)(test)


def make(mask: str, quirk: str, dtype: torch.dtype = torch.float64) -> Attention:
    return problem(mask, n=6, m=6, B=2, dtype=dtype, sharp=0.7, **QUIRKS[quirk])


@cases
def test_dense(mask: str, quirk: str) -> None:
    compare(make(mask, quirk), lambda a: [kernels.dense(a)], lambda t, v: [t.A])


@cases
def test_attend_lse(mask: str, quirk: str) -> None:
    compare(make(mask, quirk), lambda a: [*kernels.attend_lse(a)], lambda t, v: [t.out, t.lse])


@cases
def test_attend(mask: str, quirk: str) -> None:
    def seen(out: Tensor, att: Attention) -> list[Tensor]:
        return [out * ~blind(truth(att).z)[..., None]]

    compare(make(mask, quirk), lambda a: seen(kernels.attend(a), a), lambda t, v: [t.out])


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 4)])
@cases
def test_partial(mask: str, quirk: str, shape: tuple[int, int]) -> None:
    keys = torch.rand(*shape, 6) < 0.5

    def ours(att: Attention) -> list[Tensor]:
        lse = kernels.attend_lse(att)[1]
        mass, u = kernels.partial(att, lse, keys)
        return [mass, u, kernels.mass(att, lse, keys)]

    def exact(t: Truth, v: Tensor) -> list[Tensor]:
        mass = identities.mass(t.A, keys)
        return [mass, identities.partial(t.A, v, keys), mass]

    compare(make(mask, quirk), ours, exact)


@pytest.mark.parametrize("norm", [False, True])
@cases
def test_reweight(mask: str, quirk: str, norm: bool) -> None:
    keys, weight, rest = torch.rand(2, 1, 6) < 0.5, 3 * torch.rand(2, 4, 6), 0.5 + torch.rand(2, 1, 6)

    def ours(att: Attention) -> list[Tensor]:
        out, lse = kernels.attend_lse(att)
        return [kernels.reweight(att, out, lse, [(keys, weight, *kernels.partial(att, lse, keys))], rest, norm)]

    compare(make(mask, quirk), ours, lambda t, v: [edited(t, v, [(keys, weight)], rest, norm)])


@cases
def test_statistics(mask: str, quirk: str) -> None:
    weight, index = torch.rand(2, 6), torch.tensor([5, 1])

    def ours(att: Attention) -> list[Tensor]:
        lse = kernels.attend_lse(att)[1]
        rows = kernels.rows(att, lse, index)
        return [kernels.column_mass(att, lse, weight), rows, kernels.entropy(att, lse), att.visible_total(lse)]

    def exact(t: Truth, v: Tensor) -> list[Tensor]:
        column = (t.A * weight[:, None, :, None]).sum(2)
        return [column, t.A[:, :, index], identities.entropy(t.A), t.A.sum(-1)]

    compare(make(mask, quirk), ours, exact)


def test_weights_have_gradients() -> None:
    """A method may compute its weights from the masses: the chain goes through both."""
    keys = (torch.arange(6) < 2)[None, None]

    def ours(att: Attention) -> list[Tensor]:
        out, lse = kernels.attend_lse(att)
        mass, u = kernels.partial(att, lse, keys)
        left = kernels.leftover(att, lse, keys, mass)
        return [kernels.reweight(att, out, lse, [(keys, 0.4, mass, u)], 1 + 0.6 * mass / left.clamp_min(0.1), False)]

    def exact(t: Truth, v: Tensor) -> list[Tensor]:
        mass, left = identities.mass(t.A, keys), identities.mass(t.A, ~keys)
        return [edited(t, v, [(keys, 0.4)], 1 + 0.6 * mass / left.clamp_min(0.1), False)]

    compare(make("causal", "plain"), ours, exact)


@pytest.mark.parametrize("norm", [False, True])
def test_rows_that_take_the_complement(norm: bool) -> None:
    keys = (torch.arange(6) < 2)[None, None]
    att = problem("causal", n=6, m=6, dtype=torch.float64, sharp=0.5)
    att = att.replace(key_bias=torch.where(keys, 12.0, 0.0).double())

    def ours(att: Attention) -> list[Tensor]:
        out, lse = kernels.attend_lse(att)
        mass, u = kernels.partial(att, lse, keys)
        new = kernels.reweight(att, out, lse, [(keys, 0.0, mass, u)], 1.0, norm)
        return [new[:, :, 2:], kernels.leftover(att, lse, keys, mass)]

    def exact(t: Truth, v: Tensor) -> list[Tensor]:
        return [edited(t, v, [(keys, 0.0)], 1.0, norm)[:, :, 2:], identities.mass(t.A, ~keys)]

    compare(att, ours, exact)


def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of batch rows, kv heads and query rows are joined in order."""
    monkeypatch.setattr("attnsteer.kernels.problem.CPU_TILE", 64)
    keys = torch.rand(2, 4, 40) < 0.3
    att = problem("causal", n=40, m=40, dtype=torch.float64)
    assert len(att.tiles()) == 2 * 2 * 3

    def ours(att: Attention) -> list[Tensor]:
        out, lse = kernels.attend_lse(att)
        return [out, lse, *kernels.partial(att, lse, keys), kernels.entropy(att, lse), kernels.column_mass(att, lse)]

    def exact(t: Truth, v: Tensor) -> list[Tensor]:
        groups = [identities.mass(t.A, keys), identities.partial(t.A, v, keys)]
        return [t.out, t.lse, *groups, identities.entropy(t.A), identities.column_mass(t.A)]

    compare(att, ours, exact)


def test_single_precision() -> None:
    def ours(att: Attention) -> list[Tensor]:
        out, lse = kernels.attend_lse(att)
        return [out, lse, kernels.dense(att)]

    compare(make("causal", "plain", torch.float32), ours, lambda t, v: [t.out, t.lse, t.A])
