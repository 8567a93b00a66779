"""Contact sheets: a grid of images with row and column labels, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtra, SelectionError

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

PAPER, INK, EDGE, GAP = "white", "#222222", "#bbbbbb", 6
# Pixels: the least width of a cell (small images are enlarged), the font, and the most that row labels may take.
LEAST, FONT, LABEL = 128, 14, 220


def contact_sheet(
    images: Sequence[Sequence[Any]],
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | Path | None = None,
    *,
    title: str = "",
) -> Image.Image:
    """A grid of images, `images[i][j]` beside the label `rows[i]` and below `columns[j]`.

    Args:
        images: Pillow images, arrays [h, w, 3] (uint8, or floats from 0 to 1), tensors [3, h, w] from 0 to 1, or None for
            an empty cell. They are scaled to one size, small ones by whole factors.
        rows, columns: labels, one per row and column; long ones are broken into lines.
        path: also save the sheet there (the ending names the format).

    Raises:
        SelectionError: rows, columns and labels do not fit each other, or there is no image.
    """
    grid = [[None if i is None else as_image(i) for i in row] for row in images]
    if len(grid) != len(rows) or any(len(row) != len(columns) for row in grid):
        raise SelectionError(
            f"contact_sheet got rows of {[len(r) for r in grid]} images for {len(rows)} row and {len(columns)} column labels; "
            "give one label per row and per column."
        )
    found = [i for row in grid for i in row if i is not None]
    if not found:
        raise SelectionError("contact_sheet got no image; give at least one.")
    pil, draw_on, font = _pillow()
    measure = draw_on.Draw(pil.new("RGB", (1, 1)))
    width, height = (max(i.size[k] for i in found) for k in (0, 1))
    times = max(1, -(-LEAST // width))
    width, height = width * times, height * times
    above = [_lines(measure, str(c), font, width) for c in columns]
    beside = [_lines(measure, str(r), font, LABEL) for r in rows]
    line = font.size + 4
    left = int(max((measure.textlength(t, font=font) for lines in beside for t in lines), default=0)) + 2 * GAP
    heads = [line] if title else []
    top = sum(heads) + max(len(lines) for lines in above) * line + 2 * GAP
    # A label of many lines needs room even beside a low image.
    row_height = max(height, max(len(lines) for lines in beside) * line)
    right = int(measure.textlength(title, font=font)) + 2 * GAP if title else 0
    size = (max(left + len(columns) * (width + GAP), right), top + len(rows) * (row_height + GAP))
    sheet = pil.new("RGB", size, PAPER)
    draw = draw_on.Draw(sheet)
    if title:
        draw.text((GAP, GAP), title, fill=INK, font=font)
    for j, lines in enumerate(above):
        for k, text in enumerate(reversed(lines)):
            place = left + j * (width + GAP) + (width - measure.textlength(text, font=font)) / 2
            draw.text((place, top - GAP - (k + 1) * line), text, fill=INK, font=font)
    for i, row in enumerate(grid):
        y = top + i * (row_height + GAP)
        for k, text in enumerate(beside[i]):
            draw.text((GAP, y + (row_height - len(beside[i]) * line) / 2 + k * line), text, fill=INK, font=font)
        for j, image in enumerate(row):
            x = left + j * (width + GAP)
            if image is not None:
                sheet.paste(_scaled(image, width, height), (x, y))
                # A white image would be lost on white paper.
                draw.rectangle((x - 1, y - 1, x + width, y + height), outline=EDGE)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    return sheet


def strength_by_layer(
    make: Callable[[float, int], Any],
    strengths: Sequence[float],
    layers: Sequence[int],
    path: str | Path | None = None,
    *,
    title: str = "",
) -> Image.Image:
    """A contact sheet of `make(strength, layer)`: one row per strength, one column per layer."""
    images = [[make(strength, layer) for layer in layers] for strength in strengths]
    return contact_sheet(
        images, [f"strength {s:g}" for s in strengths], [f"layer {i}" for i in layers], path, title=title
    )


def strength_by_head(
    make: Callable[[float, tuple[int, int]], Any],
    strengths: Sequence[float],
    heads: Iterable[tuple[int, int]],
    path: str | Path | None = None,
    *,
    title: str = "",
) -> Image.Image:
    """A contact sheet of `make(strength, (layer, head))`: one row per strength, one column per head (a `HeadSet` will do)."""
    pairs = [(layer, head) for layer, head in heads]
    images = [[make(strength, pair) for pair in pairs] for strength in strengths]
    columns = [f"layer {layer}, head {head}" for layer, head in pairs]
    return contact_sheet(images, [f"strength {s:g}" for s in strengths], columns, path, title=title)


def as_image(image: Any) -> Image.Image:
    """An RGB Pillow image of a Pillow image, an array [h, w, 3] or a tensor [3, h, w].

    Raises:
        SelectionError: another form.
    """
    pil, _, _ = _pillow()
    if hasattr(image, "convert"):
        return image.convert("RGB")
    if hasattr(image, "detach"):
        image = image.detach().to("cpu").float()
        image = image.permute(1, 2, 0).numpy() if image.ndim == 3 and image.shape[0] in (1, 3) else image.numpy()
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) != 3 or shape[2] not in (1, 3):
        raise SelectionError(
            f"{type(image).__name__} of shape {shape} is no image; give a Pillow image, an array [h, w, 3] or a tensor [3, h, w]."
        )
    if image.dtype.kind == "f":
        image = (image.clip(0.0, 1.0) * 255.0).round().astype("uint8")
    return pil.fromarray(image.repeat(3, axis=2) if shape[2] == 1 else image).convert("RGB")


def _pillow() -> tuple[Any, Any, ImageFont.FreeTypeFont]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise MissingExtra("pictures need Pillow, which is not installed: pip install 'attnsteer[viz]'.") from error
    return Image, ImageDraw, ImageFont.load_default(FONT)


def _scaled(image: Image.Image, width: int, height: int) -> Image.Image:
    from PIL import Image

    whole = width % image.width == 0 and height % image.height == 0
    return image.resize((width, height), Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC)


def _lines(draw: ImageDraw.ImageDraw, text: str, font: Any, width: float) -> list[str]:
    """The text in lines of at most `width` pixels; a word that is longer is cut."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(joined, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = joined
    return [_cut(draw, line, font, width) for line in lines]


def _cut(draw: ImageDraw.ImageDraw, text: str, font: Any, width: float) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"
