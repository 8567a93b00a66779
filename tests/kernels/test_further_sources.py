"""Further sources of (out, lse): used where they agree with our own pass, left out where they do not. The kernels are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import kernels
from attnsteer.kernels import Attention, sources


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    before = dict(sources._SOURCES)
    yield
    sources._SOURCES.clear()
    sources._SOURCES.update(before)
    sources._AGREED.clear()


def problem(**options: Any) -> Attention:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 12, 8, generator=draw) for heads in (4, 2, 2))
    return Attention(q, k, v, 0.4, causal=True, **options)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, softcap: float
) -> tuple[Tensor, Tensor]:
    """[B, N, H, d] in, (out [B, N, H, d], lse [B, H, N]) out; the causal flag is lower-right aligned."""
    q, k, v = (t.transpose(1, 2).double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    z = q @ k.mT * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    if causal:
        n, m = z.shape[-2:]
        z = z.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf)
    return (torch.softmax(z, dim=-1) @ v).transpose(1, 2).float(), z.logsumexp(dim=-1).float()


def flash_attn_func(q, k, v, softmax_scale, causal, return_attn_probs, softcap=0.0):
    assert return_attn_probs
    return *dense_attention(q, k, v, softmax_scale, causal, softcap), None


def varlen(older: bool) -> Any:
    def flash_attn_varlen_func(
        q, k, v, bounds_q, bounds_k, longest_q, longest_k, softmax_scale, causal, return_attn_probs
    ):
        assert bounds_q.dtype == torch.int32 and torch.equal(bounds_q, bounds_k) and longest_q == longest_k
        outs, sums = [], []
        for start, stop in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True):
            out, lse = dense_attention(*(t[None, start:stop] for t in (q, k, v)), softmax_scale, causal, 0.0)
            outs.append(out[0])
            sums.append(lse[0])
        if older:
            lse = torch.stack([torch.nn.functional.pad(s, (0, longest_q - s.shape[1])) for s in sums])
        else:
            lse = torch.cat(sums, dim=1)
        return torch.cat(outs), lse, None

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_flash_attention_dense(softcap: float | None) -> None:
    att = problem(softcap=softcap)
    out, lse = sources._flash(varlen(False), att)
    wanted, wanted_lse = kernels.attend_lse(att)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("older", [False, True], ids=["lse by token", "padded lse"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_attention_of_a_padded_batch(side: str, older: bool) -> None:
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, slice(0, 5) if side == "left" else slice(7, 12)] = False
    att = problem(mask=valid[:, None, None])
    out, lse = sources._flash(varlen(older), att)
    wanted, wanted_lse = kernels.attend_lse(att)
    rows = valid[:, None].expand(2, 4, 12)
    torch.testing.assert_close(out[rows], wanted[rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[rows], wanted_lse[rows], rtol=1e-5, atol=1e-5)
    assert not out[~rows].any() and torch.isneginf(lse[~rows]).all()


def test_a_source_that_agrees_is_used() -> None:
    calls = []

    def attend(att: Attention) -> tuple[Tensor, Tensor]:
        calls.append(att.shape)
        return kernels.lse.own_pass(att)

    att = problem(softcap=3.0)
    wanted = kernels.attend_lse(att)
    assert kernels.lse_source(att) == "blockwise"
    kernels.add_source(kernels.Source("mine", lambda att: att.softcap is not None, attend))
    assert kernels.lse_source(att) == "mine"
    torch.testing.assert_close(kernels.attend_lse(att), wanted)
    # Once on a small problem of its own, then on what was asked.
    assert calls == [(2, 4, 24, 24), (2, 4, 12, 12)]
    assert kernels.lse_source(problem()) == "cpu-flash"
    kernels.remove_source("mine")
    assert kernels.lse_source(att) == "blockwise"


@pytest.mark.parametrize("wrong", ["output", "lse", "error"])
def test_a_source_that_disagrees_is_left_out(wrong: str) -> None:
    def attend(att: Attention) -> tuple[Tensor, Tensor]:
        if wrong == "error":
            raise RuntimeError("no kernel image")
        out, lse = kernels.lse.own_pass(att)
        return (out + 0.1, lse) if wrong == "output" else (out, lse * 2**0.5)

    kernels.add_source(kernels.Source("mine", lambda att: True, attend))
    with pytest.warns(UserWarning, match="does not use mine"):
        assert kernels.lse_source(problem(softcap=3.0)) == "blockwise"
    # Said once.
    assert kernels.lse_source(problem(softcap=3.0)) == "blockwise"


def test_flex_attention_has_our_terms() -> None:
    """By its definition: the compiled kernel is for CUDA."""

    def flex(q, k, v, score_mod, scale, enable_gqa, return_aux):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        b, h, n, m = (torch.arange(s) for s in (*q.shape[:3], k.shape[2]))
        z = score_mod(q @ k.mT * scale, b[:, None, None, None], h[:, None, None], n[:, None], m)
        return torch.softmax(z, dim=-1) @ v, SimpleNamespace(lse=z.logsumexp(dim=-1))

    seen = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    seen[1, :, 6:, :2] = False
    att = problem(softcap=3.0, mask=seen, key_bias=torch.linspace(-1, 1, 12)[None, None])
    out, lse = sources._flex(att, flex)
    wanted, wanted_lse = kernels.lse.own_pass(att)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)
