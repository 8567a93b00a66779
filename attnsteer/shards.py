"""Tensor parallelism: which of a site's heads this process holds, and sums over those of all processes.

Who shares the heads is read from the attention module's own parameters, never from the world: a model may be sharded over some
of its processes only, beside data or pipeline parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shards:
    """The processes that share one module's heads, in equal runs by rank: one axis of its device mesh.

    Attributes:
        group: their process group. ranks: theirs in the world, in the order of the heads. place: of this process among them.
    """

    group: Any
    ranks: tuple[int, ...]
    place: int

    @classmethod
    def of(cls, module: Any) -> Shards | None:
        """Those of an attention module; None where its parameters do not say so beyond doubt."""
        if not isinstance(module, nn.Module) or not torch.distributed.is_available():
            return None
        if not torch.distributed.is_initialized():
            return None
        from torch.distributed.tensor import DTensor

        found = {}
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor) or parameter.ndim < 2:
                continue
            mesh = parameter.device_mesh
            for axis, placement in enumerate(parameter.placements):
                # The output projection is split along its inputs, which are the heads. FSDP splits along the first dimension.
                if placement.is_shard(parameter.ndim - 1):
                    group = mesh.get_group(axis)
                    ranks = tuple(torch.distributed.get_process_group_ranks(group))
                    found[group] = cls(group, ranks, mesh.get_local_rank(axis))
                    # Where the mesh has another order than its group, torch deals parts out by either.
                    if mesh.get_coordinate()[axis] != found[group].place:
                        return None
        return next(iter(found.values())) if len(found) == 1 else None

    def pool(self, heads: tuple[int, ...] | None, local: int) -> Pool:
        """That of the heads with these indices (None: all), where each process holds `local` heads."""
        if heads is None:
            return Pool(len(self.ranks) * local, self.group, self.ranks)
        # The others have no such head, so that they do not take part.
        members = sorted({self.ranks[head // local] for head in heads})
        return Pool(len(heads), self.group if len(members) > 1 else None, tuple(members))


@dataclass(frozen=True)
class Pool:
    """A number of heads, and those processes of a group that hold them; no group: they are all here."""

    heads: int
    group: Any = None
    ranks: tuple[int, ...] = ()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the processes' tensors of one shape, the same in each."""
        return values if self.group is None else _Sum.apply(values, self.group, self.ranks)


def _total(values: Tensor, group: Any, ranks: tuple[int, ...]) -> Tensor:
    """The sum over these processes, which need not be all of the group."""
    total = values.clone(memory_format=torch.contiguous_format)
    if len(ranks) == torch.distributed.get_world_size(group):
        torch.distributed.all_reduce(total, group=group)
        return total
    # Messages in pairs and no group of their own: torch names a new group by how many its process has, which may differ.
    first, *others = ranks
    if torch.distributed.get_rank() != first:
        torch.distributed.send(total, first, group)
        torch.distributed.recv(total, first, group)
        return total
    part = torch.empty_like(total)
    for rank in others:
        torch.distributed.recv(part, rank, group)
        total += part
    for rank in others:
        torch.distributed.send(total, rank, group)
    return total


class _Sum(torch.autograd.Function):
    """A sum over processes, each of which goes on with it to heads of its own: so their gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any, ranks: tuple[int, ...]) -> Tensor:
        ctx.pool = group, ranks
        return _total(values, group, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Sum.apply(grad, *ctx.pool), None, None
