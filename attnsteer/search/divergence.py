"""`vhd`: the vision-aware head divergence of every head, as a `HeadSet` with scores. He et al. (ACL 2025, arXiv 2412.13949)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError
from ..heads import HeadSet
from ..methods.vhr import VHR
from ..steering import steer
from ..where import Where


@dataclass(frozen=True)
class _Measured(VHR):
    """VHR that keeps the divergences and scales nothing."""

    found: dict[int, list[Tensor]] = field(default_factory=dict, kw_only=True, compare=False, repr=False)

    observes = True

    def output(self, call: AttnCall, out: Tensor) -> None:
        """Measure at the prompt's last token."""
        if call.phase == "prefill":
            self.found.setdefault(call.site.layer, []).append(self.measured(call, out).cpu())


@torch.no_grad()
def vhd(
    model: Any, batches: Iterable[Mapping[str, Any]], *, outliers: bool = False, where: Where | None = None
) -> HeadSet:
    """Score heads by how much their output at the prompt's last token changes when the image is removed.

    Args:
        model: a vision-language model of transformers.
        batches: processor outputs with an image in each sample, passed to the model as they are.
        outliers: whether heads that VHR's outlier rule sets to zero count as zero in a sample.
        where: layers to score; None: all of the language model.

    Returns:
        All scored heads; the score is the mean VHD over samples (the norm of a difference of head outputs). Scores compare
        heads of one layer; `top` compares them over layers, which the paper does not.

    Raises:
        SelectionError: no batches, or a prompt without an image.
    """
    probe = _Measured(outliers=outliers, where=Where(kinds="self") if where is None else where)
    run = steer(model, probe)
    try:
        for batch in batches:
            model(**batch)
        shape = (1 + max(s.layer for s in run.host.sites() if s.modality == "text"), max(s.heads for s in run.sites))
    finally:
        run.remove()
    if not probe.found:
        raise SelectionError("vhd got no batches; give processor outputs with an image in each sample.")
    scores, samples = {}, 0
    for layer, parts in probe.found.items():
        every = torch.cat(parts)
        samples = len(every)
        scores |= {(layer, head): float(score) for head, score in enumerate(every.mean(dim=0))}
    provenance = {"score": "vhd", "arxiv": "2412.13949", "samples": samples, "outliers": outliers}
    return HeadSet(list(scores), scores=scores, shape=shape, provenance=provenance)
