"""The detector: all of a rendered scene, nothing of noise."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from attnsteer.zoo.shapes.detect import detect
from attnsteer.zoo.shapes.render import render
from attnsteer.zoo.shapes.world import BIASED, FAIR, Ground, Object, Scene, rng, sample_scene


@pytest.mark.parametrize("prior", [FAIR, BIASED], ids=["fair", "biased"])
def test_rendered_scenes_are_read_back(prior: object) -> None:
    """At least 99.5 % of the objects: shape, colour, size and place."""
    total = right = extra = 0
    for start in range(0, 300, 100):
        some = [sample_scene(rng("test", i, 7), prior=prior) for i in range(start, start + 100)]
        for scene, found in zip(some, detect(render(some)), strict=True):
            left = list(found.objects)
            for o in scene.objects:
                total += 1
                same = [
                    f
                    for f in left
                    if (f.shape, f.colour, f.size) == (o.shape, o.colour, o.size)
                    and abs(f.x - o.x) < 0.01
                    and abs(f.y - o.y) < 0.01
                    and abs(f.radius - o.radius) < 0.005
                ]
                right += bool(same)
                for f in same[:1]:
                    left.remove(f)
            extra += len(left)
    assert right / total >= 0.995 and extra == 0


def noise(kind: str, n: int = 100) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    if kind == "pixels":
        return torch.rand(n, 3, 64, 64, generator=g)
    if kind == "grey":
        return torch.rand(n, 1, 64, 64, generator=g).expand(-1, 3, -1, -1)
    side = int(kind)
    return F.interpolate(torch.rand(n, 3, side, side, generator=g), (64, 64), mode="bilinear")


@pytest.mark.parametrize(("kind", "most"), [("pixels", 0), ("grey", 0), ("12", 2), ("8", 2), ("4", 6)])
def test_noise_is_not_read(kind: str, most: int) -> None:
    """Objects found in a hundred pictures of noise, smooth ones included; none of them is valid as a whole."""
    found = detect(noise(kind))
    assert sum(len(d.found) for d in found) <= most
    assert not any(d.valid for d in found)


def test_half_formed_shapes_are_debris() -> None:
    """Two shapes melted into one, a shape with a bite, one of two colours, one fading into the ground."""
    circle = Object("circle", "red", "large", 0.4, 0.5, 0.14)
    base = render([Scene((circle,), Ground(0.5))])
    melted = torch.maximum(base, render([Scene((Object("square", "red", "large", 0.6, 0.45, 0.14),), Ground(0.5))]))
    melted[:, 1:] = torch.minimum(base, render([Scene((Object("square", "red", "large", 0.6, 0.45, 0.14),))]))[:, 1:]
    bitten = base.clone()
    bitten[:, :, 22:42, 26:40] = 0.5
    two = base.clone()
    blue = render([Scene((Object("circle", "blue", "large", 0.4, 0.5, 0.14),), Ground(0.5))])
    two[..., :25] = blue[..., :25]
    for image in (melted, bitten, two):
        (found,) = detect(image)
        assert not found.objects and found.debris > 0 and not found.valid
    (faint,) = detect(0.5 + 0.3 * (base - 0.5))
    assert not faint.objects


def test_valid_needs_objects_and_nothing_else() -> None:
    (empty,) = detect(torch.full((3, 64, 64), 0.5))
    assert not empty.valid and empty.debris == 0
    scene = sample_scene(rng("test", 3), count=2, textured=False)
    image = render([scene])
    assert detect(image)[0].valid
    image[:, 0, 2:9, 2:5] = 1.0
    (spoiled,) = detect(image)
    assert Counter(o.shape for o in spoiled.objects) == Counter(o.shape for o in scene.objects) and not spoiled.valid


def test_find() -> None:
    scene = sample_scene(rng("test", 1), count=3)
    (found,) = detect(render([scene]))
    o = scene.objects[0]
    assert len(found.find(shape=o.shape)) == len(scene.find(shape=o.shape))
    assert len(found.find(shape=o.shape, colour=o.colour)) == len(scene.find(shape=o.shape, colour=o.colour))


@pytest.mark.parametrize("bad", [torch.zeros(1, 64, 64), torch.zeros(2, 3, 64, 32), torch.full((3, 64, 64), torch.nan)])
def test_bad_images(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"detect\(\)"):
        detect(bad)
