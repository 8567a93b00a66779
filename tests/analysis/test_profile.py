"""Readings of heads against the dense map, a planted induction model, weights, words; sinks and their frames."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from attnsteer import HeadSet, Where
from attnsteer.analysis import head_profile, head_weights, sinks
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs


def dense_maps(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Eager maps [B, H, n, n] of a twin with the same weights."""
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        return list(twin.eval()(**inputs, output_attentions=True).attentions)


def test_a_selection_of_heads_is_part_of_the_whole() -> None:
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model, batch=2, length=10)
    whole = head_profile(model, [inputs], words=1)
    for heads, want in (([1, 3], [(1, 1), (1, 3)]), (HeadSet({1: [2]}), [(1, 2)])):
        some = head_profile(model, [inputs], words=1, where=Where(layers=[1], heads=heads))
        assert list(some.heads) == want
        for name in ("entropy", "previous", "copying"):
            assert some[name] == pytest.approx({p: whole[name][p] for p in want}, abs=1e-6, nan_ok=True)
        assert all(some.words[p] == whole.words[p] for p in want)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_readings_are_those_of_the_dense_map(padding: str | None) -> None:
    model = tiny_transformers("llama")
    inputs = tiny_transformers_inputs("llama", model, batch=3, length=14, padding=padding)
    inputs["input_ids"][:, 9] = inputs["input_ids"][:, 5]
    inputs["input_ids"][:, 4] = inputs["input_ids"][:, 8]
    table = head_profile(model, [inputs], theta=0.2, weights=False)
    loose = head_profile(model, [inputs], theta=None, rows="all", weights=False)
    want: dict[str, list[list[float]]] = {}
    hits, high = torch.zeros(12), torch.zeros(12)
    for b in range(3):
        mask = inputs["attention_mask"][b].bool()
        ids = inputs["input_ids"][b][mask]
        A = torch.cat([m[b][:, mask][:, :, mask] for m in dense_maps(model, inputs)])
        n = len(ids)
        i, j = torch.arange(n)[:, None], torch.arange(n)
        before = torch.cat([torch.tensor([-1]), ids[:-1]])
        P = (before[None] == ids[:, None]) & (j <= i) & (j >= 1)
        rows = [r for r in range(1, n) if P[r].any()]
        a = A[:, 1:]
        entropy = torch.special.entr(a).sum(-1)
        J = (a.pow(2).sum(-1) - 2 * a.pow(3).sum(-1) + a.pow(2).sum(-1) ** 2).clamp_min(0).sqrt()
        columns = A.sum(1) / (n - j)
        own = {
            "previous": torch.stack([A[:, r, r - 1] for r in range(1, n)], -1).mean(-1),
            "induction": (A * P)[:, rows].sum(-1).mean(-1) if rows else torch.full((12,), math.nan),
            "entropy": entropy.mean(-1),
            "eff": entropy.exp().mean(-1),
            "sensitivity": J.mean(-1),
            "distance": (a * (i - j).abs()[1:]).sum(-1).mean(-1),
            "sink_first": columns[:, 0],
            "top_mass_5": a.topk(min(5, n), -1).values.sum(-1).mean(-1),
        }
        hits += ((A >= 0.2) & (j == i - 1))[:, 1:].sum((1, 2))
        high += (A >= 0.2)[:, 1:].sum((1, 2))
        for name, value in own.items():
            want.setdefault(name, []).append(value)
        full = (A * (j == i - 1))[:, 1:].sum((1, 2)) / (n - 1)
        assert torch.allclose(loose.column("previous").top[b], full.double(), atol=1e-5)
    for name, values in want.items():
        mean = torch.stack(values).nanmean(0)
        assert torch.allclose(table.column(name).values(), mean.double(), atol=2e-5), name
    agreement = table.column("agreement_previous")
    # Counted exactly, over all inputs; a proportion of fewer than a hundred pairs is none.
    assert torch.equal(agreement.top.sum(0), hits.double()) and torch.equal(agreement.bottom.sum(0), high.double())
    assert torch.equal(agreement.values().isnan(), high < 100)


def test_mass_above_a_threshold_as_provis_weighs_it() -> None:
    """compute_edge_features.py of salesforce/provis at b23402d: weights are attention above `min_attn`, over their total.

    Our agreement counts the pairs instead; the mass form without a threshold is the same for min_attn = 0.
    """
    model = tiny_transformers("bert")
    inputs = tiny_transformers_inputs("bert", model, batch=1, length=9)
    near = lambda block: (block.i - block.j).abs() == 2  # noqa: E731
    table = head_profile(model, [inputs], patterns={"near": near}, theta=None, rows="all", weights=False)
    for layer, A in enumerate(dense_maps(model, inputs)):
        attn = (A > 0) * A
        weight_total, weighted_sum = attn.sum((0, 2, 3)), torch.zeros(4)
        for to_index in range(9):
            for from_index in range(9):
                weighted_sum += attn[0, :, from_index, to_index] * float(abs(from_index - to_index) == 2)
        got = torch.tensor([table["near"][layer, h] for h in range(4)])
        assert torch.allclose(got, weighted_sum / weight_total, atol=1e-5)


class Planted:
    """A two-layer attention-only Llama: head (0, 0) looks at the token before, head (1, 1) behind an earlier same token.

    One-hot tokens in the first 32 dimensions, one-hot positions are not needed: rotary phases give the previous token.
    """

    def __init__(self) -> None:
        import transformers

        config = transformers.GPT2Config(
            vocab_size=20, n_positions=32, n_embd=128, n_layer=2, n_head=2, n_inner=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        self.model = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()
            for m in self.model.modules():
                if isinstance(m, torch.nn.LayerNorm):
                    m.weight.fill_(1.0)
            t = self.model.transformer
            t.wte.weight[:, :20] = torch.eye(20)
            t.wpe.weight[:, 32:64] = torch.eye(32)
            sharp = 20.0
            # Layer 0, head 0: the query at position p asks for the key at p - 1, and carries that token to dimensions 64 and on.
            first = t.h[0].attn
            first.c_attn.weight[32:64, 0:32] = sharp * torch.eye(32).roll(-1, dims=1)
            first.c_attn.weight[32:64, 128 : 128 + 32] = torch.eye(32)
            first.c_attn.weight[:20, 256:276] = torch.eye(20)
            first.c_proj.weight[:20, 64:84] = torch.eye(20)
            # Layer 1, head 1: the token asks for keys whose carried token is the same.
            second = t.h[1].attn
            second.c_attn.weight[:20, 64:84] = sharp * torch.eye(20)
            second.c_attn.weight[64:84, 128 + 64 : 128 + 84] = torch.eye(20)


def test_a_planted_induction_model_is_found(tmp_path: Path) -> None:
    planted = Planted().model
    g = torch.Generator().manual_seed(0)
    half = torch.stack([torch.randperm(18, generator=g)[:12] + 1 for _ in range(6)])
    table = head_profile(planted, [{"input_ids": torch.cat([half, half], dim=1)}], weights=False)
    assert table.to_heads("previous", top=1) == HeadSet([(0, 0)], scores={(0, 0): table["previous"][0, 0]})
    assert list(table.to_heads("induction", top=1)) == [(1, 1)]
    assert table["previous"][0, 0] > 0.9 and table["induction"][1, 1] > 0.6
    assert max(v for p, v in table["induction"].items() if p != (1, 1)) < 0.3
    low, high = table.intervals("induction")[1, 1][1:]
    assert low <= table["induction"][1, 1] <= high and float(table.column("induction").chance.max()) < 0.2
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    table.plot("induction", tmp_path / "induction.png", selected=table.to_heads("induction", top=1))
    table.save(tmp_path / "t.json")
    table.save(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().count("\n") == 5 and "induction" in str(table)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_weights_of_heads_make_what_the_model_makes(family: str) -> None:
    """v and the written output from our slices, on another text than the one that they were found on."""
    model = tiny_transformers(family)
    weights, readout = head_weights(model)
    inputs = tiny_transformers_inputs(family, model, batch=1)
    from attnsteer.analysis.projections import look

    seen = look(model, inputs)
    for w in weights.values():
        has = seen.sites[w.site.path]
        name = next(
            n for n, o in seen.outputs.items() if n.startswith(w.site.path) and o[0].shape[-1] >= w.value.shape[0] * 16
        )
        x = seen.inputs[name][0].float()
        for head in range(w.site.heads):
            v = x @ w.value[w.kv(head)] + (0 if w.value_bias is None else w.value_bias[w.kv(head)])
            assert torch.allclose(v[0], has["v"][0, w.kv(head)], atol=1e-5)
        assert w.norm is not None and (w.post is not None) == (family == "gemma2")
        assert w.query is not None and w.query.shape == (4, 64, 16)
    assert readout.norm is not None and readout.unembedding.shape == (64, 99) and not readout.tied


def test_copying_and_words_of_a_planted_head() -> None:
    model = tiny_transformers("llama")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        attention = model.model.layers[1].self_attn
        axes = torch.linalg.svd(model.model.embed_tokens.weight, full_matrices=False).Vh[:16]
        attention.v_proj.weight[:16], attention.o_proj.weight[:, :16] = axes, axes.T
    weights, readout = head_weights(model)
    from attnsteer.analysis.profile import weight_readings

    raw = weight_readings(weights, readout, tuple((1, h) for h in range(4)), fold=False)["copying"].values()
    # All eigenvalues of E W_V W_O U are above zero; the same by the whole [V, V] product.
    assert float(raw[0]) == pytest.approx(1.0, abs=1e-6) and float(raw[1:].abs().max()) < 0.5
    w = weights[1]
    whole = readout.embedding.double() @ w.value[1].double() @ w.output[2].double() @ readout.unembedding.double()
    values = torch.linalg.eigvals(whole)
    assert float(raw[2]) == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-6)


def test_direct_logits_add_up_with_the_rest() -> None:
    """All heads' direct effects, with embedding and MLPs by hooks, are the logit difference (frozen final norm)."""
    model = tiny_transformers("llama").double()
    inputs = tiny_transformers_inputs("llama", model, batch=2)
    target = [(7, 30), (11, 50)]
    table = head_profile(model, [inputs], target=target, weights=False)
    parts, hooks = [], []
    for layer in model.model.layers:
        hooks.append(layer.mlp.register_forward_hook(lambda _, __, o: parts.append(o[:, -1])))
    hooks.append(model.model.embed_tokens.register_forward_hook(lambda _, __, o: parts.append(o[:, -1])))
    final = []
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, a: final.append(a[0][:, -1])))
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    for hook in hooks:
        hook.remove()
    scale = (final[0].pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    U = model.lm_head.weight
    with torch.no_grad():
        d = torch.stack([U[t] - U[f] for t, f in target]) * model.model.norm.weight / scale
        rest = sum((p * d).sum(-1) for p in parts)
        want = torch.stack([logits[b, t] - logits[b, f] for b, (t, f) in enumerate(target)])
    assert torch.allclose(table.column("direct_logit").top.sum(1) + rest, want, atol=1e-5)


def test_grids_and_bad_options() -> None:
    vit = tiny_transformers("vit")
    pixels = {"pixel_values": tiny_transformers_inputs("vit", vit)["pixel_values"]}
    table = head_profile(vit, [pixels], grid=(4, 4), ahead=1)
    whole = sum(table.column(n).values() for n in ("ring_0", "ring_1", "ring_2", "ring_3", "to_first"))
    assert torch.allclose(whole, torch.ones(12).double(), atol=1e-5)
    with pytest.raises(SelectionError, match="tokens; the map is"):
        head_profile(vit, [pixels], grid=(3, 4))
    with pytest.raises(SelectionError, match="no inputs"):
        head_profile(vit, [], grid=(4, 4))
    with pytest.raises(SelectionError, match="Did you mean"):
        table.column("ring_9x")
    with pytest.raises(UnsupportedHost, match="no unembedding"):
        head_profile(tiny_transformers("bert"), [tiny_transformers_inputs("bert", tiny_transformers("bert"))], words=3)


def test_sinks_of_columns_and_massive_activations(tmp_path: Path) -> None:
    model = tiny_transformers("llama")
    with torch.no_grad():
        # One token whose embedding is huge in one dimension.
        model.model.embed_tokens.weight[5, 3] = 4000.0
    inputs = tiny_transformers_inputs("llama", model, batch=3, length=12, padding="left")
    found = sinks(model, [inputs], threshold=0.25)
    for b in range(3):
        assert inputs["attention_mask"][b].sum() == 12 - b
    A = torch.stack(dense_maps(model, inputs), dim=1)
    for column, (layer, head) in enumerate(found.heads):
        values = []
        for b in range(3):
            own = A[b, layer, head, b:, b:]
            values.append(own.sum(0)[:8] / torch.arange(12 - b, 12 - b - 8, -1))
        want = torch.stack(values).double()
        # The eighth token of the shortest input has three rows only, too few to say.
        assert torch.allclose(found.alpha[column, :7], want.mean(0)[:7], atol=1e-5)
        assert found.share[column, 0] == pytest.approx(float((want[:, 0] > 0.25).double().mean()))
        strong = [k for k in found.tokens((layer, head)) if k < 7]
        assert set(strong) == set((want.mean(0)[:7] > 0.25).nonzero()[:, 0].tolist())
    assert 0 <= found.rate(0) <= 1 and found.kind((0, 0)) in ("centralised", "bidirectional", "distributed")
    placed = inputs | {"input_ids": inputs["input_ids"].clone()}
    placed["input_ids"][1, 4] = 5
    massive = sinks(model, [placed]).massive
    places = [(m.layer, m.sample, m.index, m.dim, m.token) for m in massive]
    assert (0, 1, 3, 3, 5) in places and {m.token for m in massive} == {5}
    assert list(found.to_heads(0, top=1)) == [max(zip(found.alpha[:, 0].tolist(), found.heads, strict=True))[1]]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found.plot(tmp_path / "sinks.png")
    with pytest.raises(SelectionError, match="threshold"):
        sinks(model, [inputs], threshold=1.5)
    bert = tiny_transformers("bert")
    both = sinks(bert, [tiny_transformers_inputs("bert", bert)], where=Where(layers=[1]))
    assert both.frame.shape == (4, 4) and "heads" in str(both)
