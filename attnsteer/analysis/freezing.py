"""Edits with live and with frozen attention: how much of an effect goes through values, how much through patterns.

After safety-research/circuit-tracer (replacement_model.py, 2025, `freeze_attention`); the shares, and a clean run that follows
generation token by token, are ours.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capturing import capture
from ..errors import SelectionError, UnsupportedHost, brief
from ..evals.significance import Interval, paired_bootstrap, percentiles, resampled_totals
from ..intervention import Intervention
from ..methods.freezemaps import FreezeMaps
from ..search.gradients import Metric, batches
from ..steering import steer
from ..where import Where

# An intervention, or what edits a model it is given inside a block, such as a hook on its residual.
Edit = Intervention | Callable[[nn.Module], AbstractContextManager[Any]]
REFUSED = (
    "num_beams",
    "num_beam_groups",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "custom_generate",
    "guidance_scale",
)


@dataclass(frozen=True)
class FreezeReport:
    """The metric of each sample: unedited, edited, and edited with the patterns of the unedited run, [N] each."""

    plain: Tensor
    edited: Tensor
    frozen: Tensor

    @property
    def effect(self) -> Interval:
        """Edited less plain, a paired mean with its 95 % interval."""
        return paired_bootstrap(self.plain.tolist(), self.edited.tolist(), draws=2000)

    @property
    def held(self) -> Interval:
        """Frozen less plain: what remains of the effect with the patterns held."""
        return paired_bootstrap(self.plain.tolist(), self.frozen.tolist(), draws=2000)

    def value_share(self, draws: int = 2000, seed: int = 0) -> Interval:
        """(frozen - plain) / (edited - plain), pooled over samples: the share through values. The rest goes through patterns.

        It may leave [0, 1], and says nothing where the effect itself is not told from zero; then value and ends are NaN.
        """
        top, bottom = self.frozen - self.plain, self.edited - self.plain
        effect = self.effect
        if effect.low <= 0.0 <= effect.high:
            return Interval(float("nan"), float("nan"), float("nan"))
        totals = resampled_totals(torch.stack([top, bottom], dim=1).double(), draws, seed)
        return Interval(float(top.sum() / bottom.sum()), *percentiles(totals[:, 0] / totals[:, 1]))

    def __str__(self) -> str:
        return f"effect {self.effect}; with frozen patterns {self.held}; share through values {self.value_share()}"


@torch.no_grad()
def freeze_report(
    model: nn.Module,
    edit: Edit,
    samples: Iterable[Any],
    *,
    metric: Metric = "choice",
    where: Where | None = None,
    batch: int = 32,
) -> FreezeReport:
    """Measure an edit with live attention and with the patterns of the unedited run.

    Args:
        edit: an intervention, which with frozen patterns acts on these; or `edit(model)`, a context manager that edits the
            model inside its block, such as `lambda m: shifted(m.model.layers[2], vector)`.
        samples, metric, batch: of `screen_heads`; candidates of one token. where: the sites that are frozen; None: the main ones.

    Raises:
        SelectionError: no samples, or candidates of several tokens.
        CompositionError: the edit changes q or k where they are frozen.
    """
    parts, facts = batches(samples, metric, batch)
    if any(not part.whole for part, _ in parts):
        raise SelectionError("freeze_report: give candidates of one token, whose answer is read behind the prompt.")
    where = Where(kinds="self") if where is None else where
    found = torch.zeros(3, facts["samples"], dtype=torch.float64)
    for part, places in parts:
        with capture(model, where, what=("q", "k")) as clean:
            found[0, places] = part.values(model).double().cpu()
        for i, freeze in ((1, ()), (2, (FreezeMaps(clean, where=where),))):
            with _applied(model, edit, *freeze):
                found[i, places] = part.values(model).double().cpu()
    return FreezeReport(*found)


@torch.no_grad()
def generate_frozen(
    model: nn.Module, inputs: Mapping[str, Any], edit: Edit, *, where: Where | None = None, **options: Any
) -> Any:
    """What `model.generate` gives under an edit whose patterns are, at every token, those of an unedited run over the same tokens.

    The unedited run goes beside, on the tokens that the edited one generates, with a cache of its own: twice the computation.

    Args:
        inputs: of `generate`. edit: see `freeze_report`; it is put on a copy of the model that shares its weights.
        where: the sites that are frozen; None: the main ones. options: of `generate`; one sequence a sample, over a cache.

    Raises:
        UnsupportedHost: beams, an assistant or no cache, which the unedited run cannot follow.
    """
    wrong = [n for n in REFUSED if options.get(n) not in (None, 1, False)]
    if wrong or options.get("use_cache") is False:
        raise UnsupportedHost(
            f"generate_frozen({wrong[0] if wrong else 'use_cache'}=...): the unedited run follows token by token, over a cache, "
            "one sequence a sample."
        )
    if not isinstance(inputs, Mapping):
        raise SelectionError(f"generate_frozen(inputs={brief(inputs)}): give the keyword arguments of generate.")
    if not hasattr(model, "generate"):
        raise UnsupportedHost(
            f"generate_frozen: a {type(model).__name__} does not generate; give a model with a language head."
        )
    where = Where(kinds="self") if where is None else where
    live = _twin(model)
    caches: list[Any] = []

    def follow(_: nn.Module, args: tuple[Any, ...], values: dict[str, Any]) -> None:
        cache = values.get("past_key_values")
        if cache is None or not hasattr(cache, "get_seq_length"):
            raise UnsupportedHost("generate_frozen: this model generates without a cache that could be followed.")
        if cache.get_seq_length() == 0:
            caches[:] = [copy.deepcopy(cache)]
        model(*args, **{**values, "past_key_values": caches[0]})

    with capture(model, where, what=("q", "k")) as clean:
        frozen = FreezeMaps(clean, where=where, new_tokens="paired")
        with _applied(live, edit, frozen):
            hook = live.register_forward_pre_hook(follow, with_kwargs=True)
            try:
                return live.generate(**inputs, **options)
            finally:
                hook.remove()


@contextlib.contextmanager
def shifted(module: nn.Module, vector: Tensor, rows: slice | None = None) -> Iterator[None]:
    """Add `vector` [D] to what a module gives, [B, n, D], inside the block: steering of the residual, as of a decoder layer.

    Args:
        rows: of each call; None: all.
    """

    if not isinstance(module, nn.Module) or not isinstance(vector, Tensor):
        raise SelectionError(f"shifted({brief(module)}, {brief(vector)}): give a module and a vector.")

    def add(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if vector.shape != hidden.shape[-1:]:
            raise SelectionError(f"shifted: a vector {list(vector.shape)} for hidden states {list(hidden.shape)}.")
        new = hidden.clone()
        new[:, slice(None) if rows is None else rows] += vector.to(hidden.device, hidden.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    hook = module.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _applied(model: nn.Module, edit: Edit, *freeze: FreezeMaps) -> Iterator[None]:
    """The edit, and behind it what is frozen."""
    if isinstance(edit, Intervention):
        with steer(model, edit, *freeze, control=True):
            yield
        return
    if not callable(edit):
        raise SelectionError(
            f"edit={brief(edit)}: give an intervention, or a function of a model that gives a context manager."
        )
    block = edit(model)
    if not isinstance(block, AbstractContextManager):
        raise SelectionError(
            f"edit(model) gave {brief(block)}; give a context manager, which edits the model inside its block."
        )
    with block, contextlib.ExitStack() as stack:
        if freeze:
            stack.enter_context(steer(model, *freeze, control=True))
        yield


def _twin(model: nn.Module) -> nn.Module:
    """A second model on the same weights."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
