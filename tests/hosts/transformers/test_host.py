"""The transformers host beyond the laws: caches, generation modes, towers, pipelines, composition, gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from attnsteer import ACT, PASTA, HeadGate, SpotLight, Where, ZeroTuning, sites, steer
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from attnsteer.testing.fingerprint import fingerprint
from attnsteer.testing.weights import randomize_
from tests.laws.dense_model import Dense, Sequence, dense_model
from tests.reference import llm_methods

SPAN = [(1, 3), (4, 5)]


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture
def llama() -> nn.Module:
    return tiny_transformers("llama")


def prompt(model: nn.Module, batch: int = 2, padding: str | None = None, seed: int = 0) -> dict[str, Tensor]:
    return tiny_transformers_inputs("llama", model, batch=batch, length=12, padding=padding, seed=seed)


@torch.no_grad()
def test_act_released_code_is_the_official_function_on_a_square_prefill(llama: nn.Module) -> None:
    inputs = prompt(llama, batch=1)
    method = ACT.released_code({0: [1, 2], 1: [1]}, beta=0.4, threshold=0.23)
    with steer(llama, method):
        ours = llama(**inputs).logits

    def edit(A: Tensor, seq: Sequence, memory: dict[str, Any]) -> Tensor:
        return torch.stack([llm_methods.act_released(A[0, h], 0.4, 0.23) for h in range(A.shape[1])])[None].to(A.dtype)

    names = {s.layer: s.name for s in sites(llama)}
    dense = Dense(llama, {names[0]: ([1, 2], edit), names[1]: ([1], edit)}, {})
    with dense_model(llama, dense, [llama.config]):
        dense.sequence = Sequence(inputs["attention_mask"].bool())
        theirs = llama(**inputs).logits
    assert far(ours, theirs) <= 1e-5
    with steer(llama, method.new(exclude="first_token")):
        assert far(llama(**inputs).logits, theirs) > 1e-4, "first hit and first token agree here; the test is vacuous"
    with steer(llama, method) as run:
        llama.generate(**inputs, max_new_tokens=3, do_sample=False)
    records = run.audit.records.values()
    assert sum(r.edits for r in records) >= 1, "the prompt is edited"
    assert all(r.edits <= 1 and r.calls == 3 for r in records), "official numbers are prefill only"


METHODS = {
    "act": ACT({1: [0, 2], 2: [1]}, 0.4, 0.12),
    "act-running": ACT({1: [0, 2], 2: [1]}, 0.4, 0.12, decode="running"),
    "zerotuning": ZeroTuning({1: [0, 2]}, 4.0),
    "spotlight": SpotLight([SPAN, SPAN], 0.5),
    "pasta": PASTA([SPAN, SPAN], {1: [0, 2]}, 0.05),
    "headgate": HeadGate({(1, 0): -1.0, (2, 3): 0.0}),
}


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_static_cache_equals_dynamic(llama: nn.Module, name: str) -> None:
    inputs = prompt(llama, padding="left")
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with steer(llama, METHODS[name]):
        dynamic = llama.generate(**inputs, **options)
        static = llama.generate(**inputs, **options, past_key_values=StaticCache(config=llama.config, max_cache_len=24))
    assert torch.equal(dynamic.sequences, static.sequences)
    assert far(torch.stack(dynamic.logits), torch.stack(static.logits)) <= 1e-5


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_static_sliding_window_equals_dynamic(name: str) -> None:
    model = tiny_transformers("mistral")
    inputs = tiny_transformers_inputs("mistral", model, batch=2, length=12, padding="left")
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with steer(model, METHODS[name]):
        dynamic = model.generate(**inputs, **options)
        static = model.generate(**inputs, **options, past_key_values=StaticCache(config=model.config, max_cache_len=24))
    assert far(torch.stack(dynamic.logits), torch.stack(static.logits)) <= 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_flex_attention_equals_sdpa(llama: nn.Module, name: str) -> None:
    inputs = prompt(llama, padding="left")
    rows = inputs["attention_mask"].bool()
    with steer(llama, METHODS[name]):
        expected = llama(**inputs).logits
    llama.set_attn_implementation("flex_attention")
    with steer(llama, METHODS[name]):
        got = llama(**inputs).logits
    assert far(got[rows], expected[rows]) <= 1e-5


@torch.no_grad()
def test_prefix_cache_copied_for_several_continuations(llama: nn.Module) -> None:
    """deepcopy of a prefilled cache carries the sinks; each continuation is as if it came alone."""
    inputs = prompt(llama)
    extra = [torch.tensor([[9, 10, 11]] * 2), torch.tensor([[12, 13, 14]] * 2)]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    for method in METHODS.values():
        with steer(llama, method) as run:
            base = llama(**inputs, use_cache=True)
            with run.freeze():
                together = [
                    llama(input_ids=e, attention_mask=mask, past_key_values=copy.deepcopy(base.past_key_values)).logits
                    for e in extra
                ]
        for e, expected in zip(extra, together, strict=True):
            with steer(llama, method) as run:
                alone = llama(**inputs, use_cache=True)
                with run.freeze():
                    logits = llama(input_ids=e, attention_mask=mask, past_key_values=alone.past_key_values).logits
            assert torch.equal(logits, expected)


@torch.no_grad()
def test_two_conversations_keep_their_own_state(llama: nn.Module) -> None:
    a, b = prompt(llama, seed=1), prompt(llama, seed=2)
    step = torch.tensor([[9], [10]])
    mask = torch.ones(2, 13, dtype=torch.long)
    with steer(llama, METHODS["act"]):
        alone = []
        for one in (a, b):
            out = llama(**one, use_cache=True)
            alone.append(llama(input_ids=step, attention_mask=mask, past_key_values=out.past_key_values).logits)
        first, second = llama(**a, use_cache=True), llama(**b, use_cache=True)
        mixed = [
            llama(input_ids=step, attention_mask=mask, past_key_values=out.past_key_values).logits
            for out in (first, second)
        ]
    assert all(torch.equal(x, y) for x, y in zip(alone, mixed, strict=True))


@torch.no_grad()
def test_cache_filled_before_steering_is_refused(llama: nn.Module) -> None:
    inputs = prompt(llama)
    cache = llama(**inputs, use_cache=True).past_key_values
    mask = torch.ones(2, 13, dtype=torch.long)
    for name in ("act", "pasta"):
        with pytest.raises(UnsupportedHost, match="before steering began"), steer(llama, METHODS[name]):
            llama(input_ids=torch.tensor([[9], [10]]), attention_mask=mask, past_key_values=copy.deepcopy(cache))


def ones(n: int) -> Tensor:
    return torch.ones(2, n, dtype=torch.long)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_generated_tokens_cut_off_the_cache(llama: nn.Module, name: str) -> None:
    """What is decoded after a cut is what is decoded without the tokens that were cut; running sums cannot, and say so."""
    inputs, ids, other = prompt(llama), torch.tensor([[9], [10]]), torch.tensor([[11, 12], [13, 14]])
    with steer(llama, METHODS[name]):
        cache = llama(**inputs, use_cache=True).past_key_values
        first = llama(input_ids=ids, attention_mask=ones(13), past_key_values=cache).logits
        for at in range(2):
            llama(input_ids=other[:, at : at + 1], attention_mask=ones(14 + at), past_key_values=cache)
        cache.crop(12 - 15)
        again = lambda: llama(input_ids=ids, attention_mask=ones(13), past_key_values=cache).logits  # noqa: E731
        if name == "act-running":
            with pytest.raises(UnsupportedHost, match=r"cut back from 15 to 12 tokens, and ACT keeps sums"):
                again()
        else:
            assert torch.equal(again(), first)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_cache_cut_back_to_the_end_of_a_prompt_call(llama: nn.Module, name: str) -> None:
    """A shared prefix, prefilled by itself, goes on with one text and, after the cut, with another: as if that came alone."""
    ids = [prompt(llama, seed=seed)["input_ids"] for seed in (0, 1)]
    ids[1][:, :7] = ids[0][:, :7]

    def go_on(text: Tensor, cache: Any) -> Tensor:
        logits = llama(input_ids=text[:, 7:], attention_mask=ones(12), past_key_values=cache).logits
        step = llama(input_ids=torch.tensor([[9], [10]]), attention_mask=ones(13), past_key_values=cache).logits
        return torch.cat([logits, step], dim=1)

    with steer(llama, METHODS[name]):
        start = lambda: llama(input_ids=ids[0][:, :7], use_cache=True).past_key_values  # noqa: E731
        alone, cache = go_on(ids[1], start()), start()
        assert far(go_on(ids[0], cache), alone) > 1e-3
        cache.crop(7 - 13)
        if name == "act-running":
            with pytest.raises(UnsupportedHost, match=r"cut back from 13 to 7 tokens, and ACT keeps sums"):
                go_on(ids[1], cache)
        else:
            assert torch.equal(go_on(ids[1], cache), alone)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_cache_cut_inside_a_prompt_call(llama: nn.Module, name: str) -> None:
    """Methods that look at a row alone go on as if the rest had never been there; others cannot, and say so."""
    ids = prompt(llama)["input_ids"]
    rest = lambda cache: llama(input_ids=ids[:, 7:], attention_mask=ones(12), past_key_values=cache).logits  # noqa: E731
    with steer(llama, METHODS[name]):
        alone = rest(llama(input_ids=ids[:, :7], use_cache=True).past_key_values)
        cache = llama(input_ids=ids[:, :9], use_cache=True).past_key_values
        cache.crop(7 - 9)
        if name.startswith("act"):
            with pytest.raises(UnsupportedHost, match=r"cut back from 9 to 7 tokens"):
                rest(cache)
        else:
            # The shared part was computed in a call of nine rows here, of seven there.
            assert far(rest(cache), alone) <= 1e-5


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_assisted_decoding_is_greedy_decoding(llama: nn.Module, name: str, how: str) -> None:
    """Candidates are scored many at a time, those that are wrong cut off the cache; tokens and logits are those of greedy."""
    # All tokens that there are, so that prompt lookup always finds candidates.
    ids = torch.randperm(llama.config.vocab_size - 3, generator=torch.Generator().manual_seed(0))[None] + 3
    # Agrees with the model often, not always.
    assistant = copy.deepcopy(llama)
    generator = torch.Generator().manual_seed(1)
    for parameter in assistant.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    helped = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {"assistant_model": assistant}
    changes = {"spans": [SPAN]} if hasattr(METHODS[name], "spans") else {}
    method = METHODS[name].new(**changes, **({"threshold": 0.02} if name.startswith("act") else {}))
    calls: list[int] = []
    hook = llama.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        with steer(llama, method) as run:
            plain = llama.generate(ids, **options)
            assert calls == [ids.shape[1]] + [1] * 11 and run.audit.record(0, run.sites[0].path).changed == 12
            calls.clear()
            if name == "act-running":
                # Its sums run over every row, those of wrong candidates too.
                with pytest.raises(
                    UnsupportedHost, match=r"cut back .* ACT keeps sums|its means move with each generated token"
                ):
                    llama.generate(ids, **options, **helped)
                return
            assisted = llama.generate(ids, **options, **helped)
    finally:
        hook.remove()
    assert len(calls) <= 12 and max(calls[1:]) > 1, "no candidate was scored"
    assert torch.equal(plain.sequences, assisted.sequences)
    assert far(torch.stack(plain.logits), torch.stack(assisted.logits)) <= 1e-5


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_sampling_several_sequences(llama: nn.Module, name: str) -> None:
    """num_return_sequences repeats rows: the first row of each sample scores as without the repetition."""
    inputs = prompt(llama, padding="left")
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with steer(llama, METHODS[name]):
        one = llama.generate(**inputs, **options)
        beams = llama.generate(**inputs, **{**options, "num_beams": 2, "num_return_sequences": 2})
    assert far(one.logits[0], beams.logits[0][::2]) <= 1e-5


@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_encoder_decoder_generation(name: str) -> None:
    """Cross-attention heads gated, the decoder spotlighted: cached generation equals teacher-forced argmax."""
    model = tiny_transformers(name)
    inputs = tiny_transformers_inputs(name, model, batch=2, length=12)
    encoder = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    where = Where(kinds="cross")
    with steer(model, HeadGate({(1, 0): -2.0, (0, 1): 0.0}, where=where)) as run:
        assert {s.kind for s in run.sites} == {"cross"}
        out = model.generate(**encoder, max_new_tokens=5, do_sample=False)
        logits = model(**encoder, decoder_input_ids=out[:, :-1]).logits
    assert torch.equal(logits.argmax(-1), out[:, 1:])
    assert not torch.equal(model(**encoder, decoder_input_ids=out[:, :-1]).logits, logits)


@torch.no_grad()
def test_cross_attention_spans_are_the_encoders_tokens() -> None:
    model = tiny_transformers("t5")
    with pytest.raises(SelectionError, match="not on"):
        steer(model, SpotLight([SPAN], 0.5, where=Where(kinds="cross")))


@torch.no_grad()
def test_vision_tower_or_text_tower() -> None:
    model = tiny_transformers("llava")
    inputs = tiny_transformers_inputs("llava", model, batch=2)
    plain = model(**inputs).logits
    text, vision = HeadGate({(0, 0): 0.0}), HeadGate({(0, 0): 0.0}, where=Where(modalities="vision"))
    with steer(model, text) as run:
        assert [s.modality for s in run.sites] == ["text"]
        assert model.config.vision_config._attn_implementation == "sdpa"
        a = model(**inputs).logits
    with steer(model, vision) as run:
        assert [s.modality for s in run.sites] == ["vision"]
        assert model.config.text_config._attn_implementation == "sdpa"
        b = model(**inputs).logits
    with steer(model, text, vision):
        c = model(**inputs).logits
    assert far(a, plain) > 1e-3 and far(b, plain) > 1e-3 and far(c, a) > 1e-3 and far(c, b) > 1e-3
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_a_transformers_pipeline_is_steered_through_its_model(llama: nn.Module) -> None:
    from transformers import Pipeline

    class Plain(Pipeline):
        def _sanitize_parameters(self, **kwargs: Any) -> Any:
            return {}, {}, {}

        def preprocess(self, inputs: Any) -> Any:
            return inputs

        def _forward(self, inputs: Any) -> Any:
            return self.model(**inputs)

        def postprocess(self, outputs: Any) -> Any:
            return outputs.logits

    pipe = Plain(model=llama, device=-1)
    inputs = prompt(llama)
    plain = pipe(inputs)
    with steer(pipe, METHODS["headgate"]):
        out = pipe(inputs)
    with steer(llama, METHODS["headgate"]):
        expected = llama(**inputs).logits
    assert torch.equal(out, expected) and not torch.equal(out, plain)


@torch.no_grad()
def test_inner_model_called_directly(llama: nn.Module) -> None:
    inputs = prompt(llama, padding="left")
    with steer(llama, METHODS["act"]):
        whole = llama(**inputs, output_hidden_states=True).hidden_states[-1]
        inner = llama.model(**inputs).last_hidden_state
    assert torch.equal(whole, inner)


@torch.no_grad()
def test_order_and_overlap_of_reweightings(llama: nn.Module) -> None:
    """On shared heads the second method sees the map of the first; neither builds it."""
    inputs = prompt(llama, batch=2, padding="left")
    first, second = ZeroTuning({1: [0, 1]}, 5.0), PASTA([SPAN, SPAN], {1: [1, 2]}, 0.1)
    with steer(llama, first, second) as run:
        ab = llama(**inputs).logits
    assert all(r.path == "bias" for r in run.audit.records.values())
    names = {s.layer: s.name for s in sites(llama)}

    def both(A: Tensor, seq: Sequence, memory: dict[str, Any]) -> Tensor:
        new = A.clone()
        new[:, :2] = llm_methods.zerotuning(A[:, :2], 5.0, seq.first())
        prompt_keys = torch.ones(2, A.shape[3], dtype=torch.bool)
        new[:, 1:] = llm_methods.pasta(new[:, 1:], 0.1, seq.marked(A.shape[3]), prompt_keys)
        return new

    dense = Dense(llama, {names[1]: ([0, 1, 2], both)}, {})
    with dense_model(llama, dense, [llama.config]):
        valid = inputs["attention_mask"].bool()
        dense.sequence = Sequence(valid, prompt=12, spans=[SPAN, SPAN])
        expected = llama(**inputs).logits
    assert far(ab[valid], expected[valid]) <= 1e-5
    # SpotLight's rule depends on the map it sees, so order matters.
    spot = SpotLight([SPAN, SPAN], 0.5, where=Where(heads={1: [0, 1, 2]}))
    with steer(llama, spot, first):
        one = llama(**inputs).logits
    with steer(llama, first, spot):
        other = llama(**inputs).logits
    assert far(one[valid], other[valid]) > 1e-4


def test_gradients_and_checkpointing(llama: nn.Module) -> None:
    """A loss through steered attention has the gradient of the explicit map, with checkpointing too."""
    inputs = prompt(llama)
    for method in METHODS.values():
        grads = []
        for reference, checkpointing in ((False, False), (True, False), (False, True)):
            if checkpointing:
                llama.activation_checkpointing_enable()
                llama.train()
            llama.zero_grad()
            with steer(llama, method, reference=reference):
                llama(**inputs, use_cache=False).logits.square().mean().backward()
            grads.append(llama.model.layers[1].self_attn.v_proj.weight.grad.clone())
            if checkpointing:
                llama.activation_checkpointing_disable()
                llama.eval()
        scale = grads[1].abs().max()
        assert far(grads[0], grads[1]) <= 1e-4 * scale and far(grads[2], grads[0]) <= 1e-4 * scale


@torch.no_grad()
def test_output_attentions_shows_the_edited_map(llama: nn.Module) -> None:
    llama.set_attn_implementation("eager")
    inputs = prompt(llama, batch=1)
    plain = llama(**inputs, output_attentions=True).attentions
    with steer(llama, ZeroTuning({1: [0, 2]}, 4.0)):
        maps = llama(**inputs, output_attentions=True).attentions
    first = torch.zeros(1, dtype=torch.long)
    expected = plain[1].clone()
    expected[:, [0, 2]] = llm_methods.zerotuning(plain[1][:, [0, 2]], 4.0, first)
    assert torch.equal(maps[0], plain[0]) and far(maps[1], expected) <= 1e-6 and far(maps[1], plain[1]) > 1e-2


def _small(name: str, **other: Any) -> nn.Module:
    config = getattr(transformers, name.removesuffix("ForCausalLM").replace("Qwen3_5", "Qwen3_5Text") + "Config")
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = getattr(transformers, name)(config(**sizes, **heads | other))
    randomize_(model, 0)
    return model.eval()


LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID = {
    "num_key_value_heads": 4, "hybrid_layer_ids": [1, 3], "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8,
    "n_mamba_heads": 4, "mamba_headdim": 32, "num_mem_blocks": 1,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "other", "layers"),
    [
        ("Qwen3_5ForCausalLM", {"head_dim": 16, **LINEAR}, [3]),
        ("DogeForCausalLM", {"head_dim": 16}, [0, 1, 2, 3]),
        ("Zamba2ForCausalLM", HYBRID, [1, 3]),
    ],
    ids=["gated queries", "masks by head", "shared blocks"],
)
def test_a_site_is_what_it_says(name: str, other: dict[str, Any], layers: list[int]) -> None:
    """Heads that are listed are those that are computed, a causal layer is called one, layers have their numbers."""
    model = _small(name, **other)
    assert [(s.layer, s.heads, s.causal) for s in sites(model)] == [(layer, 4, True) for layer in layers]
    ids = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    outs = []
    for reference in (False, True):
        with steer(model, ACT({layers[-1]: [0, 3]}, threshold=0.01), reference=reference):
            outs.append(model(input_ids=ids, attention_mask=mask).logits[mask.bool()])
    plain = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert far(*outs) <= 1e-5 * float(plain.abs().max()) < far(outs[0], plain)


@torch.no_grad()
def test_what_a_kernel_gives_rows_that_see_nothing_is_its_own() -> None:
    """Gemma 2 in float64 has NaN there, and so in the next layer: said of what enters that one."""
    model = tiny_transformers("gemma2").double()
    inputs = tiny_transformers_inputs("gemma2", model, batch=2, padding="left")
    says = r"layers\.1\.self_attn: the queries, keys or values .* have NaN"
    with pytest.raises(UnsupportedHost, match=says), steer(model, ZeroTuning(gamma=4.0)):
        model(**inputs)


@torch.no_grad()
def test_unknown_transform_inside_the_model_is_noticed(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose eager function does more than its arguments say must be refused, not edited inexactly."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.eager_attention_forward

    def odd(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
        return original(module, q * 1.3, k, v, mask, scaling, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", odd)
    llama.set_attn_implementation("eager")
    before = fingerprint(llama)
    with pytest.raises(UnsupportedHost, match="something else inside"), steer(llama, METHODS["zerotuning"]):
        llama(**prompt(llama))
    assert fingerprint(llama) == before
    # A gate multiplies what comes out, whatever made it.
    with steer(llama, HeadGate({(1, 2): 0.0})):
        closed = llama(**prompt(llama)).logits
    projection = llama.model.layers[1].self_attn.o_proj
    projection.weight[:, 2 * 16 : 3 * 16] = 0
    torch.testing.assert_close(closed, llama(**prompt(llama)).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_measured_distance_is_the_total_variation(llama: nn.Module) -> None:
    inputs = prompt(llama, batch=1)
    with steer(llama, ZeroTuning({1: [0]}, 5.0), measure=True) as run:
        llama(**inputs)
    with steer(llama, ZeroTuning({1: [0]}, 5.0), measure=True, reference=True) as slow:
        llama(**inputs)
    path = run.sites[0].path
    assert run.audit.record(0, path).distance == pytest.approx(slow.audit.record(0, path).distance, abs=1e-6)
    assert 0.01 < run.audit.record(0, path).distance < 1


@torch.no_grad()
def test_shared_config_of_two_models() -> None:
    """Steering one of two models that share a config object leaves the other bit-identical."""
    first = tiny_transformers("llama")
    second = type(first)(first.config).eval()
    inputs = prompt(first)
    plain = second(**inputs).logits
    with steer(first, METHODS["headgate"]):
        first(**inputs)
        assert torch.equal(second(**inputs).logits, plain)


@torch.no_grad()
def test_user_given_cache_object(llama: nn.Module) -> None:
    inputs = prompt(llama)
    cache = DynamicCache(config=llama.config)
    with steer(llama, METHODS["act"]):
        llama(**inputs, past_key_values=cache)
    assert not [k for k in vars(cache) if "attnsteer" in k or k == "reorder_cache"]
