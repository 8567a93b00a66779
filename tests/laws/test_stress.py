"""Many generations at once on one steered model, forwards broken off at random places: nothing wrong, nothing raised."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import ACT, PASTA, HeadGate, SpotLight, Where, ZeroTuning, steer
from attnsteer.testing import tiny_transformers

THREADS = 8
SPAN = [[(1, 3), (4, 5)]]
# Each at a layer of its own, so that all of them act in every generation.
METHODS = (
    ACT({0: [0, 2]}, 0.3, 0.12),
    PASTA(SPAN, {1: [0, 3]}, 0.05),
    SpotLight(SPAN, 0.6, where=Where(heads={2: [1]})),
    ZeroTuning({1: [1]}, 5.0),
    HeadGate({(2, 0): -0.5}),
)
some_and_many = pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.long)])


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_transformers("llama")


def request(number: int) -> dict[str, Any]:
    """Arguments of a generation of its own length, by greedy decoding, lookup, or a beam search."""
    source = random.Random(number % 20)
    length = source.randint(6, 24)
    ids = torch.randint(8, 90, (1, length), generator=torch.Generator().manual_seed(number % 20))
    way = source.choice([{}, {}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2}, {"use_cache": False}])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": source.randint(2, 6), **way}


def generate(model: nn.Module, number: int) -> Tensor:
    with torch.no_grad():
        out = model.generate(**request(number), do_sample=False, output_scores=True, return_dict_in_generate=True)
    return torch.cat([out.sequences.flatten().float(), torch.cat([s.flatten() for s in out.scores])])


def steered(model: nn.Module) -> Any:
    return steer(model, *METHODS, control=True)


def expected(model: nn.Module) -> list[Tensor]:
    return [generate(model, number) for number in range(20)]


@some_and_many
def test_threads(llama: nn.Module, count: int) -> None:
    wrong: list[Any] = []
    with steered(llama):
        alone = expected(llama)

        def work(start: int) -> None:
            for number in range(start, count, THREADS):
                try:
                    if not torch.equal(generate(llama, number), alone[number % 20]):
                        wrong.append(number)
                except Exception as error:  # reported below
                    wrong.append(error)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []


@some_and_many
def test_tasks_with_a_pool_of_threads(llama: nn.Module, count: int) -> None:
    with steered(llama):
        alone = expected(llama)

        async def every() -> list[Tensor]:
            loop = asyncio.get_running_loop()
            with ThreadPoolExecutor(THREADS) as pool:
                return await asyncio.gather(
                    *(loop.run_in_executor(pool, generate, llama, number) for number in range(count))
                )

        found = asyncio.run(every())
    assert [n for n, out in enumerate(found) if not torch.equal(out, alone[n % 20])] == []


class Stop(BaseException):
    """As `KeyboardInterrupt`: no ordinary exception."""


@some_and_many
def test_interrupted_forwards(llama: nn.Module, count: int) -> None:
    """A fifth as many forwards as generations, each broken off at a random module of a random step."""
    source, modules = random.Random(1), [m for name, m in llama.named_modules() if name]
    with steered(llama):
        alone = expected(llama)
        for number in range(count // 5):
            left = source.randint(1, 3)

            def stop(*_: Any) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Stop

            hook = source.choice(modules).register_forward_pre_hook(stop)
            try:
                generate(llama, number)
            except Stop:
                pass
            finally:
                hook.remove()
            if number % 4 == 0:
                assert torch.equal(generate(llama, number), alone[number % 20])
        assert all(torch.equal(generate(llama, n), alone[n]) for n in range(20))
