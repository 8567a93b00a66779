"""Models in training mode whose attention drops part of its map: edits of head outputs act on what came out, edits of maps stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnsteer import HeadGate, Intervention, steer
from attnsteer.call import AttnCall, KeyBias
from attnsteer.errors import UnsupportedHost
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.hosts.transformers.test_written import gptj, inputs
from tests.hosts.vit import HEADS, Attention, vit

RATE = 0.3


@dataclass(frozen=True)
class Sharpen(Intervention):
    """A bias on the first key."""

    def bias(self, call: AttnCall) -> KeyBias:
        bias = torch.zeros(1, 1, call.shape[3])
        bias[..., 0] = 1.0
        return KeyBias(bias)


class Dropping(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.join(F.scaled_dot_product_attention(*self.split(x), dropout_p=RATE * self.training))


def language_model(kind: str, implementation: str) -> Callable[[], tuple[nn.Module, Callable[[], Tensor], int]]:
    def make() -> tuple[nn.Module, Callable[[], Tensor], int]:
        model = gptj() if kind == "gptj" else tiny_transformers(kind)
        model.set_attn_implementation(implementation)
        for module in model.modules():
            for name in ("attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, RATE)
            if isinstance(module, nn.Dropout):
                module.p = RATE
        given = inputs() if kind == "gptj" else tiny_transformers_inputs(kind, model, batch=2, length=9)
        return model.train(), lambda: model(**given)[0], model.config.num_attention_heads

    return make


def plain_module() -> tuple[nn.Module, Callable[[], Tensor], int]:
    model, x = vit(Dropping)
    return model.train(), lambda: model(x), HEADS


CASES: dict[str, Any] = {
    "llama sdpa": language_model("llama", "sdpa"),
    "llama eager": language_model("llama", "eager"),
    "gptj": language_model("gptj", "eager"),
    "a plain module": plain_module,
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_gates_take_what_the_kernel_gave_and_maps_stop(name: str) -> None:
    model, run, heads = CASES[name]()

    def drawn() -> Tensor:
        torch.manual_seed(3)
        return run()

    plain = drawn()
    assert not torch.equal(plain, run())
    every = {(0, h): 1.0 for h in range(heads)}
    with steer(model, HeadGate(every), control=True):
        assert torch.equal(drawn(), plain)
    with steer(model, HeadGate({(0, 0): 0.5})):
        assert not torch.equal(drawn(), plain)
    with steer(model, Sharpen(), control=True), pytest.raises(UnsupportedHost, match=r"attention dropout 0\.3"):
        run()
    assert torch.equal(drawn(), plain)
    with steer(model.eval(), Sharpen(), control=True):
        assert torch.equal(run(), run())
