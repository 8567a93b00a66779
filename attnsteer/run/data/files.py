"""Samples from a file: JSON Lines (also when it is called .json, as POPE's are), JSON, CSV, or a text with a prompt a line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RecipeError, listing
from .. import store
from .rows import Row, samples
from .sample import Data, Sample

if TYPE_CHECKING:
    from ...recipe.schema import DataSpec

# Of a JSON object, the key that has the rows.
LISTS = ("images", "questions", "data", "rows", "annotations")
# csv.field_size_limit is 131,072; a prompt may be longer, a whole file read as one field may not.
FIELD = 1_000_000


def load(spec: DataSpec, task: str, prompt: str | None, folder: Path) -> Data:
    """The samples of a file.

    Raises:
        RecipeError: it cannot be read, a line does not parse, a column or an image is missing.
    """
    path = folder / str(spec.file)
    rows = list(read(path, spec.columns))
    stop = None if spec.limit is None else spec.start + spec.limit
    found = samples(rows[spec.start : stop], str(spec.format), spec.options, prompt, spec.start, len(rows))
    images = folder / spec.images if spec.images is not None else path.parent
    pictures = [(s, store.inside(images, str(s["image"]))) for s in found if "image" in s]
    outside = [s for s, picture in pictures if picture is None]
    if outside:
        raise RecipeError(
            f"{path}: the image {outside[0]['image']!r} of sample {outside[0]['id']} is not in {images}, and images elsewhere "
            "are not read. Name images relative to their folder, and give that as data.images."
        )
    absent = [s for s, picture in pictures if not picture.is_file()]
    if absent:
        raise RecipeError(
            f"{path}: {len(absent)} of {len(found)} images are not in {images}; the first is {absent[0]['image']!r} of "
            f"sample {absent[0]['id']}. Say where they are with data.images."
        )
    return Data(found, opener(images), images)


def opener(folder: Path) -> Callable[[Mapping[str, Any]], Any]:
    """Opens the picture of a sample in a folder."""

    def image(sample: Sample) -> Any:
        from PIL import Image, UnidentifiedImageError

        path = folder / str(sample["image"])
        try:
            with Image.open(path) as picture:
                return picture.convert("RGB")
        except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
            raise RecipeError(f"{path} (sample {sample['id']}) is no image that can be read: {error}.") from error

    return image


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a file, each with its line (from 1) or its place in a list.

    Raises:
        RecipeError: see `load`.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not text.strip():
        raise RecipeError(f"{path}: there is nothing in it.")
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        yield from _table(path, text, "\t" if ending == ".tsv" else ",", columns)
    elif ending == ".txt":
        lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1)]
        every = [(n, line) for n, line in lines if line]
        for i, (n, line) in enumerate(every):
            yield Row(f"{path}, line {n}", i, {"prompt": line}, columns)
    elif _is_lines(text):
        yield from _lines(path, text, columns)
    else:
        yield from _whole(path, text, columns)


def _is_lines(text: str) -> bool:
    """JSON Lines: the first line is an object by itself."""
    first = text.lstrip().partition("\n")[0].strip()
    if not first.startswith("{"):
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        # A broken first line of many is still one of lines; an object over several lines ends its first one early.
        return len(first) > 1 and first.endswith("}")
    return not any(isinstance(value.get(k), list) and "\n" not in text.strip() for k in LISTS)


def _lines(path: Path, text: str, columns: Mapping[str, str]) -> Iterator[Row]:
    count = 0
    # Not splitlines: a JSON text may hold other line ends than these.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            shown = line.strip()
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise RecipeError(f"{path}, line {number}: is not JSON ({error}): {shown}") from error
        yield _row(f"{path}, line {number}", count, value, columns)
        count += 1


def _whole(path: Path, text: str, columns: Mapping[str, str]) -> Iterator[Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}, line {error.lineno}, column {error.colno}: is not JSON ({error.msg}).") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: is nested too deep.") from error
    name = ""
    if isinstance(value, dict):
        name = next((k for k in LISTS if isinstance(value.get(k), list)), "")
        if not name:
            raise RecipeError(f"{path}: has no list of rows under {', '.join(LISTS)}; there are {listing(value)}.")
        value = value[name]
    if not isinstance(value, list):
        raise RecipeError(f"{path}: is {type(value).__name__}; a list of objects is needed.")
    for i, row in enumerate(value):
        yield _row(f"{path}, {name or 'row'} {i}", i, row, columns)


def _row(place: str, number: int, value: Any, columns: Mapping[str, str]) -> Row:
    if not isinstance(value, dict):
        raise RecipeError(f"{place}: is {type(value).__name__}; an object with columns is needed.")
    return Row(place, number, value, columns)


def _table(path: Path, text: str, delimiter: str, columns: Mapping[str, str]) -> Iterator[Row]:
    limit = csv.field_size_limit(FIELD)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        head: list[str] = []
        count = 0
        for cells in reader:
            if not cells:
                continue
            if not head:
                head = cells
                if len(set(head)) < len(head):
                    raise RecipeError(f"{path}, line 1: a column is named twice: {listing(head)}.")
                continue
            place = f"{path}, line {reader.line_num}"
            if len(cells) != len(head):
                raise RecipeError(f"{place}: has {len(cells)} cells; the head has {len(head)}: {listing(head)}.")
            yield Row(place, count, dict(zip(head, cells, strict=True)), columns)
            count += 1
    except csv.Error as error:
        raise RecipeError(f"{path}, line {reader.line_num}: is not CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)
