"""Norm-based maps: against loops over eager maps and weights, and the sums that they must give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.reading import norm_maps
from attnsteer.reading.norms import gauss
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.reference import reading as slow


def setting(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = tiny_transformers(family)
    return model, {"input_ids": tiny_transformers_inputs(family, model, batch=1, length=6, seed=2)["input_ids"]}


@torch.no_grad()
def llama_parts(
    model: nn.Module, ids: dict[str, Tensor], layer: int
) -> tuple[list[list[list[Tensor]]], Tensor, Tensor]:
    """(P_ij v_j W_O of each head, row and token; what enters the layer; what leaves it)."""
    model.set_attn_implementation("eager")
    out = model(**ids, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    own = model.model.layers[layer]
    x = out.hidden_states[layer][0]
    v = own.self_attn.v_proj(own.input_layernorm(x))
    A, d = out.attentions[layer][0], model.config.head_dim
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    W = own.self_attn.o_proj.weight
    parts = [
        [
            [A[h, i, j] * (W[:, h * d : (h + 1) * d] @ v[j, h // group * d : (h // group + 1) * d]) for j in range(6)]
            for i in range(6)
        ]
        for h in range(len(A))
    ]
    entered: list[Tensor] = []
    hook = own.register_forward_hook(lambda m, a, o: entered.append(o if isinstance(o, Tensor) else o[0]))
    model(**ids)
    hook.remove()
    return parts, x, entered[0][0]


def test_norms_are_those_of_the_vectors() -> None:
    model, ids = setting("llama")
    parts, x, after = llama_parts(model, ids, 1)
    heads = norm_maps(model, ids, "heads")[1].of(0)
    together = norm_maps(model, ids, "attention", layers=[1])[1].of(0)
    residual = norm_maps(model, ids, "residual", rows=[2, 5])[1].of(0)
    for i in range(6):
        for j in range(6):
            for h in range(len(parts)):
                assert abs(heads[h, i, j] - parts[h][i][j].norm()) <= 1e-5
            assert abs(together[i, j] - sum(p[i][j] for p in parts).norm()) <= 1e-5
    for r, i in enumerate((2, 5)):
        for j in range(6):
            assert abs(residual[r, j] - (sum(p[i][j] for p in parts) + (i == j) * x[i]).norm()) <= 1e-5

    # Through the feed-forward block: a closed form of the gated unit along the straight path, by a fine midpoint sum.
    own = model.model.layers[1]
    block = norm_maps(model, ids, "block", layers=[1], rows=[4])[1].of(0)
    vectors = [sum(p[4][j] for p in parts) + (j == 4) * x[4] for j in range(6)]
    carried = slow.gated(
        vectors,
        own.post_attention_layernorm.weight,
        model.config.rms_norm_eps,
        own.mlp.gate_proj.weight,
        own.mlp.up_proj.weight,
        own.mlp.down_proj.weight,
    )
    whole = sum(vectors) + sum(carried)
    assert (whole - after[4]).abs().max() <= 1e-4
    for j in range(6):
        assert abs(block[0, j] - (vectors[j] + carried[j]).norm()) <= 1e-3


def test_blocks_with_biases_add_up_and_others_are_refused() -> None:
    model, ids = setting("gpt2")
    maps = {
        scope: norm_maps(model, ids, scope, rows="last")[0].of(0) for scope in ("residual", "feed_forward", "block")
    }
    assert all(m.shape == (1, 6) and torch.isfinite(m).all() and (m > 0).all() for m in maps.values())
    # The triangle: what the block adds moves no token by more than its own size.
    assert ((maps["block"] - maps["residual"]).abs() <= maps["feed_forward"] + 1e-5).all()
    fine = norm_maps(model, ids, "feed_forward", rows="last", nodes=64)[0].of(0)
    assert (fine - maps["feed_forward"]).abs().max() <= 1e-4
    bert, words = setting("bert")
    with pytest.raises(UnsupportedHost, match="post-norm"):
        norm_maps(bert, words, "block")
    assert norm_maps(bert, words, "attention")[0].of(0).shape == (6, 6)
    with pytest.raises(SelectionError, match="one of"):
        norm_maps(model, ids, "blok")
    with pytest.raises(SelectionError, match="no row 9"):
        norm_maps(model, ids, rows=[9])


def test_quadrature() -> None:
    for nodes in (1, 4, 16):
        x, w = gauss(nodes)
        for power in range(2 * nodes):
            assert abs(sum(b * a**power for a, b in zip(x, w, strict=True)) - 1 / (power + 1)) < 1e-12
