"""The slow definitions checked against numbers worked out by hand and against the papers' own statements."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from .dense import dense_map, dense_out, dense_scores, sink_share
from .identities import column_mass, entropy, mass, partial
from .llm_methods import act, act_decode, act_released, headgate, pasta, reweight, spotlight, zerotuning

INF = float("inf")

# One head, four tokens. Column means over the rows that can see the column: .45, .5333, .15, .3
HAND = [[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.2, 0.6, 0.2, 0.0], [0.1, 0.5, 0.1, 0.3]]


def hand(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(HAND, dtype=dtype)[None, None]


def row_map(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def close(actual: Tensor, expected: Tensor | list, atol: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def random_qkv(
    seed: int, B: int = 2, H: int = 4, Hkv: int = 2, n: int = 9, m: int = 9, d: int = 8, sharp: float = 2.5
) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 q, k, v; some keys stand out so that there are sinks."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, n, d, generator=g, dtype=torch.float64)
    k = torch.randn(B, Hkv, m, d, generator=g, dtype=torch.float64) * sharp
    v = torch.randn(B, Hkv, m, d, generator=g, dtype=torch.float64)
    return q, k, v


def random_map(seed: int, causal: bool = True, sinks: Tensor | None = None, **shape: int) -> Tensor:
    q, k, _ = random_qkv(seed, **shape)
    return dense_map(dense_scores(q, k, q.shape[-1] ** -0.5, causal=causal), sinks)


# --- dense ----------------------------------------------------------------------------------------


def test_scores_by_hand_scale_softcap_then_bias() -> None:
    q = torch.tensor([[[[2.0, 0.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[1.0, 5.0], [-3.0, 0.0]]]], dtype=torch.float64)
    close(dense_scores(q, k, 0.5), [[[[1.0, -3.0]]]])
    bias = torch.tensor([10.0, 0.0], dtype=torch.float64)
    expected = [[[[2 * math.tanh(0.5) + 10, 2 * math.tanh(-1.5)]]]]
    close(dense_scores(q, k, 0.5, softcap=2.0, bias=bias), expected)
    close(dense_scores(q, k, 0.5, softcap=2.0, mask=bias), expected)


def test_map_and_output_equal_torch_sdpa_with_gqa() -> None:
    q, k, v = random_qkv(0)
    A = dense_map(dense_scores(q, k, 0.3, causal=True))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    close(dense_out(A, v), expected)


def test_gqa_groups_are_consecutive_heads() -> None:
    q = torch.ones(1, 4, 1, 1)
    k = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    close(dense_scores(q, k, 1.0).flatten(), [1.0, 1.0, 2.0, 2.0])
    close(dense_out(torch.ones(1, 4, 1, 1), k).flatten(), [1.0, 1.0, 2.0, 2.0])


def test_causal_is_bottom_right() -> None:
    z = dense_scores(torch.ones(1, 1, 2, 1), torch.ones(1, 1, 5, 1), 1.0, causal=True)
    assert torch.isfinite(z[0, 0]).tolist() == [[True, True, True, True, False], [True] * 5]
    square = dense_scores(torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1), 1.0, causal=True)
    assert torch.equal(torch.isfinite(square[0, 0]), torch.ones(3, 3).tril().bool())
    with pytest.raises(ValueError, match="n <= m"):
        dense_scores(torch.ones(1, 1, 3, 1), torch.ones(1, 1, 2, 1), 1.0, causal=True)


@pytest.mark.parametrize("lowest", [-INF, torch.finfo(torch.float32).min])
def test_bool_and_additive_masks_agree(lowest: float) -> None:
    q, k, _ = random_qkv(1)
    visible = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(2)) > 0.4
    visible[0, 0, 3] = False
    additive = torch.zeros(2, 1, 9, 9).masked_fill(~visible, lowest)
    z = dense_scores(q, k, 0.3, mask=visible)
    assert torch.equal(torch.isneginf(z), ~visible.expand_as(z))
    assert torch.equal(z, dense_scores(q, k, 0.3, mask=additive))
    A = dense_map(z)
    assert not A.isnan().any()
    assert float(A[0, :, 3].abs().max()) == 0.0
    sums = A.sum(-1)
    close(sums, visible.any(-1).expand_as(sums).double())


def test_soft_capping_does_not_reach_the_mask() -> None:
    q, k, _ = random_qkv(1)
    A = dense_map(dense_scores(q, k, 0.3, causal=True, softcap=1.0))
    assert float(A.triu(1).abs().max()) == 0.0


def test_learned_sinks_are_an_extra_column_that_is_dropped() -> None:
    q, k, _ = random_qkv(3)
    z = dense_scores(q, k, 0.3, causal=True)
    sinks = torch.tensor([0.0, 1.0, -2.0, 30.0], dtype=torch.float64)
    wide = torch.cat([z, sinks.reshape(1, 4, 1, 1).expand(2, 4, 9, 1)], dim=-1).softmax(-1)
    A = dense_map(z, sinks)
    close(A, wide[..., :-1])
    close(sink_share(z, sinks), wide[..., -1])
    close(1 - A.sum(-1), wide[..., -1], atol=1e-12)
    assert torch.equal(sink_share(z), torch.zeros(2, 4, 9, dtype=torch.float64))
    blind = dense_map(torch.full((1, 1, 1, 3), -INF), torch.tensor([-50.0]))
    assert blind.flatten().tolist() == [0.0, 0.0, 0.0]
    assert sink_share(torch.full((1, 1, 1, 3), -INF), torch.tensor([-50.0])).item() == 1.0


def test_work_dtype() -> None:
    q, k, v = random_qkv(4)
    assert dense_scores(q, k, 1.0).dtype == torch.float64
    half = dense_scores(q.bfloat16(), k.bfloat16(), 1.0)
    assert half.dtype == torch.float32
    assert dense_out(dense_map(half), v.bfloat16()).dtype == torch.float32


def test_large_scores_do_not_overflow() -> None:
    A = dense_map(torch.tensor([[[[1e4, 1e4, -1e4]]]]))
    close(A, [[[[0.5, 0.5, 0.0]]]])


# --- ACT ------------------------------------------------------------------------------------------


def test_act_by_hand_one_sink() -> None:
    A2, S, stats = act(hand(), 0.5, threshold=0.4)  # column 0 (.45) is over it too, and is the first token
    assert S.flatten().tolist() == [False, True, False, False]
    close(stats["sum"].flatten(), [1.8, 1.6, 0.3, 0.3])
    assert stats["rows"].tolist() == [[4, 3, 2, 1]]
    close(A2[0, 0], [HAND[0], [0.75, 0.25, 0, 0], [0.35, 0.3, 0.35, 0], [0.15, 0.25, 0.15, 0.45]])


def test_act_by_hand_two_sinks() -> None:
    A2, S, _ = act(hand(), 0.5, threshold=0.2)
    assert S.flatten().tolist() == [False, True, False, True]
    close(A2[0, 0], [HAND[0], [0.75, 0.25, 0, 0], [0.35, 0.3, 0.35, 0], [0.3, 0.25, 0.3, 0.15]])


def test_act_threshold_is_strict() -> None:
    assert act(hand(), 0.5, threshold=0.5)[1].flatten().tolist() == [False, True, False, False]
    assert not act(row_map([1, 0], [0.5, 0.5]), 0.5, threshold=0.5)[1].any()
    assert act(row_map([1, 0], [0.5, 0.5]), 0.5, threshold=0.4999)[1].any()


def test_act_first_token_that_is_not_a_sink_costs_no_sink() -> None:
    A2, S, _ = act(hand(), 0.5, threshold=0.5)  # only column 1 (.5333) is over the threshold
    assert S.flatten().tolist() == [False, True, False, False]
    close(A2[0, 0, 3], [0.15, 0.25, 0.15, 0.45])
    close(act_released(hand()[0, 0], 0.5, 0.5), HAND)  # "drop the first hit" leaves nothing to edit


def test_act_alpha_counts_valid_tokens() -> None:
    assert act(hand(), 0.5, alpha=2.0)[1].flatten().tolist() == [False, True, False, False]  # tau = 2 / 4
    assert act(hand(), 0.5, alpha=1.19)[1].flatten().tolist() == [False, True, False, True]  # .2975 < .3
    assert not act(hand(), 0.5, alpha=2.2)[1].any()
    with pytest.raises(ValueError, match="either"):
        act(hand(), 0.5, alpha=2.0, threshold=0.1)
    with pytest.raises(ValueError, match="either"):
        act(hand(), 0.5)


def test_act_min_rows() -> None:
    assert act(hand(), 0.5, threshold=0.2, min_rows=2)[1].flatten().tolist() == [False, True, False, False]
    assert not act(hand(), 0.5, threshold=0.2, min_rows=4)[1].any()


def test_act_min_rows_spares_a_previous_token_head() -> None:
    n, a = 64, 0.9  # specs/llm.md 1.6: 56..62 flagged with threshold 0.1
    A = torch.zeros(1, 1, n, n, dtype=torch.float64)
    A[0, 0, 0, 0] = 1.0
    for i in range(1, n):
        A[0, 0, i, i - 1] = a
        A[0, 0, i, : i + 1] += (1 - a) / (i + 1)
    flagged = [j for j, hit in enumerate(act(A, 0.4, threshold=0.1)[1].flatten().tolist()) if hit]
    assert flagged[-1] == 62 and set(range(56, 63)) <= set(flagged)
    assert not act(A, 0.4, threshold=0.1, min_rows=12)[1].any()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize("learned", [False, True])
def test_act_sink_mass_becomes_beta_s_and_row_sums_stay(beta: float, learned: bool) -> None:
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64) if learned else None
    A = random_map(5, sinks=sinks)
    A2, S, _ = act(A, beta, threshold=0.2)
    assert S.any(-1).sum() >= 4 and not S[..., 0].any()
    s, s2 = mass(A, S), mass(A2, S)
    editable = (A.sum(-1) - s) >= 1e-6
    assert editable.sum() > 60 and float(s[editable].max()) > 0.5
    close(s2[editable], beta * s[editable])
    close(A2[editable].sum(-1), A[editable].sum(-1))
    if learned:
        assert float(A.sum(-1).median()) < 0.99
    else:
        w = ((1 - beta * s) / (1 - s).clamp_min(1e-9))[..., None]  # specs/llm.md 1.2, last form
        other = torch.where(S[:, :, None], torch.zeros_like(A), A * w)
        close(torch.where(S[:, :, None], torch.zeros_like(A), A2)[editable], other[editable], atol=1e-9)
    if beta == 1.0:
        assert torch.equal(A, A2)


def test_act_equals_row_dependent_bias() -> None:
    A = random_map(6)
    A2, S, _ = act(A, 0.4, threshold=0.2)
    s = mass(A, S)
    ok = s < 0.999
    b = math.log(0.4) + torch.log(1 - s) - torch.log(1 - 0.4 * s)  # specs/llm.md 1.2, the K2 form
    z = A.log() + torch.where(S[:, :, None], b[..., None], torch.zeros_like(A))
    close(A2[ok], z.softmax(-1)[ok], atol=1e-10)


def test_act_fused_form() -> None:
    q, k, v = random_qkv(7)
    A = dense_map(dense_scores(q, k, 0.3, causal=True))
    A2, S, _ = act(A, 0.4, threshold=0.2)
    s, u, o = mass(A, S)[..., None], partial(A, v, S), dense_out(A, v)
    assert float(s.max()) > 0.3
    close(dense_out(A2, v), 0.4 * u + (1 - 0.4 * s) / (1 - s) * (o - u), atol=1e-10)  # specs/llm.md 1.10


def test_act_saturated_row_is_unchanged_and_released_code_gives_nan() -> None:
    A = row_map([1, 0, 0], [0, 1, 0], [0, 0.9, 0.1])
    A2, S, _ = act(A, 0.4, threshold=0.3)
    assert S.flatten().tolist() == [False, True, False]
    close(A2[0, 0], [[1, 0, 0], [0, 1, 0], [0, 0.36, 0.64]])
    assert act_released(A[0, 0], 0.4, 0.3)[1].isnan().all()


@pytest.mark.parametrize("rest", [1e-5, 1e-7, 1e-12, 1e-30])
def test_act_has_no_cut_off(rest: float) -> None:
    """As the official code, which is right in fp32 as long as anything is left."""
    A = torch.tensor([[[[1.0, 0.0], [rest, 1.0 - rest]]]])
    A2, S, _ = act(A, 0.4, threshold=0.3)
    assert S[0, 0, 1] and A2.dtype == torch.float32
    close(A2[0, 0, 1], [rest + 0.6 * (1.0 - rest), 0.4 * (1.0 - rest)], atol=1e-7)
    close(A2[0, 0], act_released(A[0, 0], 0.4, 0.3), atol=1e-7)


def test_act_row_without_visible_key_stays_zero() -> None:
    A = row_map([1, 0, 0], [0, 0, 0], [0.2, 0.7, 0.1])
    A2, S, _ = act(A, 0.5, threshold=0.3)
    assert S[0, 0, 1] and A2[0, 0, 1].abs().sum() == 0
    close(A2[0, 0, 2], [0.2 * (1 + 0.35 / 0.3), 0.35, 0.1 * (1 + 0.35 / 0.3)])


def test_act_does_not_touch_its_inputs() -> None:
    A = hand()
    stats = act(A, 0.5, threshold=0.4)[2]
    before = {key: value.clone() for key, value in stats.items()}
    step = row_map([0.1, 0.5, 0.1, 0.1, 0.2])
    act(step, 0.5, threshold=0.4, q_start=4, stats=stats)
    act_decode(step, stats, "running", 0.5, threshold=0.4)
    assert torch.equal(A, hand())
    assert all(torch.equal(stats[key], before[key]) for key in ("sum", "rows"))


@pytest.mark.parametrize("rule", [{"threshold": 0.2}, {"alpha": 1.19}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_act_padding_changes_nothing(side: str, rule: dict[str, float]) -> None:
    alone, S_alone, stats_alone = act(hand(), 0.5, **rule)
    A = torch.full((1, 1, 7, 7), 1 / 7, dtype=torch.float64)  # padding rows as finfo.min masks leave them
    slots = slice(3, 7) if side == "left" else slice(0, 4)
    valid = torch.zeros(1, 7, dtype=torch.bool)
    valid[:, slots] = True
    A[:, :, slots] = 0
    A[:, :, slots, slots] = hand()
    padded, S, stats = act(A, 0.5, row_valid=valid, key_valid=valid, **rule)
    assert torch.equal(S[:, :, slots], S_alone)
    assert not S[:, :, ~valid[0]].any()
    assert torch.equal(padded[:, :, slots, slots], alone)
    assert torch.equal(padded[:, :, ~valid[0]], A[:, :, ~valid[0]])
    assert torch.equal(stats["sum"][:, :, slots], stats_alone["sum"])
    assert torch.equal(stats["rows"][:, slots], stats_alone["rows"])
    first = torch.tensor([slots.start])
    assert torch.equal(act(A, 0.5, row_valid=valid, key_valid=valid, first=first, **rule)[1], S)
    careless = act(A, 0.5, **rule)  # the same map with padding taken for text
    assert not torch.equal(careless[1], S) or not torch.allclose(careless[0], padded)


def test_act_invalid_key_is_never_a_sink_even_where_it_is_visible() -> None:
    valid = torch.tensor([[True, False, True, True]])  # a caller that masks nothing (specs/llm.md 0.6)
    A2, S, _ = act(hand(), 0.5, threshold=0.4, key_valid=valid)
    assert not S.any() and torch.equal(A2, hand())


def test_act_explicit_first_wins() -> None:
    assert act(hand(), 0.5, threshold=0.4, first=torch.tensor([1]))[1].flatten().tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_act_samples_and_heads_are_independent() -> None:
    A = random_map(8, B=3)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, :4] = False
    A2, S, stats = act(A, 0.4, alpha=2.0, row_valid=valid, key_valid=valid)
    assert not torch.equal(S[0], S[1]) and not torch.equal(S[0], S[2])
    perm = torch.tensor([2, 0, 1])
    B2, T, other = act(A[perm], 0.4, alpha=2.0, row_valid=valid[perm], key_valid=valid[perm])
    assert torch.equal(B2, A2[perm]) and torch.equal(T, S[perm])
    assert torch.equal(other["sum"], stats["sum"][perm]) and torch.equal(other["rows"], stats["rows"][perm])
    for h in range(4):
        C2, U, _ = act(A[:, h : h + 1], 0.4, alpha=2.0, row_valid=valid, key_valid=valid)
        assert torch.equal(C2, A2[:, h : h + 1]) and torch.equal(U, S[:, h : h + 1])


def test_act_chunked_prefill_by_hand() -> None:
    _, S1, stats = act(hand()[:, :, :2, :2], 0.5, threshold=0.4)  # column means so far: .75, .5
    assert S1.flatten().tolist() == [False, True]
    A2, S2, stats = act(hand()[:, :, 2:], 0.5, threshold=0.52, q_start=2, stats=stats)
    assert S2.flatten().tolist() == [False, True, False, False]  # .5 alone would not do, .5333 does
    close(A2[0, 0], [[0.35, 0.3, 0.35, 0], [0.15, 0.25, 0.15, 0.45]])
    close(stats["sum"].flatten(), [1.8, 1.6, 0.3, 0.3])
    assert stats["rows"].tolist() == [[4, 3, 2, 1]]


@pytest.mark.parametrize("rule", [{"threshold": 0.2}, {"alpha": 2.0}])
def test_act_last_chunk_equals_whole(rule: dict[str, float]) -> None:
    A = random_map(9)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :2] = False
    A[1] = 0
    A[1, :, 2:, 2:] = random_map(10, B=1, n=7, m=7)[0]
    whole, S, stats = act(A, 0.4, row_valid=valid, key_valid=valid, **rule)
    state = None
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        part, T, state = act(
            A[:, :, start:stop, :stop],
            0.4,
            row_valid=valid[:, start:stop],
            key_valid=valid[:, :stop],
            q_start=start,
            stats=state,
            **rule,
        )
        prefix, U, _ = act(A[:, :, :stop, :stop], 0.4, row_valid=valid[:, :stop], key_valid=valid[:, :stop], **rule)
        assert torch.equal(T, U)
        close(part, prefix[:, :, start:stop])
    assert torch.equal(T, S)
    close(part, whole[:, :, 5:])
    close(state["sum"], stats["sum"])
    assert torch.equal(state["rows"], stats["rows"])


def test_act_statistics_use_rows_at_or_after_the_column() -> None:
    A = random_map(11)
    _, _, stats = act(A, 0.4, threshold=0.2)
    close(stats["sum"], column_mass(A))
    noisy = A.clone()
    noisy[:, :, 0, 5] = 0.9  # a row before the column does not count for it
    assert torch.equal(act(noisy, 0.4, threshold=0.2)[2]["sum"], stats["sum"])


def test_act_refuses_rows_without_a_slot() -> None:
    with pytest.raises(ValueError, match="no key slot"):
        act(hand()[:, :, 2:], 0.5, threshold=0.4, q_start=3)


# --- ACT, decode ----------------------------------------------------------------------------------

STEP = [0.1, 0.3, 0.1, 0.1, 0.4]  # after HAND


def test_decode_frozen_by_hand() -> None:
    _, S, _ = act(hand(), 0.5, threshold=0.4)
    A2, T, stats = act_decode(row_map(STEP), S, "frozen", 0.5)
    assert T.flatten().tolist() == [False, True, False, False, False] and stats is None
    factor = 1 + 0.15 / 0.7
    close(A2.flatten(), [0.1 * factor, 0.15, 0.1 * factor, 0.1 * factor, 0.4 * factor])


def test_decode_running_by_hand() -> None:
    _, _, stats = act(hand(), 0.5, threshold=0.45)
    A2, T, stats = act_decode(row_map(STEP), stats, "running", 0.5, threshold=0.45)
    close(stats["sum"].flatten(), [1.9, 1.9, 0.4, 0.4, 0.4])
    assert stats["rows"].tolist() == [[5, 4, 3, 2, 1]]
    assert T.flatten().tolist() == [False, True, False, False, False]  # 1.9 / 4 = .475
    factor = 1 + 0.15 / 0.7
    close(A2.flatten(), [0.1 * factor, 0.15, 0.1 * factor, 0.1 * factor, 0.4 * factor])
    _, _, again = act(hand(), 0.5, threshold=0.48)  # .5333 before the step, .475 after it
    A3, T, _ = act_decode(row_map(STEP), again, "running", 0.5, threshold=0.48)
    assert not T.any()
    close(A3.flatten(), STEP)


def test_decode_running_can_flag_a_new_key_and_min_rows_stops_it() -> None:
    _, _, stats = act(hand(), 0.5, threshold=0.35)
    assert act_decode(row_map(STEP), stats, "running", 0.5, threshold=0.35)[1][0, 0, 4]
    assert not act_decode(row_map(STEP), stats, "running", 0.5, threshold=0.35, min_rows=2)[1][0, 0, 4]


def test_decode_running_alpha_uses_the_running_length() -> None:
    _, _, stats = act(hand(), 0.5, alpha=2.3)
    # c_1 = .475; tau = 2.3 / 5 = .46. With N still 4 it would be .575.
    assert act_decode(row_map(STEP), stats, "running", 0.5, alpha=2.3)[1][0, 0, 1]
    valid = torch.tensor([[True, True, False, True, True]])
    assert not act_decode(row_map(STEP), stats, "running", 0.5, alpha=2.3, key_valid=valid)[1][0, 0, 1]


@pytest.mark.parametrize("rule", [{"threshold": 0.2}, {"alpha": 2.0}])
def test_decode_running_rows_at_once_equal_one_at_a_time(rule: dict[str, float]) -> None:
    A = random_map(12)
    _, _, stats = act(A[:, :, :5, :5], 0.4, **rule)
    together, S, final = act_decode(A[:, :, 5:], stats, "running", 0.4, **rule)
    for t in range(5, 9):
        one, T, stats = act_decode(A[:, :, t : t + 1, : t + 1], stats, "running", 0.4, **rule)
        close(one[..., 0, :], together[:, :, t - 5, : t + 1])
        assert T.shape[-1] == t + 1
    assert torch.equal(S, T) and torch.equal(final["rows"], stats["rows"])
    close(final["sum"], stats["sum"])
    close(final["sum"], act(A, 0.4, **rule)[2]["sum"])
    assert float((together - A[:, :, 5:]).abs().max()) > 0.05


def test_decode_skips_finished_samples() -> None:
    A = random_map(13)
    _, S, stats = act(A[:, :, :8, :8], 0.4, threshold=0.2)
    alive = torch.tensor([[True], [False]])
    for mode, state in (("frozen", S), ("running", stats)):
        A2, _, new = act_decode(A[:, :, 8:], state, mode, 0.4, threshold=0.2, row_valid=alive)
        assert torch.equal(A2[1], A[1, :, 8:]) and not torch.equal(A2[0], A[0, :, 8:])
        if new is not None:
            assert torch.equal(new["sum"][1, :, :8], stats["sum"][1])
            assert new["rows"][:, 8].tolist() == [1, 0]


def test_decode_prefill_only_and_wrong_modes() -> None:
    A, (_, S, stats) = row_map(STEP), act(hand(), 0.5, threshold=0.4)
    assert torch.equal(act_decode(A, S, "prefill_only", 0.5)[0], A)
    with pytest.raises(ValueError, match="mode"):
        act_decode(A, S, "sometimes", 0.5)
    with pytest.raises(TypeError, match="frozen"):
        act_decode(A, stats, "frozen", 0.5)
    with pytest.raises(TypeError, match="running"):
        act_decode(A, S, "running", 0.5, threshold=0.4)


# --- ACT as released ------------------------------------------------------------------------------


def test_released_equals_ours_where_it_is_right() -> None:
    A = random_map(14, B=1, H=1, Hkv=1, n=24, m=24)[0, 0]
    A[:, [0, 3, 8]] += torch.tensor([0.4, 0.5, 0.6], dtype=A.dtype)  # token 0 is over tau: the first hit
    A = A.tril() / A.tril().sum(-1, keepdim=True)
    ours, S, _ = act(A[None, None], 0.4, threshold=0.15)
    assert S[0, 0, [3, 8]].all() and float((ours[0, 0] - A).abs().max()) > 0.05
    close(act_released(A, 0.4, 0.15), ours[0, 0])


def test_released_single_decode_row() -> None:
    # hits 1 and 2, sink 2, freed .6 * .3 = .18 shared by everything, then slot 0 := 1
    close(act_released(row_map([0.1, 0.6, 0.3])[0, 0], 0.4, 0.2), [[1.0, 0.708, 0.174]])
    with pytest.raises(ValueError, match="1 < n < m"):
        act_released(row_map([0.5, 0.5, 0], [0.2, 0.3, 0.5])[0, 0], 0.4, 0.2)


def test_released_row_zero_with_mass_elsewhere() -> None:
    # A left-padded sample: column means .4, .75, .3; tau .35: hits 0 and 1, sink 1
    A = row_map([0.6, 0.3, 0.1], [0.3, 0.7, 0.0], [0.3, 0.5, 0.2])[0, 0]
    edited = act_released(A, 0.5, 0.35)
    close(edited[0], [1.0, 0.15 + 0.15 * 0.3, 0.1 + 0.15 * 0.1])  # the sink gets some of its own mass back
    close(edited[1], [0.65, 0.35, 0.0])
    close(edited[2], [0.45, 0.25, 0.3])


def test_released_without_sinks_changes_nothing() -> None:
    close(act_released(hand()[0, 0], 0.5, 0.9), HAND)


# --- reweighting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("give_share", [False, True])
def test_reweight_is_softmax_with_log_weights(learned: bool, give_share: bool) -> None:
    q, k, _ = random_qkv(15)
    z = dense_scores(q, k, 0.3, causal=True)
    sinks = torch.tensor([1.0, 0.0, -1.0, 3.0], dtype=torch.float64) if learned else None
    w = torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(16), dtype=torch.float64) * 5 + 0.01
    edited = reweight(dense_map(z, sinks), w, sink_share(z, sinks) if give_share else None)
    close(edited, dense_map(z + w.log(), sinks))


def test_reweight_never_gives_nan() -> None:
    A = row_map([0, 0, 0], [1, 0, 0], [0.5, 0.25, 0.25])
    w = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    close(reweight(A, w)[0, 0], [[0, 0, 0], [1, 0, 0], [0, 0.25, 0.75]])
    with_sink = row_map([0.5, 0, 0])  # half of it on a learned sink, so there is something left to share
    close(reweight(with_sink, w)[0, 0], [[0, 0, 0]])


# --- ZeroTuning -----------------------------------------------------------------------------------


def test_zerotuning_by_hand() -> None:
    A = row_map([0.4, 0.6], [0.25, 0.75])
    close(zerotuning(A, 2.0, torch.tensor([0]))[0, 0], [[0.8 / 1.4, 0.6 / 1.4], [0.4, 0.6]])
    close(zerotuning(A, 0.5, torch.tensor([1]))[0, 0, 0], [0.4 / 0.7, 0.3 / 0.7])
    half = row_map([0.2, 0.3])  # a learned sink holds the other half: denominator .5 + .6 + .3
    close(zerotuning(half, 3.0, torch.tensor([0]))[0, 0, 0], [0.6 / 1.4, 0.3 / 1.4])


def test_zerotuning_per_sample_and_identity() -> None:
    A = random_map(17)
    A2 = zerotuning(A, 3.0, torch.tensor([0, 2]))
    close(A2[1, :, :2], A[1, :, :2])  # rows before the first valid key of sample 1
    D = 1 + 2 * A[0, ..., 0]
    close(A2[0, ..., 0], 3 * A[0, ..., 0] / D)
    D = 1 + 2 * A[1, ..., 2]
    close(A2[1, ..., 2], 3 * A[1, ..., 2] / D)
    close(A2[1, ..., 5], A[1, ..., 5] / D)
    close(zerotuning(A, 1.0, torch.tensor([0, 2])), A)
    saturated = row_map([1, 0], [1, 0])
    close(zerotuning(saturated, 0.0, torch.tensor([0])), saturated)


def test_zerotuning_two_group_identity() -> None:
    q, k, v = random_qkv(18)
    A = dense_map(dense_scores(q, k, 0.3, causal=True))
    S = torch.arange(9) == 0
    m0, u, gamma = mass(A, S)[..., None], partial(A, v, S), 4.0
    expected = (dense_out(A, v) + (gamma - 1) * u) / (1 + (gamma - 1) * m0)  # F2
    close(dense_out(zerotuning(A, gamma, torch.tensor([0, 0])), v), expected)


# --- PASTA ----------------------------------------------------------------------------------------

MARKED = torch.tensor([[False, True, False, False]])
PROMPT = torch.tensor([[True, True, True, False]])


def test_pasta_by_hand() -> None:
    A = row_map([0.1, 0.2, 0.3, 0.4])
    close(pasta(A, 0.5, MARKED, PROMPT).flatten(), [0.0625, 0.25, 0.1875, 0.5])
    included = pasta(A, 0.5, MARKED, PROMPT, scale_position="include").flatten()
    close(included, [0.2 / 1.4, 0.2 / 1.4, 0.6 / 1.4, 0.4 / 1.4])
    half = row_map([0.05, 0.1, 0.15, 0.2])  # learned sink .5
    close(pasta(half, 0.5, MARKED, PROMPT).flatten(), [0.025 / 0.9, 0.1 / 0.9, 0.075 / 0.9, 0.2 / 0.9])
    with pytest.raises(ValueError, match="scale_position"):
        pasta(A, 0.5, MARKED, PROMPT, scale_position="generation")


@pytest.mark.parametrize("alpha", [0.01, 0.3, 2.0])
def test_pasta_include_is_exclude_of_the_inverse(alpha: float) -> None:
    A = random_map(19)
    marked = torch.zeros(2, 9, dtype=torch.bool)
    marked[0, 2:4], marked[1, 1:3] = True, True
    prompt = torch.arange(9).expand(2, 9) < torch.tensor([[6], [7]])
    included = pasta(A, alpha, marked, prompt, scale_position="include")
    close(included, pasta(A, 1 / alpha, marked, prompt))
    assert float((included - pasta(A, alpha, marked, prompt)).abs().max()) > 0.1
    close(included.sum(-1), torch.ones(2, 4, 9))


def test_pasta_ratios_between_groups() -> None:
    A = random_map(20, causal=False)
    marked = torch.arange(9).expand(2, 9) == 3
    prompt = torch.arange(9).expand(2, 9) < 6
    gain = pasta(A, 0.01, marked, prompt) / A
    close(gain[..., 3], gain[..., 7])  # highlighted and generated keys
    close(gain[..., 0], 0.01 * gain[..., 3])


def test_pasta_saturated_rows_give_no_nan() -> None:
    A = row_map([1, 0, 0, 0], [0.5, 0, 0.5, 0], [0.9, 0.1, 0, 0])
    edited = pasta(A, 0.01, MARKED, PROMPT)[0, 0]
    close(edited, [[1, 0, 0, 0], [0.5, 0, 0.5, 0], [0.009 / 0.109, 0.1 / 0.109, 0, 0]])
    knocked_out = pasta(A, 0.0, MARKED, PROMPT)[0, 0]
    close(knocked_out, [[1, 0, 0, 0], [0.5, 0, 0.5, 0], [0, 1, 0, 0]])


# --- SpotLight ------------------------------------------------------------------------------------


def test_spotlight_by_hand() -> None:
    A = row_map([0.9, 0.1, 0.0], [0.5, 0.0, 0.5], [0.5, 0.1, 0.4], [1.0, 0.0, 0.0])
    span = torch.tensor([[False, True, True]])
    edited = spotlight(A, 0.4, span)[0, 0]
    close(edited[0], [0.9 / 1.3, 0.4 / 1.3, 0.0])
    assert torch.equal(edited[1:], A[0, 0, 1:])  # psi = .5, .5 (already enough) and 0 (sees nothing of it)
    half = spotlight(row_map([0.4, 0.1, 0.0]), 0.4, span)  # learned sink .5: 1 + .4 - .1 all the same
    close(half[0, 0, 0], [0.4 / 1.3, 0.4 / 1.3, 0.0])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("target", [0.1, 0.2, 0.6])
def test_spotlight_share(target: float, learned: bool) -> None:
    q, k, _ = random_qkv(21)
    sinks = torch.tensor([1.0, 0.0, -1.0, 3.0], dtype=torch.float64) if learned else None
    z = dense_scores(q, k, 0.3, causal=True)
    A = dense_map(z, sinks)
    span = torch.zeros(2, 9, dtype=torch.bool)
    span[0, 2:4], span[1, 4:7] = True, True
    A2 = spotlight(A, target, span, p_sink=sink_share(z, sinks))
    psi, share = mass(A, span[:, None]), mass(A2, span[:, None])
    low = (psi > 0) & (psi < target)
    assert 10 < low.sum() < low.numel() - 10 and (psi == 0).sum() >= 8
    close(share[low], (target / (1 + target - psi))[low])
    assert float(share[low].max()) < target and float(share[low].min()) > target / (1 + target)
    assert torch.equal(A2[~low], A[~low])
    b = torch.where(low[..., None] & span[:, None, None], torch.log(target / psi)[..., None], 0.0)
    close(A2, dense_map(z + b, sinks))


def test_spotlight_pooled_by_hand() -> None:
    A = row_map([1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [0.5, 0.2, 0.3])
    span = torch.tensor([[False, True, False]])  # psi = 0, .3, .2: mean 1 / 6; weight 2.4
    edited = spotlight(A, 0.4, span, pooled=True)[0, 0]
    close(edited, [[1, 0, 0], [0.7 / 1.42, 0.72 / 1.42, 0], [0.5 / 1.28, 0.48 / 1.28, 0.3 / 1.28]])
    assert torch.equal(spotlight(A, 0.16, span, pooled=True), A)  # enough on average
    assert not torch.equal(spotlight(A, 0.21, span), A)  # but not in the last row
    rows = torch.tensor([[True, True, False]])  # mean .15, and the last row stays
    edited = spotlight(A, 0.3, span, pooled=True, row_valid=rows)[0, 0]
    close(edited, [[1, 0, 0], [0.7 / 1.3, 0.6 / 1.3, 0], [0.5, 0.2, 0.3]])


def test_spotlight_pooled_is_per_sample_and_over_heads() -> None:
    A = torch.tensor([[[[0.9, 0.1]], [[0.7, 0.3]]], [[[0.2, 0.8]], [[0.9, 0.1]]]], dtype=torch.float64)
    span = torch.tensor([[False, True], [False, True]])  # means .2 and .45
    edited = spotlight(A, 0.4, span, pooled=True)
    close(edited[0, :, 0], [[0.9 / 1.1, 0.2 / 1.1], [0.7 / 1.3, 0.6 / 1.3]])
    assert torch.equal(edited[1], A[1])
    blind = spotlight(A, 0.4, torch.zeros(2, 2, dtype=torch.bool), pooled=True)
    assert torch.equal(blind, A)


def test_spotlight_tiny_share_gives_no_nan() -> None:
    A = torch.tensor([[[[1.0, 1e-38], [0.0, 0.0]]]])
    edited = spotlight(A, 0.2, torch.tensor([[False, True]]))
    close(edited[0, 0], [[1 / 1.2, 0.2 / 1.2], [0.0, 0.0]], atol=1e-6)


# --- every map edit -------------------------------------------------------------------------------


def edits(A: Tensor, perm: Tensor) -> dict[str, Tensor]:
    marked = torch.zeros(3, 9, dtype=torch.bool)
    marked[0, 1:3], marked[1, 2:6], marked[2, 4] = True, True, True
    prompt = torch.arange(9).expand(3, 9) < torch.tensor([[6], [7], [9]])
    first = torch.tensor([0, 1, 0])
    marked, prompt, first = marked[perm], prompt[perm], first[perm]
    return {
        "zerotuning": zerotuning(A, 3.0, first),
        "pasta": pasta(A, 0.1, marked, prompt),
        "spotlight": spotlight(A, 0.3, marked),
        "spotlight pooled": spotlight(A, 0.5, marked, pooled=True),
    }


def test_edits_commute_with_batch_order_and_keep_row_sums_and_zeros() -> None:
    A = random_map(22, B=3)
    perm = torch.tensor([2, 0, 1])
    straight = edits(A, torch.arange(3))
    permuted = edits(A[perm], perm)
    for name, edited in straight.items():
        assert float((edited - A).abs().max()) > 0.05, name
        assert torch.equal(permuted[name], edited[perm]), name
        close(edited.sum(-1), torch.ones(3, 4, 9))
        assert float(edited.triu(1).abs().max()) == 0.0, name
        assert edited.min() >= 0, name


def test_fp32_maps_give_fp32_close_to_fp64() -> None:
    A = random_map(23, B=3)
    exact, single = edits(A, torch.arange(3)), edits(A.float(), torch.arange(3))
    for name in exact:
        assert single[name].dtype == torch.float32
        close(single[name].double(), exact[name], atol=2e-6)


# --- head gates and identities --------------------------------------------------------------------


def test_headgate() -> None:
    out = torch.arange(12.0).reshape(1, 3, 2, 2)
    edited = headgate(out, torch.tensor([0.0, 1.0, -2.0]))
    close(edited.flatten(), [0, 0, 0, 0, 4, 5, 6, 7, -16, -18, -20, -22])
    g = torch.Generator().manual_seed(24)
    o, w = torch.randn(2, 3, 4, 5, generator=g), torch.randn(15, 7, generator=g)
    gates = torch.tensor([0.5, -1.0, 0.0])
    hooked = headgate(o, gates).transpose(1, 2).flatten(2) @ w
    folded = o.transpose(1, 2).flatten(2) @ (w * gates.repeat_interleave(5)[:, None])
    close(hooked, folded, atol=1e-5)


def test_identities_by_hand() -> None:
    A = hand()
    S = torch.tensor([False, True, False, True])
    close(mass(A, S).flatten(), [0.0, 0.5, 0.6, 0.8])
    v = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64).reshape(1, 1, 4, 1)
    close(partial(A, v, S).flatten(), [0.0, 5.0, 6.0, 305.0])
    close(column_mass(A).flatten(), [1.8, 1.6, 0.3, 0.3])
    valid = torch.tensor([[False, True, True, False]])
    close(column_mass(A, valid).flatten(), [0.7, 1.1, 0.2, 0.0])
    expected = [0.0, math.log(2), -0.4 * math.log(0.2) - 0.6 * math.log(0.6)]
    close(entropy(A).flatten()[:3], expected)
    assert float(entropy(torch.zeros(1, 1, 1, 4))) == 0.0
    assert float(entropy(A)[0, 0, 0]) == 0.0


def test_identities_with_per_sample_and_per_head_sets() -> None:
    q, k, v = random_qkv(25)
    z = dense_scores(q, k, 0.3, causal=True)
    A, lse = dense_map(z), z.logsumexp(-1)
    S = torch.rand(2, 4, 9, generator=torch.Generator().manual_seed(26)) > 0.5
    close(mass(A, S) + mass(A, ~S), torch.ones(2, 4, 9))
    close(partial(A, v, S) + partial(A, v, ~S), dense_out(A, v))
    for shape in (S[:1], S[:, :1], S[:1, :1], S[0, 0]):
        close(mass(A, shape), (A * shape.expand(2, 4, 9)[:, :, None]).sum(-1))
    inside = z.masked_fill(~S[:, :, None], -INF)  # F1, the two-call form
    close(mass(A, S), torch.exp(inside.logsumexp(-1) - lse))
    close(partial(A, v, S), mass(A, S)[..., None] * dense_out(dense_map(inside), v))
    finite = torch.where(A > 0, z, torch.zeros_like(z))
    close(entropy(A), lse - (A * finite).sum(-1))
    with pytest.raises(ValueError, match="key set"):
        mass(A, S[:, :, :5])
