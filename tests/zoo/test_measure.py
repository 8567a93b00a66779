"""Measures of the cards, on made-up inputs."""

from __future__ import annotations

import torch

from attnsteer.zoo.measure.image_quality import mask_ratio, success
from attnsteer.zoo.shapes.detect import detect
from attnsteer.zoo.shapes.layouts import layout
from attnsteer.zoo.shapes.render import render
from attnsteer.zoo.shapes.world import Object, Scene


def test_mask_ratio() -> None:
    mask = torch.zeros(64, 64)
    mask[:16, :16] = 1.0
    even = torch.ones(16, 16)
    assert torch.isclose(mask_ratio(even, mask), torch.tensor(1.0))
    inside = torch.zeros(16, 16)
    inside[:4, :4] = 0.3
    assert torch.isclose(mask_ratio(inside, mask), torch.tensor(16.0))
    # A map of two cells, one of them half covered.
    mask = torch.zeros(64, 64)
    mask[:32, :16] = 1.0
    assert torch.isclose(mask_ratio(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), mask), torch.tensor(0.25 / 0.125))


def test_success_of_drawn_layouts() -> None:
    wanted = layout("test", 0, "objects", 2)
    objects = tuple(
        Object(p.shape, p.colour, "large", (x0 + x1) / 2, (y0 + y1) / 2, 0.14)
        for p, (x0, y0, x1, y1) in zip(wanted.phrases, wanted.boxes, strict=True)
    )
    images = render([Scene(objects), Scene(objects[:1])])
    spoiled = images[:1].clone()
    spoiled[:, 0, 30:34, :] = 1.0
    found = success([wanted] * 3, detect(torch.cat([images, spoiled])))
    assert [round(3 * found[k].value) for k in ("right", "exact")] == [1, 1]
    assert 1 <= round(3 * found["all there"].value) <= 2
