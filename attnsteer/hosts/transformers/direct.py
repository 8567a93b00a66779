"""Modules of transformers that call SDPA, or take a softmax, themselves: as in the sdpa host, with the host's account of rows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...call import AttnCall
from ...engine import SiteRuntime
from ...errors import UnsupportedHost
from ...kernels import Attention
from ...site import Site
from ..exact import check_exact
from ..sdpa.host import check_copyable, counting, patch_forward, plain_call, sdpa_primitive
from ..sdpa.written import Account, attach_written
from .forward import Forward, forward_of


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


def account_of(runtime: SiteRuntime) -> Any:
    """The running forward of the site's model: what computes attention by itself takes no keywords of ours."""
    forward = forward_of(runtime.run, {})
    if forward is None:
        raise UnsupportedHost(
            f"{runtime.site.path}: this attention call belongs to no running forward of its model: the module was called by "
            "itself, or a checkpoint computes it again, which a module that calls SDPA itself cannot follow. Call the "
            "steered model, without gradient checkpointing."
        )
    return forward


def call_of(runtime: SiteRuntime, batch: int, rows: int, keys: int, device: torch.device) -> AttnCall:
    """The call of a site in the running forward of its model."""
    forward = account_of(runtime)
    if not isinstance(forward, Forward):
        return plain_call(runtime.site, batch, rows, keys, device)
    return forward.call(runtime, batch, rows, keys, keys, device)


def acting(runtime: SiteRuntime) -> tuple[int, ...]:
    """Which interventions act at a site in the running forward of its model."""
    forward = account_of(runtime)
    return runtime.active(forward.phase, None, None, forward.mixed) if isinstance(forward, Forward) else ()


def attach_direct(runtime: SiteRuntime, journal: Any) -> None:
    """Exchange the SDPA that the site's module calls, until undone."""

    # As for the registered function: what is traced must not bake in the state of a run.
    @torch.compiler.disable
    def primitive(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        make_call = functools.partial(call_of, runtime)
        return sdpa_primitive(runtime, make_call, acting)(query, key, *args, **kwargs)

    acts = functools.partial(acting, runtime)
    patch_forward(runtime.site.module, counting(runtime.site, primitive, acts), journal)


def attach_followed(runtime: SiteRuntime, journal: Any) -> None:
    """Follow the softmax that the site's module takes itself, until undone."""

    def check(att: Attention, own: Callable[[Tensor], Tensor]) -> None:
        account, module = account_of(runtime), runtime.site.module
        if isinstance(account, Forward) and id(module) not in account.stack.exact:
            check_exact(runtime.site, att, own)
            account.stack.exact.add(id(module))

    account = Account(functools.partial(acting, runtime), functools.partial(call_of, runtime), check)
    attach_written(runtime, account, journal)
