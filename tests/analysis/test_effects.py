"""Effects of gates, retrieval as the official script counts it, groups of heads."""

from __future__ import annotations

import pytest
import torch

from attnsteer import HeadGate
from attnsteer.analysis import Needle, clusters, gating_effects, head_profile, retrieval_scores
from attnsteer.errors import SelectionError
from attnsteer.search.screen import measured
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.search.common import random_choices


def test_effects_of_gates() -> None:
    model, samples = tiny_transformers("llama"), random_choices(3, lengths=(8,))
    table = gating_effects(model, samples)
    plain = measured(model, None, samples, "choice")
    want = measured(model, HeadGate({(1, 2): 0.0}), samples, "choice") - plain
    assert table["prune_effect"][1, 2] == pytest.approx(float(want.mean()), abs=1e-6)
    assert table["deviation"][1, 2] == pytest.approx(float(want.abs().mean()), abs=1e-6)
    quick = gating_effects(model, samples, exact=False)
    assert quick.column("prune_effect").top.shape == (3, 12) and 0 <= table.facts["alike"] <= 1
    both = head_profile(model, [tiny_transformers_inputs("llama", model)]).joined(table)
    assert {"entropy", "prune_effect"} <= set(both.columns)


def test_retrieval_as_the_official_script_counts_it() -> None:
    """retrieval_calculate of nightdessert/Retrieval_Head at 1012272, on maps of an eager twin and a greedy answer."""
    model = tiny_transformers("llama")
    twin = tiny_transformers("llama", attn_implementation="eager")
    g = torch.Generator().manual_seed(3)
    tests, want = [], []
    for _ in range(4):
        prompt = torch.randint(4, 99, (14,), generator=g)
        with torch.no_grad():
            answer = twin.generate(input_ids=prompt[None], max_new_tokens=6, do_sample=False)[0, 14:].tolist()
            # A needle that the model says for certain.
            prompt[4:8] = torch.tensor(answer[:4])
            answer = twin.generate(input_ids=prompt[None], max_new_tokens=6, do_sample=False)[0, 14:].tolist()
            attentions = twin(
                input_ids=torch.cat([prompt, torch.tensor(answer[:-1])])[None], output_attentions=True
            ).attentions
        needle_start, needle_end = 4, 8
        score = torch.zeros(3, 4)
        for step, inp in enumerate(answer):
            for layer in range(3):
                for head in range(4):
                    _, idx = attentions[layer][0][head][13 + step].topk(1)
                    for i in idx:
                        if needle_start <= i < needle_end and inp == prompt[i].item():
                            score[layer][head] += 1 / (needle_end - needle_start)
                            break
        own = set(prompt[4:8].tolist())
        if len(own & set(answer)) / len(own) > 0.5:
            want.append(score)
        tests.append(Needle(prompt.tolist(), (4, 8)))
    table = retrieval_scores(model, tests, new_tokens=6, released=True)
    assert table.facts["found"] == len(want)
    if want:
        assert torch.allclose(
            table.column("retrieval").values(), torch.stack(want).mean(0).flatten().double(), atol=1e-6
        )
    once = retrieval_scores(model, tests, new_tokens=6)
    assert bool((once.column("retrieval").top <= table.column("retrieval").top + 1e-12).all())
    with pytest.raises(SelectionError, match="no range"):
        retrieval_scores(model, [{"prompt": [5, 6], "needle": (1, 4)}])


def test_groups_of_heads() -> None:
    model = tiny_transformers("llama")
    table = head_profile(model, [tiny_transformers_inputs("llama", model)], weights=False, theta=None)
    groups, inertia = clusters(table, 3)
    assert set(groups) == set(table.heads) and set(groups.values()) == {0, 1, 2} and inertia > 0
    sizes = [list(groups.values()).count(k) for k in range(3)]
    assert sizes == sorted(sizes, reverse=True) and clusters(table, 3)[0] == groups
    with pytest.raises(SelectionError, match="groups"):
        clusters(table, 13)
