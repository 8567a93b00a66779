"""Steered requests inside vLLM against the same requests alone in transformers: token by token, log-probabilities within 1e-4."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.exceptions import VLLMValidationError

from attnsteer import ACT, SpotLight, Where, ZeroTuning
from attnsteer.hosts.vllm import admission
from tests.hosts.vllm import engines as E

CLOSE = 1e-4
# The oracle's two likeliest tokens are further apart than what engines differ by, so that ids mean something.
APART = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> Any:
    return tmp_path_factory.mktemp("models")


def checked(wanted: list[Any], plain: list[Any] | None = None) -> list[Any]:
    """The oracle's answers, if they can tell right from wrong."""
    assert min(w[2] for w in wanted) > APART
    if plain is not None:
        moved = [E.worst([w], [p]) for w, p in zip(wanted, plain, strict=True)]
        assert sum(m > 10 * CLOSE for m in moved) > 0.6 * len(moved)
    return wanted


class TestLlama:
    """One engine: 64 requests of mixed lengths with eight steerings."""

    @pytest.fixture(scope="class")
    def path(self, models: Any) -> Any:
        return E.saved("llama", models)

    @pytest.fixture(scope="class")
    def work(self, path: Any) -> tuple[Any, ...]:
        prompts, chosen = E.requests(64)
        plain = E.oracle(path, prompts[:16], [None] * 16)
        wanted = E.oracle(path, prompts, chosen)
        checked(wanted[:16], plain)
        return prompts, chosen, wanted

    @pytest.fixture(scope="class")
    def llm(self, path: Any) -> Iterator[Any]:
        llm = E.engine(path, {"steerings": {"calm": {"method": "ZeroTuning", "gamma": 0.6}}}, block_size=32)
        yield llm
        E.close(llm)

    def test_a_batch_is_each_request_alone(self, llm: Any, work: Any) -> None:
        prompts, chosen, wanted = work
        first = E.answers(llm, prompts, chosen)
        again = E.answers(llm, prompts, chosen)
        assert E.worst(first, wanted) < CLOSE and E.worst(again, wanted) < CLOSE
        # Requests that are steered alike share their prefixes, all others do not.
        assert sum(a[2] > 0 for a in again) > 40
        turned = E.answers(llm, prompts[::-1], chosen[::-1])[::-1]
        assert E.worst(turned, wanted) < CLOSE
        alone = [E.answers(llm, [p], [s])[0] for p, s in zip(prompts[:8], chosen[:8], strict=True)]
        assert E.worst(alone, wanted[:8]) < CLOSE

    def test_a_name_is_its_definition(self, llm: Any, work: Any) -> None:
        prompts, _, wanted = work
        named = E.answers(llm, [prompts[7]] * 2, [{"attnsteer": "calm"}, {"attnsteer": {"name": "calm", "gamma": 0.6}}])
        assert E.worst(named, [wanted[7]] * 2) < CLOSE

    def test_several_sequences_of_a_request(self, llm: Any, work: Any) -> None:
        from vllm import SamplingParams

        prompts, chosen, _ = work
        params = SamplingParams(
            temperature=1.0,
            n=3,
            seed=5,
            max_tokens=4,
            detokenize=False,
            extra_args=E.request_args(chosen[0]),
            logprobs=1,
        )
        (out,) = llm.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)
        (one,) = llm.generate([{"prompt_token_ids": prompts[0]}], params.clone(), use_tqdm=False)
        assert [o.token_ids for o in out.outputs] == [o.token_ids for o in one.outputs] and len(out.outputs) == 3

    def test_refusals_change_nothing(self, llm: Any, work: Any) -> None:
        prompts, chosen, wanted = work
        wrong = [
            "calmer", {"method": "nope"}, {"method": "ZeroTuning", "gamma": "x"}, {"method": "ZeroTuning", "heads": {"9": [0]}},
            {"method": "SpotLight", "spans": [[1, 4000]]}, {"method": "VAR", "sink_dims": [1]}, {"method": "ACT"}, 5,
        ]  # fmt: skip
        for value in wrong:
            with pytest.raises(VLLMValidationError):
                E.answers(llm, prompts[:1], [{"attnsteer": value}])
        assert E.worst(E.answers(llm, prompts[:8], chosen[:8]), wanted[:8]) < CLOSE

    def test_nothing_is_left_behind(self, llm: Any, work: Any) -> None:
        prompts = work[0]
        E.answers(llm, prompts[:1], [None], 1)
        ledger = E.ledger(llm)
        assert len(ledger.requests) <= 1 and not ledger.silent and ledger.finished > 100

    def test_unsteered_requests_are_those_of_an_engine_without_it(self, llm: Any, path: Any, work: Any) -> None:
        prompts = work[0]
        llm.llm_engine.reset_prefix_cache()
        armed = E.answers(llm, prompts[:24], [None] * 24)
        other = E.engine(path, False, block_size=32)
        try:
            plain = E.answers(other, prompts[:24], [None] * 24)
            with pytest.raises(VLLMValidationError, match="started without steering"):
                E.answers(other, prompts[:1], [{"attnsteer": "calm"}])
        finally:
            E.close(other)
        assert armed == plain


def test_prompts_in_chunks_and_full_caches(models: Any, monkeypatch: Any) -> None:
    path = E.saved("llama", models)
    draw = random.Random(3)
    prompts = [[1] + [draw.randrange(3, E.VOCAB) for _ in range(121 + i)] for i in range(5)]
    chosen = [E.steerings(121)[i] for i in (0, 1, 4, 3, 2)]
    llm = E.engine(path, num_gpu_blocks_override=11, block_size=64, max_num_batched_tokens=96)
    try:
        alone = [E.answers(llm, [p], [s], 80)[0] for p, s in zip(prompts, chosen, strict=True)]
        short = [(ids[: E.TOKENS], logs[: E.TOKENS]) for ids, logs, _ in alone]
        assert E.worst(short, checked(E.oracle(path, prompts, chosen))) < CLOSE
        llm.llm_engine.reset_prefix_cache()
        from vllm.v1.core.sched.scheduler import Scheduler

        times, inner = [], Scheduler._preempt_request
        monkeypatch.setattr(Scheduler, "_preempt_request", lambda *a, **k: (times.append(1), inner(*a, **k))[1])
        assert E.worst(E.answers(llm, prompts, chosen, 80), alone) < CLOSE
        assert times
    finally:
        E.close(llm)


def test_whole_prompts_and_their_statistics(models: Any) -> None:
    path = E.saved("llama", models)
    prompts, _ = E.requests(12, seed=2)
    act = [ACT(heads=E.HEADS, beta=0.4, threshold=0.02), ACT(beta=0.2, threshold=0.01, decode="running"), None]
    chosen = [act[i % 3] for i in range(12)]
    wanted = checked(E.oracle(path, prompts, chosen))
    plain = E.oracle(path, prompts[:6], [None] * 6)
    assert [E.worst([w], [p]) > CLOSE for w, p in zip(wanted, plain, strict=False)] == [True, True, False] * 2
    llm = E.engine(path, enable_chunked_prefill=False, max_num_batched_tokens=1024, block_size=32)
    try:
        assert E.worst(E.answers(llm, prompts, chosen), wanted) < CLOSE
        again = E.answers(llm, prompts, chosen)
        assert E.worst(again, wanted) < CLOSE
        # The rows of a block that is read again are not there to be counted.
        assert [a[2] > 0 for a in again] == [c is None and len(p) > 32 for c, p in zip(chosen, prompts, strict=True)]
        from vllm import SamplingParams

        # Each sequence of a request has a statistic of its own: the likeliest first token has the oracle's log-probability in both.
        params = SamplingParams(
            temperature=1.0, seed=3, n=2, max_tokens=2, detokenize=False, extra_args=E.request_args(act[0]), logprobs=1
        )
        (out,) = llm.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)
        first = [own.logprobs[0][wanted[0][0][0]].logprob for own in out.outputs]
        assert len(first) == 2 and all(abs(f - wanted[0][1][0]) < CLOSE for f in first)
    finally:
        E.close(llm)


FAMILIES = [
    ("qwen3", "sdpa", {}),
    ("mistral", "sdpa", {"max_num_batched_tokens": 64}),
    ("gemma2", "eager", {"max_num_batched_tokens": 64}),
    ("gpt_oss", "eager", {}),
    ("llama", "sdpa", {"enforce_eager": False}),
    (
        "llama",
        "sdpa",
        {
            "speculative_config": dict(
                method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1
            )
        },
    ),
]


@pytest.mark.parametrize(
    ("family", "attn", "options"), FAMILIES, ids=["qwen3", "windows", "softcap", "sinks", "compiled", "speculative"]
)
def test_other_models_and_engines(models: Any, family: str, attn: str, options: Any) -> None:
    path = E.saved(family, models)
    prompts, chosen = E.requests(16, seed=1)
    wanted = E.oracle(path, prompts, chosen, attn=attn)
    assert min(w[2] for w in wanted) > 2e-5
    llm = E.engine(path, block_size=32, **options)
    try:
        assert E.worst(E.answers(llm, prompts, chosen), wanted) < CLOSE
        assert E.worst(E.answers(llm, prompts, chosen), wanted) < CLOSE
    finally:
        E.close(llm)


def test_adapters(models: Any) -> None:
    """LoRA beside the model itself in one batch, both steered: vLLM's own key keeps their blocks apart."""
    from vllm.lora.request import LoRARequest

    path = E.saved("llama", models)
    adapter, merged = E.adapted(path, models)
    prompts, chosen = E.requests(8, seed=6)
    wanted = [o for pair in zip(*(E.oracle(p, prompts, chosen) for p in (path, merged)), strict=True) for o in pair]
    assert all(E.worst([a], [b]) > 10 * CLOSE for a, b in zip(wanted[::2], wanted[1::2], strict=True))
    # vLLM's operators of CPU take the last place of adapters for requests without one: it has to be an empty one.
    llm = E.engine(path, block_size=32, enable_lora=True, max_lora_rank=8, max_loras=2)
    try:
        both = [None, LoRARequest("adapter", 1, str(adapter))] * len(prompts)
        twice = lambda own: [o for o in own for _ in range(2)]  # noqa: E731
        for _ in range(2):
            found = E.answers(llm, twice(prompts), twice(chosen), lora=both)
            assert E.worst(found, wanted) < CLOSE
        assert sum(f[2] > 0 for f in found) >= 8
    finally:
        E.close(llm)


def test_a_quantised_cache_is_refused(models: Any) -> None:
    with pytest.raises(Exception, match="kv_cache_dtype"):
        E.engine(E.saved("llama", models), kv_cache_dtype="fp8")


def test_an_engine_whose_worker_is_not_armed_does_not_start(models: Any, monkeypatch: Any) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    monkeypatch.setattr(Worker, "load_model", Worker.load_model.__wrapped__)
    with pytest.raises(Exception, match="did not load attnsteer's plug-in"):
        E.engine(E.saved("llama", models))


class TestPrefixCache:
    """1,000 sequences of requests that share prefixes under different steerings, in batches of random size, over one cache.

    A sequence is a conversation: each turn's prompt is the one before, what was answered to it, and some tokens more, and may be
    steered otherwise. Few beginnings and few ends, so that most blocks are there already, of a request steered alike or not.
    """

    COUNT, TOKENS = 1000, 8

    @staticmethod
    def beginnings(count: int, seed: int) -> list[list[int]]:
        draw = random.Random(seed)
        trunk = [1] + [draw.randrange(3, E.VOCAB) for _ in range(95)]
        ends = [[draw.randrange(3, E.VOCAB) for _ in range(40)] for _ in range(3)]
        return [
            trunk[: draw.choice([24, 32, 56, 64, 80])] + draw.choice(ends)[: draw.randrange(1, 40)]
            for _ in range(count)
        ]

    @staticmethod
    def choice(draw: random.Random) -> Any:
        decode = Where(phases="decode")
        own = [
            None, ZeroTuning(gamma=0.2), ZeroTuning(gamma=4.0), E.steerings(24)[3], E.steerings(24)[4], E.steerings(24)[6],
            ZeroTuning(gamma=0.05, where=decode), SpotLight(spans=[[(2, 9)]], target=0.5, where=Where(phases="prefill")),
        ]  # fmt: skip
        return draw.choice(own)

    @classmethod
    def turns(cls, count: int) -> list[list[tuple[Any, list[int]]]]:
        """(steering, tokens that are added) of each turn of each sequence: one to three."""
        draw = random.Random(7)
        more = lambda: [draw.randrange(3, 9) for _ in range(draw.choice([1, 3, 30]))]  # noqa: E731
        found = []
        for _ in range(count):
            first = cls.choice(draw)
            own = [first] + [
                first if draw.random() < 0.6 else cls.choice(draw) for _ in range(draw.choice([0, 0, 1, 2]))
            ]
            found.append([(s, more()) for s in own])
        return found

    @classmethod
    def asked(cls, llm: Any, count: int) -> Iterator[tuple[list[int], list[list[int]], list[Any], list[Any]]]:
        """(sequences, prompts, steerings, answers) of batches of random size; what is answered here goes on in the next turn."""
        prompts, turns, draw = cls.beginnings(count, 0), cls.turns(count), random.Random(1)
        waiting = list(range(count))
        at = dict.fromkeys(waiting, 0)
        while waiting:
            own = [
                waiting.pop(draw.randrange(min(60, len(waiting))))
                for _ in range(min(len(waiting), draw.randrange(1, 48)))
            ]
            chosen = [turns[i][at[i]][0] for i in own]
            found = E.answers(llm, [prompts[i] for i in own], chosen, cls.TOKENS)
            yield own, [prompts[i] for i in own], chosen, found
            for i, answer in zip(own, found, strict=True):
                prompts[i] = prompts[i] + answer[0] + turns[i][at[i]][1]
                at[i] += 1
                if at[i] < len(turns[i]):
                    waiting.insert(0, i)

    @classmethod
    def wrong(cls, llm: Any, oracle: Any, count: int) -> tuple[int, int, int]:
        """(requests, those whose answer is another one than without a cache, those that found blocks)."""
        total = wrong = hits = 0
        for _, prompts, chosen, found in cls.asked(llm, count):
            for answer, wanted in zip(found, oracle(prompts, chosen), strict=True):
                wrong += E.worst([answer], [wanted]) > CLOSE
                hits += answer[2] > 0
                total += 1
        return total, wrong, hits

    def test_a_block_is_reused_where_the_steering_is_the_same_only(self, models: Any, monkeypatch: Any) -> None:
        llm = E.engine(E.saved("llama", models), block_size=32)
        known: dict[Any, Any] = {}

        def oracle(prompts: list[list[int]], chosen: list[Any]) -> list[Any]:
            """The same requests by the same engine, which reads no block for them."""
            keys = [(tuple(p), str(s)) for p, s in zip(prompts, chosen, strict=True)]
            new = {k: i for i, k in enumerate(keys) if k not in known}
            if new:
                found = E.answers(
                    llm, [prompts[i] for i in new.values()], [chosen[i] for i in new.values()], self.TOKENS, fresh=True
                )
                assert not any(f[2] for f in found)
                known.update(zip(new, found, strict=True))
            return [known[k] for k in keys]

        try:
            total, wrong, hits = self.wrong(llm, oracle, self.COUNT)
            print(f"{self.COUNT} sequences, {total} requests, {hits} with blocks of others, {wrong} wrong")
            assert wrong == 0 and hits > 0.8 * total
            # The same with the keys switched off, so that the test can fail: of the steering, and of what was generated.
            llm.llm_engine.reset_prefix_cache()
            with monkeypatch.context() as patch:
                patch.setattr(admission, "own_key", lambda request, stop: None)
                total, wrong, hits = self.wrong(llm, oracle, self.COUNT // 4)
                print(f"without keys of what was generated: {total} requests, {hits} with blocks, {wrong} wrong")
                assert wrong > 3 and hits
            llm.llm_engine.reset_prefix_cache()
            monkeypatch.setattr(admission, "salt", lambda choice, id, own: admission.MARK)
            monkeypatch.setattr(admission, "enter", lambda request, menu: _unsalted(request))
            total, wrong, hits = self.wrong(llm, oracle, self.COUNT // 4)
            print(f"without keys of the steering: {total} requests, {hits} with blocks, {wrong} wrong")
            assert wrong > 50 and hits
        finally:
            E.close(llm)


def _unsalted(request: Any) -> Any:
    request.cache_salt = None
    return request
