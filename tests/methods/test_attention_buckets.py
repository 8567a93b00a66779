"""AttentionBuckets against models built with each base, over all ways of decoding; its search against the official code's."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import AttentionBuckets, HeadGate, Where, steer
from attnsteer.errors import NeverFired, SelectionError, UnsupportedHost
from attnsteer.methods.attentionbuckets import mixed
from attnsteer.search import rotary_bases
from attnsteer.search.bases import _Waves, waveform
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.reference import buckets

BASES = (10000.0, 200.0, 3000.0)
SCALED: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@functools.cache
def model_of(kind: str, base: float = 10000.0) -> nn.Module:
    # Shorter than the prompts, so that a dynamic rule acts.
    more = {"max_position_embeddings": 8} if kind == "dynamic" else {}
    return tiny_transformers("llama", rope_parameters={**SCALED[kind], "rope_theta": base}, **more)


def prompts() -> dict[str, Tensor]:
    return tiny_transformers_inputs("llama", model_of("default"), batch=3, length=12, padding="left", seed=1)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor], *methods: Any, control: bool = False) -> Tensor:
    with steer(model, *methods, control=control):
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def plain(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("kind", SCALED)
def test_each_stream_is_a_model_built_with_its_base_and_every_position_is_mixed(kind: str) -> None:
    inputs = prompts()
    ours = logits(model_of(kind), inputs, AttentionBuckets(BASES))
    streams = [plain(model_of(kind, base), inputs) for base in BASES]
    theirs = torch.stack([buckets.mix([s[i] for s in streams]) for i in range(len(ours))])
    assert (ours - theirs).abs().max() <= 1e-5
    assert min((ours - s).abs().max() for s in streams) > 1e-3


def test_equal_bases_are_the_plain_model_and_its_own_base_is_it_to_the_bit() -> None:
    model, inputs = model_of("default"), prompts()
    base = plain(model, inputs)
    assert torch.equal(logits(model, inputs, AttentionBuckets((10000,)), control=True), base)
    for mix in ("logits", "probs"):
        same = logits(model, inputs, AttentionBuckets((10000.0,) * 3, mix), control=True)
        wanted = base if mix == "logits" else base.log_softmax(-1)
        assert (same - wanted).abs().max() <= 1e-5
    with pytest.raises(NeverFired, match="changed nothing"):
        logits(model, inputs, AttentionBuckets((10000.0,)))
    # One other base is the model built with it.
    alone = logits(model, inputs, AttentionBuckets((200.0,)))
    assert (alone - plain(model_of("default", 200.0), inputs)).abs().max() <= 1e-6


def test_distributions_are_averaged_by_their_largest_probabilities() -> None:
    draw = torch.Generator().manual_seed(0)
    streams = [torch.randn(2, 5, generator=draw) for _ in range(3)]
    p = torch.stack(streams).softmax(-1)
    weight = p.amax(-1, keepdim=True) / p.amax(-1, keepdim=True).sum(0)
    assert torch.allclose(mixed(streams, "probs").exp(), (weight * p).sum(0), atol=1e-6)
    assert mixed([s.bfloat16() for s in streams], "logits").dtype == torch.bfloat16


@torch.no_grad()
def test_each_way_of_decoding_is_that_of_models_built_with_each_base() -> None:
    model, inputs = model_of("default"), prompts()
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    wanted = []
    for _ in range(5):
        position = (mask.cumsum(-1) - 1).clamp_min(0)
        streams = [
            model_of("default", b)(input_ids=ids, attention_mask=mask, position_ids=position).logits[:, -1]
            for b in BASES
        ]
        wanted.append(torch.stack([buckets.mix([s[i] for s in streams]) for i in range(3)]))
        ids = torch.cat([ids, wanted[-1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    with steer(model, AttentionBuckets(BASES)):
        for ways in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            made = model.generate(**inputs, **ways, **options)
            assert torch.equal(made.sequences, ids), ways
            assert (torch.stack(list(made.logits)) - torch.stack(wanted)).abs().max() <= 1e-5, ways
        one = {k: v[:1] for k, v in inputs.items()}
        made = model.generate(**one, prompt_lookup_num_tokens=2, max_new_tokens=5, do_sample=False)
        assert torch.equal(made, ids[:1])
        beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **beams), model.generate(**inputs, use_cache=False, **beams))


@torch.no_grad()
def test_caches_of_streams_follow_the_first() -> None:
    model, inputs = model_of("default"), prompts()
    one = {k: v[:1] for k, v in inputs.items()}
    token = torch.tensor([[7]])
    with steer(model, AttentionBuckets(BASES)):
        whole = model(input_ids=torch.cat([one["input_ids"], token], dim=1)).logits[:, -1]
        cache = model(input_ids=one["input_ids"], use_cache=True).past_key_values
        kept = copy.deepcopy(cache)
        for held in (cache, kept):
            assert (model(input_ids=token, past_key_values=held).logits[:, -1] - whole).abs().max() <= 1e-5
        cache.crop(-1)
        assert (model(input_ids=token, past_key_values=cache).logits[:, -1] - whole).abs().max() <= 1e-5
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        twice = model(input_ids=token.expand(2, 1), past_key_values=cache).logits[:, -1]
        assert (twice - whole).abs().max() <= 1e-5
    assert not [name for name in vars(cache) if "attnsteer" in name]
    filled = model(input_ids=one["input_ids"], use_cache=True).past_key_values
    with pytest.raises(UnsupportedHost, match="Run the prefill inside"), steer(model, AttentionBuckets(BASES)):
        model(input_ids=token, past_key_values=filled)


@torch.no_grad()
def test_another_method_acts_in_each_stream() -> None:
    model, inputs, gate = model_of("default"), prompts(), HeadGate({(1, 0): -1.0})
    ours = logits(model, inputs, gate, AttentionBuckets(BASES))
    streams = [logits(model_of("default", b), inputs, gate) for b in BASES]
    theirs = torch.stack([buckets.mix([s[i] for s in streams]) for i in range(len(ours))])
    assert (ours - theirs).abs().max() <= 1e-5


def test_models_without_one_base_are_refused() -> None:
    method = AttentionBuckets(BASES)
    for name, message in (
        ("gpt2", "has no such module"),
        ("gemma3_text", "do not follow from one rope_theta"),
        ("t5", "has no such module"),
    ):
        with pytest.raises(UnsupportedHost, match=message):
            steer(tiny_transformers(name), method)
    model = model_of("default")
    with pytest.raises(UnsupportedHost, match="Steer the model with its language head"):
        steer(model.model, method)
    odd = tiny_transformers("llama")
    odd.model.rotary_emb.inv_freq.mul_(0.5)
    odd.model.rotary_emb.original_inv_freq.mul_(0.5)
    with pytest.raises(UnsupportedHost, match="frequencies of their own"):
        steer(odd, method)
    with pytest.raises(SelectionError, match="selects a part of it"):
        steer(model, AttentionBuckets(BASES, where=Where(layers=[0])))
    inputs = prompts()
    with steer(model, method, control=True), pytest.raises(UnsupportedHost, match="compute the loss from the logits"):
        model(**inputs, labels=inputs["input_ids"])
    with steer(model, method, control=True), pytest.raises(UnsupportedHost, match="share one paged cache"):
        model(**inputs, cache=object())
    for bases in ((), (0.5,), "many", (True,)):
        with pytest.raises(SelectionError, match="AttentionBuckets"):
            AttentionBuckets(bases)


def test_the_waveform_and_its_extrema() -> None:
    offsets = torch.tensor([1, 1030, 4090])
    for base in (10000.0, 25000.0):
        ours = waveform(base, offsets, 128)
        theirs = [buckets.waveform(int(i), base, 128) for i in offsets]
        assert ours.tolist() == pytest.approx(theirs, abs=1e-10)
    assert _Waves(torch.arange(1000, 4091), 128).extrema(10000.0) == (
        buckets.OFFICIAL["peaks"],
        buckets.OFFICIAL["troughs"],
    )


def test_the_search_finds_what_the_official_one_does() -> None:
    assert rotary_bases() == buckets.OFFICIAL["bases"]
    pair = rotary_bases(2, (), candidates=range(10000, 14001, 1000), offsets=(500, 2500), head_dim=64)
    assert len(pair) == 2 and pair[0] < pair[1]
    for arguments in ({"count": 1}, {"offsets": (10, 5)}, {"candidates": [0.5]}):
        with pytest.raises(SelectionError, match="rotary_bases"):
            rotary_bases(**arguments)
    with pytest.raises(SelectionError, match="give a longer range"):
        rotary_bases(2, (10000,), offsets=(1000, 1010))
