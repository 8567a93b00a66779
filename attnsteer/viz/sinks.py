"""Where the sinks of an image are: its tokens with massive activations, by band of layers (Kang et al. 2025, arXiv 2503.03321)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..errors import SelectionError
from ..intervention import Intervention
from ..methods._sink_dims import known_sink_dims
from ..methods.var import sink_tokens
from ..steering import steer
from ..tokens import Tokens
from ..where import Where
from .record import _image_span, _square


@dataclass(frozen=True)
class SinkRecorder(Intervention):
    """Notes which tokens of a prompt are sinks in the states that enter the layers; edits nothing.

    Attributes:
        found: layer -> bool [B, n]. tokens: roles of the prompt's tokens, in a list of one.
    """

    dims: tuple[int, ...] = ()
    tau: float = 20.0
    found: dict[int, Tensor] = field(default_factory=dict, kw_only=True, compare=False, repr=False)
    tokens: list[Tokens] = field(default_factory=list, kw_only=True, compare=False, repr=False)

    kinds = ("self",)
    needs = ("tokens", "residual")
    observes = True

    def weights(self, call: AttnCall) -> None:
        self.found[call.site.layer] = sink_tokens(call.residual, self.dims, self.tau).detach().cpu()
        if not self.tokens:
            self.tokens.append(call.tokens)


@torch.no_grad()
def sink_maps(
    model: Any,
    inputs: Mapping[str, Any],
    dims: Sequence[int] | None = None,
    tau: float = 20.0,
    *,
    bands: Mapping[str, Iterable[int]] | None = None,
    image: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """The share of layers in which each token of an image is a sink: `{band: [h, w]}`, 0 to 1, for `viz.cross_attention`.

        found = sink_maps(model, inputs, bands={"3-9": range(3, 10), "13-28": range(13, 29)})
        cross_attention(picture, list(found), torch.stack(list(found.values())), "sinks.png")

    Args:
        inputs: keyword arguments of the model for one sample: what the processor gave.
        dims, tau: of massive activations, see `VAR`; dims None: looked up for backbones that the authors name.
        bands: name -> layers; all layers in one by default.
        image, grid: see `word_maps`.

    Raises:
        SelectionError: several samples, no image or several, tokens that are no grid of that size, an unknown backbone, a tau
            that no state can reach, a band without layers or with one that the model does not have.
    """
    if len(inputs["input_ids"]) != 1:
        raise SelectionError(f"sink_maps got {len(inputs['input_ids'])} samples; give one.")
    recorder = SinkRecorder(
        known_sink_dims(model) if dims is None else tuple(dims), tau, where=Where(modalities=("text",), kinds="self")
    )
    with steer(model, recorder):
        model(**inputs)
    start, stop = _image_span(recorder.tokens[0]) if image is None else image
    h, w = _square(stop - start) if grid is None else grid
    if h * w != stop - start:
        raise SelectionError(f"grid {(h, w)} has {h * w} cells, the image has {stop - start} tokens.")
    out = {}
    for name, layers in ({"all layers": sorted(recorder.found)} if bands is None else bands).items():
        own = list(layers)
        missing = [i for i in own if i not in recorder.found]
        if missing or not own:
            there = f"0 to {max(recorder.found)}"
            raise SelectionError(f"the band {name!r} has the layers {own}; the model has {there}.")
        flags = torch.stack([recorder.found[i][0, start:stop] for i in own])
        out[name] = flags.float().mean(dim=0).unflatten(0, (h, w))
    return out
