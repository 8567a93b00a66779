"""Any module that calls F.scaled_dot_product_attention: a small vision transformer written in every spelling."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnsteer import HeadGate, Where, steer
from attnsteer.call import AttnCall, Reweight
from attnsteer.errors import UnsupportedHost
from attnsteer.intervention import Intervention
from tests.hosts.vit import SPELLINGS, TOKENS, Attention, ByName, ByOwnImport, Vit, vit


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
    with steer(model, HeadGate({(0, 0): 1.0, (1, 0): 1.0}), control=True):
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
    """Head edits and reweightings are one graph, whose values are those of each call."""
    torch._dynamo.reset()
    model, x = vit(Attention, ByName)
    inputs = (x, x.flip(1) * 1.5)
    plain = [model(x) for x in inputs]
    boosts = (Boost(where=Where(layers=0)), Boost(normalise=False, where=Where(layers=1, heads=(1, 2))))
    methods = (HeadGate({(0, 0): -1.0, (1, 2): 0.0}), *(boosts if reweighting else ()))
    with steer(model, *methods):
        expected = [model(x) for x in inputs]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    if not steer_first:
        torch.testing.assert_close(compiled(inputs[0]), plain[0])
    run = steer(compiled, *methods)
    for _ in range(2):
        torch.testing.assert_close([compiled(x) for x in inputs], expected)
    assert all(run.audit.fired(i) for i in range(len(methods)))
    run.remove()
    torch.testing.assert_close([compiled(x) for x in inputs], plain)
    assert all((new - old).abs().max() > 1e-2 for new, old in zip(expected, plain, strict=True))


@torch.no_grad()
def test_an_import_inside_a_compiled_forward_is_refused() -> None:
    """The compiler resolves it by itself; eagerly it is exchanged (`test_gates_in_every_spelling`)."""
    torch._dynamo.reset()
    model, x = vit(Attention, ByOwnImport)
    compiled = torch.compile(model, backend="eager")
    with (
        pytest.raises(UnsupportedHost, match=r"0 times .*in compiled code also by an import inside the forward"),
        steer(model, HeadGate({(1, 0): 0.0})),
    ):
        compiled(x)


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


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@torch.no_grad()
def test_a_copy_of_a_steered_module_is_plain_and_can_be_steered(how: Any) -> None:
    model, x = vit()
    plain, gate = model(x), HeadGate({(1, 1): 0.0})
    with steer(model, gate):
        expected = model(x)
        other = how(model)
        assert torch.equal(other(x), plain)
    assert torch.equal(other(x), plain)
    with steer(other, gate):
        assert torch.equal(other(x), expected)
    assert torch.equal(other(x), plain) and not torch.equal(expected, plain)


@torch.no_grad()
def test_layers_leave_in_the_order_in_which_they_came() -> None:
    model, x = vit()
    plain = model(x)
    first, second = steer(model, HeadGate({(0, 0): 0.0})), steer(model, HeadGate({(1, 1): 0.0}))
    model(x)
    first.remove()
    with steer(model, HeadGate({(0, 0): 0.0})):
        model(x)
    second.remove()
    assert torch.equal(model(x), plain)
    assert all("forward" not in vars(m) for m in model.modules())


class Bare(nn.Module):
    """Attention without projections: what enters the kernel is float32, also under autocast."""

    num_heads = 4

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, q + 1, q - 1)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [None, [0, 2]], ids=["all heads", "two heads"])
@pytest.mark.parametrize("rows", [3, 9])
@torch.no_grad()
def test_the_output_under_autocast_has_the_dtype_of_the_kernel(rows: int, heads: Any, dtype: torch.dtype) -> None:
    model, x = Bare(), torch.randn(2, rows, 16)
    boost = Boost(keys=2, where=Where(heads=heads))
    with steer(model, boost):
        expected = model(x)
    with torch.autocast("cpu", dtype):
        plain = model(x)
        with steer(model, boost):
            out = model(x)
    assert out.dtype == plain.dtype == dtype
    assert float((out.float() - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    assert float((plain.float() - expected).abs().max()) > 0.05 * float(expected.abs().max())
