"""Scenes, the renderer and the splits."""

from __future__ import annotations

import math

import pytest
import torch

from attnsteer.zoo.shapes.render import coverage, render
from attnsteer.zoo.shapes.world import (
    BIASED,
    FAIR,
    PARTNER,
    RADII,
    REACH,
    SHAPES,
    USUAL,
    Ground,
    Object,
    Prior,
    Scene,
    rng,
    sample_scene,
)


def scenes(n: int, **options: object) -> list[Scene]:
    return [sample_scene(rng("test", i), **options) for i in range(n)]


def test_same_seed_same_scene_and_splits_differ() -> None:
    first = sample_scene(rng("train", 5))
    assert first == sample_scene(rng("train", 5))
    others = [sample_scene(rng(s, i, t)) for s, i, t in (("train", 6, 0), ("train", 5, 1), ("test", 5, 0))]
    assert all(o != first for o in others)
    # Positions are real numbers: across splits no scene comes twice.
    seen = {sample_scene(rng(s, i)).objects for s in ("train", "calibration", "test") for i in range(200)}
    assert len(seen) == 600


@pytest.mark.parametrize(("split", "index"), [("validation", 0), ("test", -1)])
def test_unknown_split_or_index(split: str, index: int) -> None:
    with pytest.raises(ValueError, match="split"):
        rng(split, index)


def test_objects_are_inside_and_apart() -> None:
    for scene in scenes(300):
        for i, a in enumerate(scene.objects):
            x0, y0, x1, y1 = a.box
            assert 0 < x0 < a.x < x1 < 1 and 0 < y0 < a.y < y1 < 1
            assert RADII[a.size][0] <= a.radius <= RADII[a.size][1]
            for b in scene.objects[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) > a.reach + b.reach


def test_count_is_as_asked() -> None:
    assert {len(s.objects) for s in scenes(100, count=3)} == {3}
    assert {len(s.objects) for s in scenes(200)} == {1, 2, 3, 4, 5}
    with pytest.raises(ValueError, match="1 to 5"):
        sample_scene(rng("test", 0), count=6)


def test_prior_makes_attributes_come_together() -> None:
    def usual(prior: Prior) -> float:
        objects = [o for s in scenes(500, prior=prior) for o in s.objects]
        return sum(o.colour == USUAL[o.shape] for o in objects) / len(objects)

    def partner(prior: Prior) -> float:
        pairs = [s.objects for s in scenes(500, count=2, prior=prior)]
        return sum(a.shape == PARTNER[b.shape] for a, b in pairs) / len(pairs)

    assert 0.1 < usual(FAIR) < 0.25 and 0.4 < usual(BIASED) < 0.65
    assert 0.1 < partner(FAIR) < 0.25 and 0.5 < partner(BIASED) < 0.75
    with pytest.raises(ValueError, match="probability"):
        Prior(usual=1.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_area_and_centre_of_each_shape(shape: str) -> None:
    """The drawn area is that of a disc of the radius, its centre of mass is where the object is."""
    o = Object(shape, "red", "large", 0.5, 0.48, 0.2)
    cover = coverage([Scene((o,))], side=256)[0][0]
    assert math.isclose(float(cover.mean()), math.pi * o.radius**2, rel_tol=0.01)
    at = (torch.arange(256) + 0.5) / 256
    assert math.isclose(float((cover.sum(0) * at).sum() / cover.sum()), o.x, abs_tol=2e-3)
    assert math.isclose(float((cover.sum(1) * at).sum() / cover.sum()), o.y, abs_tol=2e-3)
    # The box and the reach hold the shape, tightly.
    rows, columns = (cover > 0.5).any(1).nonzero(), (cover > 0.5).any(0).nonzero()
    found = [columns.min() / 256, rows.min() / 256, (columns.max() + 1) / 256, (rows.max() + 1) / 256]
    # The tips of pointed shapes are thinner than a pixel.
    assert all(abs(float(f) - b) < 0.02 for f, b in zip(found, o.box, strict=True))
    far = torch.hypot(at[None] - o.x, at[:, None] - o.y)[cover > 0.5].max()
    assert 0.93 * o.reach < float(far) <= o.reach + 1 / 256


def test_render_values_and_ground() -> None:
    o = Object("circle", "blue", "large", 0.5, 0.5, 0.14)
    image = render([Scene((o,), Ground(0.4)), Scene((o,), Ground(0.6, "stripes", 0.05))])
    assert image.shape == (2, 3, 64, 64) and image.min() >= 0 and image.max() <= 1
    assert torch.allclose(image[0, :, 0, 0], torch.full((3,), 0.4))
    assert torch.allclose(image[0, :, 32, 32], torch.tensor([0.12, 0.22, 0.90]))
    corner = image[1, 0, :10, :10]
    assert 0.01 < float(corner.std()) < 0.05 and torch.equal(image[1, 0, :10, :10], image[1, 1, :10, :10])


def test_batch_equals_single() -> None:
    some = scenes(8, prior=BIASED)
    assert torch.equal(render(some), torch.cat([render([s]) for s in some]))


def test_reach_is_of_unit_area() -> None:
    assert REACH["square"] == pytest.approx(math.sqrt(math.pi / 2), abs=1e-3)
    assert REACH["triangle"] == pytest.approx(math.sqrt(4 * math.pi / (3 * math.sqrt(3))), abs=1e-3)
