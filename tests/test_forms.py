"""The share of a set of keys in a decode step, as two calls of a kernel, against the map itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnsteer.call import Share
from attnsteer.forms import WholeForms
from attnsteer.kernels import Attention

B, H, KV, M, D = 2, 4, 2, 90, 8


def key_sets(draw: torch.Generator) -> dict[str, Tensor]:
    """bool [B or 1, H or 1, s]: few and many, of one span or scattered, alike for all heads or not, empty for some rows."""
    scattered = torch.rand(B, H, M - 3, generator=draw) < 0.06
    span = torch.zeros(1, 1, M, dtype=torch.bool)
    span[..., 20:27] = True
    some = scattered.clone()
    some[0, 1] = some[1] = False
    return {
        "span": span,
        "span of a prompt": span[..., : M - 10],
        "scattered": scattered,
        "alike for heads": scattered[:, :1],
        "empty for some": some,
        "empty": torch.zeros(1, 1, M - 1, dtype=torch.bool),
        "many": torch.rand(B, H, M - 1, generator=draw) < 0.5,
        "all": torch.ones(1, 1, M, dtype=torch.bool),
    }


@pytest.mark.parametrize("name", key_sets(torch.Generator()))
@pytest.mark.parametrize("heads", [None, (0, 3)])
@torch.no_grad()
def test_a_share_is_that_of_the_map(name: str, heads: tuple[int, ...] | None) -> None:
    draw = torch.Generator().manual_seed(len(name))
    q, k, v = (torch.randn(B, h, n, D, generator=draw, dtype=torch.float64) for h, n in ((H, 1), (KV, M), (KV, M)))
    keys = key_sets(draw)[name]
    keys = keys if heads is None or keys.shape[1] == 1 else keys[:, list(heads)]
    forms = WholeForms(Attention(q, k, v, 0.7), {})
    before, after = forms.share(heads, Share(keys, lambda share: 0.3 * share))

    A = torch.softmax(0.7 * q @ k.repeat_interleave(H // KV, dim=1).mT, dim=-1)
    inside = torch.zeros(B, H, M, dtype=torch.bool)
    inside[:, slice(None) if heads is None else list(heads), : keys.shape[-1]] = keys
    share = (A * inside[:, :, None]).sum(dim=-1)
    moves = inside.any(dim=-1)[..., None] & ~inside.all(dim=-1)[..., None]
    rest = torch.where(moves, (1 - 0.3 * share) / (1 - share).clamp_min(1e-9), 1.0)
    factor = torch.ones_like(share).masked_fill(moves, 0.3)
    new = A * torch.where(inside[:, :, None], factor[..., None], rest[..., None])
    torch.testing.assert_close(before, share, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after, torch.where(moves, 0.3 * share, share), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(forms.out(), new @ v.repeat_interleave(H // KV, dim=1), rtol=1e-12, atol=1e-12)


SPANS = {
    "one": [[(3, 5)], [(3, 5)]],
    "by sample": [[(3, 5)], [(15, 18)]],
    "two": [[(3, 5), (9, 10)], [(5, 7)]],
    "last": [[(38, 40)], [(39, 40)]],
    "none in a sample": [[], [(4, 5)]],
    "first": [[(0, 2)], [(0, 2)]],
    "many": [[(2, 30)], [(2, 30)]],
}


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("heads", [None, {0: [1], 1: [0, 3]}])
@torch.no_grad()
def test_a_share_of_a_prompt_is_that_of_the_map(spans: str, heads: dict[int, list[int]] | None) -> None:
    """Two calls of the kernel where it can be so, and the map's identities elsewhere; the same each time."""
    from attnsteer import SpotLight, Where, steer
    from attnsteer.testing import tiny_transformers

    model = tiny_transformers("llama")
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    method = SpotLight(SPANS[spans], 0.3, where=Where() if heads is None else Where(heads=heads))
    found, counts = [], []
    for reference in (True, False):
        with steer(model, method, reference=reference) as run:
            found += [model(ids).logits for _ in range(2)]
            counts.append({key: record.changed for key, record in run.audit.records.items()})
    path = next(iter(run.audit.records.values())).path
    assert (path == "shares") == (spans not in ("first", "many"))
    torch.testing.assert_close(found[2], found[0], atol=2e-6, rtol=0)
    assert torch.equal(found[2], found[3])
    assert counts[0] == counts[1]
