"""Sink tokens on the image, against the model's own hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnsteer.errors import SelectionError
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from attnsteer.viz import cross_attention, sink_maps


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_transformers("llava")


@pytest.fixture(scope="module")
def inputs(llava: Any) -> Any:
    return tiny_transformers_inputs("llava", llava, batch=1, length=7)


def test_shares_of_layers_by_the_models_own_states(llava: Any, inputs: Any) -> None:
    dims, tau = (1, 5), 1.5
    with torch.no_grad():
        states = llava(**inputs, output_hidden_states=True).hidden_states[:-1]
    start = int((inputs["input_ids"][0] == llava.config.image_token_id).nonzero()[0])
    flags = []
    for x in states:
        x = x[0, start : start + 16]
        flags.append(
            ((x[:, list(dims)].abs() / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).amax(-1) > tau).float()
        )
    found = sink_maps(llava, inputs, dims, tau, bands={"first": [0], "rest": range(1, len(states))})
    assert list(found) == ["first", "rest"]
    torch.testing.assert_close(found["first"], flags[0].view(4, 4))
    torch.testing.assert_close(found["rest"], torch.stack(flags[1:]).mean(0).view(4, 4))
    assert 0 < float(found["rest"].mean()) < 1
    (name,) = whole = sink_maps(llava, inputs, dims, tau)
    torch.testing.assert_close(whole[name], torch.stack(flags).mean(0).view(4, 4))
    picture = torch.zeros(3, 16, 16)
    figure = cross_attention(picture, list(found), torch.stack(list(found.values())))
    assert len(figure.axes) == 3


def test_bad_input(llava: Any, inputs: Any) -> None:
    for options, said in (
        ({"dims": None}, "sink"),
        ({"dims": (10**6,)}, "have .* dimensions"),
        ({"tau": 1e3}, "no token can be a sink"),
        ({"bands": {"x": [99]}}, r"band 'x' has the layers \[99\]"),
        ({"bands": {"x": []}}, r"band 'x' has the layers \[\]"),
        ({"grid": (3, 3)}, "has 9 cells, the image has 16"),
    ):
        with pytest.raises(SelectionError, match=said):
            sink_maps(llava, inputs, **{"dims": (1,), "tau": 1.5, **options})
    two = {k: torch.cat([v, v]) for k, v in inputs.items()}
    with pytest.raises(SelectionError, match="got 2 samples"):
        sink_maps(llava, two, (1,), 1.5)
