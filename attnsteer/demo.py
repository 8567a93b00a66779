"""A demonstration that needs no download: a small random Llama, steered, with numbers before and after.

A random model says nothing sensible; what it shows is that the edit acts where it was asked to, does what its equation
says, equals the slow definition over the full map, and is gone afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .call import AttnCall
from .intervention import Intervention
from .methods.spotlight import SpotLight
from .steering import sites, steer
from .where import Where

# One marked span of a prompt of PROMPT tokens, and the share of attention it is lifted to.
PROMPT, SPAN, TARGET = 24, (6, 10), 0.4
LAYERS = (1, 2, 3)


@dataclass(frozen=True)
class Probe(Intervention):
    """Reads, edits nothing: the mean attention of each layer's last row to the keys `start` to `stop`."""

    start: int
    stop: int
    seen: dict[int, float]

    observes = True

    def weights(self, call: AttnCall) -> None:
        marked = (call.key_position >= self.start) & (call.key_position < self.stop)
        self.seen[call.site.layer] = float(call.map.mass(marked[None, None])[:, :, -1].mean())


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured.

    Attributes:
        method: repr of the intervention. sites: table of the model's sites. audit: of the steered call.
        mass: layer -> (before, after): attention of the last row to the span, mean over heads.
        top: the five likeliest next tokens (token, probability) before and after.
        distance: total variation between the next-token distributions. exact: largest difference of a logit from
            the same edit over the full map. restored: whether the logits after removal are the first ones, bit for bit.
    """

    method: str
    sites: str
    audit: Any
    mass: dict[int, tuple[float, float]]
    top: tuple[list[tuple[int, float]], list[tuple[int, float]]]
    distance: float
    exact: float
    restored: bool

    @property
    def ok(self) -> bool:
        """Whether the edit acted, was exact, and left nothing behind."""
        lifted = all(self.mass[layer][1] > self.mass[layer][0] for layer in LAYERS)
        return lifted and self.distance > 0 and self.exact < 1e-4 and self.restored


def run_demo() -> DemoResult:
    """Steer a small Llama with SpotLight in some of its layers; takes about a second once the libraries are loaded."""
    model = _model()
    ids = torch.randint(4, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    method = SpotLight([[SPAN]], TARGET, where=Where(layers=LAYERS))
    before, after = {}, {}
    with torch.no_grad():
        plain = _next(model, ids)
        with steer(model, Probe(*SPAN, before)):
            _next(model, ids)
        with steer(model, method, measure=True) as run:
            steered = _next(model, ids)
        with steer(model, method, Probe(*SPAN, after)):
            _next(model, ids)
        with steer(model, method, reference=True):
            dense = _next(model, ids)
        again = _next(model, ids)
    p, q = plain.softmax(dim=-1), steered.softmax(dim=-1)
    return DemoResult(
        method=repr(method),
        sites=str(sites(model)),
        audit=run.audit,
        mass={layer: (before[layer], after[layer]) for layer in before},
        top=(_top(p), _top(q)),
        distance=float((p - q).abs().sum() / 2),
        exact=float((steered - dense).abs().max()),
        restored=torch.equal(plain, again),
    )


def _model() -> Any:
    from .testing import tiny_transformers

    return tiny_transformers("llama", num_hidden_layers=4)


def _next(model: Any, ids: Tensor) -> Tensor:
    """Logits of the next token, fp32 [V]."""
    return model(ids).logits[0, -1].float()


def _top(p: Tensor) -> list[tuple[int, float]]:
    values, tokens = p.topk(5)
    return list(zip(tokens.tolist(), values.tolist(), strict=True))
