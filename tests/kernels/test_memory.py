"""No pass makes a tensor of the size of one head's map, and key sets are found and gathered as documented."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnsteer import kernels
from attnsteer.kernels import Attention
from tests.kernels.common import close

N, H, D = 4096, 4, 16


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest storage that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


@pytest.fixture(scope="module")
def long() -> tuple[Attention, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, H, N, D), torch.randn(1, 2, N, D), torch.randn(1, 2, N, D)
    att = Attention(q, k, v, D**-0.5, causal=True)
    return att, *kernels.attend_lse(att)


def test_the_measure_sees_a_map(long: tuple[Attention, Tensor, Tensor]) -> None:
    with LargestTensor() as seen:
        kernels.dense(long[0].select([0]))
    assert seen.bytes == 4 * N * N


@pytest.mark.parametrize("task", ["attend_lse", "column_mass", "entropy", "gathered", "per head", "span", "rows"])
def test_no_map_is_built(long: tuple[Attention, Tensor, Tensor], task: str) -> None:
    att, out, lse = long
    keys = torch.rand(1, H if task == "per head" else 1, N) < 16 / N
    if task == "span":
        keys = ((torch.arange(N) > 100) & (torch.arange(N) < 700))[None, None]
    with LargestTensor() as seen:
        if task in ("gathered", "per head", "span"):
            group = kernels.partial(att, lse, keys)
            kernels.leftover(att, lse, keys, group[0])
            kernels.reweight(att, out, lse, [(keys, 0.5, *group)], 1.5, True)
        elif task == "attend_lse":
            kernels.attend_lse(att)
        elif task == "rows":
            kernels.rows(att, lse, torch.arange(N - 8, N))
        else:
            getattr(kernels, task)(att, lse)
    assert seen.bytes <= 4 * N * N // 4  # a quarter of one head's map in fp32; all heads' is sixteen times that


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_no_map_is_built_under_a_mask(long: tuple[Attention, Tensor, Tensor], mask: str) -> None:
    att, out, lse = long
    see = torch.ones(1, 1, N, N, dtype=torch.bool).tril_()
    see = see if mask == "bool" else torch.zeros(1, 1, N, N).masked_fill_(~see, -torch.inf)
    masked = att.replace(mask=see, causal=False)
    keys = torch.rand(1, H, N) < 16 / N
    with LargestTensor() as seen:
        column = kernels.column_mass(masked, lse)
        group = kernels.partial(masked, lse, keys)
        new = kernels.reweight(masked, out, lse, [(keys, 0.5, *group)], 1.5, True)
    # 4-D views of the mask itself count with their whole storage.
    assert seen.bytes <= see.untyped_storage().nbytes() <= 4 * N * N
    close(column, kernels.column_mass(att, lse), 1e-5)
    expected = kernels.partial(att, lse, keys)
    close(group[0], expected[0], 1e-6)
    close(new, kernels.reweight(att, out, lse, [(keys, 0.5, *expected)], 1.5, True), 1e-5)


def test_saturated_rows_build_no_map_either(long: tuple[Attention, Tensor, Tensor]) -> None:
    att, keys = long[0], (torch.arange(N) < 2)[None, None]
    att = att.replace(key_bias=torch.where(keys, 14.0, 0.0))
    with LargestTensor() as seen:
        out, lse = kernels.attend_lse(att)
        mass, u = kernels.partial(att, lse, keys)
        kernels.leftover(att, lse, keys, mass)
        kernels.reweight(att, out, lse, [(keys, 0.0, mass, u)], 1.0, True)
    assert seen.bytes <= 4 * N * N // 4


def test_key_index() -> None:
    keys = torch.zeros(2, 2, 7, dtype=torch.bool)
    keys[0, 0, [1, 4]] = True
    keys[1, 1, [0, 2, 6]] = True
    found = kernels.index_keys(keys)
    assert found.size == 3 and found.span is None
    assert found.index[0, 0].tolist() == [1, 4, 0] and found.valid[0, 0].tolist() == [True, True, False]
    assert found.index[1, 1].tolist() == [0, 2, 6] and not found.valid[0, 1].any()
    assert kernels.index_keys(keys[:1, :1] & False).size == 0
    assert kernels.index_keys((torch.arange(7) > 4)[None, None]).span == (5, 7)
    assert kernels.index_keys((torch.arange(7) % 2 == 0)[None, None]).span is None


def test_a_key_index_may_be_given_for_the_keys(long: tuple[Attention, Tensor, Tensor]) -> None:
    att, _, lse = long
    keys = torch.rand(1, H, N) < 16 / N
    index = kernels.index_keys(keys)
    assert torch.equal(kernels.mass(att, lse, keys), kernels.mass(att, lse, index))
