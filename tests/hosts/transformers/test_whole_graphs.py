"""torch.compile(fullgraph=True): a steered model is as many graphs as the unsteered one, and says the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

from attnsteer import ACT, PASTA, VAR, HeadGate, SpotLight, Where, ZeroTuning, steer
from attnsteer.testing.transformers_models import TRANSFORMERS

SPANS = [[(3, 9)]]
SLOTS = 96
METHODS: dict[str, Any] = {
    "HeadGate": lambda: HeadGate({(0, 0): 0.5}),
    "ZeroTuning": lambda: ZeroTuning({0: [1, 2]}, gamma=3.0),
    "SpotLight": lambda: SpotLight(SPANS, 0.5),
    "PASTA": lambda: PASTA(SPANS, alpha=0.1),
    "ACT": lambda: ACT({0: [0, 3]}, beta=0.4, threshold=0.02),
    "VAR": lambda: VAR((1, 5), tau=1.5, rho=0.1, min_image_mass=0.01, where=Where(layers=[0])),
}
TYPES = ("llama", "qwen3", "gemma2", "gemma3_text", "llava")
# Soft-capping and windows of Gemma take our own pass and masks of their own; all but one run with `-m long`.
QUICK = {("llama", "ACT")}
PAIRS = [
    pytest.param(kind, name, marks=() if (kind, name) in QUICK else pytest.mark.long)
    for kind in TYPES
    for name in METHODS
    if name != "VAR" or kind == "llava"
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of one layer, or of one of each kind, and a prompt of 20 tokens."""
    model = TRANSFORMERS[kind].build(**({} if kind.startswith("gemma") else {"num_hidden_layers": 1}))
    if kind == "llava":
        inputs = TRANSFORMERS[kind].inputs(model, 1, 24, None, 0)
        del inputs["attention_mask"]
        return model, inputs
    return model, {"input_ids": torch.randint(5, 60, (1, 20), generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def steps(run: Any, model: nn.Module, inputs: dict[str, Tensor], count: int, cache: Any = None) -> Tensor:
    """The logits of a prompt's end and of `count` greedy steps over a static cache."""
    cache = StaticCache(model.config.get_text_config(), max_cache_len=SLOTS) if cache is None else cache
    out = [run(**inputs, past_key_values=cache).logits[:, -1:]]
    for _ in range(count):
        out.append(run(input_ids=out[-1].argmax(dim=-1), past_key_values=cache).logits)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_one_graph_for_the_prompt_and_one_for_all_steps(kind: str, name: str) -> None:
    model, inputs = build(kind)
    method, count = METHODS[name](), min(64, SLOTS - 1 - inputs["input_ids"].shape[1])
    plain = steps(model, model, inputs, count)
    with steer(model, method) as run:
        expected = steps(model, model, inputs, count)
        counts = run.audit.to_dict()
    counter = CompileCounterWithBackend("eager")
    with steer(model, method) as run:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        torch.testing.assert_close(steps(compiled, model, inputs, count), expected, rtol=1e-5, atol=1e-5)
        # Added to inside the graph, and read when somebody asks.
        own = run.audit.to_dict()
    assert counter.frame_count == 2
    for before, now in zip(counts["interventions"], own["interventions"], strict=True):
        assert {p: s["phases"] for p, s in before["sites"].items()} == {p: s["phases"] for p, s in now["sites"].items()}
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.long
def test_compiled_before_it_is_steered_and_used_after() -> None:
    model, inputs = build("llama")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    plain = steps(compiled, model, inputs, 3)
    with steer(model, METHODS["ZeroTuning"]()):
        expected = steps(model, model, inputs, 3)
    assert counter.frame_count == 2
    with steer(compiled, METHODS["ZeroTuning"]()) as run:
        torch.testing.assert_close(steps(compiled, model, inputs, 3), expected, rtol=1e-5, atol=1e-5)
        assert run.audit.fired(0)
    assert counter.frame_count == 4
    torch.testing.assert_close(steps(compiled, model, inputs, 3), plain)
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.long
def test_a_padded_batch_over_a_growing_cache() -> None:
    """Left padding, a mask that grows, values per sample: each row as alone."""
    model, inputs = build("llama")
    ids = inputs["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    method = ZeroTuning(gamma=[3.0, 0.2])

    @torch.no_grad()
    def logits(run: Any) -> Tensor:
        cache, seen = DynamicCache(config=model.config), mask
        out = [run(input_ids=ids, attention_mask=seen, past_key_values=cache).logits[:, -1:]]
        for token in (7, 9, 11):
            seen = torch.nn.functional.pad(seen, (0, 1), value=1)
            step = torch.full((2, 1), token)
            out.append(run(input_ids=step, attention_mask=seen, past_key_values=cache).logits)
        return torch.cat(out, dim=1)

    with steer(model, method, SpotLight([[(1, 4)], [(2, 5)]], 0.5)):
        expected = logits(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", ["prompt", pytest.param("steps", marks=pytest.mark.long)])
def test_compiled_and_uncompiled_calls_share_a_sequence(first: str) -> None:
    """As `generate` does: the prompt runs uncompiled, the steps compiled; and the other way round."""
    model, inputs = build("llama")
    method = METHODS["ACT"]()
    with steer(model, method), torch.no_grad():
        expected = steps(model, model, inputs, 4)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        begin, go_on = (model, compiled) if first == "prompt" else (compiled, model)
        cache = StaticCache(model.config, max_cache_len=SLOTS)
        out = [begin(**inputs, past_key_values=cache).logits[:, -1:]]
        for run in (go_on, go_on, begin, begin):
            out.append(run(input_ids=out[-1].argmax(dim=-1), past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(out, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_a_reset_cache_begins_anew() -> None:
    model, inputs = build("llama")
    other = {"input_ids": inputs["input_ids"].flip(1)}
    with steer(model, METHODS["ACT"]()):
        expected = steps(model, model, other, 2)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        cache = StaticCache(model.config, max_cache_len=SLOTS)
        steps(compiled, model, inputs, 2, cache)
        cache.reset()
        again = StaticCache(model.config, max_cache_len=SLOTS)
        torch.testing.assert_close(steps(compiled, model, other, 2, again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_state_that_grows_with_each_token_is_not_left_out() -> None:
    """Refused with `fullgraph`, else run uncompiled."""
    model, inputs = build("llama")
    with steer(model, ACT({0: [0, 3]}, beta=0.4, threshold=0.02, decode="running")):
        expected = steps(model, model, inputs, 2)
        with pytest.raises(Exception, match=r"changes call\.state"):
            steps(torch.compile(model, backend="eager", fullgraph=True), model, inputs, 2)
        torch._dynamo.reset()
        torch.testing.assert_close(steps(torch.compile(model, backend="eager"), model, inputs, 2), expected)


def test_a_block_around_compiled_calls_is_not_left_out() -> None:
    model, inputs = build("llama")
    with steer(model, METHODS["ACT"](), control=True) as run, run.freeze(), pytest.raises(Exception, match="disable"):
        steps(torch.compile(model, backend="eager", fullgraph=True), model, inputs, 1)


def test_spans_that_compiled_code_cannot_look_for() -> None:
    model, inputs = build("llama")
    for spans, what in ((["word"], "strings"), ([[(3, 40)]], "ends after the 20 tokens")):
        torch._dynamo.reset()
        with (
            steer(model, SpotLight(spans, 0.5), control=True),
            pytest.raises(Exception, match=what),
        ):
            steps(torch.compile(model, backend="eager", fullgraph=True), model, inputs, 1)


@pytest.mark.long
def test_generate_compiles_its_steps() -> None:
    from transformers import CompileConfig

    model, inputs = build("llama")
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    with steer(model, METHODS["ACT"](), METHODS["PASTA"]()) as run:
        expected = model.generate(**inputs, **options, disable_compile=True)
        calls = next(iter(run.audit.to_dict()["interventions"][0]["sites"].values()))["calls"]
        torch.testing.assert_close(model.generate(**inputs, **options, compile_config=compile_config), expected)
        assert next(iter(run.audit.to_dict()["interventions"][0]["sites"].values()))["calls"] == 2 * calls
    plain = model.generate(**inputs, **options, disable_compile=True)
    assert not torch.equal(plain, expected)


@pytest.mark.long
@torch.no_grad()
def test_a_cache_that_is_made_inside_the_graph() -> None:
    model, inputs = build("llama")
    with steer(model, METHODS["ACT"]()):
        first = model(**inputs)
        wanted = model(input_ids=torch.tensor([[7]]), past_key_values=first.past_key_values).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        cache = compiled(**inputs).past_key_values
        found = compiled(input_ids=torch.tensor([[7]]), past_key_values=cache).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_inductor() -> None:
    model, inputs = build("llama")
    with steer(model, METHODS["ACT"]()) as run:
        expected = steps(model, model, inputs, 8)
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        torch.testing.assert_close(steps(compiled, model, inputs, 8), expected, rtol=1e-4, atol=1e-4)
        assert run.audit.fired(0)
    assert counter.frame_count == 2
