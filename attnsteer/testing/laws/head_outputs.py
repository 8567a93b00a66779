"""The head outputs of every site of a call, as they are after all edits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...intervention import Intervention
from ...steering import sites, steer
from ...where import Where
from ..cases import HostCase

_TAPPED: dict[str, Tensor] = {}
_SEEN: set[tuple[str, tuple[int, ...]]] = set()


class _Tap(Intervention):
    """Keeps each site's final head outputs; edits nothing."""

    linear = True

    def output(self, call: Any, out: Tensor) -> None:
        whole = _TAPPED.setdefault(call.site.path, out.new_zeros(out.shape[0], call.site.heads, *out.shape[2:]))
        # The first call only: later steps of a pipeline start from an edited latent.
        if (call.site.path, call.heads) not in _SEEN:
            _SEEN.add((call.site.path, call.heads))
            whole[:, list(call.heads)] = out.detach()


def head_outputs(
    target: Any, host: HostCase, inputs: dict[str, Any], method: Intervention | None = None, reference: bool = False
) -> dict[str, Tensor]:
    """Head outputs [B, H, n, d] of the main modality's sites, by path, in the order in which they ran."""
    main = "text" if host.family == "transformers" else sites(target)[0].modality
    _TAPPED.clear()
    _SEEN.clear()
    tap = _Tap(where=Where(modalities=main))
    run = steer(target, *([] if method is None else [method]), tap, reference=reference, control=True)
    try:
        host.run(target, inputs)
    finally:
        run.remove()
    return dict(_TAPPED)
