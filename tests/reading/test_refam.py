"""RefAM, a reconstruction: its arithmetic in loops, the columns against explicit maps, the noise level, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attnsteer import RefAM, Where, capture, zoo
from attnsteer.errors import SelectionError, UnsupportedHost
from attnsteer.reading.refam import _noised
from attnsteer.run.data.zoo import image as scene_image
from attnsteer.testing import tiny_pipeline
from tests.reference import reading as slow

PHRASE = "a red circle"
CALL = {"max_sequence_length": 8}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return zoo.load("shapes-mmdit")


@pytest.fixture(scope="module")
def scene() -> Any:
    return scene_image({"split": "test", "image": 0})


@pytest.mark.parametrize("sinks", ["keep", "suppress", "redirect"])
def test_reading_is_the_definition(sinks: str) -> None:
    g = torch.Generator().manual_seed(0)
    P = torch.rand(12, 9, generator=g) * 0.05
    P[:, 2] = 0.6 + 0.01 * torch.rand(12, generator=g)
    P[:, 7] = 0.5 * (torch.arange(12) == 3)
    method = RefAM(sinks=sinks)
    for content, magnets in (([1, 2], [4, 5]), ([2], [2, 6]), ([0], [])):
        found, away, drop = method.read(P, content, magnets)
        wanted = slow.refam(P.tolist(), content, magnets, 5.0, 0.5, sinks)
        assert (found - torch.tensor(wanted[0])).abs().max() < 1e-6
        assert (away - torch.tensor(wanted[1])).abs().max() < 1e-6
        assert drop.nonzero()[:, 0].tolist() == wanted[2] == ([] if sinks == "keep" else [2])


def test_columns_are_those_of_the_map(pipe: Any, scene: Any) -> None:
    where = Where(layers=[2, 3])
    method = RefAM(where=where, noise=0.3, sinks="keep", renormalise=False)
    found = method.refer(pipe, scene, PHRASE, **CALL)
    noisy, level = _noised(pipe, scene, 0.3, 0)
    with torch.no_grad(), capture(pipe, where, what=("q", "k")) as seen:
        pipe(
            prompt=" ".join([PHRASE, *method.magnets]),
            latents=noisy,
            sigmas=[level],
            num_inference_steps=1,
            guidance_scale=1.0,
            output_type="latent",
            **CALL,
        )
    assert float(pipe.scheduler.sigmas[0]) == pytest.approx(0.3, abs=1e-5)
    wanted = torch.zeros(8, 8)
    for take in seen.takes:
        q, k = take.tensor("q")[0].double(), take.tensor("k")[0].double()
        A = (q @ k.transpose(-1, -2) * take.scale).softmax(dim=-1).mean(dim=0)
        # 64 image tokens first; the prompt begins with its start token: red and circle are the third and fourth.
        wanted += A[:64, 64:][:, [2, 3]].mean(dim=1).float().view(8, 8) / 2
    assert (found.map - wanted).abs().max() <= 1e-6
    assert found.mask.shape == (64, 64) and found.mask.any() and found.away is not None
    y, x = divmod(int(wanted.argmax()), 8)
    assert found.point == ((x + 0.5) / 8, (y + 0.5) / 8)


def test_noise_is_what_is_asked(pipe: Any, scene: Any) -> None:
    z, _ = _noised(pipe, scene, 0.0, 0)
    a, given = _noised(pipe, scene, 0.6, 5)
    b, _ = _noised(pipe, scene, 0.6, 6)
    assert torch.equal(a, _noised(pipe, scene, 0.6, 5)[0]) and not torch.equal(a, b)
    shift = pipe.scheduler.config.shift
    assert shift * given / (1 + (shift - 1) * given) == pytest.approx(0.6)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    assert (a - (0.4 * z + 0.6 * eps)).abs().max() < 2e-2
    two = RefAM(where=Where(layers=[3]), draws=2).refer(pipe, scene, PHRASE, **CALL)
    each = [RefAM(where=Where(layers=[3]), seed=s).refer(pipe, scene, PHRASE, **CALL).map for s in (0, 1)]
    assert (two.map - (each[0] + each[1]) / 2).abs().max() < 1e-6


def test_magnets_may_repeat_words(pipe: Any, scene: Any) -> None:
    method = RefAM(where=Where(layers=[3]), magnets=("a", "red"), include="last")
    assert method.refer(pipe, scene, "a red circle and a star", **CALL).away is not None
    assert RefAM(where=Where(layers=[3]), magnets=()).refer(pipe, scene, PHRASE, **CALL).away is None


def test_refusals(pipe: Any, scene: Any) -> None:
    with pytest.raises(SelectionError, match="no stop word"):
        RefAM().refer(pipe, scene, "of the")
    with pytest.raises(SelectionError, match="PIL image"):
        RefAM().refer(pipe, np.zeros((8, 8)), PHRASE)
    with pytest.raises(SelectionError, match="no words"):
        RefAM(magnets=(3,))
    with pytest.raises(SelectionError, match="Where"):
        RefAM(where=3)
    with pytest.raises((SelectionError, UnsupportedHost)):
        RefAM().refer(tiny_pipeline("sd"), Image.new("RGB", (64, 64)), PHRASE)
