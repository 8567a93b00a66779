"""Sparse coding over unembedding rows, a planted concept, and functions of heads from their weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnsteer import HeadGate, HeadSet
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.search import enhanced, head_pursuit, inverted, maps, somp
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs


def slow_somp(rows: torch.Tensor, dictionary: torch.Tensor, atoms: int) -> tuple[list[int], list[float]]:
    """The paper's loop as it stands, with a least-squares solver; neither centred nor normalised."""
    chosen, explained, residual = [], [], rows
    for _ in range(atoms):
        P = dictionary @ residual.T
        chosen.append(int(P.abs().sum(dim=1).argmax()))
        S = dictionary[chosen]
        W = torch.linalg.lstsq(S.T, rows.T).solution.T
        residual = rows - W @ S
        explained.append(float(1 - residual.norm() ** 2 / rows.norm() ** 2))
    return chosen, explained


def test_the_pursuit_is_that_of_the_paper() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 12, generator=g, dtype=torch.float64)
    dictionary = torch.randn(30, 12, generator=g, dtype=torch.float64)
    found = somp(rows, dictionary, 5, centre=False, normalise=False)
    chosen, explained = slow_somp(rows, dictionary, 5)
    assert list(found.atoms) == chosen and found.explained == pytest.approx(explained, abs=1e-10)
    planted = torch.rand(20, 3, generator=g, dtype=torch.float64) @ dictionary[[4, 9, 21]] + 7.0
    code = somp(planted, dictionary, 10)
    assert set(code.atoms) == {4, 9, 21} and code.explained[-1] == pytest.approx(1.0)
    assert somp(torch.zeros(3, 12), dictionary).atoms == ()


def released_somp(rows: torch.Tensor, dictionary: torch.Tensor, k: int) -> tuple[list[int], list[float]]:
    """The arithmetic of `SOMP(k)` in src/residual/sparse_decomposition.py of Flegyas/ResiDual at 004b0aa, and of its callers.

    The pursuit of the authors' paper before (arXiv 2411.00246): rows are centred, callers give F.normalize(dictionary), an atom is
    taken once, "evr" is the variance of the reconstruction over that of the rows, both summed over coordinates.
    """
    atoms, mean = torch.nn.functional.normalize(dictionary), rows.mean(dim=0, keepdim=True)
    left, free, chosen, explained = rows - mean, torch.ones(len(dictionary), dtype=rows.dtype), [], []
    for _ in range(k):
        chosen.append(int(((left @ atoms.T) * free).abs().sum(dim=0).argmax()))
        free[chosen[-1]] = 0
        made = (atoms[chosen].T @ torch.linalg.lstsq(atoms[chosen].T, (rows - mean).T).solution).T
        left = rows - mean - made
        explained.append(float((mean + made).std(dim=0).square().sum() / rows.std(dim=0).square().sum()))
    return chosen, explained


def test_the_pursuit_is_that_of_the_authors_code() -> None:
    g = torch.Generator().manual_seed(2)
    rows = torch.randn(9, 24, generator=g, dtype=torch.float64) * torch.linspace(0.2, 3, 24).double() + 2.0
    # Rows of unlike sizes, so that a dictionary that is not normalised would give another order.
    dictionary = torch.randn(50, 24, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, 50).double()[:, None]
    found, (chosen, explained) = somp(rows, dictionary, 7), released_somp(rows, dictionary, 7)
    assert list(found.atoms) == chosen and found.explained == pytest.approx(explained, abs=1e-12)
    for other in (somp(rows, dictionary, 7, centre=False), somp(rows, dictionary, 7, normalise=False)):
        assert other.explained != pytest.approx(explained, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_planted_concept_is_found(family: str) -> None:
    """One head's output projection writes into the span of three unembedding rows only."""
    model = tiny_transformers(family)
    concept = [11, 40, 77]
    layer = model.model.layers[1].self_attn.o_proj if family == "llama" else model.transformer.h[1].attn.c_proj
    with torch.no_grad():
        span = torch.linalg.qr(model.get_output_embeddings().weight[concept].T).Q
        weight = layer.weight.T if family == "llama" else layer.weight
        weight[32:48] = (weight[32:48] @ span) @ span.T
    batches = [tiny_transformers_inputs(family, model, batch=6, seed=s) for s in range(2)]
    found = head_pursuit(model, batches, concept, words=2)
    best = next(iter(found.top(1)))
    assert best == (1, 2) and found.scores[best] == pytest.approx(1.0, abs=1e-4)
    assert sorted(found.scores.values())[-2] < 0.6 and found.provenance["atoms"] == 3
    assert set(found.provenance["words"]["1.2"]) <= {*concept, *range(99)} and found.shape == (3, 4)
    assert inverted(found.top(1)) == HeadGate({(1, 2): -1.0}) and enhanced(found.top(1)).gates == {(1, 2): 5.0}


def test_bad_concepts_and_models_without_words() -> None:
    model = tiny_transformers("llama")
    batch = tiny_transformers_inputs("llama", model)
    with pytest.raises(SelectionError, match="vocabulary"):
        head_pursuit(model, [batch], [5, 1000])
    with pytest.raises(SelectionError, match="tokenizer="):
        head_pursuit(model, [batch], ["red"])
    with pytest.raises(SelectionError, match="two or more"):
        head_pursuit(model, [{k: v[:1] for k, v in batch.items()}], [5])
    with pytest.raises(UnsupportedHost, match="no unembedding"):
        head_pursuit(model.model, [batch], [5])
    with pytest.raises(UnsupportedHost, match="no unembedding"):
        maps(tiny_transformers("bert"), [(4, 5)])


def slow_maps(model: Any, pairs: list[tuple[int, int]], k: int, layer: int, head: int) -> float:
    """The lines of src/maps.py at 5f4799d, on the weights of a Llama by name."""
    block, attention = model.model.layers[0], model.model.layers[layer].self_attn
    src, dst = torch.tensor(pairs).T
    embeds = model.model.embed_tokens.weight[src]
    if layer:
        embeds = block.mlp(block.post_attention_layernorm(embeds))
    W_V = attention.v_proj.weight.T[:, 16 * (head // 2) : 16 * (head // 2 + 1)]
    W_O = attention.o_proj.weight.T[16 * head : 16 * (head + 1)]
    projection = (embeds @ (W_V @ W_O)) @ model.lm_head.weight.T
    _, indices = torch.topk(projection, k)
    return float((indices == dst.unsqueeze(1)).sum(dim=1).float().mean())


def test_relations_as_the_official_code_scores_them() -> None:
    model = tiny_transformers("llama")
    g = torch.Generator().manual_seed(1)
    pairs = [tuple(p) for p in torch.randint(4, 99, (40, 2), generator=g).tolist()]
    found = maps(model, pairs, top=30)
    with torch.no_grad():
        for layer in range(3):
            for head in range(4):
                assert found.scores[layer, head] == pytest.approx(slow_maps(model, pairs, 30, layer, head), abs=0.03)
        # A head that copies: its value-output product sends each embedding to its own unembedding row.
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        attention = model.model.layers[0].self_attn
        axes = torch.linalg.svd(model.model.embed_tokens.weight, full_matrices=False).Vh[:16]
        attention.v_proj.weight[:16] = axes
        attention.o_proj.weight[:, 16:32] = axes.T
    same = [(t, t) for t in range(4, 99)]
    copying, against = maps(model, same, top=5), maps(model, same, top=5, suppress=True)
    assert copying.top(1) == HeadSet([(0, 1)], scores=copying.scores) and copying.scores[0, 1] > 0.5
    assert against.scores[0, 1] < 0.1
    with pytest.raises(SelectionError, match="single tokens"):
        maps(model, [])
    for pairs in ([(4.5, 6)], [([4], [5])], [(4,)], ["ab"], [4]):
        with pytest.raises(SelectionError, match="pairs"):
            maps(model, pairs)
