"""A computation for several values of its inputs at once gives, bit for bit, what it gives for each by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnsteer.hosts.diffusers.variants import UnlikeError, Variants

W = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


def views(x: Tensor, y: Tensor) -> Tensor:
    rows, rest = x[:, :2], x[:, 2:].transpose(1, 2)
    return torch.cat([rows @ W, rest.reshape(2, -1, 6)[:, :1] * y[:, :1]], dim=1).permute(1, 0, 2)


def writes(x: Tensor, y: Tensor) -> Tensor:
    """Into what no input has reached, through views of it, and over what one has."""
    made = torch.zeros(2, 4, 6)
    part = made[:, 1:3]
    part += x[:, :2]
    made[:, 3] = y[:, 0]
    made[0].mul_(2.0)
    made.index_add_(1, torch.tensor([0, 0]), y[:, :2])
    y.masked_fill_(y > 1.0, 0.0)
    return made + part.sum() + y.sum()


def several(x: Tensor, y: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    out = F.gelu(a) * b.softmax(-1) + F.layer_norm(y, (6,))[..., :3]
    values, places = out.max(-1)
    return values + places + torch.stack(y.unbind(0)).mean()


def drawn(x: Tensor, y: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=True) + torch.randn(6) + torch.rand_like(y) * y


@pytest.mark.parametrize("function", [views, writes, several, drawn])
def test_each_value_gives_what_it_gives_by_itself(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, x2, y, y2 = (torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(4))

    def alone(a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        return function(a.clone(), b.clone())

    variants = Variants()
    a, b = variants.vary(x, {"x": x2}), variants.vary(y, {"y": y2})
    with variants:
        torch.manual_seed(0)
        out = function(a, b)
    others = variants.of(out)
    assert torch.equal(out, alone(x, y)) and set(others) == {"x", "y"}
    assert torch.equal(others["x"], alone(x2, y)) and torch.equal(others["y"], alone(x, y2))
    assert not torch.equal(others["x"], out) and not torch.equal(others["y"], out)


def test_what_depends_on_one_input_has_no_other_variant() -> None:
    x = torch.randn(2, 3)
    variants = Variants()
    a, b = variants.vary(x, {"x": -x}), variants.vary(x, {"y": 2 * x})
    with variants:
        one, both, none = a.exp(), a.exp() + b, torch.ones(3) * 2
    assert set(variants.of(one)) == {"x"} and set(variants.of(both)) == {"x", "y"} and not variants.of(none)


@pytest.mark.parametrize(
    "function", [lambda x: x * float(x.sum()), lambda x: x[x > 0], lambda x: x if bool((x > 0).all()) else -x]
)
def test_what_python_would_see_otherwise_raises(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(2, 3)
    variants = Variants()
    with variants, pytest.raises(UnlikeError, match="depends on the inputs"):
        function(variants.vary(x, {"x": -x}))


def test_memory_that_is_gone_is_forgotten() -> None:
    x = torch.randn(4)
    variants = Variants()
    with variants:
        a = variants.vary(x, {"x": -x})
        for _ in range(1000):
            a = a + 1.0
    assert torch.allclose(variants.of(a)["x"] - a, -2 * x, atol=1e-3)
    assert len(variants._known) < 600
