"""A picture of a layout: its boxes with numbers, and a legend beside them; before anything is run."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SelectionError
from ..maps.layout import boxes
from .sheet import _lines, _pillow, as_image

if TYPE_CHECKING:
    from PIL import Image

GAP, LEGEND, PAPER, INK, TAG = 8, 220, "white", "black", 2
# Characters of a text in the legend.
LONGEST = 300


def layout_preview(
    layout: Mapping[str, Any],
    size: tuple[int, int] = (512, 512),
    path: str | Path | None = None,
    *,
    image: Any = None,
    prompt: str | None = None,
) -> Image.Image:
    """The boxes of a layout in their colours, each with the number of its phrase in the legend.

    Args:
        layout: phrase -> boxes in fractions of the image, or places in words (see `attnsteer.maps.layout.boxes`).
        size: (width, height) in pixels of the canvas, 64 to 4096 each. path: also save the picture there.
        image: what the boxes are drawn on, brought to `size`; None: white. prompt: above the legend; phrases are checked with it.

    Raises:
        SelectionError: no layout, a size out of range, a name whose ending is no picture's, or what `boxes` refuses.
    """
    if not (isinstance(size, (tuple, list)) and len(size) == 2) or not all(
        isinstance(n, int) and 64 <= n <= 4096 for n in size
    ):
        raise SelectionError(f"size={size}: give (width, height) of 64 to 4096 pixels.")
    found = boxes(layout, prompt)
    pil, drawing, font = _pillow()
    width, height = size
    canvas = pil.new("RGB", size, PAPER) if image is None else as_image(image).resize(size)
    draw = drawing.Draw(canvas)
    colours = [_colour(n, len(found)) for n in range(len(found))]
    tags: list[tuple[float, float, float, float]] = []
    for n, several in enumerate(found.values()):
        for x0, y0, x1, y1 in several:
            corners = (x0 * width, y0 * height, max(x0 * width, x1 * width - 1), max(y0 * height, y1 * height - 1))
            draw.rectangle(corners, outline=colours[n], width=3)
            _tag(draw, str(n + 1), corners, colours[n], font, tags, size)
    texts = [*([prompt] if prompt else []), *(f"{n + 1}  {phrase}" for n, phrase in enumerate(map(_text, found)))]
    texts = [" ".join(text.split()) for text in texts]
    texts = [text if len(text) <= LONGEST else f"{text[:LONGEST]}..." for text in texts]
    wrapped = [_lines(draw, text, font, LEGEND - 4 * GAP) for text in texts]
    line = int(sum(font.getmetrics())) + 2
    sheet = pil.new(
        "RGB", (width + LEGEND, max(height, sum(map(len, wrapped)) * line + (len(wrapped) + 1) * GAP)), PAPER
    )
    sheet.paste(canvas, (0, 0))
    draw, y = drawing.Draw(sheet), GAP
    draw.rectangle((0, 0, width - 1, height - 1), outline=INK)
    for i, lines in enumerate(wrapped):
        n = i - bool(prompt)
        if n >= 0:
            draw.rectangle((width + GAP, y, width + GAP + line // 2, y + line // 2), fill=colours[n])
        for text in lines:
            draw.text((width + 3 * GAP, y), text, fill=INK, font=font)
            y += line
        y += GAP
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            sheet.save(path)
        except ValueError as error:
            raise SelectionError(f"path={path}: {error}; give a name such as layout.png.") from None
    return sheet


def _text(phrase: Any) -> str:
    return (
        phrase
        if isinstance(phrase, str)
        else f"{phrase[0]} ({phrase[1]})"
        if isinstance(phrase[0], str)
        else str(phrase)
    )


def _colour(n: int, count: int) -> tuple[int, ...]:
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(n / max(count, 1), 0.9, 0.75))


def _tag(draw: Any, text: str, corners: Any, colour: Any, font: Any, taken: list[Any], size: tuple[int, int]) -> None:
    """The number of a box at its upper left corner, or as near below and beside it as no other number is."""
    wide, high = draw.textlength(text, font=font) + 2 * TAG, sum(font.getmetrics()) + 2 * TAG
    steps = sorted(((i, j) for i in range(40) for j in range(40)), key=sum)
    places = (
        (min(corners[0] + i * (wide + 1), size[0] - wide), min(corners[1] + j * (high + 1), size[1] - high))
        for i, j in steps
    )
    free = lambda x, y: all(x + wide <= a or c <= x or y + high <= b or d <= y for a, b, c, d in taken)  # noqa: E731
    x, y = next((p for p in places if free(*p)), (corners[0], corners[1]))
    taken.append((x, y, x + wide, y + high))
    draw.rectangle((x, y, x + wide, y + high), fill=colour)
    draw.text((x + TAG, y + TAG), text, fill=PAPER, font=font)
