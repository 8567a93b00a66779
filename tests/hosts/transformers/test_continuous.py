"""Continuous batching: every request as if it ran alone through `generate`, whatever it shares its batches with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState

from attnsteer import ACT, PASTA, HeadGate, SpotLight, Where, ZeroTuning, steer
from attnsteer.errors import CompositionError, ContractError, NeverFired, SelectionError, UnsupportedHost
from attnsteer.intervention import Intervention
from attnsteer.testing import tiny_transformers

NEW = 6
# Log-probabilities of a float32 model: the rows of a batch are summed in another order than those of one request.
CLOSE = 2e-5


def decided(name: str = "llama", **config: Any) -> nn.Module:
    """A tiny model whose logits are far enough apart that rounding decides no token."""
    model = tiny_transformers(name, **config)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=generator) * 0.12
    return model


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return decided()


def prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 60, (n,), generator=generator).tolist() for n in lengths]


def sampling(new: int = NEW, **more: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **more)


def batching(**more: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        **{"num_blocks": 64, "page_size": 16, "max_batch_tokens": 128, "return_logprobs": True, **more}
    )


def alone(model: nn.Module, ids: list[int], methods: Sequence[Intervention], new: int = NEW) -> tuple[list[int], Any]:
    """(tokens, their log-probabilities) of one request through `generate`."""
    with steer(model, *methods, control=True) if methods else contextlib.nullcontext():
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), generation_config=sampling(new),
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    tokens = out.sequences[0, len(ids) :].tolist()
    return tokens, [float(l[0].log_softmax(-1)[t]) for l, t in zip(out.logits, tokens, strict=True)]


def check(result: Any, expected: tuple[list[int], Any]) -> None:
    assert result.error is None
    assert result.generated_tokens == expected[0]
    assert result.logprobs == pytest.approx(expected[1], abs=CLOSE)


def batch(model: nn.Module, inputs: Any, steer: Any = None, new: int = NEW, **config: Any) -> list[Any]:
    given = {} if steer is None else {"steer": steer}
    return list(
        model.generate_batch(
            inputs, generation_config=sampling(new), continuous_batching_config=batching(**config), **given
        ).values()
    )


@contextlib.contextmanager
def managing(model: nn.Module, **config: Any) -> Iterator[Any]:
    with model.continuous_batching_context_manager(
        generation_config=sampling(), continuous_batching_config=batching(**config), block=True, timeout=10
    ) as manager:
        yield manager


def results(manager: Any, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while len(found) < count:
        result = manager.get_result(timeout=5)
        assert result is not None or manager.is_running()
        if result is not None and result.is_finished():
            found[result.request_id] = result
    return found


SPAN = [[(2, 5)]]
METHODS: dict[str, list[Intervention]] = {
    "zerotuning": [ZeroTuning(gamma=5.0)],
    "pasta": [PASTA(SPAN, {0: [0, 2], 2: [1]}, alpha=0.1)],
    "spotlight": [SpotLight(SPAN, target=0.6)],
    "headgate": [HeadGate({(0, 0): 0.0, (1, 1): -1.0})],
    "composed": [SpotLight(SPAN, target=0.5), ZeroTuning({1: [0, 1]}, 4.0), HeadGate({(2, 3): 0.3})],
    "decode only": [ZeroTuning(gamma=5.0, where=Where(phases="decode"))],
}
WHOLE: dict[str, list[Intervention]] = {
    "act": [ACT(beta=0.1, threshold=0.02)],
    "act running": [ACT(beta=0.1, alpha=1.5, decode="running")],
    "act prefill": [ACT(beta=0.1, threshold=0.02, decode="prefill_only")],
    "pooled": [SpotLight(SPAN, target=0.6, pooled=True)],
    "last row": [ZeroTuning(gamma=5.0, where=Where(rows="last"))],
}
INPUTS = prompts(7, 39, 12, 25)


# All of them whole and in chunks in the long run.
PAIRS = [(name, size) for name in METHODS for size in (128, 16)]
SHORT = {("composed", 16), ("pasta", 128), ("decode only", 16), ("headgate", 128)}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(*pair, marks=[] if pair in SHORT else pytest.mark.long, id="-".join(map(str, pair)))
        for pair in PAIRS
    ],
)
def test_as_alone(llama: nn.Module, name: str, size: int) -> None:
    with steer(llama, named={"it": METHODS[name]}):
        found = batch(llama, INPUTS, "it", max_batch_tokens=size)
    for ids, result in zip(INPUTS, found, strict=True):
        check(result, alone(llama, ids, METHODS[name]))


@pytest.mark.parametrize("name", WHOLE)
def test_a_prompt_stays_whole_where_it_must(llama: nn.Module, name: str) -> None:
    """A batch of 48 tokens has no room for all prompts: those that do not fit wait, and none is split."""
    with steer(llama, named={"it": WHOLE[name]}):
        found = batch(llama, INPUTS, "it", max_batch_tokens=48)
    for ids, result in zip(INPUTS, found, strict=True):
        check(result, alone(llama, ids, WHOLE[name]))


@pytest.mark.parametrize(
    ("family", "config"),
    [("mistral", {"sliding_window": 9}), ("gemma3_text", {}), ("gpt_oss", {}), ("llama", {"attn_implementation": "eager"})],
    ids=["window", "windows and full", "sinks", "eager"],
)  # fmt: skip
def test_other_caches_and_kernels(family: str, config: dict[str, Any]) -> None:
    model = decided(family, **config)
    named = {"zero": METHODS["zerotuning"], "spans": METHODS["spotlight"], "act": WHOLE["act"]}
    choices = ["zero", "spans", "act", None]
    with steer(model, named=named, control=True):
        found = batch(model, INPUTS, choices, max_batch_tokens=64)
    for ids, chosen, result in zip(INPUTS, choices, found, strict=True):
        check(result, alone(model, ids, named[chosen] if chosen else []))


def eight(count: int) -> tuple[dict[str, Any], list[list[int]], list[Any], list[list[Intervention]]]:
    """Eight steerings (one is none), and requests that choose them in turn, with values of their own."""
    named = {
        "flat": ZeroTuning(gamma=5.0),
        "sharp": ZeroTuning(gamma=0.2),
        "focus": PASTA([[(1, 4)]], alpha=0.1),
        "less": PASTA([[(1, 4)]], {0: [0]}, alpha=0.3),
        "spot": SpotLight([[(2, 5)]], target=0.6),
        "act": ACT(beta=0.1, threshold=0.02),
        "both": [HeadGate({(0, 0): 0.5}), ZeroTuning(gamma=3.0)],
    }
    names = [*named, "none"]
    inputs = prompts(*(6 + (i * 7) % 29 for i in range(count)), seed=5)
    chosen, alike = [], []
    for i in range(count):
        name = names[i % len(names)]
        own: dict[str, Any] = {}
        if name in ("focus", "spot"):
            own = {"spans": [(i % 3, i % 3 + 2)]}
        if name == "flat":
            own = {"gamma": 2.0 + i % 5}
        chosen.append({"steering": name, **own} if own else name)
        methods = [] if name == "none" else named[name] if isinstance(named[name], list) else [named[name]]
        alike.append([m.new(**{k: [v] if k == "spans" else v for k, v in own.items()}) for m in methods])
    return named, inputs, chosen, alike


def test_eight_steerings_share_one_batch(llama: nn.Module) -> None:
    named, inputs, chosen, alike = eight(24)
    with steer(llama, named=named) as run:
        found = batch(llama, inputs, chosen)
    for ids, methods, result in zip(inputs, alike, found, strict=True):
        check(result, alone(llama, ids, methods))
    assert all(run.audit.fired(i) for i in range(len(run.bounds)))


def test_requests_that_choose_nothing_are_those_of_the_plain_model(llama: nn.Module) -> None:
    plain = batch(llama, INPUTS)
    with steer(llama, named={"it": ZeroTuning(gamma=5.0)}, control=True):
        found = batch(llama, INPUTS)
    assert [(r.generated_tokens, r.logprobs) for r in found] == [(r.generated_tokens, r.logprobs) for r in plain]


def test_neutral_strengths_change_no_bit(llama: nn.Module) -> None:
    plain = batch(llama, INPUTS)
    with steer(llama, ZeroTuning(gamma=1.0), HeadGate({(0, 0): 1.0}), control=True):
        found = batch(llama, INPUTS)
    assert [(r.generated_tokens, r.logprobs) for r in found] == [(r.generated_tokens, r.logprobs) for r in plain]


def test_one_value_for_each_input(llama: nn.Module) -> None:
    """In the order of the inputs, which the library sorts by their tokens."""
    values, spans = [5.0, None, 0.2, 1.5], [[(0, 2)], [(3, 9)], [(1, 2)], [(4, 6), (8, 9)]]
    with steer(llama, ZeroTuning(gamma=values), PASTA(spans, alpha=0.2)):
        found = batch(llama, INPUTS)
    for ids, gamma, own, result in zip(INPUTS, values, spans, found, strict=True):
        methods = [PASTA([own], alpha=0.2)] if gamma is None else [ZeroTuning(gamma=gamma), PASTA([own], alpha=0.2)]
        check(result, alone(llama, ids, methods))
    with steer(llama, ZeroTuning(gamma=values), control=True):
        with pytest.raises(SelectionError, match=r"gamma=.*4 samples, and this is a batch of 3 inputs"):
            batch(llama, INPUTS[:3])
        with managing(llama) as manager, pytest.raises(SelectionError, match="one request"):
            manager.add_request(INPUTS[0])


def test_each_head_set_for_its_input(llama: nn.Module) -> None:
    sets = [{0: [0]}, {1: [1, 2]}, None, {0: [3], 2: [0]}]
    with steer(llama, ZeroTuning(sets, 6.0)):
        found = batch(llama, INPUTS)
    for ids, heads, result in zip(INPUTS, sets, found, strict=True):
        check(result, alone(llama, ids, [ZeroTuning(heads, 6.0)] if heads else []))


def test_a_request_of_a_manager(llama: nn.Module) -> None:
    with steer(llama, ZeroTuning(gamma=5.0)) as run, managing(llama) as manager:
        manager.add_request(INPUTS[0], request_id="as attached")
        manager.add_request(INPUTS[0], request_id="own", steer={"gamma": 0.3})
        manager.add_request(INPUTS[0], request_id="made before", steer=run.request(gamma=0.3, heads={1: [0]}))
        manager.add_request(INPUTS[0], request_id="none", steer=None)
        found = results(manager, 4)
    own = {
        "as attached": [ZeroTuning(gamma=5.0)],
        "own": [ZeroTuning(gamma=0.3)],
        "made before": [ZeroTuning({1: [0]}, gamma=0.3)],
        "none": [],
    }
    for name, methods in own.items():
        check(found[name], alone(llama, INPUTS[0], methods))


def test_sequences_that_fork(llama: nn.Module) -> None:
    forked = GenerationConfig(
        max_new_tokens=NEW, do_sample=True, top_k=1, num_return_sequences=2, eos_token_id=None, pad_token_id=0
    )
    options = {"generation_config": forked, "continuous_batching_config": batching()}
    with steer(llama, ZeroTuning(gamma=5.0)):
        found = llama.generate_batch(INPUTS[:2], **options)
    assert len(found) == 4
    for i, ids in enumerate(INPUTS[:2]):
        expected, _ = alone(llama, ids, [ZeroTuning(gamma=5.0)])
        assert found[f"req_{i}"].generated_tokens == found[f"req_{i}__child#0"].generated_tokens == expected
    with steer(llama, ACT(), control=True), pytest.raises(UnsupportedHost, match="num_return_sequences=2"):
        llama.generate_batch(INPUTS[:2], **options)


@pytest.mark.parametrize("offload", [0.0, 0.01], ids=["reset", "offloaded"])
def test_memory_pressure(llama: nn.Module, monkeypatch: pytest.MonkeyPatch, offload: float) -> None:
    """Generated tokens that are computed again stay generated tokens, and what a method keeps follows its request."""
    resets: list[str] = []
    again = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda self: resets.append(self.request_id) or again(self)
    )
    # The library pins the memory that it offloads to, which needs an accelerator.
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))
    named = {
        "act": WHOLE["act"],
        "running": WHOLE["act running"],
        "pasta": METHODS["pasta"],
        "spot": METHODS["spotlight"],
    }
    inputs = prompts(20, 25, 22, 24, seed=8)
    with steer(llama, named=named) as run:
        found = batch(llama, inputs, list(named), new=24, num_blocks=8, safety_margin=0.0, cpu_offload_space=offload)
        assert not run.failures
    assert bool(resets) == (offload == 0.0)
    for ids, methods, result in zip(inputs, named.values(), found, strict=True):
        check(result, alone(llama, ids, methods, new=24))


class Prefixes:
    """Runs requests one after the other in one manager, and counts the tokens of prompts that were computed."""

    def __init__(self, manager: Any):
        self.manager, self.rows = manager, 0
        io = manager.batch_processor or manager._create_batch_processor()
        manager.batch_processor = io
        inner = io.inputs_and_outputs.prepare_batch_tensors

        def counted(requests_in_batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.rows += sum(r.query_length for r in requests_in_batch)
            return inner(requests_in_batch, *args, **kwargs)

        io.inputs_and_outputs.prepare_batch_tensors = counted

    def run(self, ids: list[int], steer: Any) -> tuple[Any, int]:
        """(the result, how many tokens of the prompt were not computed)."""
        before = self.rows
        name = self.manager.add_request(ids, steer=steer)
        (result,) = results(self.manager, 1).values()
        assert result.request_id == name
        return result, len(ids) - (self.rows - before - (NEW - 1))


def test_prefixes_are_shared_by_requests_that_are_steered_alike(llama: nn.Module) -> None:
    named = {"zero": ZeroTuning(gamma=5.0), "pasta": PASTA(SPAN, alpha=0.1), "act": ACT(beta=0.1, threshold=0.02)}
    ids, done = prompts(39)[0], []
    with steer(llama, named=named, control=True), managing(llama) as manager:
        manager.stop(block=True)
        prefixes = Prefixes(manager)
        manager.start()
        same = {"steering": "zero", "gamma": 0.2}
        for chosen, methods, shared in (
            ("zero", [ZeroTuning(gamma=5.0)], 0),
            (same, [ZeroTuning(gamma=0.2)], 0),
            (None, [], 0),
            ("pasta", [PASTA(SPAN, alpha=0.1)], 0),
            ("act", WHOLE["act"], 0),
            ("zero", [ZeroTuning(gamma=5.0)], 32),
            (dict(same), [ZeroTuning(gamma=0.2)], 32),
            (None, [], 32),
            ({"steering": "pasta", "spans": [(2, 5)]}, [PASTA(SPAN, alpha=0.1)], 32),
            ({"steering": "pasta", "spans": [(2, 6)]}, [PASTA([[(2, 6)]], alpha=0.1)], 0),
            # It looks ahead: a later token may have moved what stands in the blocks.
            ("act", WHOLE["act"], 0),
        ):
            done.append((prefixes.run(ids, chosen), methods, shared))
    for (result, reused), methods, shared in done:
        check(result, alone(llama, ids, methods))
        assert reused == shared, methods


def test_an_answer_is_no_prefix_of_a_prompt(llama: nn.Module) -> None:
    """The same tokens, generated and as part of a prompt, are edited differently."""
    method, ids = PASTA(SPAN, alpha=0.05), prompts(30)[0]
    with steer(llama, named={"it": method}), managing(llama) as manager:
        manager.add_request(ids, max_new_tokens=20, steer="it")
        (first,) = results(manager, 1).values()
        longer = ids + first.generated_tokens[:12]
        manager.add_request(longer, steer="it")
        (second,) = results(manager, 1).values()
    check(second, alone(llama, longer, [method]))


def test_what_a_request_asks_wrongly_is_told_to_it_alone(llama: nn.Module) -> None:
    named = {"zero": ZeroTuning(gamma=5.0), "focus": [PASTA(SPAN, alpha=0.1), SpotLight(SPAN, target=0.3)]}
    wrong: list[tuple[Any, str]] = [
        ("zerro", r"'zerro' does not exist; there are focus, zero and none. Did you mean 'zero'"),
        ({"gamma": 2.0}, "no steering is named; there are focus, zero"),
        ({"steering": "zero", "gama": 2.0}, "no parameter 'gama'.*Did you mean 'gamma'"),
        ({"steering": "zero", "gamma": "2"}, "not str"),
        ({"steering": "zero", "gamma": -1.0}, "above 0"),
        ({"steering": "zero", "gamma": [1.0, 2.0]}, "2 samples, and this is one request"),
        ({"steering": "focus", "spans": [(0, 2)]}, "spans is a parameter of PASTA, SpotLight; say whose"),
        ({"steering": "focus", "PASTA": {"spans": [(0, 400)]}}, "ends after its 7 tokens"),
        ({"steering": "focus", "PASTA": {"spans": [(3, 1)]}}, "start < stop"),
        ({"steering": "focus", "PASTA": {"spans": ["cat"]}}, "tokenizer"),
        (3, "steer=3"),
        ({1: 2}, "a mapping of parameters"),
    ]
    with steer(llama, named=named, control=True), managing(llama) as manager:
        manager.add_request(INPUTS[1], request_id="good", steer="zero")
        for chosen, message in wrong:
            with pytest.raises(SelectionError, match=message):
                manager.add_request(INPUTS[0], steer=chosen)
        for ids in ([], "abc", [1, "a"], [True], None, 3):
            with pytest.raises(SelectionError, match="at least one token id"):
                manager.add_request(ids, steer="zero")
        with pytest.raises(SelectionError, match="0 entries for 1 input"):
            manager.add_requests([INPUTS[0]], steer=[])
        found = results(manager, 1)
        assert not manager.batch_processor.scheduler.active_requests
    check(found["good"], alone(llama, INPUTS[1], [named["zero"]]))
    with steer(llama, named=named, control=True), pytest.raises(SelectionError, match="does not exist"):
        batch(llama, INPUTS, ["zero", "zero", "zero", "zerro"])


def test_spans_as_text(llama: nn.Module) -> None:
    class Letters:
        """Token 5 is a, and so on."""

        is_fast = False

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            return "".join(chr(ord("a") + i - 5) for i in ids)

    tokenizer: Any = Letters()
    ids = [5, 6, 7, 8, 9, 10]
    with steer(llama, named={"it": PASTA(["cd"], alpha=0.1, tokenizer=tokenizer)}), managing(llama) as manager:
        manager.add_request(ids, request_id="default", steer="it")
        manager.add_request(ids, request_id="own", steer={"steering": "it", "spans": ["ef"]})
        with pytest.raises(SelectionError, match="not in the text"):
            manager.add_request(ids, steer={"steering": "it", "spans": ["xyz"]})
        found = results(manager, 2)
    check(found["default"], alone(llama, ids, [PASTA([[(2, 4)]], alpha=0.1)]))
    check(found["own"], alone(llama, ids, [PASTA([[(4, 6)]], alpha=0.1)]))


def test_a_cancelled_request_leaves_nothing(llama: nn.Module) -> None:
    with (
        steer(llama, named={"act": ACT(beta=0.1, threshold=0.02), "zero": ZeroTuning(gamma=5.0)}),
        managing(llama) as manager,
    ):
        manager.add_request(INPUTS[1], request_id="gone", max_new_tokens=400, steer="act", streaming=True)
        while manager.get_result(timeout=5) is None:
            pass
        manager.add_request(INPUTS[0], request_id="stays", steer="zero")
        manager.cancel_request("gone")
        found = {}
        while "stays" not in found:
            result = manager.get_result(timeout=5)
            if result is not None and result.is_finished():
                found[result.request_id] = result
        scheduler, cache = manager.batch_processor.scheduler, manager.batch_processor.cache
        assert set(found) == {"stays"}
        assert not scheduler.active_requests and not scheduler.waiting_requests
        assert not any(a.block_table for a in cache.cache_allocators.values())
    check(found["stays"], alone(llama, INPUTS[0], [ZeroTuning(gamma=5.0)]))


@dataclass(frozen=True)
class Broken(Intervention):
    """Fails in its third call."""

    kinds = ("self",)
    row_local = True

    def output(self, call: Any, out: torch.Tensor) -> torch.Tensor:
        if call.phase == "decode":
            raise ValueError("a bug of the method")
        return out * 2.0


@dataclass(frozen=True)
class Keeping(Intervention):
    """Says that it keeps nothing, and does."""

    kinds = ("self",)
    row_local = True

    def output(self, call: Any, out: torch.Tensor) -> torch.Tensor:
        call.state["seen"] = 1
        return out * 2.0


@dataclass(frozen=True)
class Untold(ZeroTuning):
    """Overrides a door, and says nothing of rows."""

    def weights(self, call: Any) -> Any:
        return super().weights(call)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_errors_of_the_thread_reach_the_caller(llama: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    with steer(llama, Broken(), control=True) as run:
        with pytest.raises(ValueError, match="a bug of the method"):
            batch(llama, INPUTS)
        assert not run.failures
    with steer(llama, Keeping(), control=True), pytest.raises(ContractError, match="declares row_local, and keeps"):
        batch(llama, INPUTS)
    with pytest.raises(ValueError, match="a bug of the method"), steer(llama, Broken()), managing(llama) as manager:
        manager.add_request(INPUTS[0])
        assert "a bug" in results(manager, 1)["req_0"].error
    assert not {"generate_batch", "init_continuous_batching"} & set(vars(llama))
    assert alone(llama, INPUTS[0], [])[0] == batch(llama, INPUTS)[0].generated_tokens


def test_a_derived_method_says_for_itself_whether_its_rows_are_local() -> None:
    assert ZeroTuning().row_local and not Untold().row_local
    assert not SpotLight(SPAN, pooled=True).row_local and not ACT().row_local


def test_what_cannot_be_exact_is_refused_before_the_first_token(llama: nn.Module) -> None:
    with steer(llama, ACT(), control=True), pytest.raises(UnsupportedHost, match="ACT takes a prompt in one piece"):
        batch(llama, prompts(40), max_batch_tokens=32)
    with steer(llama, ZeroTuning(gamma=2.0), control=True) as run:
        with run.freeze(), pytest.raises(UnsupportedHost, match=r"run\.freeze"):
            batch(llama, INPUTS)
        with pytest.raises(UnsupportedHost, match="use_async_batching=False"):
            batch(llama, INPUTS, use_async_batching=True)
        with pytest.raises(UnsupportedHost, match="varlen_compile_config=None"):
            batch(llama, INPUTS, default_compile_level=1)
    capped = tiny_transformers("gemma2")
    with steer(capped, ZeroTuning(gamma=2.0), control=True), pytest.raises(UnsupportedHost, match="caps its scores"):
        batch(capped, INPUTS)
    assert not {"generate_batch", "init_continuous_batching"} & set(vars(llama))


def test_a_manager_belongs_to_its_steering(llama: nn.Module) -> None:
    with managing(llama) as before, steer(llama, ZeroTuning(gamma=5.0), control=True):
        before.add_request(INPUTS[0])
        assert "made before the model was steered" in results(before, 1)["req_0"].error
    kept = {"generation_config": sampling(), "continuous_batching_config": batching(), "persistent_manager": True}
    llama.generate_batch(INPUTS, **kept)
    with steer(llama, ZeroTuning(gamma=5.0), control=True):
        with pytest.raises(UnsupportedHost, match="destroy_cached_continuous_batching_manager"):
            batch(llama, INPUTS)
        llama.destroy_cached_continuous_batching_manager()
        for _ in range(2):
            (found, *_) = llama.generate_batch(INPUTS, **kept).values()
            assert found.generated_tokens == alone_within(llama, INPUTS[0])
    assert not hasattr(llama, "_cached_continuous_batching_manager")
    with steer(llama, ZeroTuning(gamma=5.0), control=True) as run, managing(llama) as manager:
        run._detach()
        with pytest.raises(CompositionError, match="was removed"):
            manager.add_request(INPUTS[0])


def alone_within(model: nn.Module, ids: list[int]) -> list[int]:
    """Tokens of a request through `generate` of a model that is steered."""
    mask = torch.ones(1, len(ids), dtype=torch.long)
    return model.generate(torch.tensor([ids]), attention_mask=mask, generation_config=sampling())[
        0, len(ids) :
    ].tolist()


class CallsSdpa(nn.Module):
    """An attention of nobody's library."""

    num_heads = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_names(llama: nn.Module) -> None:
    for named, message in (
        ({}, "a mapping of names"),
        ([ZeroTuning()], "a mapping of names"),
        ({"none": ZeroTuning()}, "stands for no steering"),
        ({"": ZeroTuning()}, "named ''"),
        ({"it": []}, "has no intervention"),
    ):
        with pytest.raises(SelectionError, match=message):
            steer(llama, named=named)
    with pytest.raises(SelectionError, match="give all of them names, or none"):
        steer(llama, ZeroTuning(), named={"it": ZeroTuning()})
    with pytest.raises(UnsupportedHost, match="no requests that could choose"):
        steer(CallsSdpa(), named={"it": HeadGate({(0, 0): 0.5})})
    with steer(llama, named={"it": ZeroTuning(gamma=3.0)}, control=True) as run:
        with pytest.raises(UnsupportedHost, match="for requests of continuous batching"):
            llama(torch.tensor([INPUTS[0]]))
        with pytest.raises(SelectionError, match="head"):
            run.request("it", where=Where(layers=[0], heads=[9]))
    with steer(llama, ZeroTuning({0: [1]}, 3.0), control=True) as run:
        with pytest.raises(SelectionError, match="where nothing is attached"):
            run.request(heads={1: [0]})
        with pytest.raises(SelectionError, match="there are no names here"):
            run.request("it")


def test_each_name_must_act_where_a_request_chose_it(llama: nn.Module) -> None:
    """Also where requests of other names act in the same batches."""
    named = {"flat": ZeroTuning(gamma=5.0), "sharp": ZeroTuning(gamma=0.5), "unused": ACT()}
    with steer(llama, named=named) as run:
        batch(llama, INPUTS, ["flat", "flat", "sharp", None])
    calls = [run.audit.records[i, run.sites[0].path] for i in (0, 1)]
    assert calls[0].rows > calls[1].rows > 0 and not run.audit.saw(2)
    with (
        pytest.raises(NeverFired, match=r"^ZeroTuning\([^)]*\)[^)]*gamma=0.5\) was asked, but changed nothing"),
        steer(llama, named=named),
    ):
        batch(llama, INPUTS, ["flat", "flat", {"steering": "sharp", "gamma": 1.0}, None])
