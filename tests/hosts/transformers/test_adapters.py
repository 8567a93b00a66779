"""Adapters of peft: LoRA, and learned vectors in front of a prompt, which are no tokens of the user's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import HeadGate, Intervention, SpotLight, Where, steer
from attnsteer.call import AttnCall
from attnsteer.testing import tiny_transformers

peft = pytest.importorskip("peft", reason="peft is not installed")

# What peft asks of the library, and how it is told of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

VIRTUAL, WIDTH = 3, 9


class Letters:
    """A tokenizer whose text is one character a token."""

    is_fast = False

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(200 + i) for i in ids)


def configs() -> dict[str, Any]:
    kind = {"task_type": "CAUSAL_LM"}
    return {
        "lora": peft.LoraConfig(target_modules=["q_proj"], **kind),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, **kind),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL, **kind),
    }


def adapted(name: str) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(tiny_transformers("llama"), configs()[name]).eval()


class Seen(Intervention):
    """Notes where the marked keys lie, counted from the last key."""

    observes = True
    needs = ("tokens",)
    kinds = ("self",)
    found: list[list[int]]

    def weights(self, call: AttnCall) -> None:
        keys = call.span_keys(call.tokens.spans([[(1, 3)], [(1, 3)]]))
        FOUND.append((keys[:, 0].nonzero()[:, 1] - (call.past + call.q.shape[2])).tolist())


FOUND: list[list[int]] = []


@torch.no_grad()
@pytest.mark.parametrize("left", [0, 2], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["lora", "prompt", "prefix"])
def test_spans_count_from_the_users_first_token(name: str, left: int) -> None:
    model = adapted(name)
    ids = torch.randint(4, 90, (2, WIDTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :left], mask[1, :left] = 0, 0
    FOUND.clear()
    with steer(model, Seen(where=Where(layers=[0]))):
        model(input_ids=ids, attention_mask=mask)
    assert [[1 - WIDTH, 2 - WIDTH, 1 + left - WIDTH, 2 + left - WIDTH]] == FOUND
    FOUND.clear()
    with steer(model, Seen(where=Where(layers=[0]))):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    expected = [1 - WIDTH, 2 - WIDTH, 1 + left - WIDTH, 2 + left - WIDTH]
    assert [[at - step for at in expected] for step in range(3)] == FOUND


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora", "prompt", "prefix"])
def test_strings_are_found_behind_them(name: str) -> None:
    model, ids = adapted(name), torch.tensor([[5, 6, 50, 51, 7, 8]])
    ranges, words = SpotLight([[(2, 4)]], 0.6), SpotLight(Letters().decode([50, 51]), 0.6, tokenizer=Letters())
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}

    def tokens(method: Intervention) -> Tensor:
        with steer(model, method):
            return model.generate(**options, output_logits=True, return_dict_in_generate=True).logits

    for one, other in zip(tokens(ranges), tokens(words), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_what_was_adapted_is_plain_again() -> None:
    model = adapted("prompt")
    ids = torch.randint(4, 90, (1, WIDTH), generator=torch.Generator().manual_seed(2))
    before = model(input_ids=ids).logits
    with steer(model, HeadGate({(0, 1): 0.0})):
        assert not torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model(input_ids=ids).logits, before)
