"""The map of a short call in blocks of rows, against the dense fp64 truth."""

from __future__ import annotations

import pytest
import torch

from attnsteer import kernels
from attnsteer.attention_map import AttentionMap, DenseMap
from attnsteer.edits import Reweight, Share
from attnsteer.kernels import RowBlocks, blocks
from tests.kernels.common import MASKS, OUTPUT, STATISTIC, close, key_sets, problem, truth
from tests.reference.dense import dense_out

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"softcap": 3.0}, {"n": 12, "m": 7}], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_every_answer(mask: str, options: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)
    att = problem(mask, dtype=dtype, **options)
    t, lse = truth(att), kernels.attend_lse(att)[1]
    held = RowBlocks.of(att, lambda: lse)
    assert len(held.blocks) == (3 if att.causal else 1)
    B, H, n, m = att.shape
    close(held.dense(), t.A, STATISTIC[dtype])
    close(held.column_mass(), t.A.sum(2), STATISTIC[dtype])
    weight = torch.rand(B, n).round()
    close(held.column_mass(weight), torch.einsum("bhnm,bn->bhm", t.A, weight.double()), STATISTIC[dtype])
    for keys in key_sets(att).values():
        before, after, out = held.share(keys, lambda share: 0.3 * share)
        wide = keys.expand(B, H, m)[:, :, None]
        inside, outside = (t.A * wide).sum(-1), (t.A * ~wide).sum(-1)
        stays = (inside == 0) | (outside == 0)
        close(before, inside, STATISTIC[dtype])
        assert torch.equal(stays, before == after)
        factor = torch.where(wide, 0.3, (1.0 + 0.7 * inside / outside)[..., None])
        want = dense_out(torch.where(stays[..., None], 0.0, t.A * factor), att.v)
        close(torch.where(stays[..., None], 0.0, out), want, max(OUTPUT[dtype], 1e-5 if dtype != torch.float64 else 0))


@pytest.mark.parametrize("gap", [-16.0, 8.0, 16.0], ids="gap {:g}".format)
@torch.no_grad()
def test_nearly_all_mass_on_one_side_loses_no_digits(gap: float) -> None:
    att = problem("causal", n=40, m=40, d=16, sharp=0.5)
    keys = (torch.arange(40) < 2)[None, None]
    att = att.replace(k=torch.cat([att.k, gap * keys[..., None].expand(2, 2, 40, 1)], dim=-1))
    att = att.replace(q=torch.cat([att.q, torch.full((2, 4, 40, 1), 1 / att.scale)], dim=-1))
    A, wide = truth(att).A, keys[:, :, None]
    _, _, out = RowBlocks.of(att, lambda: None).share(keys, lambda share: 0.4 * share)
    inside, outside = ((A * s).sum(-1, keepdim=True) for s in (wide, ~wide))
    want = dense_out(A * torch.where(wide, 0.4, (1 - 0.4 * inside) / outside), att.v)
    close(out[:, :, 2:], want[:, :, 2:], 2e-5)


@torch.no_grad()
def test_a_map_is_held_once_its_columns_were_asked_for() -> None:
    att = problem("causal", n=20, m=20)
    t, keys = truth(att), torch.rand(2, 4, 20) < 0.3
    view = AttentionMap(att)
    close(view.column_mass(), t.A.sum(2), 5e-6)
    shared = view.reweighted(Share(keys, lambda share: 0.4 * share))
    assert view.path == shared.path == "rows" and view._lse is None and view._dense is None
    explicit = DenseMap.of(att, AttentionMap(att).out).reweighted(Share(keys, lambda share: 0.4 * share))
    close(shared.out, explicit.out, 1e-5)
    # A further edit, which sees what the first has left.
    again = shared.reweighted(Reweight(((keys, 3.0),)))
    explicit = explicit.reweighted(Reweight(((keys, 3.0),)))
    close(again.out, explicit.out, 1e-5)
    close(again.column_mass(), explicit.column_mass(), 1e-5)
    # No row is moved by a share of the same: the bits are the model's own.
    assert torch.equal(view.reweighted(Share(keys, lambda share: share)).out, view.out)
