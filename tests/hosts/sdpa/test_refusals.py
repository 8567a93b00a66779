"""Modules that call F.scaled_dot_product_attention in ways that cannot be steered exactly are refused."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attnsteer import PAG, HeadGate, Where, sites, steer
from attnsteer.errors import CompositionError, NeverFired, SelectionError, UnsupportedHost
from tests.hosts.vit import DIM, HEADS, Attention, vit


class NoHeads(Attention):
    def __init__(self) -> None:
        super().__init__()
        del self.num_heads
        self.how_many = HEADS

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).unflatten(-1, (3, self.how_many, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.join(F.scaled_dot_product_attention(*self.split(x)))


def test_modules_without_a_number_of_heads() -> None:
    with pytest.raises(UnsupportedHost, match=r"blocks.0.attn.*num_heads"):
        sites(vit(NoHeads)[0])
    model, x = vit(NoHeads, Attention)
    assert [(s.name, bool(s.refused)) for s in sites(model)] == [("blocks.1.attn", False), ("blocks.0.attn", True)]
    for name in ("n_heads", "heads", "n_head", "nhead"):
        model, x = vit(NoHeads)
        setattr(model.blocks[0].attn, name, HEADS)
        with steer(model, HeadGate({(0, 3): 0.0})):
            model(x)


def test_what_cannot_be_steered_is_listed_with_its_reason() -> None:
    mixed = nn.ModuleList([NoHeads(), nn.MultiheadAttention(DIM, HEADS), Attention()])
    found = {site.name: site for site in sites(mixed)}
    assert {name: bool(site.refused) for name, site in found.items()} == {"0": True, "1": True, "2": False}
    assert "num_heads" in found["0"].refused
    assert "scaled_dot_product_attention" in found["1"].refused
    # The layer's number is what it is without the others.
    assert found["2"].layer == 0
    x = torch.randn(2, 5, DIM)
    with steer(mixed, HeadGate({(0, 1): 0.0})):
        gated = mixed[2](x)
    assert not torch.equal(gated, mixed[2](x))
    with pytest.raises(UnsupportedHost, match="does not say"):
        steer(mixed, HeadGate({(1, 0): 0.0}))


class Twice(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.join(F.scaled_dot_product_attention(out, k, v))


OPERATORS = types.SimpleNamespace(functional=F)


class Hidden(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.join(OPERATORS.functional.scaled_dot_product_attention(*self.split(x)))


class Flat(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in self.split(x))
        return self.join(F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, HEADS)))


class WrongHeads(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.split(x))
        return self.join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


class Dropping(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.join(F.scaled_dot_product_attention(*self.split(x), dropout_p=0.1))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (Twice, "2 times"),
        (Hidden, "0 times .*through an object or a helper function"),
        (Flat, "3-D"),
        (WrongHeads, "listed with 4 heads but computes 10"),
        (Dropping, "dropout"),
    ],
)
def test_what_cannot_be_steered_exactly(attention: type[nn.Module], message: str) -> None:
    model, x = vit(attention)
    torch.manual_seed(1)
    plain = model(x)
    # Most are refused before anything is edited.
    run = steer(model, HeadGate({(0, 0): 0.0}), control=True)
    with pytest.raises(UnsupportedHost, match=message):
        model(x)
    run.remove()
    torch.manual_seed(1)
    assert torch.equal(model(x), plain)


def test_a_forward_that_is_not_the_class_own_is_refused() -> None:
    class Decorated(Attention):
        @torch.no_grad()
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.join(F.scaled_dot_product_attention(*self.split(x)))

    with pytest.raises(UnsupportedHost, match="decorated"):
        steer(vit(Decorated)[0], HeadGate({(0, 0): 0.0}))
    model, x = vit()
    attn = model.blocks[0].attn
    attn.forward = lambda x, mask=None: x
    with pytest.raises(UnsupportedHost, match="exchanged on the module"):
        steer(model, HeadGate({(0, 0): 0.0}))
    with steer(model, HeadGate({(1, 0): 0.0})):
        model(x)


def test_selections_and_methods_that_do_not_fit() -> None:
    model, x = vit()
    with pytest.raises(SelectionError, match=r"layers \[7\]"):
        steer(model, HeadGate({(7, 0): 0.0}))
    with pytest.raises(SelectionError, match="steps"):
        steer(model, HeadGate({(0, 0): 0.0}, where=Where(steps=[1])))
    with pytest.raises(UnsupportedHost, match="several times"):
        steer(model, PAG(3.0, where=Where(layers=0)))
    with pytest.raises(UnsupportedHost, match="nothing here can steer"):
        steer(nn.TransformerEncoderLayer(8, 2), HeadGate({(0, 0): 0.0}))
    with pytest.raises(NeverFired), steer(model, HeadGate({(0, 0): 0.0})):
        pass
    with steer(model, HeadGate({(0, 0): 0.0})):
        with pytest.raises(CompositionError, match="to one call"):
            steer(model, HeadGate({(0, 1): 0.0}))
        model(x)


def test_nothing_global_changes() -> None:
    before = F.scaled_dot_product_attention
    model, x = vit()
    other, _ = vit()
    plain = other(x)
    with warnings.catch_warnings(), steer(model, HeadGate({(0, 0): 0.0})):
        warnings.simplefilter("error")
        model(x)
        assert torch.equal(other(x), plain)
        assert torch.nn.functional.scaled_dot_product_attention is before is scaled_dot_product_attention
    assert Attention.forward.__globals__["F"] is F
