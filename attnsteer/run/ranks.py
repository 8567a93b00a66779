"""The processes of a run: one, or those that `accelerate launch` started, which share the batches among them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from ..errors import RunError
from .store import AGAIN

# Batches take different times, and a slow one must not look like a dead process.
PATIENCE = timedelta(days=7)


def first() -> bool:
    """Whether this process speaks for the run."""
    return int(os.environ.get("RANK", "0")) == 0


class Ranks:
    """Attributes: rank: of this process, from 0. world: how many there are. device: of this process, or None to choose."""

    def __init__(self) -> None:
        self.rank, self.world, self.device = 0, 1, None
        self._group: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.rank, self.world = state.process_index, state.num_processes
        self.device = str(state.device)
        # Over the CPU whatever the devices are: only barriers and short texts pass through it.
        self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all processes are here.

        Raises:
            RunError: another process has ended.
        """
        if self._group is None:
            return
        import torch

        try:
            torch.distributed.barrier(group=self._group)
        except RuntimeError as error:
            raise RunError(f"another process of this run has ended; its own message says why. Then {AGAIN}.") from error

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            import torch

            torch.distributed.destroy_process_group()
            self._group = None
