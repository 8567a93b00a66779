"""Pictures of a run as data URIs: large ones made smaller, and no more than a page can bear."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import RunError
from ...run import store

# Bytes of all pictures in a page, and the longest side in pixels.
BUDGET, SIDE = 12 * 2**20, 320
KIND = {"PNG": "image/png", "JPEG": "image/jpeg"}
# Colours of a map from none to most (matplotlib's inferno at five places), each with its opacity.
HEAT = ((0, 0, 4, 70), (87, 16, 110, 125), (188, 55, 84, 160), (249, 142, 9, 180), (252, 255, 164, 195))


class Album:
    """The pictures of a page, each once.

    Attributes:
        uris: data URIs; samples refer to them by index. left_out: pictures that no longer fitted. shrunk: made smaller.
        missing: pictures of the data that are not there (any more), or cannot be read here.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any], budget: int = BUDGET):
        self.folder, self.recipe, self.left = folder, recipe, budget
        self.uris: list[str] = []
        self.left_out = self.shrunk = self.missing = 0
        data = recipe.get("data") or {}
        file = data.get("file")
        # Where `attnsteer.run.data.files` has the pictures from; paths of a run's recipe are absolute.
        source = data.get("images") or (os.path.dirname(file) if isinstance(file, str) else None)
        self.source = Path(source) if isinstance(source, str) and os.path.isabs(source) else None
        self.known: dict[Any, int | None] = {}

    def add(self, image: Any, own: bool = False) -> int | None:
        """The index of a picture; None where there is none, or no more room.

        Args:
            image: a path, or the number of a scene of the shapes world. own: a path in the run folder, which must be there;
                else it is one in the folder of the data, which may lie elsewhere by now.

        Raises:
            RunError: a missing file of the run, one that is no picture, or a path that leads out of its folder.
        """
        if image is None or isinstance(image, bool) or not isinstance(image, int | str):
            return None
        key = (image, own)
        if key not in self.known:
            content = self._content(image, own)
            self.missing += content is None
            self.known[key] = None if content is None else self._keep(content)
        return self.known[key]

    def _keep(self, uri: str) -> int | None:
        if len(uri) > self.left:
            self.left_out += 1
            return None
        self.left -= len(uri)
        self.uris.append(uri)
        return len(self.uris) - 1

    def _content(self, image: int | str, own: bool) -> str | None:
        from PIL import Image, UnidentifiedImageError

        if isinstance(image, int):
            return self._scene(image)
        if own:
            path = store.own_file(self.folder, image)
        else:
            path = None if self.source is None else store.inside(self.source, image)
            if path is None or not path.is_file():
                return None
        try:
            with Image.open(path) as opened:
                if max(opened.size) <= SIDE and opened.format in KIND:
                    return uri(path.read_bytes(), KIND[opened.format])
                smaller = opened.convert("RGB")
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
            if not own:
                return None
            raise RunError(f"{path} is no picture ({error}); delete it and start the run again.") from error
        smaller.thumbnail((SIDE, SIDE))
        self.shrunk += 1
        stream = io.BytesIO()
        smaller.save(stream, "JPEG", quality=88)
        return uri(stream.getvalue(), KIND["JPEG"])

    def _scene(self, index: int) -> str | None:
        data = self.recipe.get("data") or {}
        if not data.get("zoo"):
            return None
        from ...zoo.shapes.questions import picture
        from ...zoo.shapes.render import render

        pixels = (render([picture(str(data.get("split", "test")), index)])[0] * 255).round().byte().permute(1, 2, 0)
        return png("RGB", pixels.shape[1], pixels.shape[0], pixels.numpy().tobytes())


def uri(content: bytes, kind: str) -> str:
    """A data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(mode: str, width: int, height: int, pixels: bytes) -> str:
    """A data URI of raw pixels, row by row; mode: "RGB" or "RGBA"."""
    from PIL import Image

    stream = io.BytesIO()
    Image.frombytes(mode, (width, height), pixels).save(stream, "PNG", optimize=True)
    return uri(stream.getvalue(), KIND["PNG"])


def heat(grid: Sequence[Sequence[float]], top: float) -> str:
    """A map [h][w] as a picture to lay over another; `top` gets the brightest colour."""
    pixels = bytes(c for row in grid for v in row for c in _colour(v / top if top > 0 else 0.0))
    return png("RGBA", len(grid[0]), len(grid), pixels)


def _colour(share: float) -> tuple[int, ...]:
    place = max(0.0, min(1.0, share)) * (len(HEAT) - 1)
    i = min(int(place), len(HEAT) - 2)
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(HEAT[i], HEAT[i + 1], strict=True))
