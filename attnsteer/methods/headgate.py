"""HeadGate: multiplies the outputs of chosen heads by a number before the output projection.

Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?" (NeurIPS 2019), the gates xi_h of equation 2
(0 masks a head); with other values the head rescaling of Head Pursuit (NeurIPS 2025, arXiv 2510.21518), -1 or 5.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError
from ..heads import HeadSet
from ..intervention import Intervention
from ..parameters import Number, PerSample, is_all, parsed
from ..registry import register_method
from ..where import Where


def _gates(given: Any) -> dict[tuple[int, int], float]:
    if not isinstance(given, Mapping) or not given:
        raise SelectionError("give {(layer, head): gate} with at least one head.")
    gates = {}
    for pair, gate in given.items():
        # Keys may be of NumPy; `HeadSet` has one form for each head.
        (head,) = HeadSet([pair])
        if head in gates:
            raise SelectionError(f"head {head} has two gates; give one.")
        gates[head] = Number(per_sample=True, learnable=True).check("gate", str(head), gate)
    return gates


@register_method
@dataclass(frozen=True)
class HeadGate(Intervention):
    """Scale head outputs: o_h <- gate_h * o_h.

    Args:
        gates: `{(layer, head): gate}`, finite numbers, or one for each sample; 1 (or None for a sample) leaves a head as it
            is, 0 removes it. `where` may name some of these heads; then only they are gated.

    Raises:
        SelectionError: no gate, or a gate that is not a finite number.
    """

    gates: Mapping[tuple[int, int], float] = parsed(_gates, "{(layer, head): finite number}", per_sample=True)

    linear = True
    row_local = True
    steady = True

    def selection(self) -> Where:
        gated, chosen = HeadSet(list(self.gates)), self.where.heads
        if isinstance(chosen, HeadSet) and chosen != gated:
            # A choice among the gated heads: the others keep their outputs.
            return replace(self.where, heads=HeadSet([p for p in gated if p in chosen], shape=chosen.shape))
        return self.where & Where(heads=gated)

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        factor = self.head_factors(call, out)
        return None if factor is None else out * factor

    def head_factors(self, call: AttnCall, out: Tensor) -> Tensor | None:
        gates = [self.gates[call.site.layer, head] for head in call.heads]
        if all(is_all(g, 1.0) for g in gates):
            return None
        many = [g for g in gates if isinstance(g, PerSample)]
        if not many:
            make = _tensor if torch.compiler.is_compiling() else _factors
            return make(tuple(gates), out.dtype, out.device)
        if not torch.compiler.is_compiling() and not any(g.learned for g in many):
            return call.each_row(_joined(tuple(gates)), out, axes=2)
        own = {"key": "gate", "each": lambda gate: 1.0 if gate is None else gate}
        rows = [call.each_row(g, out, **own) if isinstance(g, PerSample) else out.new_tensor([g]) for g in gates]
        return torch.stack([r.expand(out.shape[0]) for r in rows], dim=1)[:, :, None, None]


@functools.lru_cache(maxsize=1024)
def _joined(gates: tuple[float | PerSample, ...]) -> PerSample:
    """The gates of some heads as one value for each sample, a tuple; open ones where a sample is left alone. Made once, and
    its tensors with it: stacked at each layer and step they would cost more than the edit."""
    count = next(g.count for g in gates if isinstance(g, PerSample))
    columns = [g.given if isinstance(g, PerSample) else (g,) * count for g in gates]
    return PerSample([tuple(1.0 if g is None else g for g in row) for row in zip(*columns, strict=True)])


@functools.lru_cache(maxsize=1024)
def _factors(gates: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The gates as a tensor, made once: a transfer at each layer and step would cost more than the edit."""
    # Of inference mode it could not be used for a gradient later.
    with torch.inference_mode(False):
        return _tensor(gates, dtype, device)


def _tensor(gates: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[h, 1, 1]."""
    return torch.tensor(gates, dtype=dtype, device=device)[:, None, None]
