"""`reweight` and `leftover` at their limits: nothing to do, nothing left, nearly nothing left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnsteer import kernels
from attnsteer.kernels import Attention, groups
from tests.kernels.common import OUTPUT, close, edited, problem, truth

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def saturated(dtype: torch.dtype = torch.float32, gap: float = 12.0, mask: str = "causal") -> tuple[Attention, Tensor]:
    """A problem whose first two keys take nearly all mass (all but about e^-gap), and the set of these keys."""
    att = problem(mask, n=40, m=40, d=16, dtype=dtype, sharp=0.5)
    bias = torch.where(torch.arange(40) < 2, gap, 0.0)[None, None]
    return att.replace(key_bias=bias), (torch.arange(40) < 2)[None, None]


@FLOATS
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", ["causal", "left padding", "bool per head"])
def test_weights_of_one_change_no_bit(mask: str, sinks: bool, norm: bool, dtype: torch.dtype) -> None:
    att = problem(mask, n=33, m=33, dtype=dtype, sinks=sinks)
    out, lse = kernels.attend_lse(att)
    keys = torch.rand(2, 4, 33) < 0.5
    mass, u = kernels.partial(att, lse, keys)
    for weight, rest in ((1.0, 1.0), (torch.ones(2, 1, 33), torch.ones(2, 4, 1))):
        assert torch.equal(kernels.reweight(att, out, lse, [(keys, weight, mass, u)], rest, norm), out)
    assert torch.equal(kernels.reweight(att, out, lse, [], 1.0, norm), out)


@FLOATS
def test_rows_with_weights_of_one_change_no_bit(dtype: torch.dtype) -> None:
    att = problem("causal", n=33, m=33, dtype=dtype, sinks=True)
    out, lse = kernels.attend_lse(att)
    keys, weight = torch.rand(1, 1, 33) < 0.5, torch.ones(2, 4, 33)
    weight[:, 1:3, 5:20] = 0.0
    new = kernels.reweight(att, out, lse, [(keys, weight, *kernels.partial(att, lse, keys))], 1.0, True)
    assert torch.equal(new[weight == 1], out[weight == 1]) and not torch.equal(new, out)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_weights_broadcast(norm: bool, sinks: bool) -> None:
    att = problem("causal", sinks=sinks)
    out, lse = kernels.attend_lse(att)
    one, two = (torch.arange(12) < 3)[None, None], (torch.arange(12) > 8).expand(2, 4, 12)
    for shape in ((), (1, 1, 12), (2, 1, 1), (1, 4, 1), (2, 4, 12)):
        first, second, rest = (torch.rand(shape) + 0.5 for _ in range(3))
        groups = [(one, first), (two, second)]
        full = [(keys, w, *kernels.partial(att, lse, keys)) for keys, w in groups]
        new = kernels.reweight(att, out, lse, full, rest, norm)
        close(new, edited(truth(att), att.v, groups, rest, norm), 1e-5)


@FLOATS
@pytest.mark.parametrize("gap", [5.0, 12.0, 30.0])
@pytest.mark.parametrize("norm", [False, True])
def test_all_mass_on_removed_keys(norm: bool, gap: float, dtype: torch.dtype) -> None:
    """A knock-out of what holds nearly everything is attention over the others, exact though they hold e^-30."""
    att, keys = saturated(dtype, gap)
    out, lse = kernels.attend_lse(att)
    mass, u = kernels.partial(att, lse, keys)
    new = kernels.reweight(att, out, lse, [(keys, 0.0, mass, u)], 1.0, norm)
    t = truth(att)
    assert t.A[:, :, 5:, :2].sum(-1).min() > 0.6
    close(new[:, :, :2], out[:, :, :2] if norm else torch.zeros(()), 1e-6 if norm else 1e-5)
    if norm:
        others = att.replace(key_bias=None, mask=torch.ones(40, 40, dtype=torch.bool).tril() & ~keys[0], causal=False)
        close(new[:, :, 2:], truth(others).out[:, :, 2:], 2 * OUTPUT[dtype])
    else:
        expected = edited(t, att.v, [(keys, 0.0)], 1.0, False)
        close(new, expected, 2 * OUTPUT[dtype])


@FLOATS
@pytest.mark.parametrize("gap", [2.0, 6.0, 12.0, 30.0])
def test_freed_mass_goes_to_the_rest(gap: float, dtype: torch.dtype) -> None:
    """ACT and VAR: what the set gives up is shared by the others, whose weight is then large; sums stay one."""
    att, keys = saturated(dtype, gap)
    out, lse = kernels.attend_lse(att)
    mass, u = kernels.partial(att, lse, keys)
    left = kernels.leftover(att, lse, keys, mass)
    rest = torch.where(left > 0, 1 + 0.6 * mass / left, 1.0)
    weight = torch.where(left > 0, 0.4, 1.0)
    assert rest.max() > 10
    new = kernels.reweight(att, out, lse, [(keys, weight, mass, u)], rest, False)
    A = truth(att).A
    moved = torch.where(keys[:, :, None], 0.4 * A, A)
    beyond = torch.where(keys[:, :, None], torch.zeros_like(A), A)
    total = beyond.sum(-1, keepdim=True)
    moved = torch.where(total > 0, moved + 0.6 * (1 - total) * beyond / total.clamp_min(1e-300), A)
    close(moved.sum(-1), torch.ones(()), 1e-12)
    close(new, moved @ att.expanded_values().double(), 4 * OUTPUT[dtype])


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", ["causal", "left padding", "left padding, causal flag", "float min", "stack", "none"])
def test_leftover_keeps_its_digits(mask: str, sinks: bool, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call for many heads, and head by head in pieces as in long calls."""
    if not short:
        monkeypatch.setattr(groups, "SHORT", 0)
        monkeypatch.setattr(groups, "SOME_ROWS", 7)
    att, keys = saturated(gap=14.0, mask=mask)
    att = att.replace(sinks=torch.randn(4) if sinks else None, softcap=40.0 if short is sinks else None)
    lse = kernels.attend_lse(att)[1]
    left = kernels.leftover(att, lse, keys, kernels.mass(att, lse, keys)).double()
    exact = (truth(att).A * ~keys[:, :, None]).sum(-1)
    small = (exact > 0) & (exact < 1e-2)
    assert small.sum() > 50
    close(left[small] / exact[small], torch.ones(()), 1e-5)
    assert (left[exact == 0] == 0).all()


def test_weight_zero_everywhere() -> None:
    att = problem("causal")
    out, lse = kernels.attend_lse(att)
    keys = (torch.arange(12) < 3)[None, None]
    group = [(keys, 0.0, *kernels.partial(att, lse, keys))]
    assert not kernels.reweight(att, out, lse, group, 0.0, False).any()
    assert torch.equal(kernels.reweight(att, out, lse, group, 0.0, True), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_renormalising_keeps_the_learned_sink(dtype: torch.dtype) -> None:
    """Renormalised weights are log weights added to the scores, where a learned sink keeps its own."""
    att = problem("causal", sinks=True, dtype=dtype)
    out, lse = kernels.attend_lse(att)
    keys = (torch.arange(12) % 3 == 0)[None, None]
    for weight, rest in ((0.1, 1.0), (5.0, 1.0), (1.0, 0.3)):
        new = kernels.reweight(att, out, lse, [(keys, weight, *kernels.partial(att, lse, keys))], rest, True)
        biased = att.replace(key_bias=torch.where(keys, torch.tensor(weight), torch.tensor(rest)).log())
        close(new, truth(biased).out, 4 * OUTPUT[dtype])


def test_a_learned_sink_may_be_all_that_is_left() -> None:
    att = problem("causal", sinks=True)
    att = att.replace(sinks=att.sinks - 18.0)
    out, lse = kernels.attend_lse(att)
    keys = torch.ones(1, 1, 12, dtype=torch.bool)
    new = kernels.reweight(att, out, lse, [(keys, 0.0, *kernels.partial(att, lse, keys))], 1.0, True)
    assert not new.any()


def test_nothing_is_written_to() -> None:
    att, keys = saturated()
    out, lse = kernels.attend_lse(att)
    mass, u = kernels.partial(att, lse, keys)
    before = [t.clone() for t in (out, lse, mass, u, att.q, att.k, att.v)]
    kernels.reweight(att, out, lse, [(keys, 0.0, mass, u)], 1.0, True)
    kernels.leftover(att, lse, keys, mass)
    kernels.column_mass(att, lse)
    for a, b in zip(before, (out, lse, mass, u, att.q, att.k, att.v), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_complement_of_many_heads_at_once_is_that_of_each(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: bool
) -> None:
    """Short problems take one kernel call for all (batch row, head) pairs, long ones a call for each."""
    B, H, n = 3, 4, 12
    q, k, v = (torch.randn(B, h, n, 8, dtype=dtype) for h in (H, 2, 2))
    mask = torch.ones(n, n, dtype=torch.bool).tril().expand(B, 1, n, n).clone() if masked else None
    if masked:
        mask[1, :, :, :3] = False
    att = Attention(q, k, v, 0.3, mask=mask, causal=not masked, key_bias=torch.randn(1, H, n))
    lse = kernels.attend_lse(att)[1]
    keys, wanted = torch.rand(B, H, n) < 0.3, torch.rand(B, H, n) < 0.4
    # Rows that see no key are never asked for.
    wanted[0, 1], wanted[1, :, :3] = False, False

    def found() -> tuple[torch.Tensor, torch.Tensor]:
        out, mass = torch.full((B, H, n, 8), -7.0), torch.full((B, H, n), -7.0)
        for b, h, at, o, m in groups.complement(att, lse, keys, wanted):
            out[b, h, at], mass[b, h, at] = o.float(), m
        return out, mass

    many = found()
    monkeypatch.setattr(groups, "SHORT", 0)
    for ours, each in zip(many, found(), strict=True):
        assert torch.equal(ours == -7.0, each == -7.0) and bool((ours != -7.0).any())
        torch.testing.assert_close(ours, each, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)
