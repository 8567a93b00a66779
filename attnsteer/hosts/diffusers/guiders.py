"""Modular pipelines and their guiders: whose batch a denoiser call is, and the term behind whatever formula the guider has.

A guider makes the batches of a step (conditional, unconditional, and what its own method needs), readies the denoiser before each,
and combines their predictions. So it knows which call is which, and its combination is the place where a term counts exactly
once, for any formula (projected, CFG-Zero*, rescaled, skip-layer guidance).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...errors import UnsupportedHost
from .formula import NORMALISES

if TYPE_CHECKING:
    from ...undo import Journal
    from .steps import Sampling

# What a guider calls the batches whose rows we know; all others belong to a method of its own.
BRANCHES = {"pred_cond": "cond", "pred_uncond": "uncond"}


class Batches:
    """The batches of one guider in the running step, for a `Sampling`."""

    def __init__(self, sampling: Sampling, key: str):
        self.sampling, self.key = sampling, key
        self._names: list[str] = []
        self._next = 0
        self.running = False

    def begin(self, batches: list[Any]) -> None:
        """The batches of a step, in the order in which the denoiser is asked for them."""
        self._names, self._next = [getattr(b, self.key, "?") for b in batches], 0

    def ready(self) -> None:
        """The denoiser is about to be asked for the next one."""
        self.running = True
        name = self._names[self._next] if self._next < len(self._names) else "?"
        self._next += 1
        self.sampling.context = BRANCHES.get(name)
        self.sampling.bystander = name not in BRANCHES

    def done(self) -> None:
        """The denoiser has answered."""
        self.running = False
        self.sampling.context, self.sampling.bystander = None, False

    def combined(self, output: Any, cond: Any) -> Any:
        """The guider's output with the term that waits. `cond`: the conditional prediction that it combined."""
        pred = getattr(output, "pred", None)
        term = self.sampling.formula.take(cond if pred is not None and isinstance(cond, Tensor) else None)
        if term is not None:
            output["pred"] = pred + term.to(pred.dtype)
        return output


def watch_guider(pipe: Any, sampling: Sampling, journal: Journal) -> None:
    """Learn from the guider of a modular pipeline which call is which, and add terms to what it combines."""
    guider = getattr(pipe, "guider", None)
    if guider is None:
        return
    batches = Batches(sampling, guider._identifier_key)
    sampling.apart = lambda: not batches.running and _by_a_block_without_guider()
    sampling.guard = lambda: _same_parts(pipe, guider, sampling.scheduler)
    sampling.formula.outside = True

    def prepared(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        batches.begin(found)
        return found

    def ready(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batches.ready()
        return inner(*args, **kwargs)

    def done(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batches.done()
        return inner(*args, **kwargs)

    def state(inner: Callable[..., Any], step: int, num_inference_steps: int, timestep: Any, **kwargs: Any) -> Any:
        sampling.told = (
            int(step),
            int(num_inference_steps),
            float(timestep.flatten()[0] if hasattr(timestep, "flatten") else timestep),
        )
        return inner(step=step, num_inference_steps=num_inference_steps, timestep=timestep, **kwargs)

    def combined(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return batches.combined(inner(*args, **kwargs), kwargs.get("pred_cond", next(iter(args), None)))

    for name in ("prepare_inputs", "prepare_inputs_from_block_state"):
        journal.wrap(guider, name, prepared)
    journal.wrap(guider, "prepare_models", ready)
    journal.wrap(guider, "cleanup_models", done)
    journal.wrap(guider, "set_state", state)
    if not _normalises(pipe):
        journal.wrap(guider, "forward", combined)


def _by_a_block_without_guider() -> bool:
    """Whether the block that makes the running call has no guider: it prepares what others read, as the keys of a reference."""
    frame = sys._getframe(1)
    while frame is not None:
        specs = getattr(frame.f_locals.get("self"), "expected_components", None)
        if isinstance(specs, list):
            return all(spec.name != "guider" for spec in specs)
        frame = frame.f_back
    return False


def _normalises(pipe: Any) -> bool:
    """Whether a block of a modular pipeline normalises what its guider has combined: then a term waits for the scheduler's step."""
    waiting = [getattr(pipe, "blocks", None)]
    while waiting:
        block = waiting.pop()
        code = getattr(inspect.unwrap(type(block).__call__), "__code__", None) if callable(block) else None
        if code is not None and NORMALISES & {*code.co_names, *code.co_varnames}:
            return True
        waiting += list((getattr(block, "sub_blocks", None) or {}).values())
    return False


def _same_parts(pipe: Any, guider: Any, scheduler: Any) -> None:
    for name, part in (("guider", guider), ("scheduler", scheduler)):
        if part is not None and getattr(pipe, name, None) is not part:
            raise UnsupportedHost(
                f"the {name} of {type(pipe).__name__} was exchanged while the pipeline is steered, so what it does is not seen. "
                "Detach first (leave the `with` block or call remove()), exchange it, then steer again."
            )
