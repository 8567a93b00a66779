"""The identities of `specs/llm.md` 0.4 (LF1 to LF9) and `specs/lvlm.md` 0.4 (VF1 to VF10), on the library's kernels.

Each test computes the identity's right-hand side with the kernels and its left-hand side on the dense map in fp64.
VF1 to VF4 are LF1 to LF3 without renormalisation, and VF9 is LF6.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from attnsteer import kernels
from attnsteer.kernels import Attention
from tests.kernels.common import OUTPUT, REWEIGHTED, STATISTIC, close, edited, problem, truth
from tests.reference import dense as reference
from tests.reference import identities

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SIZES = {"B": 2, "H": 6, "Hkv": 3, "n": 64, "m": 64, "d": 32}


def spans(m: int, *edges: int) -> list[Tensor]:
    """The key sets between consecutive edges, [1, 1, m]."""
    j = torch.arange(m)
    return [((j >= a) & (j < b))[None, None] for a, b in zip((0, *edges), (*edges, m), strict=True)]


def slice_of(att: Attention, start: int, stop: int) -> Attention:
    """The same rows against the keys start..stop; causality as a mask."""
    n, m = att.shape[2:]
    see = torch.ones(n, m, dtype=torch.bool).tril() if att.causal else torch.ones(n, m, dtype=torch.bool)
    bias = None if att.key_bias is None else att.key_bias[..., start:stop]
    return att.replace(
        k=att.k[:, :, start:stop], v=att.v[:, :, start:stop], mask=see[:, start:stop], causal=False, key_bias=bias
    )


def swapped(att: Attention, lse: Tensor) -> Attention:
    """LF6: the problem whose row log-sum-exp is the log of the column mass, in reverse order."""
    B, H, n, _ = att.shape
    k = torch.cat([att.k.repeat_interleave(att.groups, 1).float(), torch.ones(B, H, n, 1)], -1)
    q = torch.cat([att.scale * att.q.float(), -lse[..., None]], -1)
    return Attention(k.flip(2), q.flip(2), q.flip(2), 1.0, causal=True)


@FLOATS
def test_lf1_small_set(dtype: torch.dtype) -> None:
    att = problem("causal", **SIZES, dtype=dtype)
    A = truth(att).A
    keys = torch.rand(2, 6, 64) < 0.2
    mass, u = kernels.partial(att, kernels.attend_lse(att)[1], keys)
    close(mass, identities.mass(A, keys), STATISTIC[dtype])
    close(u, identities.partial(A, att.v, keys), STATISTIC[dtype])


@FLOATS
def test_lf1_large_span_by_a_second_call(dtype: torch.dtype) -> None:
    """Also VF2: the second call's output is normalised inside the set."""
    att = problem("causal", **SIZES, dtype=dtype)
    A, lse = truth(att).A, kernels.attend_lse(att)[1]
    out, part = kernels.attend_lse(slice_of(att, 8, 40))
    keys = spans(64, 8, 40)[1]
    close(torch.exp(part - lse), identities.mass(A, keys), STATISTIC[dtype])
    close(torch.exp(part - lse)[..., None] * out, identities.partial(A, att.v, keys), OUTPUT[dtype])


@FLOATS
def test_masses_of_a_partition_sum_to_one(dtype: torch.dtype) -> None:
    """Catches a base-2, padded or unmasked log-sum-exp."""
    for mask in ("causal", "left padding", "right padding, float min", "window"):
        att = problem(mask, **SIZES, dtype=dtype)
        lse = kernels.attend_lse(att)[1]
        total = sum(kernels.mass(att, lse, keys) for keys in spans(64, 1, 10, 50))
        close(total, att.visible_total(lse), STATISTIC[dtype])


@FLOATS
@pytest.mark.parametrize("norm", [False, True])
def test_lf2_two_groups(norm: bool, dtype: torch.dtype) -> None:
    """Also VF3; the weight varies per batch row, head and query row."""
    att = problem("causal", **SIZES, dtype=dtype)
    out, lse = kernels.attend_lse(att)
    keys, w = spans(64, 4, 20)[1], 0.5 + 2 * torch.rand(2, 6, 64)
    mass, u = kernels.partial(att, lse, keys)
    by_hand = out + (w - 1)[..., None] * u
    if norm:
        by_hand = by_hand / (1 + (w - 1) * mass)[..., None]
    expected = edited(truth(att), att.v, [(keys, w)], 1.0, norm)
    close(by_hand, expected, 3 * OUTPUT[dtype])
    close(kernels.reweight(att, out, lse, [(keys, w, mass, u)], 1.0, norm), expected, 3 * OUTPUT[dtype])


@FLOATS
@pytest.mark.parametrize("norm", [False, True])
def test_lf3_many_groups(norm: bool, dtype: torch.dtype) -> None:
    """Also VF4: a weighted merge over a partition, by separate calls and by `reweight`."""
    att = problem("causal", **SIZES, dtype=dtype)
    t, (out, lse) = truth(att), kernels.attend_lse(att)
    edges, parts = (0, 5, 30, 64), spans(64, 5, 30)
    weights = [0.2 + 2 * torch.rand(2, 6, 64) for _ in parts]
    expected = edited(t, att.v, list(zip(parts, weights, strict=True)), 1.0, norm)
    groups = [(keys, w, *kernels.partial(att, lse, keys)) for keys, w in zip(parts[1:], weights[1:], strict=True)]
    close(kernels.reweight(att, out, lse, groups, weights[0], norm), expected, 3 * OUTPUT[dtype])
    calls = [kernels.attend_lse(slice_of(att, a, b)) for a, b in itertools.pairwise(edges)]
    shares = [w * torch.exp(l - lse) for w, (_, l) in zip(weights, calls, strict=True)]
    merged = sum(s[..., None] * o for s, (o, _) in zip(shares, calls, strict=True))
    close(merged / sum(shares)[..., None] if norm else merged, expected, 3 * OUTPUT[dtype])


@FLOATS
@pytest.mark.parametrize("bias", [(1, 1), (2, 1), (1, 6), (2, 6)])
@pytest.mark.parametrize("mask", ["none", "causal", "left padding"])
def test_lf4_key_bias_as_lanes(mask: str, bias: tuple[int, int], dtype: torch.dtype) -> None:
    att = problem(mask, **SIZES, dtype=dtype, bias=bias)
    t = truth(att)
    out, lse = kernels.attend_lse(att)
    close(lse, t.lse, STATISTIC[dtype])
    close(out, t.out, OUTPUT[dtype])
    close(kernels.attend(att).masked_fill(torch.isneginf(t.lse)[..., None], 0.0), t.out, OUTPUT[dtype])


@FLOATS
@pytest.mark.parametrize("d", [8, 12, 40, 64, 72, 80, 96, 128])
def test_lf4_weight_ratio(d: int, dtype: torch.dtype) -> None:
    """With log(0.01) on every key the log-sum-exp moves by just that: the ratio of weights, off by less than 0.1 %."""
    att = problem(n=8, m=40, d=d, dtype=dtype, sharp=0.5)
    for alpha in (0.01, 0.3, 7.0):
        biased = att.replace(key_bias=torch.full((1, 1, 40), math.log(alpha)))
        ratio = torch.exp((kernels.attend_lse(biased)[1] - kernels.attend_lse(att)[1]).double()) / alpha
        close(ratio, torch.ones_like(ratio), 1e-5 if dtype == torch.float32 else 1e-4)


@FLOATS
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_lf5_value_side_trick(mask: str, dtype: torch.dtype) -> None:
    att = problem(mask, **SIZES, dtype=dtype, bias=(1, 6))
    att = att.replace(key_bias=att.key_bias.clamp(-2, 2))
    v = att.expanded_values().float()
    v = torch.exp(att.key_bias)[..., None] * torch.cat([v, torch.ones_like(v[..., :1])], -1)
    # The blockwise pass takes values of any width; in fp32, as e^b has no place in half precision.
    wide = att.replace(q=att.q.float(), k=att.k.repeat_interleave(2, 1).float(), v=v, key_bias=None)
    out = kernels.attend_lse(wide)[0]
    close(out[..., :-1] / out[..., -1:], kernels.attend(att), OUTPUT[dtype])
    close(out[..., :-1] / out[..., -1:], truth(att).out, OUTPUT[torch.float32])


@FLOATS
@pytest.mark.parametrize("mask", ["causal", "right padding", "left padding", "window"])
def test_lf6_column_mass(mask: str, dtype: torch.dtype) -> None:
    att = problem(mask, **SIZES, dtype=dtype)
    t, lse = truth(att), kernels.attend_lse(att)[1]
    valid = torch.arange(64) < torch.tensor([[64], [50]])
    close(kernels.column_mass(att, lse), identities.column_mass(t.A), STATISTIC[dtype])
    close(kernels.column_mass(att, lse, valid), identities.column_mass(t.A, valid), STATISTIC[dtype])
    weight = torch.rand(1, 64)
    close(kernels.column_mass(att, lse, weight), (t.A * weight[:, None, :, None]).sum(2), STATISTIC[dtype])


def test_lf6_by_swapped_roles() -> None:
    """Also VF9: a second fused pass on reversed sequences agrees with the blockwise reduction."""
    att = problem("causal", **SIZES)
    lse = kernels.attend_lse(att)[1]
    column = kernels.column_mass(att, lse)
    close(torch.exp(kernels.attend_lse(swapped(att, lse))[1]).flip(2), column, STATISTIC[torch.float32])


def test_lf7_head_gate_folds_into_the_projection() -> None:
    att = problem("causal", **SIZES)
    out, gates = kernels.attend(att), torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0, 0.1])
    project = torch.randn(6 * 32, 20)
    hooked = (out * gates[:, None, None]).transpose(1, 2).flatten(2) @ project
    folded = out.transpose(1, 2).flatten(2) @ (project * gates.repeat_interleave(32)[:, None])
    close(hooked, folded, 1e-5)


@FLOATS
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_lf8_merge_of_key_blocks(mask: str, dtype: torch.dtype) -> None:
    att = problem(mask, **SIZES, dtype=dtype)
    t = truth(att)
    parts = [kernels.attend_lse(slice_of(att, a, b)) for a, b in ((0, 20), (20, 21), (21, 64))]
    out, lse = kernels.merge(parts)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(lse, t.lse, STATISTIC[dtype])
    close(out, t.out, 2 * OUTPUT[dtype])


def test_lf8_merge_of_blocks_that_no_row_sees() -> None:
    att = problem("none", n=5, m=6)
    dark = att.replace(mask=torch.zeros(5, 6, dtype=torch.bool))
    out, lse = kernels.merge([kernels.attend_lse(att), kernels.attend_lse(dark)])
    close(out, kernels.attend_lse(att)[0], 1e-6)
    out, lse = kernels.merge([kernels.attend_lse(dark), kernels.attend_lse(dark)])
    assert (out == 0).all() and torch.isneginf(lse).all()


def test_lf9_mask_variable_gradient() -> None:
    """dL/dxi_h is the sum of <o, dL/do>, so only the outputs of a differentiable kernel are needed."""
    att = problem("causal", **SIZES)
    att = att.replace(**{name: getattr(att, name).requires_grad_() for name in "qkv"})
    out = kernels.attend_lse(att)[0]
    xi = torch.ones(6, requires_grad=True)
    project = torch.randn(6 * 32, 7)
    loss = torch.tanh((xi[:, None, None] * out).transpose(1, 2).flatten(2) @ project * 0.1).square().sum()
    by_outputs, by_mask = torch.autograd.grad(loss, (out, xi))
    close((out * by_outputs).sum(dim=(0, 2, 3)), by_mask, 1e-5)


def test_vf5_constant_bias_by_merging() -> None:
    att = problem("causal", **SIZES)
    bias = (0.7, -1.5, 2.0)
    parts = []
    for b, (start, stop) in zip(bias, ((0, 5), (5, 30), (30, 64)), strict=True):
        out, lse = kernels.attend_lse(slice_of(att, start, stop))
        parts.append((out, lse + b))
    keyed = att.replace(key_bias=torch.tensor(bias).repeat_interleave(torch.tensor([5, 25, 34]))[None, None])
    t = truth(keyed)
    for merged, exact in ((kernels.merge(parts), t), (kernels.attend_lse(keyed), t)):
        close(merged[0], exact.out, OUTPUT[torch.float32])
        close(merged[1], exact.lse, STATISTIC[torch.float32])


def test_vf6_nonlinear_edit_of_few_rows() -> None:
    """PAINT's l + a |l| on image keys of the last row: explicit there, merged with the fused complement."""
    att = problem(n=1, m=64, B=2, H=6, Hkv=3, d=32)
    z = truth(att).z
    image = slice(8, 40)
    z[..., image] += 0.5 * z[..., image].abs()
    expected = reference.dense_out(reference.dense_map(z), att.v)
    l = att.scores(slice(0, 1), image)
    l = l + 0.5 * l.abs()
    block = (reference.dense_out(l.softmax(-1), att.v[:, :, image]).float(), l.logsumexp(-1))
    others = [kernels.attend_lse(slice_of(att, 0, 8)), kernels.attend_lse(slice_of(att, 40, 64))]
    close(kernels.merge([block, *others])[0], expected, OUTPUT[torch.float32])


def test_vf7_knock_out() -> None:
    att = problem("causal", **SIZES)
    out, lse = kernels.attend_lse(att)
    keys = spans(64, 8, 40)[1]
    mass, u = kernels.partial(att, lse, keys)
    new = kernels.reweight(att, out, lse, [(keys, 0.0, mass, u)], 1.0, True)
    kept = att.replace(key_bias=torch.zeros(1, 1, 64).masked_fill(keys, -torch.inf))
    close(new, kernels.attend_lse(kept)[0], REWEIGHTED[torch.float32])
    close(new, truth(kept).out, REWEIGHTED[torch.float32])


def test_vf8_entropy_inside_a_set() -> None:
    """A call on the slice with V := K gives the mean key, and with it the entropy."""
    att = problem("causal", **SIZES)
    A = truth(att).A
    part = slice_of(att, 0, 12)
    out, lse = kernels.attend_lse(part.replace(v=part.k))
    by_mean_key = lse - att.scale * (att.q * out).sum(-1)
    inside = A[..., :12] / A[..., :12].sum(-1, keepdim=True)
    close(by_mean_key, identities.entropy(inside), 1e-5)
    close(kernels.entropy(part, lse), identities.entropy(inside), STATISTIC[torch.float32])


@FLOATS
def test_vf8_entropy_of_the_row(dtype: torch.dtype) -> None:
    for mask in ("causal", "left padding", "window"):
        att = problem(mask, **SIZES, dtype=dtype)
        close(kernels.entropy(att, kernels.attend_lse(att)[1]), identities.entropy(truth(att).A), STATISTIC[dtype])


def test_entropy_of_saturated_rows_is_finite() -> None:
    att = problem("causal", **SIZES, sharp=40.0)
    close(kernels.entropy(att, kernels.attend_lse(att)[1]), identities.entropy(truth(att).A), 2e-4)


def test_vf10_one_head_for_all() -> None:
    att = problem("causal", **SIZES)
    A = truth(att).A
    broadcast = att.replace(q=att.q[:, 3:4].expand(-1, 6, -1, -1), k=att.k[:, 1:2].expand(-1, 3, -1, -1))
    expected = reference.dense_out(A[:, 3:4].expand(-1, 6, -1, -1), att.v)
    close(kernels.attend(broadcast), expected, OUTPUT[torch.float32])
    close(kernels.attend_lse(broadcast)[0], expected, OUTPUT[torch.float32])


@pytest.mark.parametrize("sinks", [False, True])
def test_the_entropy_does_not_hang_on_the_last_digits_of_the_lse(sinks: bool) -> None:
    """A row of many keys would magnify them; also of a map whose keys were given weights."""
    att = problem("none", B=2, H=4, Hkv=2, n=64, m=256, d=16, dtype=torch.float32)
    att = att.replace(q=0.3 * att.q, sinks=torch.randn(4) if sinks else None)
    lse = kernels.attend_lse(att)[1]
    A = kernels.dense(att.replace(q=att.q.double(), k=att.k.double(), v=att.v.double()))
    half = (torch.arange(256) < 128)[None, None]
    factors = torch.tensor(1.5).expand(lse.shape), torch.tensor(0.5).expand(lse.shape)
    for cells, rest, own in (((), None, A), ([(half, factors[0])], factors[1], torch.where(half, 1.5, 0.5) * A)):
        truth = torch.special.entr(own).sum(-1)
        assert float((kernels.entropy(att, lse, cells, rest) - truth).abs().max()) < 2e-6
        # A learned sink's share is read from the lse, too.
        if not sinks:
            assert float((kernels.entropy(att, lse + 2e-5, cells, rest) - truth).abs().max()) < 4e-6
