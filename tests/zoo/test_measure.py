"""Measures of the cards, on made-up inputs."""

from __future__ import annotations

import pytest
import torch

from attnsteer import zoo
from attnsteer.zoo.measure.card import words
from attnsteer.zoo.measure.image_quality import mask_ratio, success
from attnsteer.zoo.shapes.detect import detect
from attnsteer.zoo.shapes.layouts import layout
from attnsteer.zoo.shapes.render import render
from attnsteer.zoo.shapes.world import Object, Scene
from attnsteer.zoo.tokenizers import clip_tokenizer, word_tokenizer


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


@pytest.mark.parametrize("name", zoo.NAMES)
def test_cards_have_the_words_that_their_tokenizers_know(name: str) -> None:
    card = (zoo.MODELS / name / "README.md").read_text(encoding="utf-8")
    assert f"\n\n{words(name)}\n\n## Measured" in card
    known = words(name).split("`")[3 if name not in zoo.PIPELINES else 1].split()
    tokenizer = clip_tokenizer() if name in zoo.PIPELINES else word_tokenizer()
    assert len(known) > 60
    for word in known:
        (token,) = tokenizer(word, add_special_tokens=False).input_ids
        assert token != tokenizer.unk_token_id


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
