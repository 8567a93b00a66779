"""HeadGate: multiplies the outputs of chosen heads by a number before the output projection.

Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?" (NeurIPS 2019), the gates xi_h of equation 2
(0 masks a head); with other values the head rescaling of Head Pursuit (NeurIPS 2025, arXiv 2510.21518), -1 or 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError
from ..heads import HeadSet
from ..intervention import Intervention
from ..where import Where


@dataclass(frozen=True)
class HeadGate(Intervention):
    """Scale head outputs: o_h <- gate_h * o_h.

    Args:
        gates: `{(layer, head): gate}`, finite numbers; 1 leaves a head as it is, 0 removes it.

    Raises:
        SelectionError: no gate, or a gate that is not a finite number.
    """

    gates: Mapping[tuple[int, int], float]

    linear = True

    def __post_init__(self) -> None:
        if not isinstance(self.gates, Mapping) or not self.gates:
            raise SelectionError(f"HeadGate({self.gates!r}): give {{(layer, head): gate}} with at least one head.")
        for pair, gate in self.gates.items():
            if isinstance(gate, bool) or not isinstance(gate, (int, float)) or not math.isfinite(gate):
                raise SelectionError(f"HeadGate: the gate of {pair} is {gate!r}; give a finite number.")
        HeadSet(list(self.gates))
        object.__setattr__(self, "gates", dict(self.gates))

    def selection(self) -> Where:
        return self.where & Where(heads=HeadSet(list(self.gates)))

    def output(self, call: AttnCall, out: Tensor) -> Tensor | None:
        gates = [float(self.gates[call.site.layer, head]) for head in call.heads]
        if all(g == 1.0 for g in gates):
            return None
        return out * out.new_tensor(gates)[:, None, None]
