"""CONFORM: its loss against the definition, its loop against the authors', and what it refuses."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from attnsteer import CONFORM, Where, steer
from attnsteer.errors import NotFinite, SelectionError
from attnsteer.methods.conform import contrast
from attnsteer.testing import PIPELINES
from tests.reference import contrastive as slow
from tests.reference import latent_loops

from .latent_common import EXACT, call_of, cross_layers, double, far


def vectors(n: int = 8) -> Tensor:
    return torch.rand(n, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def same(labels: list[int]) -> Tensor:
    return torch.tensor([[a == b for b in labels] for a in labels])


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 2, 2, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1]])
def test_losses_are_those_of_the_definition(labels: list[int]) -> None:
    v = vectors()
    assert abs(float(contrast(v, same(labels), 0.5, "ntxent") - slow.ntxent(v, labels, 0.5))) < 1e-12
    assert abs(float(contrast(v, same(labels), 0.5, "contrastive") - slow.contrastive(v, labels))) < 1e-12


def test_the_loss_of_pytorch_metric_learning() -> None:
    """Its version 2.5.0 gave this number."""
    assert abs(float(contrast(vectors(), same([0] * 4 + [1] * 4), 0.5, "ntxent")) - 1.6080297745) < 1e-9


OTHERS = [pytest.param(f"sd-{name}", marks=pytest.mark.long) for name in ("pndm", "euler", "dpm++2m", "heun")]


@pytest.mark.parametrize("name", ["sd-ddim", *OTHERS, "sdxl", "flux", "sd3"])
def test_equal_to_the_authors_loop(name: str) -> None:
    """Groups of one and of two words, two prompts; at first a group of one word each: nothing to do in the first call."""
    name, _, scheduler = name.partition("-")
    pipe, call = double(name, scheduler or None), call_of(name, batch=2, steps=3)
    text, model = call["prompt_embeds"].shape[1], getattr(pipe, PIPELINES[name].denoiser)
    parts: dict[str, Any] = {}
    if name in ("sd", "sdxl"):
        side = 16 if name == "sd" else 8
        layers, grid = cross_layers(pipe, side), (side, side)
    else:
        layers = ["transformer_blocks.2.attn" if name == "sd3" else "transformer_blocks.1.attn"]
        grid, first, second = (
            (8, 8),
            *((slice(0, 64), slice(64, None)) if name == "sd3" else (slice(text, None), slice(0, text))),
        )
        parts = {"image": first, "text": second}
    groups = [[[2, 3], [5]], [[1], [4]]]
    loops = [slow.Loop(own, (0, 1), 2, 2) for own in groups]

    def maps(predict: Any, b: int, z: Tensor) -> Tensor:
        with latent_loops.recorded(model, layers) as found:
            predict(b, z)
        return latent_loops.cross_map([found[layer] for layer in layers], grid, **parts)

    def optimise(z: Tensor, predict: Any, i: int, n: int) -> Tensor:
        return torch.cat([loops[b](z[b : b + 1], functools.partial(maps, predict, b), i, n) for b in range(len(z))])

    expected = latent_loops.LOOPS[name](pipe, call, optimise)
    as_ranges = [[[(t, t + 1) for t in group] for group in own] for own in groups]
    where = Where(layers=[2]) if name == "sd3" else Where()
    plain = pipe(**call)[0]
    with steer(pipe, CONFORM(as_ranges, (0, 1), 2, until=2, blind_calls=True, where=where)) as run:
        ours = pipe(**call)[0]
    assert far(ours, expected) < EXACT * max(1.0, float(expected.abs().max()))
    assert far(plain, expected) > 1e-4
    # The second sample rests in the first call: it has no pair there.
    assert run.audit.extra[0]["latent updates"] == 2 * 6 - 3
    assert torch.equal(pipe(**call)[0], plain)


def test_words_of_a_prompt_and_the_anchor() -> None:
    pipe, call = double("sd"), call_of("sd", text=True, steps=3)
    rule = {"refine_at": (), "until": 3}
    outs = {}
    for anchor in (None, 0):
        with steer(pipe, CONFORM([("red", "cube"), ("blue", "ball")], anchor=anchor, **rule)):
            outs[anchor] = pipe(**call)[0]
    with steer(pipe, CONFORM(["red cube", "blue ball"], **rule)):
        phrases = pipe(**call)[0]
    assert torch.equal(phrases, outs[None])
    assert far(outs[0], outs[None]) > 1e-12


def test_each_sample_has_its_own_step_size() -> None:
    """Groups of other sizes beside it; the one without stays as it is."""
    pipe, call = double("sd"), call_of("sd", batch=3, steps=2)
    groups = [[[(2, 4)], [(5, 6)]], [[(1, 2)], [(4, 5)]], [[(2, 3)], [(5, 7)]]]
    plain, outs = pipe(**call)[0], {}
    for size in (20.0, 5.0, (20.0, None, 5.0)):
        with steer(pipe, CONFORM(groups, (), until=2, step_size=size)):
            outs[size] = pipe(**call)[0]
    each = outs[20.0, None, 5.0]
    assert torch.equal(each[1], plain[1])
    assert far(each[0], outs[20.0][0]) < EXACT and far(each[2], outs[5.0][2]) < EXACT
    assert far(each[0], plain[0]) > 1e-4 and far(outs[20.0][2], outs[5.0][2]) > 1e-5


def test_bad_groups() -> None:
    for groups, words in (
        (["cube"], "at least two groups"),
        ("cube", "at least two groups"),
        ([("red", "cube"), ("red", "ball")], "several groups"),
        ([[("red", "cube"), ("ball",)], [("dog",)]], "at least two groups"),
        ([1, 2], "at least two groups"),
    ):
        with pytest.raises(SelectionError, match=words):
            CONFORM(groups)
    with pytest.raises(SelectionError, match="0 to 1"):
        CONFORM(["cube", "ball"], (1.5,))
    assert CONFORM.released_code(["cube", "ball"]).until == 30
    pipe, call = double("sd"), call_of("sd", text=True, steps=1)
    # The token behind a phrase may be that of the next one.
    with steer(pipe, CONFORM(["red", "cube"], include="last+1", until=0), control=True):
        pipe(**call)
    for groups, words in (
        (["cube", "dog"], "is not in the prompt"),
        (["a", "cube"], "is 2 times in the prompt"),
        (["red cube", "CUBE"], "'red cube' and 'CUBE' share token 3"),
        ([("ball", 1), "ball"], "share token 7"),
        ([("red cube", "cube"), "ball"], "share token 3"),
        ([(2, 4), (3, 5)], r"\(2, 4\) and \(3, 5\) share token 3"),
    ):
        with pytest.raises(SelectionError, match=words), steer(pipe, CONFORM(groups)):
            pipe(**call)


def test_a_loss_that_is_not_finite_names_call_and_site(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnsteer.methods import conform

    pipe, call = double("sd"), call_of("sd", text=True, steps=2)
    monkeypatch.setattr(conform, "contrast", lambda v, *_: v.sum() * float("nan"))
    with (
        pytest.raises(NotFinite, match=r"call 0 of 2.*down_blocks\.0") as raised,
        steer(pipe, CONFORM(["red cube", "ball"])),
    ):
        pipe(**call)
    assert bool(torch.isfinite(raised.value.latent).all())
