"""Any module that calls F.scaled_dot_product_attention: a small vision transformer written in every spelling."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch as pytorch
import torch.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as renamed

from attnsteer import PAG, HeadGate, Where, sites, steer
from attnsteer.call import AttnCall, Reweight
from attnsteer.errors import CompositionError, NeverFired, SelectionError, UnsupportedHost
from attnsteer.intervention import Intervention

DIM, HEADS, TOKENS = 32, 4, 10


class Attention(nn.Module):
    """As timm's, with `import torch.nn.functional as F`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N, _ = x.shape
        return self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByFunctional(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByNn(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByTorch(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByOtherTorch(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(pytorch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class ByName(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(scaled_dot_product_attention(q, k, v, mask))


class ByOtherName(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        return self.join(renamed(q, k, v, mask))


class ByLocalName(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        attend = F.scaled_dot_product_attention
        return self.join(attend(*self.split(x), mask))


class BySuper(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = super().split(x)
        return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Inherited(Attention):
    pass


SPELLINGS = (
    Attention, ByFunctional, ByNn, ByTorch, ByOtherTorch, ByName, ByOtherName, ByLocalName, BySuper, Inherited,
)  # fmt: skip


class Block(nn.Module):
    def __init__(self, attention: type[nn.Module]):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(DIM), attention(), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 48), nn.GELU(), nn.Linear(48, DIM))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    def __init__(self, *attention: type[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(Block(a) for a in attention)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


def vit(*attention: type[nn.Module]) -> tuple[Vit, Tensor]:
    torch.manual_seed(0)
    return Vit(*(attention or (Attention, Attention))).eval(), torch.randn(3, TOKENS, DIM)


def dense(model: Vit, layer: int, x: Tensor, change: Any, mask: Tensor | None = None) -> Tensor:
    """The model with `change(map, values)` in place of one layer's head outputs."""
    attn = model.blocks[layer].attn

    def forward(x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = attn.split(x)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        return attn.join(change(scores.softmax(-1), v))

    vars(attn)["forward"] = forward
    try:
        return model(x, mask)
    finally:
        del vars(attn)["forward"]


@dataclass(frozen=True)
class Boost(Intervention):
    """Scales the weight of the first `keys` keys, renormalised or not."""

    keys: int = 3
    factor: float = 2.0
    normalise: bool = True

    def weights(self, call: AttnCall) -> Reweight:
        chosen = (torch.arange(call.k.shape[2]) < self.keys)[None, None]
        return Reweight(((chosen, self.factor),), normalise=self.normalise)


@pytest.mark.parametrize("attention", SPELLINGS)
@torch.no_grad()
def test_gates_in_every_spelling(attention: type[nn.Module]) -> None:
    model, x = vit(Attention, attention)
    plain = model(x)
    gate = torch.tensor([1.0, 0.0, -2.0, 1.0])[:, None, None]
    with steer(model, HeadGate({(1, 1): 0.0, (1, 2): -2.0})) as run:
        out = model(x)
        assert [s.name for s in run.sites] == ["blocks.1.attn"]
    torch.testing.assert_close(out, dense(model, 1, x, lambda A, v: gate * (A @ v)), atol=1e-5, rtol=1e-5)
    assert (out - plain).abs().max() > 1e-2
    assert torch.equal(model(x), plain)
    assert "forward" not in vars(model.blocks[1].attn)
    with steer(model, HeadGate({(0, 0): 1.0, (1, 0): 1.0})):
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_weights_are_those_of_the_dense_map(masked: bool, normalise: bool) -> None:
    model, x = vit()
    mask = torch.rand(3, 1, TOKENS, TOKENS) > 0.3 if masked else None
    mask = mask | torch.eye(TOKENS, dtype=torch.bool) if masked else None

    def change(A: Tensor, v: Tensor) -> Tensor:
        new = A.clone()
        new[:, :, :, :3] *= 2.5
        new = new / new.sum(-1, keepdim=True) if normalise else new
        return torch.cat([(A @ v)[:, :1], (new @ v)[:, 1:3], (A @ v)[:, 3:]], dim=1)

    with steer(model, Boost(3, 2.5, normalise, where=Where(layers=0, heads=(1, 2))), measure=True) as run:
        out = model(x, mask)
    torch.testing.assert_close(out, dense(model, 0, x, change, mask), atol=1e-5, rtol=1e-5)
    record = next(iter(run.audit.records.values()))
    assert record.distance > 0 and record.path == "fused"


def test_gradients_pass_through() -> None:
    model, x = vit()
    x.requires_grad_(True)
    with steer(model, Boost(), HeadGate({(1, 0): 0.5})):
        grad = torch.autograd.grad(model(x).square().sum(), x)[0]
    assert grad.isfinite().all() and grad.abs().max() > 0


@pytest.mark.parametrize("steer_first", [False, True])
@pytest.mark.parametrize("reweighting", [False, True])
@torch.no_grad()
def test_compiled(reweighting: bool, steer_first: bool) -> None:
    """Head edits are one graph; a reweighting gathers keys, which breaks the graph, or raises with `fullgraph`."""
    torch._dynamo.reset()
    model, x = vit(Attention, ByName)
    plain = model(x)
    methods = (HeadGate({(0, 0): -1.0, (1, 2): 0.0}), *([Boost(where=Where(layers=0))] if reweighting else []))
    with steer(model, *methods):
        expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=not reweighting)
    if not steer_first:
        torch.testing.assert_close(compiled(x), plain)
    run = steer(compiled, *methods)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    assert all(run.audit.fired(i) for i in range(len(methods)))
    if reweighting:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"guard on data-dependent|graph break|Dynamo"):
            torch.compile(model, backend="eager", fullgraph=True)(x)
    run.remove()
    torch.testing.assert_close(compiled(x), plain)
    assert (expected - plain).abs().max() > 1e-2


@pytest.mark.parametrize("unhook_first", [False, True])
@pytest.mark.parametrize("hook_first", [False, True])
@torch.no_grad()
def test_hooks_of_accelerate_in_any_order(hook_first: bool, unhook_first: bool) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model, x = vit()
    attn, plain, gate = model.blocks[0].attn, model(x), HeadGate({(0, 0): 0.0})
    with steer(model, gate):
        expected = model(x)
    run = None if hook_first else steer(model, gate)
    add_hook_to_module(attn, AlignDevicesHook(execution_device="cpu"))
    run = run or steer(model, gate)
    assert torch.equal(model(x), expected)
    if unhook_first:
        remove_hook_from_module(attn)
        assert torch.equal(model(x), expected)
        run.remove()
    else:
        run.remove()
        assert torch.equal(model(x), plain)
        remove_hook_from_module(attn)
    assert torch.equal(model(x), plain)
    assert attn.forward.__func__ is Attention.forward
    # and once more
    with steer(model, gate):
        assert torch.equal(model(x), expected)


# ----------------------------------------------------------------------------------------------------- refusals


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
    assert [s.name for s in sites(model)] == ["blocks.1.attn"]
    for name in ("n_heads", "heads", "n_head", "nhead"):
        model, x = vit(NoHeads)
        setattr(model.blocks[0].attn, name, HEADS)
        with steer(model, HeadGate({(0, 3): 0.0})):
            model(x)


class Twice(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.join(F.scaled_dot_product_attention(out, k, v))


class Hidden(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        from torch.nn import functional as local

        return self.join(local.scaled_dot_product_attention(*self.split(x)))


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
        (Hidden, "0 times"),
        (Flat, "3-D"),
        (WrongHeads, "listed with 4 heads but computes 10"),
        (Dropping, "dropout"),
    ],
)
def test_what_cannot_be_steered_exactly(attention: type[nn.Module], message: str) -> None:
    model, x = vit(attention)
    torch.manual_seed(1)
    plain = model(x)
    run = steer(model, HeadGate({(0, 0): 0.0}))
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
        with pytest.raises(CompositionError, match="one call"):
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
