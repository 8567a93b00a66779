"""TokenMerge: matching and attention against loops, the official choices of destinations, exact sizes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnsteer import HeadGate, TokenMerge, Where, steer
from attnsteer.errors import CompositionError, SelectionError, UnsupportedHost
from attnsteer.methods import tokenmerge
from attnsteer.testing import HOSTS
from tests.reference import efficiency as slow


class Attn(nn.Module):
    """Attention of given queries, keys and values, by a name that can be exchanged."""

    num_heads = 4

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)


def draw(n: int, batch: int = 2, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 4, n, d, generator=g) for _ in range(3))


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize(("match", "special"), [("grid", 0), ("alternate", 1)])
def test_is_the_loop(match: str, special: int, sizes: bool) -> None:
    """Destinations by cells of a grid with a remainder, or every second token; samples are matched apart."""
    h, w = 5, 7
    q, k, v = draw(h * w)
    model = Attn()
    grid = {"grid": (h, w)} if match == "grid" else {}
    method = TokenMerge(0.4, size_bias=sizes, match=match, special=special, use_rand=False, **grid)
    with steer(model, method):
        out = model(q, k, v)
    cells = [y % 2 == 0 and x % 2 == 0 and y < 4 and x < 6 for y in range(h) for x in range(w)]
    destination = cells if match == "grid" else [i % 2 == 1 and i >= special for i in range(h * w)]
    source = [not d and i >= special for i, d in enumerate(destination)]
    for b in range(2):
        root = slow.merged_groups(k[b].mean(0), destination, source, int(h * w * 0.4))
        for head in range(4):
            want = slow.merged_attention(q[b, head], k[b, head], v[b, head], root, sizes)
            torch.testing.assert_close(out[b, head], want, atol=1e-5, rtol=1e-5)


def test_drawn_destinations_are_one_in_each_cell_and_new_in_each_step() -> None:
    method = TokenMerge(0.5, grid=(6, 8), stride=(3, 2))
    cells = method._cells(6, 8, torch.Generator().manual_seed(0)).reshape(2, 3, 4, 2)
    assert (cells.sum(dim=(1, 3)) == 1).all()
    other = method._cells(6, 8, torch.Generator().manual_seed(1)).reshape(2, 3, 4, 2)
    assert not torch.equal(cells, other)


def test_frames_are_those_of_fastvggt() -> None:
    """The first frame and the special tokens are destinations, of other frames one token in each cell; protected ones stay."""
    method = TokenMerge.fastvggt((2, 4), 3)
    q, k, v = draw(3 * (5 + 8), batch=1)
    model = Attn()
    found: dict[str, Tensor] = {}
    plain = tokenmerge.match

    def noted(metric: Tensor, destination: Tensor, source: Tensor, count: int) -> Tensor:
        found.update(destination=destination, source=source, root=plain(metric, destination, source, count))
        return found["root"]

    tokenmerge.match, before = noted, tokenmerge.match
    try:
        with steer(model, method):
            model(q, k, v)
    finally:
        tokenmerge.match = before
    frames = found["destination"].reshape(3, 13)
    assert frames[0].all() and frames[:, :5].all()
    assert (frames[1:, 5:].reshape(2, 2, 4).reshape(2, 2, 2, 2).sum(dim=(1, 3)) == 1).all()
    strided = torch.arange(0, 39, 13)
    assert not found["source"][strided].any()
    assert (found["root"][0] != torch.arange(39)).sum() == found["source"].sum()


@pytest.mark.parametrize("sizes", [True, False])
def test_equal_tokens_merge_without_any_error_if_sizes_count(sizes: bool) -> None:
    """Of equal pairs some are merged and some are not, so that sizes differ."""
    q, k, v = (t[:, :, :12].repeat_interleave(2, dim=2) for t in draw(12))
    model = Attn()
    want = model(q, k, v)
    with steer(model, TokenMerge(0.25, match="alternate", size_bias=sizes)):
        out = model(q, k, v)
    assert torch.allclose(out, want, atol=1e-5) == sizes


def test_no_ratio_is_the_plain_model_and_selected_rows_and_samples_are() -> None:
    q, k, v = draw(36)
    model = Attn()
    want = model(q, k, v)
    for method in (TokenMerge(0.0, grid=(6, 6)), TokenMerge(0.02, grid=(6, 6))):
        with steer(model, method, control=True):
            assert torch.equal(model(q, k, v), want)
    with steer(model, TokenMerge(0.5, grid=(6, 6), where=Where(rows=(0, 10), heads=[1]))):
        out = model(q, k, v)
    assert torch.equal(out[:, [0, 2, 3]], want[:, [0, 2, 3]]) and torch.equal(out[:, 1, 10:], want[:, 1, 10:])
    assert not torch.allclose(out[:, 1, :10], want[:, 1, :10], atol=1e-3)


def smooth(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that are like their neighbours, as those of images are."""
    g = torch.Generator().manual_seed(2)
    coarse = torch.randn(12, 8, side // 4, side // 4, generator=g)
    fine = F.interpolate(coarse, size=(side, side), mode="bilinear") + 0.1 * torch.randn(12, 8, side, side, generator=g)
    return tuple(fine.flatten(2).transpose(1, 2).reshape(3, 1, 4, side * side, 8))


def test_error_falls_with_the_budget_and_is_less_with_sizes() -> None:
    q, k, v = smooth(16)
    model, errors = Attn(), {}
    for sizes in (True, False):
        for ratio in (0.1, 0.25, 0.5, 0.75):
            with steer(model, TokenMerge(ratio, size_bias=sizes, grid=(16, 16)), measure=True) as run:
                model(q, k, v)
            record = next(iter(run.audit.records.values()))
            errors[sizes, ratio] = record.error
            assert record.kept == pytest.approx(1 - ratio, abs=0.01)
    with_sizes = [errors[True, r] for r in (0.75, 0.5, 0.25, 0.1)]
    assert with_sizes == sorted(with_sizes, reverse=True) and with_sizes[0] < 0.6
    assert errors[True, 0.5] < errors[False, 0.5]


def test_gates_come_after_and_other_edits_of_the_map_are_refused() -> None:
    q, k, v = draw(36)
    model = Attn()
    merge = TokenMerge(0.5, grid=(6, 6))
    with steer(model, merge):
        alone = model(q, k, v)
    with steer(model, merge, HeadGate({(0, 1): 0.5})):
        out = model(q, k, v)
    torch.testing.assert_close(out[:, 1], 0.5 * alone[:, 1])
    torch.testing.assert_close(out[:, 0], alone[:, 0])
    with (
        steer(model, merge, TokenMerge(0.2, grid=(6, 6)), control=True),
        pytest.raises(CompositionError, match="merges tokens"),
    ):
        model(q, k, v)


def test_denoisers_give_their_grid_and_text_is_never_merged() -> None:
    for name, kind in (("sd", "self"), ("sd3", "joint"), ("flux", "joint")):
        host = HOSTS[name]
        model = host.build()
        inputs = host.inputs(model, 2, None, 0)
        want = host.run(model, inputs)
        with steer(model, TokenMerge(0.5, where=Where(kinds=kind, layers=0)), measure=True) as run:
            out = host.run(model, inputs)
        record = next(iter(run.audit.records.values()))
        assert not torch.allclose(out, want) and record.kept < 1 and record.error > 0
        with steer(model, TokenMerge(0.0, where=Where(kinds=kind)), control=True):
            assert torch.equal(host.run(model, inputs), want)
        with steer(model, TokenMerge(0.5, where=Where(kinds=kind, layers=0))):
            alone = host.run(
                model, {n: t[:1] if isinstance(t, Tensor) and t.ndim and len(t) == 2 else t for n, t in inputs.items()}
            )
        torch.testing.assert_close(alone, out[:1], atol=1e-5, rtol=1e-4)


def test_pipelines_draw_by_step_and_not_from_the_noise() -> None:
    host = HOSTS["sd-pipeline"]
    pipe = host.build()
    inputs = host.inputs(pipe, 1, None, 0)
    method = TokenMerge.tomesd(0.5, where=Where(kinds="self", layers=0))
    with steer(pipe, method):
        first = host.run(pipe, inputs)
        state = torch.random.get_rng_state()
        second = host.run(pipe, inputs)
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TokenMerge(1.5), "ratio"),
        (lambda: TokenMerge(0.5, (2,)), "pair"),
        (lambda: TokenMerge(0.5, grid=(0, 4)), "pair"),
        (lambda: TokenMerge(0.5, frames=2), "frames"),
    ],
)
def test_bad_parameters(make: Any, says: str) -> None:
    with pytest.raises(SelectionError, match=says):
        make()


def test_where_there_is_nothing_to_merge_into_nothing_is_merged() -> None:
    """One token, or special ones and one more."""
    for n, special in ((1, 0), (1, 1), (2, 1), (3, 2), (3, 3)):
        q, k, v = draw(n)
        with steer(Attn(), TokenMerge(1.0, match="alternate", special=special), control=True) as run:
            out = run.target(q, k, v)
        want = F.scaled_dot_product_attention(q, k, v)
        assert torch.equal(out, want), (n, special)


def test_refusals_say_what_to_do() -> None:
    q, k, v = draw(36)
    model = Attn()
    cases = (
        (TokenMerge(0.5, grid=(6, 6)), {"is_causal": True}, "causal"),
        (TokenMerge(0.5, grid=(6, 6)), {"attn_mask": torch.ones(36, 36, dtype=torch.bool)}, "under a mask"),
        (TokenMerge(0.5, grid=(5, 6)), {}, "are not 1 x"),
    )
    for method, options, says in cases:
        with steer(model, method, control=True), pytest.raises(UnsupportedHost, match=says):
            model(q, k, v, **options)
    with (
        steer(model, TokenMerge(0.5, match="alternate"), control=True),
        pytest.raises(UnsupportedHost, match="other keys"),
    ):
        model(q, k[:, :, :20], v[:, :, :20])
    with pytest.raises(UnsupportedHost, match="needs grid"):
        steer(model, TokenMerge(0.5))
    llama = HOSTS["llama"].build()
    with steer(llama, TokenMerge(0.5, match="alternate"), control=True), pytest.raises(UnsupportedHost, match="causal"):
        llama(torch.arange(3, 20)[None])
