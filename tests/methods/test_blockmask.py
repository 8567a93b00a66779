"""BlockMask: against loops over rows and blocks, the official choice of blocks, exact attention, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnsteer import BlockMask, HeadGate, Where, steer
from attnsteer.call import AttnCall
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.kernels import Attention, KeyBlocks, attend, attend_blocks, hide_blocks
from attnsteer.methods import blockmask
from attnsteer.testing import HOSTS, tiny_transformers, tiny_transformers_inputs
from tests.reference import efficiency as slow


class Attn(nn.Module):
    """Attention of given queries, keys and values, by a name that can be exchanged."""

    num_heads = 4

    def __init__(self, kv: int = 4):
        super().__init__()
        self.num_kv_heads = kv

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])


def draw(
    n: int, heads: int = 4, kv: int = 4, batch: int = 1, d: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, h, n, d, generator=g) for h in (heads, kv, kv))


def clustered(n: int, block: int, sharp: float, d: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Keys around one centre for each block, queries near one of the centres."""
    g = torch.Generator().manual_seed(3)
    centres = torch.randn(1, 4, n // block, d, generator=g)
    k = centres.repeat_interleave(block, 2) * 0.8 + 0.6 * torch.randn(1, 4, n, d, generator=g)
    at = torch.randint(0, n // block, (1, 4, n), generator=g)
    q = sharp * centres.gather(2, at[..., None].expand(-1, -1, -1, d)) + 0.5 * torch.randn(1, 4, n, d, generator=g)
    return q, k, torch.randn(1, 4, n, d, generator=g)


@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("n", [96, 90, 40])
def test_is_the_loop_over_rows_and_blocks(n: int, kv: int) -> None:
    """More rows than the mask is for and fewer, a ragged last block, grouped heads."""
    q, k, v = draw(n, kv=kv)
    model = Attn(kv)
    with steer(model, BlockMask(16, top_k=2)):
        out = model(q, k, v)
    for h in range(4):
        want = slow.block_attention(q[0, h], k[0, h // (4 // kv)], v[0, h // (4 // kv)], 16, 2, False)
        torch.testing.assert_close(out[0, h], want, atol=1e-5, rtol=1e-5)


def test_causal_is_the_loop_and_never_looks_ahead() -> None:
    """The causal form, by its kernel; a model whose sites are causal is in the laws."""
    q, k, v = draw(90)
    rows = torch.arange(90) // 16
    gate = torch.einsum("bhnd,bhcd->bhnc", q, torch.stack([k[:, :, c * 16 : c * 16 + 16].mean(2) for c in range(6)], 2))
    ids = torch.arange(6)
    there = (ids <= rows[:, None])[None, None]
    mine = (ids == rows[:, None])[None, None]
    keep = blockmask._by_rank(gate, there, mine, 3, "query_head")
    att = Attention(q, k, v, 0.25, causal=True)
    out, lse = attend_blocks(att, KeyBlocks(rows[None], keep))
    for h in range(4):
        want = slow.block_attention(q[0, h], k[0, h], v[0, h], 16, 3, True)
        torch.testing.assert_close(out[0, h], want, atol=1e-5, rtol=1e-5)
    masked = hide_blocks(att, KeyBlocks(rows[None], keep))
    z = masked.scores(slice(0, 90), slice(0, 90))
    torch.testing.assert_close(lse, z.logsumexp(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_causal_choice_by_threshold_is_that_of_the_keys_that_a_row_sees(share: float) -> None:
    """In the whole prompt, in chunks, step by step, and beside padding; the own block's later keys are in no row's choice."""
    model = HOSTS["llama"].build()
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    method = BlockMask(7, threshold=share)
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    class Watched(BlockMask):
        def bias(self, call: AttnCall) -> object:
            found = super().bias(call)
            if call.map.shape[2] == 40:
                seen[call.site.path] = (call.q[0], call.k[0], found.keep.expand(1, *call.map.shape[1:3], -1)[0])
            return found

    with torch.no_grad():
        with steer(model, Watched(7, threshold=share)):
            model(ids)
        with steer(model, method):
            whole = model(ids).logits[0]
            out = model(ids[:, :17], use_cache=True)
            parts = [out.logits[0]]
            for start, stop in ((17, 30), *((i, i + 1) for i in range(30, 40))):
                out = model(ids[:, start:stop], past_key_values=out.past_key_values, use_cache=True)
                parts.append(out.logits[0])
            padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
            mask = (torch.arange(44) >= 4).long()[None]
            beside = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits[0, 4:]
            begin = model(ids[:, :25]).logits[0]
    for q, k, keep in seen.values():
        for h in range(len(q)):
            want = slow.causal_share(q[h], k[h * len(k) // len(q)], 7, share)
            assert [row.nonzero()[:, 0].tolist() for row in keep[h]] == want
    for got, want in ((torch.cat(parts), whole), (beside, whole), (begin, whole[:25])):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_kernel_takes_padding_masks_biases_and_any_order_of_blocks() -> None:
    """Blocks that are scattered over the keys, keys in no block, masks by row, a bias of the keys, causality beside a mask."""
    q, k, v = draw(100, batch=2)
    g = torch.Generator().manual_seed(1)
    block = torch.randint(-1, 5, (2, 100), generator=g)
    keep = torch.rand(2, 4, 100, 5, generator=g) < 0.4
    mask = torch.rand(2, 1, 100, 100, generator=g) < 0.9
    bias = torch.randn(1, 4, 100, generator=g)
    for causal in (False, True):
        for given in (None, mask, torch.zeros(mask.shape).masked_fill(~mask, -1e30)):
            att = Attention(q, k, v, 0.25, mask=given, causal=causal, key_bias=bias)
            out, lse = attend_blocks(att, KeyBlocks(block, keep))
            want = hide_blocks(att, KeyBlocks(block, keep))
            z = want.scores(slice(0, 100), slice(0, 100))
            p = torch.softmax(z, -1).nan_to_num(0.0)
            torch.testing.assert_close(out, p @ v, atol=2e-5, rtol=1e-5)
            seen = ~z.isneginf().all(-1)
            torch.testing.assert_close(lse[seen], z.logsumexp(-1)[seen], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["query_head", "head_global", "overall", "block"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 0.95])
def test_threshold_is_the_official_choice(kind: str, share: float) -> None:
    g = torch.Generator().manual_seed(5)
    gate = torch.randn(1, 3, 12, 4, generator=g)
    home = torch.arange(12) // 3
    mine = (torch.arange(4) == home[:, None])[None, None]
    keep = blockmask._by_threshold(gate, torch.ones(1, 1, 12, 4, dtype=torch.bool), mine, share, kind)
    found = {(c, h, s) for _, h, s, c in keep.nonzero().tolist()}
    assert found == slow.vmoba_pairs(gate[0].permute(2, 0, 1), home.tolist(), kind, share)


def test_pooled_ranks_spend_one_budget() -> None:
    """`moba_topk` times the rows for a head, times the heads over all; own blocks first."""
    g = torch.Generator().manual_seed(6)
    gate = torch.randn(2, 3, 12, 4, generator=g)
    mine = (torch.arange(4) == (torch.arange(12) // 3)[:, None])[None, None]
    there = torch.ones(1, 1, 12, 4, dtype=torch.bool)
    by_head = blockmask._by_rank(gate, there, mine, 2, "head_global")
    assert (by_head.sum(dim=(2, 3)) == 24).all()
    over_all = blockmask._by_rank(gate, there, mine, 2, "overall")
    assert (over_all.sum(dim=(1, 2, 3)) == 72).all()
    assert (by_head & mine).sum() == (over_all & mine).sum() == 2 * 3 * 12
    # Every pair that is kept beats every one that is not, but for own ones.
    for b in range(2):
        rest = ~mine.expand(1, 3, 12, 4)[0]
        assert gate[b][over_all[b] & rest].min() > gate[b][~over_all[b] & rest].max()


@pytest.mark.parametrize("all_blocks", [BlockMask(16, top_k=6), BlockMask(16, threshold=1.0), BlockMask(96, top_k=1)])
def test_all_blocks_are_the_plain_model(all_blocks: BlockMask) -> None:
    q, k, v = draw(96)
    model = Attn()
    want = model(q, k, v)
    with steer(model, all_blocks, control=True):
        assert torch.equal(model(q, k, v), want)


def test_nearly_all_blocks_and_blocks_with_no_mass_change_little() -> None:
    """The error against exact attention is what is left out: none where the other blocks have no mass."""
    q, k, v = draw(96)
    k = k.clone()
    k[..., 0] = 0.0
    k[:, :, 16:32, 0], q = -60.0, q.clone()
    q[..., 0] = 40.0
    model = Attn()
    want = model(q, k, v)
    with steer(model, BlockMask(16, top_k=5)):
        out = model(q, k, v)
    torch.testing.assert_close(out[:, :, 32:], want[:, :, 32:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sharp", [1.0, 0.5])
def test_error_falls_with_the_budget_on_average(sharp: float) -> None:
    """On clustered keys; not row by row: leaving a block out can help one."""
    q, k, v = clustered(512, 32, sharp)
    model, errors, kept = Attn(), [], []
    for best in (1, 2, 4, 8, 12):
        with steer(model, BlockMask(32, top_k=best), measure=True) as run:
            model(q, k, v)
        record = next(iter(run.audit.records.values()))
        errors.append(record.error)
        kept.append(record.kept)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]
    assert kept == pytest.approx([1 / 16, 2 / 16, 4 / 16, 8 / 16, 12 / 16])


def test_audit_measures_the_error_of_the_sampled_rows() -> None:
    q, k, v = draw(96)
    model = Attn()
    exact = model(q, k, v)
    with steer(model, BlockMask(16, top_k=2), measure=True) as run:
        out = model(q, k, v)
    record = next(iter(run.audit.records.values()))
    rows = slice(0, 96, 2)
    want = (out - exact)[:, :, rows].norm() / exact[:, :, rows].norm()
    assert record.error == pytest.approx(float(want), rel=1e-4)
    assert "error" in run.audit.to_dict()["interventions"][0]["sites"]["Attn"]
    assert f"error {record.error:.4f}, kept 0.333" in str(run.audit)


def test_selected_rows_and_later_methods_see_the_masked_map() -> None:
    """Rows outside `where` are exact; a later method's masses are those of the masked map."""
    q, k, v = draw(96)
    model = Attn()
    want = model(q, k, v)
    with steer(model, BlockMask(16, top_k=1, where=Where(rows=(0, 20)))):
        out = model(q, k, v)
    torch.testing.assert_close(out[:, :, 20:], want[:, :, 20:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[:, :, :20], want[:, :, :20], atol=1e-3)
    gate = HeadGate({(0, 1): 0.5})
    with steer(model, BlockMask(16, top_k=2), gate):
        both = model(q, k, v)
    with steer(model, BlockMask(16, top_k=2), gate, reference=True):
        torch.testing.assert_close(both, model(q, k, v), atol=1e-5, rtol=1e-5)


def test_released_form_attends_to_all_where_only_own_blocks_are_chosen() -> None:
    q, k, v = draw(96)
    model = Attn()
    want = model(q, k, v)
    with steer(model, BlockMask(16, top_k=1, released=True), control=True):
        assert torch.equal(model(q, k, v), want)
    with steer(model, BlockMask(16, top_k=1)):
        assert not torch.allclose(model(q, k, v), want, atol=1e-3)
    assert BlockMask.released_code(455) == BlockMask(455, threshold=0.25, released=True)


def test_gradients_are_those_of_the_mask() -> None:
    q, k, v = (t.requires_grad_() for t in draw(96))
    model = Attn()
    with steer(model, BlockMask(16, top_k=2)):
        out = model(q, k, v)
    given = torch.autograd.grad(out.square().sum(), (q, k, v))
    with torch.no_grad(), steer(model, BlockMask(16, top_k=2)):
        torch.testing.assert_close(model(q, k, v), out, atol=1e-5, rtol=1e-5)
    rows = torch.arange(96) // 16
    g = torch.stack([k[:, :, c * 16 : c * 16 + 16].mean(2) for c in range(6)], 2)
    keep = torch.zeros(1, 4, 96, 6, dtype=torch.bool)
    fit = (q @ g.mT).masked_fill(torch.arange(6) == rows[:, None], torch.inf)
    keep.scatter_(-1, fit.topk(2, -1).indices, True)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=keep.repeat_interleave(16, -1))
    for got, want in zip(given, torch.autograd.grad(plain.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_padded_prompt_counts_blocks_from_its_first_token_and_decodes_as_one_call() -> None:
    """Long enough for the passes over blocks; the laws run the short forms."""
    model = HOSTS["llama"].build()
    ids = torch.randint(3, 60, (1, 80), generator=torch.Generator().manual_seed(0))
    method = BlockMask(8, top_k=3)
    with torch.no_grad(), steer(model, method):
        alone = model(ids).logits[0]
        padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids], 1)
        mask = torch.ones_like(padded)
        mask[:, :7] = 0
        beside = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits[0, 7:]
        first = model(ids[:, :70], use_cache=True)
        steps = model(ids[:, 70:], past_key_values=first.past_key_values).logits[0]
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(steps, alone[70:], atol=1e-4, rtol=1e-4)


def test_tiles_of_the_image_of_a_denoiser() -> None:
    """Tiles are blocks whatever the order of tokens; text rows of joint attention stay as they are."""
    host = HOSTS["sd"]
    unet = host.build()
    inputs = host.inputs(unet, 2, None, 0)
    want = host.run(unet, inputs)
    with steer(unet, BlockMask((2, 2), top_k=2, where=Where(kinds="self", layers=0)), measure=True) as run:
        out = host.run(unet, inputs)
    assert not torch.allclose(out, want) and 0 < next(iter(run.audit.records.values())).kept < 1
    joint = HOSTS["sd3"]
    model = joint.build()
    inputs = joint.inputs(model, 2, None, 0)
    with steer(model, BlockMask((2, 2), top_k=1, where=Where(kinds="joint", layers=0)), measure=True) as run:
        joint.run(model, inputs)
    assert 0 < next(iter(run.audit.records.values())).kept < 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BlockMask(16, threshold=1.5), "threshold"),
        (lambda: BlockMask(0, top_k=2), "tokens of a block"),
        (lambda: BlockMask((2, 2, 2), top_k=2), "tokens of a block"),
        (lambda: BlockMask(16, top_k=2, select="block"), "no form with top_k"),
        (lambda: BlockMask(16, top_k=2, select="rows"), "one of"),
    ],
)
def test_bad_parameters(make: object, says: str) -> None:
    with pytest.raises(SelectionError, match=says):
        make()


def test_refusals_say_what_to_do() -> None:
    llama = HOSTS["llama"].build()
    ids = torch.arange(3, 30)[None]
    pooled, uneven = (
        BlockMask(4, top_k=2, select="overall"),
        BlockMask((3, 5), top_k=1, where=Where(kinds="self", layers=0)),
    )
    with steer(llama, pooled, control=True), pytest.raises(UnsupportedHost, match="compete with later ones"):
        llama(ids)
    with pytest.raises(UnsupportedHost, match="needs grid"):
        steer(llama, BlockMask((2, 2), top_k=2))
    host = HOSTS["sd"]
    unet = host.build()
    with steer(unet, uneven, control=True), pytest.raises(UnsupportedHost, match="do not divide"):
        host.run(unet, host.inputs(unet, 2, None, 0))


def test_attention_with_everything_kept_is_exact() -> None:
    q, k, v = draw(128, batch=2)
    att = Attention(q, k, v, 0.25)
    blocks = KeyBlocks((torch.arange(128) // 32)[None], torch.ones(1, 1, 128, 4, dtype=torch.bool))
    torch.testing.assert_close(attend_blocks(att, blocks)[0], attend(att), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_window_cache_that_has_dropped_keys_is_refused() -> None:
    model = tiny_transformers("mistral")
    inputs = tiny_transformers_inputs("mistral", model, batch=2, length=12)
    with steer(model, BlockMask(2, top_k=2), control=True):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(UnsupportedHost, match=r"its cache holds 5 of 13 tokens \(a sliding window\)"):
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
    with steer(model, BlockMask(2, top_k=2, where=Where(phases="prefill"))):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
