"""Every kernel under every form of mask, dtype and model quirk, against the dense map in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnsteer import kernels
from attnsteer.kernels import Attention
from tests.kernels.common import MASKS, OUTPUT, STATISTIC, check, close, problem, truth
from tests.reference import identities

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUIRKS = {
    "plain": {},
    "soft-capped": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "bias": {"bias": (2, 1)},
    "bias per head": {"bias": (1, 4)},
    "narrow values": {"dv": 4},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, dtype: torch.dtype) -> None:
    check(problem(mask, n=17, m=17, dtype=dtype))


@pytest.mark.parametrize("quirk", QUIRKS)
@pytest.mark.parametrize("mask", ["none", "causal", "left padding", "float min", "stack"])
def test_quirks(mask: str, quirk: str) -> None:
    check(problem(mask, **QUIRKS[quirk]))


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 2), (4, 1), (8, 2)])
@pytest.mark.parametrize("mask", ["causal", "bool per head", "right padding"])
def test_grouped_queries(mask: str, heads: tuple[int, int]) -> None:
    check(problem(mask, H=heads[0], Hkv=heads[1], bias=(1, heads[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "keys", "float min"])
def test_one_row_over_a_cache(mask: str, dtype: torch.dtype) -> None:
    check(problem(mask, n=1, m=1500, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["chunk", "window", "left padding"])
def test_chunk_over_a_cache(mask: str, dtype: torch.dtype) -> None:
    check(problem(mask, n=7, m=40, dtype=dtype))


@pytest.mark.parametrize("quirk", ["plain", "sinks", "bias per head"])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (1, 1)])
def test_causal_flag_is_upper_left(shape: tuple[int, int], quirk: str) -> None:
    check(problem("causal", n=shape[0], m=shape[1], **QUIRKS[quirk]))


@pytest.mark.parametrize("quirk", ["plain", "soft-capped", "sinks", "bias per head"])
@pytest.mark.parametrize("mask", ["none", "causal", "left padding, causal flag", "bool", "float min"])
def test_large_spans_take_the_fused_path(mask: str, quirk: str) -> None:
    att = problem(mask, B=1, n=320, m=320, **QUIRKS[quirk])
    lse = kernels.attend_lse(att)[1]
    keys = ((torch.arange(320) >= 30) & (torch.arange(320) < 300))[None, None]
    assert kernels.index_keys(keys).span == (30, 300)
    gathered = kernels.groups._gathered(att, lse, kernels.index_keys(keys), True)
    for fused, slow in zip(kernels.partial(att, lse, keys), gathered, strict=True):
        close(fused, slow, STATISTIC[torch.float32])
    check(att)


@pytest.mark.parametrize("quirk", ["plain", "soft-capped", "sinks", "bias per head"])
@pytest.mark.parametrize("mask", ["none", "causal", "left padding, causal flag", "bool", "float min"])
def test_large_spans_with_holes(mask: str, quirk: str) -> None:
    """Another span with other holes in each batch row; some rows see hardly anything but holes."""
    keys = torch.zeros(2, 1, 320, dtype=torch.bool)
    keys[0, 0, 30:300], keys[1, 0, 2:305] = True, True
    holes = [[30, 31, 77], [2, 100, 101, 102, 301]]
    for b, at in enumerate(holes):
        keys[b, 0, at] = False
    keys[0, 0, 30] = True
    index = kernels.index_keys(keys)
    assert [(start, stop, holes.size) for start, stop, holes in index.runs] == [(30, 300, 2), (3, 305, 4)]
    for dtype in (torch.float64, torch.float32):
        att = problem(mask, B=2, n=320, m=320, sharp=1.0, dtype=dtype, **QUIRKS[quirk])
        for b, at in enumerate(holes):
            att.k[b, :, at] *= 3.0
        lse, A = kernels.attend_lse(att)[1], truth(att).A
        found = kernels.partial(att, lse, keys)
        # The span and its holes are each within the limit, their difference within twice as much.
        for fused, true in zip(found, (identities.mass(A, keys), identities.partial(A, att.v, keys)), strict=True):
            close(fused, true, 2 * STATISTIC[dtype])
        assert torch.equal(kernels.mass(att, lse, keys), found[0])


def test_a_set_with_many_holes_is_gathered() -> None:
    keys = torch.ones(1, 1, 600, dtype=torch.bool)
    keys[..., 5:400:4] = False
    assert kernels.index_keys(keys).runs is None
    keys[..., 5:400] = True
    assert kernels.index_keys(keys).runs == ((0, 600, None),)


@pytest.mark.parametrize("shape", [(200, 900), (900, 200), (300, 300)])
def test_large_spans_under_causality(shape: tuple[int, int]) -> None:
    """Rows before, inside and after a span of keys, and a span that ends after the last row."""
    n, m = shape
    att = problem("causal", B=1, n=n, m=max(m, 300))
    out, lse = kernels.attend_lse(att)
    A = truth(att).A
    for start in (0, 30):
        keys = ((torch.arange(A.shape[-1]) >= start) & (torch.arange(A.shape[-1]) < start + 260))[None, None]
        close(kernels.mass(att, lse, keys), (A * keys[:, :, None]).sum(-1), STATISTIC[torch.float32])


@given(data=st.data())
@settings(max_examples=80)
def test_random_problems(data: st.DataObject) -> None:
    draw = data.draw
    mask = draw(st.sampled_from(MASKS))
    Hkv, groups, B = draw(st.integers(1, 2)), draw(st.sampled_from((1, 2, 4))), draw(st.integers(1, 3))
    H, n = Hkv * groups, draw(st.integers(1, 24))
    m = n + draw(st.sampled_from((0, 0, 1, 13)))
    att = problem(
        mask,
        B,
        H,
        Hkv,
        n,
        m,
        d=draw(st.sampled_from((4, 5, 16))),
        dv=draw(st.sampled_from((None, None, 3))),
        dtype=draw(st.sampled_from(DTYPES)),
        softcap=draw(st.sampled_from((None, None, 4.0))),
        sinks=draw(st.booleans()),
        bias=draw(st.sampled_from((None, (1, 1), (B, 1), (1, H), (B, H)))),
        seed=draw(st.integers(0, 99)),
    )
    check(att)


@pytest.mark.parametrize("mask", MASKS)
def test_select_is_the_same_heads(mask: str) -> None:
    att = problem(mask, H=8, bias=(1, 8), sinks=True)
    heads = [0, 3, 5]
    for part, whole in zip(kernels.attend_lse(att.select(heads)), kernels.attend_lse(att), strict=True):
        close(part, whole[:, heads], 1e-6)
    one = kernels.dense(att.one(1, 5))
    close(one[0, 0], kernels.dense(att)[1, 5], 1e-6)


@pytest.mark.parametrize("mask", ["left padding", "right padding, float min", "bool", "left padding, causal flag"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_no_key(mask: str, dtype: torch.dtype, sinks: bool) -> None:
    """Zero everywhere, minus infinity for the log-sum-exp, and a reweighting leaves them alone."""
    att = problem(mask, B=3, n=9, m=9, dtype=dtype, sinks=sinks)
    see = torch.rand(3, 1, 9, 9) < 0.5
    see[:, :, 2] = False
    see[1, :, 7] = False
    att = att.replace(mask=att.mask & see if att.mask.dtype == torch.bool else att.mask.masked_fill(~see, -torch.inf))
    t = truth(att)
    dark = torch.isneginf(t.lse)
    assert dark[:, :, 2].all() and not dark.all()
    out, lse = kernels.attend_lse(att)
    assert torch.equal(torch.isneginf(lse), dark)
    keys = torch.rand(3, 4, 9) < 0.5
    mass, u = kernels.partial(att, lse, keys)
    zero = (out, mass, u, kernels.entropy(att, lse), kernels.dense(att), kernels.leftover(att, lse, keys, mass))
    for answer in (*zero, kernels.rows(att, lse, torch.arange(9)), att.visible_total(lse)):
        assert not answer.isnan().any() and (answer[dark] == 0).all()
    for norm in (False, True):
        for weight, rest in ((0.0, 1.0), (3.0, 0.0), (0.0, 50.0), (0.0, 0.0)):
            new = kernels.reweight(att, out + 1, lse, [(keys, weight, mass, u)], rest, norm)
            assert not new.isnan().any() and torch.equal(new[dark], (out + 1)[dark])
    check(att)


@pytest.mark.parametrize("bias", [(1, 1), (2, 4)])
def test_removed_keys(bias: tuple[int, int]) -> None:
    """A key bias of minus infinity removes a key, in rows that see nothing else too."""
    att = problem("causal", bias=bias)
    att.key_bias[..., :2] = -torch.inf
    check(att)
    out, lse = kernels.attend_lse(att)
    assert torch.isneginf(lse[:, :, :2]).all() and (out[:, :, :2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float_masks_keep_their_precision(dtype: torch.dtype) -> None:
    """A position bias in fp32 is not rounded to the dtype of q."""
    att = problem("float -inf", dtype=dtype)
    att = att.replace(mask=(att.mask.float() * 7.3).masked_fill(att.mask.float() < -3, torch.finfo(torch.float32).min))
    check(att)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_inputs_of_any_layout(which: str) -> None:
    """Kernels that assume dense rows would read transposed tensors as garbage."""
    att = problem("causal")
    tensor = getattr(att, which)
    check(att.replace(**{which: tensor.transpose(2, 3).contiguous().transpose(2, 3)}))
    check(att.replace(**{which: tensor.transpose(1, 2).contiguous().transpose(1, 2)}))


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6), (2, 5, 0), (2, 0, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_empty_problems(shape: tuple[int, int, int], causal: bool, sinks: bool) -> None:
    B, n, m = shape
    q, k, v = torch.randn(B, 4, n, 8), torch.randn(B, 2, m, 8), torch.randn(B, 2, m, 8)
    att = Attention(q, k, v, 0.3, causal=causal, sinks=torch.randn(4) if sinks else None)
    out, lse = kernels.attend_lse(att)
    assert out.shape == (B, 4, n, 8) and (out == 0).all() and torch.isneginf(lse).all()
    keys = torch.ones(1, 1, m, dtype=torch.bool)
    mass, u = kernels.partial(att, lse, keys)
    new = kernels.reweight(att, out, lse, [(keys, 0.5, mass, u)], 2.0, True)
    assert new.shape == out.shape and mass.shape == lse.shape and not new.any() and not mass.any()
    assert kernels.column_mass(att, lse).shape == (B, 4, m)
    assert kernels.dense(att).shape == (B, 4, n, m)
    assert kernels.rows(att, lse, torch.arange(min(n, 1))).shape == (B, 4, min(n, 1), m)
    assert kernels.entropy(att, lse).shape == kernels.leftover(att, lse, keys, mass).shape == (B, 4, n)


def test_output_has_the_dtype_of_the_values() -> None:
    for dtype in DTYPES:
        for quirk in ({}, {"softcap": 5.0}):
            att = problem("causal", dtype=dtype, **quirk)
            out, lse = kernels.attend_lse(att)
            assert out.dtype == kernels.attend(att).dtype == dtype
            assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert OUTPUT[dtype] < 0.1
