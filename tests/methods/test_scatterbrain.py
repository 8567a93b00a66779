"""Scatterbrain: against its dense definition, exact where all is supported, and the slopes of its error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnsteer import HeadGate, Scatterbrain, SpotLight, Where, steer
from attnsteer.errors import CompositionError, SelectionError, UnsupportedHost
from attnsteer.methods import scatterbrain
from attnsteer.testing import HOSTS
from tests.reference import efficiency as slow


class Attn(nn.Module):
    """Attention of given queries, keys and values, by a name that can be exchanged."""

    num_heads = 2

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)


def draw(n: int, size: float, d: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, n, d, generator=g) for _ in range(3))
    return size * q / q.norm(dim=-1, keepdim=True) * 1.0, size * k / k.norm(dim=-1, keepdim=True), v


@pytest.mark.parametrize("size", [0.5, 4.0])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_is_its_dense_definition(size: float, rounds: int) -> None:
    """Pairs that several rounds find count once; a number of rows that the clusters do not divide."""
    q, k, v = draw(37, size)
    g = torch.Generator().manual_seed(1)
    W = scatterbrain.orthogonal(24, 16, g)
    hashes = [scatterbrain.hashed(q, k, 4, g) for _ in range(rounds)]
    out = scatterbrain.estimate(q, k, v, 0.25, W, hashes)
    for h in range(2):
        support = torch.zeros(37, 37, dtype=torch.bool)
        for rows, keys in hashes:
            support |= rows[0, h][:, None] == keys[0, h]
        want = slow.scatterbrain(q[0, h], k[0, h], v[0, h], W, support)
        torch.testing.assert_close(out[0, h].double(), want, atol=1e-4, rtol=1e-4)


def test_features_are_gaussian_and_orthogonal() -> None:
    W = scatterbrain.orthogonal(40, 16, torch.Generator().manual_seed(0))
    gram = W[:16] @ W[:16].T
    assert torch.allclose(gram, torch.diag(gram.diag()), atol=1e-5)
    assert W.shape == (40, 16) and 12 < float(W.square().sum(1).mean()) < 20


def test_all_supported_is_exact_for_any_features() -> None:
    q, k, v = draw(24, 3.0)
    one = (torch.zeros(1, 2, 24, dtype=torch.long),) * 2
    for seed in range(2):
        W = scatterbrain.orthogonal(4, 16, torch.Generator().manual_seed(seed))
        out = scatterbrain.estimate(q, k, v, 0.25, W, [one])
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)
    model = Attn()
    with steer(model, Scatterbrain(cluster_size=24), control=True):
        assert torch.equal(model(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_error_falls_with_the_root_of_the_features_where_queries_and_keys_are_small() -> None:
    """Over nine draws, |q| = |k| = 0.6: sixteen times the features, a quarter of the error."""
    q, k, v = draw(128, 0.6)
    model, errors = Attn(), []
    for features in (64, 1024):
        own = []
        for seed in range(9):
            with steer(model, Scatterbrain(features, 0, seed=seed), measure=True) as run:
                model(q, k, v)
            own.append(next(iter(run.audit.records.values())).error)
        errors.append(sorted(own)[4])
    assert 2.5 < errors[0] / errors[1] < 7.0


def test_error_falls_with_the_support_on_average() -> None:
    q, k, v = draw(128, 1.5)
    model, errors = Attn(), []
    for size in (8, 32, 96):
        own = []
        for seed in range(5):
            with steer(model, Scatterbrain(64, 2, size, seed), measure=True) as run:
                model(q, k, v)
            own.append(next(iter(run.audit.records.values())).error)
        errors.append(sorted(own)[2])
    assert errors == sorted(errors, reverse=True)


def test_a_seed_repeats_and_exact_attention_is_not_run() -> None:
    q, k, v = draw(64, 1.0)
    model, calls = Attn(), []
    with steer(model, Scatterbrain(32, 1, 16)):
        first = model(q, k, v)
        plain = F.scaled_dot_product_attention
        assert torch.equal(model(q, k, v), first)
        del plain, calls
    with steer(model, Scatterbrain(32, 1, 16), HeadGate({(0, 1): 0.5})):
        out = model(q, k, v)
    torch.testing.assert_close(out[:, 1], 0.5 * first[:, 1])
    with steer(model, Scatterbrain(32, 1, 16, where=Where(rows=(0, 5)))):
        some = model(q, k, v)
    assert torch.equal(some[:, :, :5], first[:, :, :5])
    torch.testing.assert_close(some[:, :, 5:], F.scaled_dot_product_attention(q, k, v)[:, :, 5:])


def test_refusals_say_what_to_do() -> None:
    q, k, v = draw(32, 1.0)
    model = Attn()
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(32, 32, dtype=torch.bool)}):
        with (
            steer(model, Scatterbrain(cluster_size=8), control=True),
            pytest.raises(UnsupportedHost, match="random features"),
        ):
            model(q, k, v, **options)
    both = (Scatterbrain(cluster_size=8), Scatterbrain(cluster_size=4))
    with steer(model, *both, control=True), pytest.raises(CompositionError, match="in the place of attention"):
        model(q, k, v)
    bert = HOSTS["bert"].build()
    spans = SpotLight([[(1, 3)]], 0.5)
    with (
        steer(bert, Scatterbrain(cluster_size=4), spans, control=True),
        pytest.raises(CompositionError, match="SpotLight"),
    ):
        bert(torch.arange(3, 20)[None])
    with pytest.raises(SelectionError, match="nb_features"):
        Scatterbrain(1)
