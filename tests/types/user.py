"""A user's program over the public names; never run: `make types` checks it, strictly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_type

from torch import Tensor, nn

import attnsteer
from attnsteer import (
    ACT,
    PAG,
    SEG,
    AttentionRefocusing,
    Captured,
    HeadGate,
    HeadSet,
    Intervention,
    Site,
    SoftPAG,
    SpotLight,
    Steering,
    Tokens,
    Where,
    ZeroTuning,
    capture,
    detach,
    register_method,
    sites,
    steer,
)
from attnsteer.call import AttnCall, KeyBias, Reweight
from attnsteer.errors import AttnSteerError, NeverFired
from attnsteer.parameters import number


@register_method
@dataclass(frozen=True)
class Mine(Intervention):
    """Adds to the scores of the first key."""

    strength: float = number(0.5, low=0)

    kinds = ("self",)

    def bias(self, call: AttnCall) -> KeyBias | None:
        return KeyBias(self.strength * call.first_key().float())

    def weights(self, call: AttnCall) -> Reweight | None:
        return Reweight(((call.first_key(), 0.5),))


def language(model: nn.Module, **inputs: Any) -> None:
    heads = HeadSet({2: [0, 5], 3: [1, 7]})
    heads.save("heads.safetensors")
    assert_type(HeadSet.load("heads.safetensors"), HeadSet)
    with steer(model, ACT(heads=heads, beta=0.4), ZeroTuning(gamma=1.5), Mine(0.3)) as run:
        assert_type(run, Steering)
        with run.freeze():
            model(**inputs)
    print(run.audit)
    run.check_fired()
    for site in sites(model):
        assert_type(site, Site)
        assert_type(site.layer, int)
    method = SpotLight(spans=["a red star"], target=0.2)
    assert_type(method.new(target=0.3), SpotLight)
    method.save_pretrained("folder")
    with capture(model, Where(layers=[1]), what="output") as seen:
        assert_type(seen, Captured)
    assert_type(detach(model), int)


def pictures(pipe: Any) -> None:
    handle = steer(pipe, PAG(3.0), SoftPAG(scale=3.0, strength=0.5, where=Where(layers=[4, 5])), SEG(2.0))
    handle.remove()
    boxes = AttentionRefocusing(boxes={"red circle": (0.0, 0.1, 0.5, 0.9)})
    gates = HeadGate({(0, 3): 0.0})
    try:
        with steer(pipe, boxes, gates, measure=True):
            pipe("a red circle")
    except NeverFired as error:
        print(error)
    except AttnSteerError:
        raise


def roles(tokens: Tokens, values: Tensor, folder: Path) -> type[Intervention]:
    assert_type(attnsteer.__version__, str)
    return attnsteer.get_method("ACT")
