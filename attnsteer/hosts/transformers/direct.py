"""Modules of transformers that call SDPA themselves: steered as in the generic host, under the host's own clock."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedHost
from ...site import Site
from ..sdpa.host import check_copyable, counting, patch_forward, sdpa_primitive
from .attention_function import Attached, context


def check_direct(site: Site) -> None:
    """Raise where the forward would not reach SDPA, or could not be copied."""
    check_copyable(site)
    code = inspect.unwrap(type(site.module).forward).__code__
    name = getattr(getattr(site.module, "config", None), "_attn_implementation", "sdpa")
    if "_attn_implementation" in code.co_names and name != "sdpa":
        raise UnsupportedHost(
            f"{site.path}: {type(site.module).__name__} has its own attention for {name!r}, which cannot be reached; its SDPA "
            'can. Load the model with attn_implementation="sdpa".'
        )


def attach_direct(attached: Attached, journal: Any) -> None:
    """Exchange the SDPA that the site's module calls, until undone."""
    runtime, clock = attached.runtime, attached.clock

    # As for the registered function: what is traced must not bake in the state of the clock.
    @torch.compiler.disable
    def primitive(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        n, m = query.shape[-2], key.shape[-2]
        phase = attached.phase(n)

        def make_context(rows: int, batch: int) -> Any:
            return context(attached, phase, (batch, query.shape[1], rows, m), m, query.device)

        return sdpa_primitive(runtime, make_context, lambda r: r.active(phase, None, None))(query, key, *args, **kwargs)

    def acting() -> tuple[int, ...]:
        return runtime.active(attached.phase(clock.new), None, None)

    patch_forward(runtime.site.module, counting(runtime.site, primitive, acting), journal)
