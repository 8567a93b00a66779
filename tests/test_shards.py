"""Sums over the heads of several processes, and who takes part; three processes, without a model library."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnsteer.shards import Shards
from tests.processes import start, work

HEADS, LOCAL, D = 6, 2, 3


def attention(mesh: object, row_wise: bool = True) -> nn.Module:
    """Projections of six heads, split as tensor parallelism does."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    module = nn.Module()
    module.q_proj, module.o_proj = nn.Linear(8, HEADS * D, bias=False), nn.Linear(HEADS * D, 12, bias=False)
    for layer, dim in ((module.q_proj, 0), (module.o_proj, 1 if row_wise else 0)):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(dim)]))
    return module


def rank() -> int:
    return torch.distributed.get_rank()


def mesh(ranks: list[int]) -> object:
    return torch.distributed.DeviceMesh("cpu", ranks)


def the_ranks_are_those_of_the_mesh() -> None:
    """A model on a part of the world, and on each row of a mesh."""
    part = mesh([1, 2])
    if rank():
        shards = Shards.of(attention(part))
        assert (shards.place, shards.ranks) == (rank() - 1, (1, 2))
    both = torch.distributed.init_device_mesh("cpu", (1, 3), mesh_dim_names=("data", "heads"))
    shards = Shards.of(attention(both["heads"]))
    assert (shards.place, shards.ranks) == (rank(), (0, 1, 2))


def a_mesh_in_another_order_says_nothing() -> None:
    assert Shards.of(attention(mesh([2, 0, 1]))) is None


def fsdp_is_no_tensor_parallelism() -> None:
    assert Shards.of(attention(mesh([0, 1, 2]), row_wise=False)) is None
    assert Shards.of(nn.Linear(4, 4)) is None


def pooled(heads: tuple[int, ...] | None) -> None:
    """The sum over heads and its gradient, where each process goes on with the sum to heads of its own."""
    shards = Shards.of(attention(mesh([0, 1, 2])))
    generator = torch.Generator().manual_seed(3)
    values, factors = (torch.randn(2, HEADS, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    chosen = list(range(HEADS) if heads is None else heads)
    whole = values.clone().requires_grad_()
    total = whole[:, chosen].sum(dim=1, keepdim=True)
    (total.sin() * factors[:, chosen]).sum().backward()

    own = [h for h in chosen if h // LOCAL == shards.place]
    if not own:
        # Takes no part, and must not be waited for.
        return
    pool = shards.pool(heads, LOCAL)
    assert pool.heads == len(chosen)
    part = values.clone().requires_grad_()
    got = pool.sum(part[:, own].sum(dim=1, keepdim=True))
    (got.sin() * factors[:, own]).sum().backward()
    assert torch.allclose(got, total, rtol=0, atol=1e-12)
    assert torch.allclose(part.grad[:, own], whole.grad[:, own], rtol=0, atol=1e-12)


CHECKS = {
    "mesh": the_ranks_are_those_of_the_mesh,
    "another order": a_mesh_in_another_order_says_nothing,
    "fsdp": fsdp_is_no_tensor_parallelism,
    "all heads": lambda: pooled(None),
    "some heads of each": lambda: pooled((1, 2, 3, 5)),
    "heads of two": lambda: pooled((0, 1, 5)),
    "heads of one": lambda: pooled((2, 3)),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return start("tests.test_shards", 3, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("name", CHECKS)
def test_three_processes(name: str, said: dict[str, list[str]]) -> None:
    assert said[name] == [""] * 3, "\n".join(said[name])


if __name__ == "__main__":
    work(CHECKS)
