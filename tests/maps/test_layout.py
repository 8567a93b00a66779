"""Layouts in words and from texts of language models, and their preview."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnsteer import AttentionRefocusing
from attnsteer.errors import SelectionError
from attnsteer.maps.layout import box_of, boxes, read
from attnsteer.viz import layout_preview

PROMPT = "a red cube and a blue ball"


@pytest.mark.parametrize(
    ("place", "box"),
    [
        ("left", (0, 0, 0.5, 1)),
        ("on the right side", (0.5, 0, 1, 1)),
        ("Top", (0, 0, 1, 0.5)),
        ("top left", (0, 0, 0.5, 0.5)),
        ("lower-right corner of the image", (0.5, 0.5, 1, 1)),
        ("centre", (0.25, 0.25, 0.75, 0.75)),
        ("top center", (0.25, 0, 0.75, 0.5)),
        ("middle left", (0, 0.25, 0.5, 0.75)),
        ("bottom third", (0, 2 / 3, 1, 1)),
        ("everywhere", (0, 0, 1, 1)),
    ],
)
def test_places_in_words(place: str, box: tuple[float, ...]) -> None:
    assert box_of(place) == box
    assert boxes({"red cube": place, "blue ball": [place, (0, 0, 1, 0.25)]}, PROMPT)["blue ball"] == [
        box,
        (0, 0, 1, 0.25),
    ]


@pytest.mark.parametrize(
    "place", ["", "left right", "top bottom", "up", "left third top", "third", "everywhere left", "the"]
)
def test_what_is_no_place(place: str) -> None:
    with pytest.raises(SelectionError, match=r"no place|no one place"):
        box_of(place)


BOTH = {"red cube": [(0, 0, 0.5, 0.5)], "blue ball": [(0.5, 0.5, 1, 1), (0, 0.5, 0.5, 1)]}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (json.dumps({"red cube": [0, 0, 0.5, 0.5], "blue ball": [[0.5, 0.5, 1, 1], [0, 0.5, 0.5, 1]]}), None),
        (
            'Sure! Here it is:\n```json\n{"objects": [{"name": "red cube", "bbox": [0, 0, 256, 256]}, '
            '{"name": "blue ball", "bbox": [256, 256, 512, 512]}, {"name": "blue ball", "bbox": [0, 256, 256, 512]}]}\n```\nEnjoy.',
            (512, 512),
        ),
        ('{"red cube": "top left", "blue ball": "bottom right", "blue ball": "bottom left"}', None),
        (
            '[{"phrase": "red cube", "box": [0,0,0.5,0.5]}, {"phrase": "blue ball", "boxes": [[0.5,0.5,1,1],[0,0.5,0.5,1]]}]',
            None,
        ),
        (
            "Boxes:\nred cube: (0, 0, 256, 128)\n- blue ball: [256, 128, 512, 256]\nblue ball: (0, 128, 256, 256)\n",
            (512, 256),
        ),
    ],
)
def test_layouts_of_language_models(text: str, size: tuple[int, int] | None) -> None:
    found = read(text, size, PROMPT)
    assert found == BOTH
    assert AttentionRefocusing(found).phrases() == [["red cube", "blue ball"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I cannot draw.", "no layout"),
        ('{"red cube": [0, 0, 256, 256]}', r"give size="),
        ('{"red cube": [0, 0, 0.5]}', "four numbers"),
        ('{"red cube": [0, 0, true, 1]}', "four numbers"),
        ('{"red cube": [0.5, 0, 0.5, 1]}', "not inside the image"),
        ('{"red cube": [-0.1, 0, 0.5, 1]}', "not inside the image"),
        ('{"red cube": [0, 0, NaN, 1]}', "finite"),
        ('{"red cube": [0, 0, 1e999, 1]}', "finite"),
        ('{"red cube": [0, 0, 1' + "0" * 310 + ", 1]}", "finite"),
        ('{"red cube": [-' + "9" * 5000 + ", 0, 1, 1]}", "finite"),
        ('{"red cube": [0, 0, 0.5, 1], ', "does not end"),
        ('{"green cube": [0, 0, 0.5, 1]}', "is not in the prompt"),
        ('{"a": [0, 0, 0.5, 1]}', "2 times in the prompt"),
        ('{"red cube": {"x": 1}}', "four numbers"),
        ('[{"name": "red cube"}]', "1 phrases and 0 boxes"),
        ("[1, 2, 3]", "a layout is an object"),
        ('{"": "left"}', "phrase"),
        ("[" * 50_000, r"no layout|does not end"),
        (json.dumps({"red cube": [[0, 0, 1, 1]] * 101}), "at most 100"),
    ],
)
def test_bad_layouts(text: str, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        read(text, None, PROMPT)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='{}[]":,(). 0123456789redcubNaN-\n', max_size=60))
def test_any_text_is_a_layout_or_refused(text: str) -> None:
    try:
        found = read(text)
    except SelectionError:
        return
    assert found and all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for b in found.values() for x0, y0, x1, y1 in b)


def test_preview(tmp_path: Path) -> None:
    sheet = layout_preview(
        {"red cube": "left", "blue ball": ["left", "top"]}, (128, 96), tmp_path / "a.png", prompt=PROMPT
    )
    assert (tmp_path / "a.png").is_file() and sheet.size[0] > 128 and sheet.size[1] >= 96
    # The right edge of the left half, and of the image, are drawn; the lower right quarter is empty.
    assert sheet.getpixel((62, 70)) != (255, 255, 255) and sheet.getpixel((100, 70)) == (255, 255, 255)
    with pytest.raises(SelectionError, match="64 to 4096"):
        layout_preview({"cube": "left"}, (8, 8))
    # One line of the legend, whatever is in the phrase; a box smaller than a pixel; any number as a side.
    odd = layout_preview({"blue\nball": "left", "x" * 5000: (0, 0, 1e-9, 1e-9)}, (64, 64))
    assert odd.size[1] < 1000
    with pytest.raises(SelectionError, match="64 to 4096"):
        layout_preview({"cube": "left"}, 64)
    with pytest.raises(SelectionError, match=r"layout\.png"):
        layout_preview({"cube": "left"}, (64, 64), tmp_path / "a.foo")
    for box in ((0, 0, 10**400, 1), (0, 0, float("inf"), 1)):
        with pytest.raises(SelectionError, match="not inside the image"):
            boxes({"cube": box})
    with pytest.raises(SelectionError, match="size="):
        read("{}", (10**400, 1))
