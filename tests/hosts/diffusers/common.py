"""What the guidance tests share: pipelines built once, selections by module path, the error of the spec's tables."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnsteer import Where, sites, steer
from attnsteer.testing import PIPELINES, STOCHASTIC_SCHEDULERS, tiny_call, tiny_pipeline

# Final latents against a loop or an official pipeline; the effect itself must be this many times larger.
BOUND, EFFECT = 5e-6, 1e-2


def relative(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over largest absolute value."""
    return float((a - b).abs().max() / b.abs().max())


@functools.cache
def pipeline(name: str, scheduler: str | None = None, **overrides: Any) -> Any:
    """A tiny pipeline, shared by the tests: steering must leave it as it was."""
    return tiny_pipeline(name, scheduler=scheduler, **overrides)


def denoiser(name: str, pipe: Any) -> torch.nn.Module:
    return getattr(pipe, PIPELINES[name].denoiser)


def paths(pipe: Any, part: str = "") -> list[str]:
    """Names, below the denoiser, of the self and joint attentions whose name has `part`."""
    return [s.name for s in sites(pipe) if s.kind in ("self", "joint") and part in s.name]


def at(names: Sequence[str], **more: Any) -> Where:
    """A selection of whole module names."""
    return Where(modules=[re.escape(n) for n in names], **more)


def guidance(name: str, on: bool) -> dict[str, float]:
    """Call arguments that switch classifier-free guidance on or off."""
    if name in ("flux", "qwenimage"):
        return {"true_cfg_scale": 4.0 if on else 1.0}
    return {} if on else {"guidance_scale": 1.0}


def call_of(name: str, scheduler: str | None = None, **overrides: Any) -> dict[str, Any]:
    """Arguments of one call; each call of this function starts from the same noise."""
    noise = {"generator": torch.Generator().manual_seed(1)} if scheduler in STOCHASTIC_SCHEDULERS else {}
    return tiny_call(name, **noise, **overrides)


def against_a_wrapper(pipe: Any, call: Callable[[], dict[str, Any]], method: Any, guide: Callable[..., Tensor]) -> None:
    """The steered run against one whose denoiser is wrapped by hand.

    Args:
        call: fresh arguments of one run. guide: (predict, kwargs of a denoiser call, its prediction) to the guided one.
    """
    plain = pipe(**call())[0]
    with steer(pipe, method):
        ours = pipe(**call())[0]
    model = getattr(pipe, "transformer", None) or pipe.unet
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def predict(kwargs: dict[str, Any]) -> Tensor:
        return type(model).forward(model, **{**kwargs, "return_dict": False})[0]

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return (guide(predict, given, predict(given)),)

    vars(model)["forward"] = by_hand
    try:
        expected = pipe(**call())[0]
    finally:
        del vars(model)["forward"]
    assert relative(ours, expected) < BOUND
    assert relative(plain, expected) > EFFECT
    assert torch.equal(pipe(**call())[0], plain)


class _Values(TorchFunctionMode):
    """Attention gives its values back wherever it is on: the identity map of PAG, also in joint attention."""

    on = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.on and func is torch.nn.functional.scaled_dot_product_attention:
            q, _, v = [*args, *(kwargs.get(n) for n in ("query", "key", "value")[len(args) :])][:3]
            return v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return func(*args, **kwargs)


@contextlib.contextmanager
def identity_at(model: torch.nn.Module, site: str) -> Iterator[None]:
    """In this block the attention of one module is the identity, edited from outside of the library."""
    mode, module = _Values(), model.get_submodule(site)
    handles = [
        module.register_forward_pre_hook(lambda *_: setattr(mode, "on", True)),
        module.register_forward_hook(lambda *_: setattr(mode, "on", False), always_call=True),
    ]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
