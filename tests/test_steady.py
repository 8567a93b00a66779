"""Decode steps that are done again without asking the methods: as if every one of them were asked, whatever happens in between."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import (
    ACT,
    PASTA,
    FreezeMaps,
    HeadGate,
    InjectMap,
    Intervention,
    PatchHeads,
    SpotLight,
    Where,
    ZeroTuning,
    capture,
    get_method,
    methods,
    steer,
)
from attnsteer.forms import STEP
from attnsteer.hosts.transformers.forward import Stack
from attnsteer.methods.instaboost import InstABoost
from attnsteer.steady import Step

PROMPT = 24
HEADS = {0: [0, 1], 1: [2], 2: [0, 1, 2, 3]}
SPANS = [[(3, 9)], [(5, 12)]]
GATES = {(0, 0): 0.5, (1, 2): 0.0, (2, 1): -1.0}
STEADY: dict[str, Any] = {
    "ACT": [ACT(None, 0.4, 0.03)],
    "ACT of some heads": [ACT(HEADS, 0.4, 0.03)],
    "ACT of samples": [ACT(HEADS, [0.4, 0.1], 0.03)],
    "ACT of a sample": [ACT(HEADS, [0.4, None], 0.03)],
    "ZeroTuning": [ZeroTuning(gamma=2.0)],
    "ZeroTuning of a sample": [ZeroTuning(HEADS, gamma=[2.0, None])],
    "SpotLight": [SpotLight(SPANS, 0.3)],
    "SpotLight of a sample": [SpotLight(SPANS, [None, 0.3])],
    "PASTA": [PASTA(SPANS, heads=HEADS, alpha=0.1)],
    "InstABoost": [InstABoost(SPANS, 3.0)],
    "HeadGate": [HeadGate(GATES)],
    "HeadGate of samples": [HeadGate({(0, 0): [0.5, None], (2, 1): 0.0})],
    "apart": [ZeroTuning({0: [0]}, gamma=2.0), PASTA(SPANS, heads={0: [1], 1: [1]}, alpha=0.1)],
    "then gated": [ACT(HEADS, 0.4, 0.03), HeadGate(GATES)],
    "FreezeMaps": lambda donor: [FreezeMaps(donor, same_tokens=False)],
    "PatchHeads": lambda donor: [PatchHeads(donor, HEADS)],
    "PatchHeads of the prompt": lambda donor: [PatchHeads(donor, HEADS, rows="prompt")],
    "InjectMap": lambda donor: [InjectMap(donor, HEADS)],
    "patched, then injected": lambda donor: [PatchHeads(donor, HEADS), InjectMap("self", {1: [3]}, rows="prompt")],
}


def given(name: str, model: nn.Module) -> list[Intervention]:
    """The methods of a row; those that have a source get that of another prompt as long."""
    found = STEADY[name]
    if not callable(found):
        return found
    with capture(model, what=("map", "q", "k", "output")) as donor:
        model(prompt().flip(1))
    return found(donor)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the steps that were done again."""
    count, inner = [0], Step.__call__

    def counted(self: Step, *args: Any) -> Tensor:
        count[0] += 1
        return inner(self, *args)

    monkeypatch.setattr(Step, "__call__", counted)
    yield count


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches the doing again off and on."""
    inner = Stack._steps
    return lambda yes: monkeypatch.setattr(Stack, "_steps", (lambda self, forward: None) if yes else inner)


def prompt(batch: int = 2, size: int = PROMPT) -> Tensor:
    return torch.randint(0, 50, (batch, size), generator=torch.Generator().manual_seed(size))


def decode(model: nn.Module, cache: Any, ids: Tensor, steps: int, **inputs: Any) -> Tensor:
    """Logits [B, steps, V] of greedy steps from the last token of `ids` on."""
    token, found = ids[:, -1:], []
    for _ in range(steps):
        found.append(model(token, past_key_values=cache, **inputs).logits)
        token = found[-1].argmax(dim=-1)
    return torch.cat(found, dim=1)


def counts(run: Any) -> dict[Any, Any]:
    return {key: record.to_dict() for key, record in run.audit.records.items()}


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_equal_to_asking(
    model: nn.Module, again: list[int], asked: Callable[[bool], None], name: str, mode: Callable[[], Any]
) -> None:
    found, audits = [], []
    # With the one so many that what has grown with the cache has to grow again.
    steps = STEP + 6 if mode is torch.no_grad else 4
    for yes in (True, False):
        asked(yes)
        again[0] = 0
        with mode(), steer(model, *given(name, model)) as run:
            cache = model(prompt(), use_cache=True).past_key_values
            found.append(decode(model, cache, prompt(), steps))
            audits.append(counts(run))
        assert again[0] == (0 if yes else (steps - 1) * len(run.runtimes))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)
    assert audits[0] == audits[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_other_dtypes(model: nn.Module, again: list[int], asked: Callable[[bool], None], dtype: torch.dtype) -> None:
    other = copy.deepcopy(model).to(dtype)
    for given in (STEADY["ACT of some heads"], STEADY["PASTA"], STEADY["HeadGate"]):
        found = []
        for yes in (True, False):
            asked(yes)
            with steer(other, *given):
                cache = other(prompt(), use_cache=True).past_key_values
                found.append(decode(other, cache, prompt(), 5))
        assert torch.equal(*found)
    assert again[0]


def _reordered(model: nn.Module, cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 1]))


def _copied(model: nn.Module, cache: Any) -> None:
    copied = copy.deepcopy(cache)
    decode(model, copied, prompt(), 3)


def _cut_behind_the_prompt(model: nn.Module, cache: Any) -> None:
    cache.crop(-2)


def _next_turn(model: nn.Module, cache: Any) -> None:
    model(prompt(size=7), past_key_values=cache)


def _several_rows(model: nn.Module, cache: Any) -> None:
    model(prompt(size=3), past_key_values=cache)


def _with_a_gradient(model: nn.Module, cache: Any) -> None:
    with torch.enable_grad():
        model(prompt()[:, :1], past_key_values=cache)


def _eager(model: nn.Module, cache: Any) -> None:
    model.set_attn_implementation("eager")
    model(prompt()[:, :1], past_key_values=cache)
    model.set_attn_implementation("sdpa")


def _interrupted(model: nn.Module, cache: Any) -> None:
    """The step fails half-way, and the cache is put back as it was."""
    before = [(layer.keys, layer.values) for layer in cache.layers]
    fail = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(prompt()[:, :1], past_key_values=cache)
    fail.remove()
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        layer.keys, layer.values = keys, values


BETWEEN = (
    _reordered,
    _copied,
    _cut_behind_the_prompt,
    _next_turn,
    _several_rows,
    _with_a_gradient,
    _eager,
    _interrupted,
)
ASKED = ("ACT of some heads", "PASTA", "SpotLight", "ZeroTuning of a sample", "then gated")
# A donor is of prompts of one length, so that nothing more is put in.
PAIRS = [(n, b) for n in ASKED for b in BETWEEN] + [
    ("PatchHeads", b) for b in BETWEEN if b not in (_next_turn, _several_rows)
]


@pytest.mark.parametrize(("name", "between"), PAIRS)
def test_whatever_comes_between(
    model: nn.Module, asked: Callable[[bool], None], again: list[int], name: str, between: Callable[..., None]
) -> None:
    found = []
    for yes in (True, False):
        asked(yes)
        with torch.no_grad(), steer(model, *given(name, model)):
            cache = model(prompt(), use_cache=True).past_key_values
            first = decode(model, cache, prompt(), 3)
            between(model, cache)
            found.append(torch.cat([first, decode(model, cache, prompt(), 4)], dim=1))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)
    assert again[0]


@torch.no_grad()
def test_a_mask_that_changes_is_seen(model: nn.Module, asked: Callable[[bool], None]) -> None:
    """The first token of a sample becomes padding while it decodes; and a token that came is none."""
    masks = [torch.ones(2, PROMPT + i + 1, dtype=torch.long) for i in range(6)]
    for mask in masks[3:]:
        mask[0, 0] = 0
    for mask in masks[5:]:
        mask[1, PROMPT + 4] = 0
    found = []
    for yes in (True, False):
        asked(yes)
        with steer(model, ZeroTuning(gamma=2.0)):
            cache = model(prompt(), attention_mask=masks[0][:, :PROMPT], use_cache=True).past_key_values
            token, logits = prompt()[:, -1:], []
            for mask in masks:
                logits.append(model(token, past_key_values=cache, attention_mask=mask).logits)
            found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_shorter_batch_of_the_same_cache_object(model: nn.Module, asked: Callable[[bool], None]) -> None:
    found = []
    for yes in (True, False):
        asked(yes)
        with steer(model, ACT(HEADS, 0.4, 0.03)):
            cache = model(prompt(), use_cache=True).past_key_values
            decode(model, cache, prompt(), 3)
            cache.batch_select_indices(torch.tensor([1]))
            found.append(decode(model, cache, prompt(1), 3))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_methods_that_are_asked_each_time(model: nn.Module, again: list[int]) -> None:
    """Whose statistics move, whose rows are chosen, whose strength is learned, or who stand for themselves."""

    class Odd(ZeroTuning):
        """Says nothing of itself."""

    learned = torch.tensor(2.0, requires_grad=True)
    for method in (
        ACT(HEADS, 0.4, 0.03, decode="running"),
        SpotLight(SPANS, 0.3, pooled=True),
        ZeroTuning(gamma=2.0, where=Where(rows="last")),
        ZeroTuning(gamma=learned),
        Odd(gamma=2.0),
    ):
        with steer(model, method):
            cache = model(prompt(), use_cache=True).past_key_values
            decode(model, cache, prompt(), 3)
        assert not again[0], method


@torch.no_grad()
def test_a_cache_of_fixed_size_and_a_window_are_asked(model: nn.Module, again: list[int]) -> None:
    from transformers import MistralConfig, MistralForCausalLM, StaticCache

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        vocab_size=50, sliding_window=PROMPT + 3,
    )  # fmt: skip
    windowed = MistralForCausalLM(config).eval()
    found = []
    for reference in (True, False):
        with steer(windowed, ZeroTuning(gamma=2.0), reference=reference):
            cache = windowed(prompt(), use_cache=True).past_key_values
            found.append(decode(windowed, cache, prompt(), 8))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    before = again[0]
    with steer(model, ZeroTuning(gamma=2.0)):
        cache = StaticCache(config=model.config, max_cache_len=40)
        model(prompt(), past_key_values=cache, use_cache=True)
        decode(model, cache, prompt(), 3)
    assert again[0] == before


def _scaled_otherwise(model: nn.Module, run: Any, cache: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.7


def _a_copied_module(model: nn.Module, run: Any, cache: Any) -> None:
    """A shallow copy is another module, and not steered."""
    model.model.layers[0].self_attn = copy.copy(model.model.layers[0].self_attn)


def _another_prompt_announced(model: nn.Module, run: Any, cache: Any) -> None:
    with run.chunked_prefill(PROMPT + 2):
        _scored(model, cache)


def _cut_inside_a_span(model: nn.Module, run: Any, cache: Any) -> None:
    cache.crop(10 - cache.get_seq_length())


def _scored(model: nn.Module, cache: Any, steps: int = 4) -> list[Tensor]:
    return [model(prompt()[:, i : i + 1], past_key_values=cache).logits for i in range(steps)]


@pytest.mark.parametrize(
    "between", [_scaled_otherwise, _a_copied_module, _another_prompt_announced, _cut_inside_a_span]
)
@pytest.mark.parametrize("method", [PASTA([[(3, 11)]] * 2, alpha=0.1), InstABoost([[(3, 11)]] * 2, 3.0)])
@torch.no_grad()
def test_what_a_step_stands_on_may_change(
    model: nn.Module, asked: Callable[[bool], None], between: Callable[..., None], method: Intervention
) -> None:
    found = []
    for yes in (True, False):
        asked(yes)
        other = copy.deepcopy(model)
        with steer(other, method) as run:
            cache = other(prompt(), use_cache=True).past_key_values
            logits = _scored(other, cache)
            between(other, run, cache)
            logits += _scored(other, cache)
            found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_an_output_whose_factor_is_not_what_it_does_is_asked(model: nn.Module) -> None:
    """No factor is given, or a base's stands for what the class does otherwise."""

    class Half(Intervention):
        steady, linear = True, True

        def output(self, call: Any, out: Tensor) -> Tensor:
            return out * 0.5

    class Twice(HeadGate):
        steady = True

        def output(self, call: Any, out: Tensor) -> Tensor:
            return super().output(call, out) * 2.0

    for method in (Half(), Twice(GATES)):
        found = []
        for reference in (True, False):
            with steer(model, method, reference=reference):
                cache = model(prompt(), use_cache=True).past_key_values
                found.append(torch.cat(_scored(model, cache), dim=1))
        torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@torch.no_grad()
def test_sequences_in_turns_are_counted_as_if_asked(model: nn.Module, asked: Callable[[bool], None]) -> None:
    """A prompt goes another way than the steps of the sequence before it."""
    audits = []
    for yes in (True, False):
        asked(yes)
        with steer(model, SpotLight(SPANS, 0.3)) as run:
            cache = model(prompt(), use_cache=True).past_key_values
            _scored(model, cache)
            model(prompt(size=12), use_cache=True)
            _scored(model, cache, 1)
            audits.append(counts(run))
    assert audits[0] == audits[1]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@torch.no_grad()
def test_a_cache_that_is_kept_keeps_no_model(model: nn.Module, copied: Callable[[Any], Any]) -> None:
    other = copy.deepcopy(model)
    with steer(other, *STEADY["then gated"]):
        cache = copied(other(prompt(), use_cache=True).past_key_values)
        _scored(other, cache)
    left = weakref.ref(other)
    del other
    gc.collect()
    assert left() is None and not any(name.startswith("_attnsteer") for name in vars(cache))


@torch.no_grad()
def test_running_sums_follow_the_dtype_of_the_model(model: nn.Module) -> None:
    found = []
    for reference in (True, False):
        other = copy.deepcopy(model)
        with steer(other, ACT(HEADS, 0.4, 0.03, decode="running"), reference=reference):
            cache = other(prompt(), use_cache=True).past_key_values
            other.double()
            found.append(torch.cat(_scored(other, cache), dim=1))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@torch.no_grad()
def test_all_that_say_so_are_tried(model: nn.Module) -> None:
    """Every registered class with the promise has a row above."""
    tried = {type(m) for name in STEADY for m in given(name, model)}
    promised = {cls for cls in map(get_method, methods()) if "steady" in vars(cls) and vars(cls)["steady"] is not False}
    assert promised == tried


@torch.no_grad()
def test_rows_that_are_not_chosen_stay_whatever_weighs_the_rest(model: nn.Module) -> None:
    """Where the remainder of the keys has a weight too."""
    ids = prompt()
    plain = model(ids, output_hidden_states=True).hidden_states[1]
    for method in (PASTA(SPANS, alpha=0.1), PASTA(SPANS, alpha=0.1, released=True)):
        with steer(model, method.new(where=Where(rows=(12, 20), layers=[0]))):
            steered = model(ids, output_hidden_states=True).hidden_states[1]
        changed = (steered - plain).abs().amax(dim=-1) > 1e-6
        assert changed[:, 12:20].all()
        assert not changed[:, :12].any() and not changed[:, 20:].any()
