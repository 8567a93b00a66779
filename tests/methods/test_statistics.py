"""Statistics over rows: the same whatever calls the rows come in, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import ACT, VHR, SpotLight, Where, steer
from attnsteer.errors import UnsupportedHost
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs

HEADS = {1: [0, 2], 2: [1]}
ALPHA = ACT(HEADS, 0.2, alpha=1.2)
RUNNING = ACT(HEADS, 0.2, 0.12, decode="running")
POOLED = SpotLight([[(1, 3)]], 0.9, pooled=True, where=Where(heads=HEADS))
# Repeats itself, so that lookup has candidates from the first call on.
PROMPT = torch.tensor([[9, 10, 11, 12, 9, 10, 11, 12, 9, 10]])


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_transformers("llama")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def generate(model: nn.Module, **options: Any) -> Any:
    return model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"use_cache": False}], ids=["lookup", "no cache"])
@pytest.mark.parametrize("method", [ALPHA, POOLED], ids=["ACT alpha", "SpotLight pooled"])
def test_candidates_behind_the_prompt_move_nothing(llama: nn.Module, method: Any, options: dict[str, Any]) -> None:
    """Candidates in the prompt's own call are neither counted among its tokens nor pooled with its rows."""
    with steer(llama, method):
        greedy, other = generate(llama), generate(llama, **options)
    assert torch.equal(greedy.sequences, other.sequences)
    assert max(far(a, b) for a, b in zip(greedy.logits, other.logits, strict=True)) <= 1e-5


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"use_cache": False}], ids=["lookup", "no cache"])
def test_running_means_take_one_token_at_a_time(llama: nn.Module, options: dict[str, Any]) -> None:
    with steer(llama, RUNNING, control=True), pytest.raises(UnsupportedHost, match=r"decode='running'.*has several"):
        generate(llama, **options)


def test_running_means_need_the_prompt(llama: nn.Module) -> None:
    cache = llama(input_ids=PROMPT, use_cache=True).past_key_values
    with steer(llama, RUNNING, control=True), pytest.raises(UnsupportedHost, match="sinks are not known"):
        llama(input_ids=PROMPT[:, :1], past_key_values=cache)
    later = RUNNING.new(where=Where(phases="decode"))
    with steer(llama, later, control=True), pytest.raises(UnsupportedHost, match="sinks are not known"):
        generate(llama)


def test_a_pooled_share_looks_ahead(llama: nn.Module) -> None:
    """A later token of the prompt moves an earlier row, so a cache is not cut inside it; a scored continuation moves nothing."""
    assert POOLED.looks_ahead and not SpotLight([[(1, 3)]]).looks_ahead
    other = PROMPT.clone()
    other[:, -1] = 60
    with steer(llama, POOLED) as run:
        first, second = (llama(input_ids=ids).logits[:, :-1] for ids in (PROMPT, other))
        assert far(first, second) > 1e-3
        cache = llama(input_ids=PROMPT, use_cache=True).past_key_values
        cache.crop(-4)
        with pytest.raises(UnsupportedHost, match="cut back from 10 to 6"):
            llama(input_ids=PROMPT[:, :1], past_key_values=cache)
        scores = []
        for ids in (PROMPT, other):
            cache = llama(input_ids=PROMPT, use_cache=True).past_key_values
            with run.freeze():
                scores.append(llama(input_ids=ids, past_key_values=cache).logits)
    assert torch.equal(scores[0][:, :-1], scores[1][:, :-1])


def packed(model: nn.Module, method: Any) -> tuple[Tensor, list[Tensor]]:
    """(logits of two sequences in one row, those of each alone)."""
    parts = [PROMPT[:, :7] + 1, PROMPT]
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts])[None]
    with steer(model, method):
        together = model(input_ids=torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
        return together, [model(input_ids=p, use_cache=False).logits for p in parts]


FIRST_HIT = ACT({1: [0, 1, 2, 3]}, 0.1, 0.05, exclude="first_hit")


@pytest.mark.parametrize("method", [ALPHA, FIRST_HIT, POOLED], ids=["ACT alpha", "ACT first hit", "SpotLight pooled"])
def test_packed_sequences_have_statistics_of_their_own(llama: nn.Module, method: Any) -> None:
    together, alone = packed(llama, method)
    assert far(together, torch.cat(alone, dim=1)) <= 1e-5


def test_heads_chosen_at_the_end_of_a_prompt_are_refused_for_packed_ones() -> None:
    model = tiny_transformers("llava")
    inputs = [tiny_transformers_inputs("llava", model, batch=1, length=n, seed=n) for n in (8, 10)]
    ids = torch.cat([i["input_ids"] for i in inputs], dim=1)
    positions = torch.cat([torch.arange(i["input_ids"].shape[1]) for i in inputs])[None]
    with steer(model, VHR(2.0), control=True), pytest.raises(UnsupportedHost, match=r"VHR.*several sequences"):
        model(
            input_ids=ids,
            position_ids=positions,
            pixel_values=torch.cat([i["pixel_values"] for i in inputs]),
            use_cache=False,
        )
