"""What a call tells a method: scores, the keys that a row sees, and the row of the prompt's last token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import Intervention, Where, steer
from attnsteer.call import AttnCall, KeyBias, Reweight
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs

NO_GRAD = torch.no_grad()


@dataclass(frozen=True)
class Asks(Intervention):
    """Keeps what `ask` answers at each call."""

    ask: Callable[[AttnCall], Any]
    kept: list[Any] = field(default_factory=list, compare=False, repr=False)

    kinds = ("self",)
    needs = ("tokens",)
    observes = True

    def output(self, call: AttnCall, out: Tensor) -> None:
        self.kept.append(self.ask(call))


@dataclass(frozen=True)
class Earlier(Intervention):
    """A bias and a reweighting before the method that asks."""

    def bias(self, call: AttnCall) -> KeyBias:
        return KeyBias(call.first_key() * 1.5)

    def weights(self, call: AttnCall) -> Reweight:
        return Reweight(((call.first_key(), 2.0),))


def answers(host: str, ask: Callable[[AttnCall], Any], *before: Intervention, **inputs: Any) -> Any:
    """What a method at the middle layer is told in one call."""
    model = tiny_transformers(host)
    method = Asks(ask, where=Where(layers=[1]))
    with NO_GRAD, steer(model, *before, method):
        model(**tiny_transformers_inputs(host, model, batch=2, **inputs))
    return method.kept[0]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("host", ["llama", "mistral", "gemma2"])
def test_scores_are_those_that_the_map_is_made_of(host: str, padding: str) -> None:
    """Soft-capped, masked (a window of 5 tokens in mistral), and with the bias of the method before."""
    ask = lambda call: (call.map.scores(), call.map.dense(), call.map.keys_seen(), call.first_key())  # noqa: E731
    for before in ((), (Earlier(where=Where(layers=[1])),)):
        scores, A, seen, first = answers(host, ask, *before, length=9, padding=padding)
        # The reweighting of the method before is in the map, and its bias in both.
        mine = (scores + first[:, :, None] * math.log(2.0 if before else 1.0)).softmax(-1).nan_to_num(0.0)
        torch.testing.assert_close(A, mine, atol=1e-6, rtol=1e-5)
        assert torch.equal(seen.expand(A.shape[:3]), (scores > -torch.inf).sum(-1))
        assert int(seen.max()) == (5 if host == "mistral" else 9)


def ends(host: str, run: Callable[[Any, dict[str, Tensor]], Any], **inputs: Any) -> list[list[list[int]]]:
    """For each call, the slots at which `call.prompt_end` holds, for each sample."""
    model = tiny_transformers(host)
    inputs = tiny_transformers_inputs(host, model, batch=2, **inputs)
    method = Asks(lambda call: (call.prompt_end, call.rows.slot), where=Where(layers=[1]))
    with NO_GRAD, steer(model, method) as steering:
        run((model, steering), inputs)
    return [[slot[row].tolist() for row in end.expand(2, -1)] for end, slot in method.kept]


def test_the_end_of_the_prompt_is_its_last_token() -> None:
    once = lambda m, inputs: m[0](**inputs)  # noqa: E731
    assert ends("llama", once, length=9) == [[[8], [8]]]
    assert ends("llama", once, length=9, padding="left") == [[[8], [8]]]
    inputs = tiny_transformers_inputs("llama", tiny_transformers("llama"), batch=2, length=9, padding="right")
    last = (inputs["attention_mask"].sum(-1) - 1).tolist()
    assert ends("llama", once, length=9, padding="right") == [[[end] for end in last]] and min(last) < 8


@pytest.mark.parametrize("cached", [True, False])
def test_generated_rows_are_behind_it(cached: bool) -> None:
    generate = lambda m, inputs: m[0].generate(**inputs, max_new_tokens=3, use_cache=cached, do_sample=False)  # noqa: E731
    later = [[], []] if cached else [[8], [8]]
    assert ends("llama", generate, length=9, padding="left") == [[[8], [8]], later, later]


def test_in_chunks_it_is_in_the_last_one_only() -> None:
    def chunks(told: tuple[Any, Any], inputs: dict[str, Tensor], total: int | None) -> None:
        (model, steering), ids, cache = told, inputs["input_ids"], None
        with steering.chunked_prefill(tokens=total):
            for part in ids.split(4, dim=1):
                cache = model(input_ids=part, past_key_values=cache, use_cache=True).past_key_values

    none = [[], []]
    assert ends("llama", lambda told, i: chunks(told, i, 9), length=9) == [none, none, [[8], [8]]]
    # Nothing tells that there is no further chunk.
    assert ends("llama", lambda told, i: chunks(told, i, None), length=9) == [none, none, none]
