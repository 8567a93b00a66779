"""The published protocols of the readers, over a model and records that the user has as files.

    python -m benchmarks.reading --published tag --model FOLDER --data screenspot_web.json --images FOLDER

Protocols and their records (JSON Lines, or JSON with a list): `PROTOCOLS`. Values are means over the records with 95 % intervals;
differences are paired bootstraps, records of one picture resampled together. Prompts, crops, rules and step counts are those of the
official code, HeimingX/TAG at 1c6236f, mrwu-mac/ControlMLLM at 57e16e7 and YuyaoGe/CARVE at a1f0442, in the model's own chat
template; RefAM's code could not be read, so that its protocol is ours but for the metrics. Nothing is fetched.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnsteer import CARVE, TAG, ControlMLLM, HeadSet, RefAM, Where
from attnsteer.errors import AttnSteerError, RecipeError, brief
from attnsteer.evals.metrics import contains, grounding, pointing, vqa
from attnsteer.evals.metrics.base import Metric
from attnsteer.reading._pictures import box_of, minmax, resized
from attnsteer.reading._vision import decoded, image_grid, prepared, text_depth
from attnsteer.reading.carve import GENERAL
from attnsteer.reading.controlmllm import image_tokens, nearest
from attnsteer.recipe.schema import ModelSpec
from attnsteer.run import models, store
from attnsteer.run.data.files import opener
from attnsteer.run.data.files import read as read_rows
from attnsteer.run.data.rows import Row
from attnsteer.run.loaded import Loaded
from attnsteer.tokens import char_offsets

# eval_mm/screenspot/prompt_tag.py
KEY = "element_content_or_description"
COMMAND = (
    'In this UI screenshot, I want to perform the command "{}", which element should I perform? Please output in json format '
    "ONLY with the following two keys: action_type, {key}. If the element is an icon and there is no text content on this element, "
    "please output up to three keywords for the {key}."
)
# The longer side of a screenshot, at most.
LONGEST = 1344
# carve/pipeline.py; behind the general instruction too.
SUFFIX = "Answer the question using a single word or phrase."
HEADS = 10

Record = dict[str, Any]
Arms = dict[str, Record]


@dataclass(frozen=True)
class Settings:
    """Of a measurement. max_new_tokens: None: the protocol's. region: of ControlMLLM. where, noise: of RefAM."""

    max_new_tokens: int | None = None
    region: str = "box"
    where: Where = field(default_factory=Where)
    noise: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Item:
    """A record that was checked. place: file and line. picture: its file. values: by protocol. subset: has its own lines."""

    place: str
    picture: Path
    values: Record
    subset: str | None = None

    def open(self) -> Any:
        """The picture in RGB."""
        return opener(self.picture.parent)({"image": self.picture.name, "id": self.place})


@dataclass(frozen=True)
class Folders:
    """Where pictures and masks are."""

    images: Path
    masks: Path

    def file(self, row: Row, column: str, name: Any, masks: bool = False) -> Path:
        """The file that a record names.

        Raises:
            RecipeError: it is not in the folder.
        """
        folder = self.masks if masks else self.images
        path = store.inside(folder, name) if isinstance(name, str) and name else None
        if path is None or not path.is_file():
            option = "--masks" if masks else "--images"
            raise row.wrong(column, name, f"the name of a file in {folder} ({option} says which folder)")
        return path

    def picture(self, row: Row, *columns: str) -> tuple[Path, tuple[int, int]]:
        """(the picture of a record, its (width, height))."""
        from PIL import Image, UnidentifiedImageError

        column = next((c for c in columns if row.has(c)), columns[0])
        path = self.file(row, column, row.get(column))
        try:
            with Image.open(path) as found:
                return path, found.size
        except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
            raise RecipeError(f"{row.place}: {path} is no picture that can be read: {error}.") from error


def pixel_box(row: Row, column: str, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of a box [x, y, width, height] in pixels of a picture of `size` (width, height).

    Raises:
        RecipeError: it is none: corners and fractions are in use too, and would be measured as something else.
    """
    given = row.get(column)
    wanted = f"[x, y, width, height] in pixels, inside of the picture of {size[0]} x {size[1]}"
    if not isinstance(given, list) or len(given) != 4 or not all(_number(v) for v in given):
        raise row.wrong(column, given, wanted)
    x, y, w, h = (float(v) for v in given)
    # Annotations reach a few pixels over the border.
    inside = x >= -0.02 * size[0] and y >= -0.02 * size[1] and x + w <= 1.02 * size[0] and y + h <= 1.02 * size[1]
    if not inside or w <= 0 or h <= 0 or max(given) <= 1:
        raise row.wrong(column, given, f"{wanted} (not corners, not fractions)")
    return max(x, 0.0), max(y, 0.0), min(x + w, float(size[0])), min(y + h, float(size[1]))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def filled(box: Sequence[int], size: tuple[int, int]) -> Tensor:
    """bool [height, width] of a box (x0, y0, x1, y1) in pixels, ends excluded, of a picture of `size` (width, height)."""
    mask = torch.zeros(size[1], size[0], dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def png_mask(path: Path, size: tuple[int, int]) -> Tensor:
    """bool [height, width] of a mask in a file: what is not black.

    Raises:
        RecipeError: of another size than the picture, or empty.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as found:
            # A palette's numbers are objects; its colours are not.
            grey = found if found.mode in ("1", "L", "P", "I", "I;16") else found.convert("L")
            mask = torch.from_numpy(np.asarray(grey) > 0)
            there = found.size
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise RecipeError(f"{path} is no mask that can be read: {error}.") from error
    if there != size or not bool(mask.any()):
        raise RecipeError(
            f"{path}: a mask of {there[0]} x {there[1]} with {int(mask.sum())} pixels in it; it must have the size of its picture, "
            f"{size[0]} x {size[1]}, and something in it."
        )
    return mask


def polygons(row: Row, column: str, size: tuple[int, int]) -> Tensor:
    """bool [height, width] of polygons [[x0, y0, x1, y1, ...], ...] in pixels, as COCO has them.

    Raises:
        RecipeError: another form, or nothing of the picture in them.
    """
    from PIL import Image, ImageDraw

    given = row.get(column)
    parts = [given] if isinstance(given, list) and given and _number(given[0]) else given
    formed = isinstance(parts, list) and bool(parts) and all(isinstance(p, list) for p in parts)
    if not formed or not all(len(p) >= 6 and len(p) % 2 == 0 and all(map(_number, p)) for p in parts):
        raise row.wrong(
            column, given, "polygons [[x0, y0, x1, y1, x2, y2, ...], ...] in pixels (no run lengths: write a PNG)"
        )
    canvas = Image.new("1", size)
    for part in parts:
        ImageDraw.Draw(canvas).polygon(list(zip(part[::2], part[1::2], strict=True)), fill=1)
    mask = torch.from_numpy(np.asarray(canvas) > 0)
    if not bool(mask.any()):
        raise row.wrong(column, given, f"polygons with a pixel of the picture of {size[0]} x {size[1]} in them")
    return mask


def seen(processor: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part (x0, y0, x1, y1) of a picture of `size` (width, height) that the model gets: its maps are over that.

    Raises:
        RecipeError: the processor pads or cuts in a way that is not known.
    """
    own = getattr(processor, "image_processor", None)
    if getattr(own, "do_pad", None) and size[0] != size[1]:
        raise RecipeError(
            f"{type(own).__name__} pads pictures, so that its maps are not over them; give square pictures, or "
            "a processor with do_pad=false."
        )
    if not getattr(own, "do_center_crop", None):
        return 0, 0, *size
    side = lambda of, name: of.get(name) if isinstance(of, Mapping) else getattr(of, name, None)  # noqa: E731
    crop = (side(own.crop_size, "height"), side(own.crop_size, "width"))
    if crop == (side(own.size, "height"), side(own.size, "width")):
        return 0, 0, *size
    if crop[0] != crop[1] or side(own.size, "shortest_edge") != crop[0]:
        raise RecipeError(
            f"{type(own).__name__} sizes pictures to {own.size} and cuts {own.crop_size}: what it shows is not known."
        )
    short = min(size)
    left, top = (size[0] - short) // 2, (size[1] - short) // 2
    return left, top, left + short, top + short


def prompt(loaded: Loaded, text: str, images: int = 1) -> str:
    """A whole prompt about so many pictures, by the processor's chat template where it has one."""
    processor, tokenizer = loaded.processor, loaded.tokenizer
    if not getattr(processor, "chat_template", None):
        return f"{getattr(processor, 'image_token', '<image>') * images} {text}"
    turn = [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}]
    written = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    first = tokenizer.bos_token
    # Readers let the tokenizer put it there.
    return (
        written.removeprefix(first) if first and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else written
    )


def random_heads(draw: random.Random, layers: int, heads: int, count: int) -> HeadSet:
    """So many (layer, head) pairs."""
    chosen = draw.sample([(n, h) for n in range(layers) for h in range(heads)], min(count, layers * heads))
    return HeadSet({n: sorted(h for m, h in chosen if m == n) for n in {m for m, _ in chosen}})


# TAG.


def tag_items(row: Row, folders: Folders, settings: Settings) -> Iterator[Item]:
    """ScreenSpot: a command and the box of its element."""
    path, size = folders.picture(row, "img_filename", "image")
    x0, y0, x1, y1 = pixel_box(row, "bbox", size)
    target = [x0 / size[0], y0 / size[1], x1 / size[0], y1 / size[1]]
    subset = row.text("data_type") if row.has("data_type") else None
    yield Item(row.place, path, {"instruction": row.text("instruction"), "target": target}, subset)


def quoted(ids: Tensor, tokenizer: Any) -> tuple[int, int]:
    """(start, stop): the tokens of the command in a prompt.

    Raises:
        RecipeError: the tokenizer has lost the prompt's words.
    """
    offsets, text = char_offsets(ids.tolist(), tokenizer)
    before, behind = COMMAND.format("\0", key=KEY).split("\0")
    start = text.find(before) + len(before)
    stop = text.rfind(behind)
    inside = [t for t, (a, b) in enumerate(offsets) if a < stop and b > start]
    if before not in text or not inside:
        raise RecipeError(
            f"the prompt's words are not in its tokens, which read {brief(text[-300:])}; is this the model's tokenizer?"
        )
    return inside[0], inside[-1] + 1


def tag_arms(loaded: Loaded, item: Item, settings: Settings, draw: random.Random) -> Arms:
    """The click by the answer's words, or of the command's; of the same words in random heads; and the centre."""
    picture, command = item.open(), item.values["instruction"]
    if max(picture.size) > LONGEST:
        scale = LONGEST / max(picture.size)
        # BICUBIC
        picture = picture.resize([max(1, int(v * scale)) for v in picture.size], 3)
    x0, y0, x1, y1 = seen(loaded.processor, picture.size)
    shown = picture.crop((x0, y0, x1, y1))
    text = prompt(loaded, COMMAND.format(command, key=KEY))
    words = quoted(prepared(loaded.target, loaded.processor, shown, text)["input_ids"][0], loaded.tokenizer)
    config = loaded.target.config.get_text_config()
    heads = random_heads(draw, text_depth(loaded.target), config.num_attention_heads, HEADS)
    arms: Arms = {"centre": {"point": [0.5, 0.5]}}
    for arm, method in (("TAG", TAG(heads=HEADS)), ("random heads", TAG(heads=heads))):
        found = method.ground(
            loaded.target,
            loaded.processor,
            shown,
            text,
            words,
            key=KEY,
            max_new_tokens=settings.max_new_tokens or 1024,
        )
        x, y = x0 + found.point[0] * (x1 - x0), y0 + found.point[1] * (y1 - y0)
        arms[arm] = {"point": [x / picture.size[0], y / picture.size[1]], "source": found.source}
    return {arm: {**own, "target": item.values["target"]} for arm, own in arms.items()}


# ControlMLLM.


def control_items(row: Row, folders: Folders, settings: Settings) -> Iterator[Item]:
    """ROC (`name`, `bbox`, `seg_mask`) or RTC (`label`, `box`, `mask`): a question about a region, and its object or text."""
    roc = not row.has("label")
    path, size = folders.picture(row, *(("image_path", "image") if roc else ("image",)))
    text = row.text("text").replace("<location> " if roc else " <location>", "")
    name = row.text("name" if roc else "label").replace("_", " ").strip()
    synonyms = row.listed("synonyms") if row.has("synonyms") and row.get("synonyms") else []
    if not all(isinstance(s, str) and s.strip() for s in synonyms):
        raise row.wrong("synonyms", synonyms, "a list of texts")
    if settings.region == "mask":
        column = "seg_mask" if roc else "mask"
        mask = partial(png_mask, folders.file(row, column, row.get(column), masks=True), size)
        mask()
    else:
        x0, y0, x1, y1 = pixel_box(row, "bbox" if roc else "box", size)
        mask = partial(filled, (int(x0), int(y0), int(x1), int(y1)), size)
    yield Item(row.place, path, {"text": text, "name": name, "synonyms": synonyms, "mask": mask, "roc": roc})


def control_arms(loaded: Loaded, item: Item, settings: Settings, draw: random.Random) -> Arms:
    """Answers with and without the region. T is 5 for ROC and 4 for RTC; of ++, whose last pass takes no step, 4 and 2."""
    picture, values = item.open(), item.values
    x0, y0, x1, y1 = seen(loaded.processor, picture.size)
    picture, mask = picture.crop((x0, y0, x1, y1)), values["mask"]()[y0:y1, x0:x1]
    text = prompt(loaded, values["text"])
    options = {"max_new_tokens": settings.max_new_tokens or 30}

    def ask(method: ControlMLLM, region: Tensor) -> str:
        return method.ask(loaded.target, loaded.processor, picture, text, {"mask": region}, **options)[0]

    plain = ask(ControlMLLM(steps=0), torch.ones_like(mask))
    inputs = prepared(loaded.target, loaded.processor, picture, text)
    grid = image_grid(loaded.target, inputs, int(image_tokens(loaded.target, inputs).sum()))
    first = dataclasses.replace(ControlMLLM.released_code(), steps=5 if values["roc"] else 4)
    second = dataclasses.replace(ControlMLLM.plus_plus(), steps=3 if values["roc"] else 1)
    a, b, c, d = box_of(mask) if bool(mask.any()) else (0, 0, *picture.size)
    left, top = draw.randint(0, picture.size[0] - (c - a)), draw.randint(0, picture.size[1] - (d - b))
    other = filled((left, top, left + c - a, top + d - b), picture.size)
    arms = {"no region": plain}
    for arm, method, region in (
        ("ControlMLLM", first, mask),
        ("ControlMLLM++", second, mask),
        ("a random box", first, other),
    ):
        # Without a cell, as outside of what the model is shown, the loss has no gradient in the code, and nothing moves.
        arms[arm] = ask(method, region) if bool(nearest(region.float(), grid).any()) else plain
    own = {"name": values["name"], "synonyms": values["synonyms"]}
    return {arm: {"generated": said, **own} for arm, said in arms.items()}


# CARVE.


def carve_items(row: Row, folders: Folders, settings: Settings) -> Iterator[Item]:
    """TextVQA: a question and the answers of several people."""
    if not any(row.has(c) for c in ("image", "image_path")) and row.has("image_id"):
        row = dataclasses.replace(row, values={**row.values, "image": f"{row.get('image_id')}.jpg"})
    path, _ = folders.picture(row, "image", "image_path")
    answers = [a.get("answer") if isinstance(a, Mapping) else a for a in row.listed("answers")]
    if len(answers) < 2 or not all(isinstance(a, str) for a in answers):
        raise row.wrong("answers", row.get("answers"), "a list of what several people answered (ten, of TextVQA)")
    yield Item(row.place, path, {"question": row.text("question"), "answers": answers})


def carve_arms(loaded: Loaded, item: Item, settings: Settings, draw: random.Random) -> Arms:
    """Answers on the whole picture, on CARVE's (as in the paper), on both (as in the code), and on a random window of its size."""
    picture, model = item.open(), loaded.target
    count = settings.max_new_tokens or 32
    question = f"{item.values['question']} {SUFFIX}"
    general = f"{GENERAL} {SUFFIX}"
    paper, code = CARVE(), dataclasses.replace(CARVE.released_code(), layers=None)

    def looked(text: str) -> tuple[Tensor, Tensor]:
        return paper.attention(model, prepared(model, loaded.processor, picture, prompt(loaded, text)), count)

    def said(*pictures: Any) -> str:
        inputs = prepared(model, loaded.processor, list(pictures), prompt(loaded, question, len(pictures)))
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        return decoded(loaded.processor, made[0, inputs["input_ids"].shape[1] :])

    (query, ids), (other, _) = looked(question), looked(general)
    size = (picture.size[1], picture.size[0])
    S = paper.contrast(query, other, size)
    refined, (x0, y0, x1, y1) = paper.refine(picture, paper.mask(S))
    left, top = draw.randint(0, size[1] - (x1 - x0)), draw.randint(0, size[0] - (y1 - y0))
    window = filled((left, top, left + x1 - x0, top + y1 - y0), picture.size)
    arms = {
        "whole image": decoded(loaded.processor, ids),
        "CARVE": said(refined),
        "CARVE, both pictures": said(picture, code.refine(picture, code.mask(S))[0]),
        "a random window": said(paper.refine(picture, window)[0]),
    }
    return {arm: {"generated": answer, "answers": item.values["answers"]} for arm, answer in arms.items()}


# RefAM.


def refam_items(row: Row, folders: Folders, settings: Settings) -> Iterator[Item]:
    """RefCOCO: expressions, and the mask of what they refer to."""
    path, size = folders.picture(row, "image", "file_name", "image_path")
    if row.has("mask"):
        mask = partial(png_mask, folders.file(row, "mask", row.get("mask"), masks=True), size)
    else:
        mask = partial(polygons, row, "segmentation", size)
    # Checked here, and made again when it is needed: of thousands of records they would not fit.
    mask()
    if not row.has("sentences"):
        yield Item(row.place, path, {"expression": row.text("expression", "sentence", "text"), "mask": mask})
        return
    for sentence in row.listed("sentences"):
        text = (sentence.get("sent") or sentence.get("raw")) if isinstance(sentence, Mapping) else sentence
        if not isinstance(text, str) or not text.strip():
            raise row.wrong("sentences", sentence, "a list of texts, or of objects with sent")
        yield Item(row.place, path, {"expression": text, "mask": mask})


def refam_arms(loaded: Loaded, item: Item, settings: Settings, draw: random.Random) -> Arms:
    """Masks of the picture at the pipeline's own size, brought back to the picture's."""
    picture, target, pipe = item.open(), item.values["mask"](), loaded.target
    config = pipe.transformer.config
    side = config.sample_size * pipe.vae_scale_factor
    shown = picture.resize((side, side), 3)
    best = RefAM(where=settings.where, noise=settings.noise)
    heads = random_heads(draw, config.num_layers, config.num_attention_heads, 1)
    height, width = target.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    # As large as the object, in the middle.
    arms = {
        "whole image": torch.ones_like(target),
        "centre disc": (y - height / 2) ** 2 + (x - width / 2) ** 2 <= float(target.sum()) / math.pi,
    }
    for arm, method in {
        "RefAM": best,
        "without magnets": dataclasses.replace(best, magnets=()),
        "a random head": dataclasses.replace(best, where=Where(heads=heads)),
    }.items():
        found = method.refer(pipe, shown, item.values["expression"])
        arms[arm] = minmax(resized(found.map, (height, width))) >= method.threshold
    return {arm: {"predicted": mask, "target": target} for arm, mask in arms.items()}


# All of them.


@dataclass(frozen=True)
class Protocol:
    """A published measurement.

    Attributes:
        kind: of the model. expected: of a record. items, arms: its functions. metric: of an arm's record; shown: its estimates, the
            first one compared. compared: (an arm, those that it is compared with), .... theirs: what the paper reports.
    """

    kind: str
    expected: str
    items: Callable[[Row, Folders, Settings], Iterator[Item]]
    arms: Callable[[Loaded, Item, Settings, random.Random], Arms]
    metric: Callable[[], Metric]
    shown: tuple[str, ...]
    compared: tuple[tuple[str, tuple[str, ...]], ...]
    theirs: str


PROTOCOLS: dict[str, Protocol] = {
    "tag": Protocol(
        "vlm",
        "ScreenSpot's records: img_filename (or image), instruction, bbox [x, y, width, height] in pixels; perhaps data_type",
        tag_items,
        tag_arms,
        pointing.metric,
        ("accuracy",),
        (("TAG", ("centre", "random heads")),),
        "TAG, MiniCPM-Llama3-V 2.5: the repository's tables are pictures and could not be read; a summary by others says 0.883 for "
        "mobile text on ScreenSpot.",
    ),
    "controlmllm": Protocol(
        "vlm",
        "records of ROC: image_path (or image), text, name, perhaps synonyms, bbox [x, y, width, height] in pixels, or "
        "seg_mask with --region mask; or of RTC: image, text, label, box likewise, or mask",
        control_items,
        control_arms,
        lambda: contains.metric(official=True),
        ("accuracy",),
        (("ControlMLLM", ("no region", "a random box")), ("ControlMLLM++", ("no region", "ControlMLLM"))),
        "ControlMLLM's repository: LLaVA-1.5-7B on ROC 0.5472, with ControlMLLM 0.6059, with ++ 0.7119; on RTC 0.5742, 0.6306, "
        "0.7466; Qwen2.5-VL-7B on ROC 0.7881, 0.7920, 0.7920; on RTC 0.8191, 0.8643, 0.8823. Their ++ has contrastive decoding, "
        "which is not here; ROC's test set is the file's first 1,548 records, ++'s of RTC the first 1,172.",
    ),
    "carve": Protocol(
        "vlm",
        "TextVQA's records: image (or image_id, of a .jpg), question, answers, a list of at least two",
        carve_items,
        carve_arms,
        vqa.metric,
        ("accuracy",),
        (("CARVE", ("whole image", "a random window")), ("CARVE, both pictures", ("whole image",))),
        "CARVE's paper, TextVQA, all steps (last step): LLaVA-1.5-7B 0.478 without, 0.579 (0.582) with; 13B 0.571, 0.612 (0.612); "
        "Qwen2.5-VL-3B 0.728, 0.763 (0.764); 7B 0.750, 0.817 (0.819).",
    ),
    "refam": Protocol(
        "image",
        "RefCOCO's records: image (or file_name), expression (or sentence, or sentences with sent), mask, a PNG of the picture's "
        "size, or segmentation, polygons in pixels",
        refam_items,
        refam_arms,
        grounding.metric,
        ("miou", "oiou", "precision_50"),
        (("RefAM", ("whole image", "centre disc", "a random head", "without magnets")),),
        "RefAM: the paper's figures could not be read, and theirs are of masks by SAM 2 on FLUX; here a threshold makes the mask.",
    ),
}


def read(
    name: str, data: Path, folders: Folders, settings: Settings | None = None, limit: int | None = None
) -> list[Item]:
    """All records of a file, checked before a model is loaded. limit: of the items, from the first.

    Raises:
        RecipeError: a file is not there, or a record is not the protocol's.
    """
    protocol, items = PROTOCOLS[name], []
    for folder in (folders.images, folders.masks):
        if not folder.is_dir():
            raise RecipeError(
                f"there is no folder {folder}; give the folder of the pictures (--images) or masks (--masks)."
            )
    try:
        for row in read_rows(data, {}):
            items += protocol.items(row, folders, settings or Settings())
            if limit is not None and len(items) >= limit:
                break
    except RecipeError as error:
        raise RecipeError(f"{error} --published {name} takes {protocol.expected}.") from error
    return items[:limit]


def measure(
    name: str, loaded: Loaded, items: Sequence[Item], settings: Settings | None = None, out: Path | None = None
) -> dict[str, list[dict[str, float]]]:
    """The metric's numbers of each record, by arm. out: a file for them and for what was said, a line for each record.

    Raises:
        RecipeError: a record cannot be measured; it names its line.
    """
    protocol, settings = PROTOCOLS[name], settings or Settings()
    metric, draw = protocol.metric(), random.Random(settings.seed)
    found: dict[str, list[dict[str, float]]] = {}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("")
    for item in items:
        try:
            records = protocol.arms(loaded, item, settings, draw)
        except AttnSteerError as error:
            raise RecipeError(f"{item.place}: {error}") from error
        line: Record = {"record": item.place, "image": item.picture.name, "arms": {}}
        for arm, record in records.items():
            numbers = metric.sample(record)
            found.setdefault(arm, []).append(numbers)
            shown = {k: record[k] for k in ("generated", "point", "source") if k in record}
            line["arms"][arm] = {**shown, **numbers}
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return found


def table(name: str, items: Sequence[Item], found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table of what was measured, and what the paper reports, which is named as theirs."""
    protocol, metric = PROTOCOLS[name], PROTOCOLS[name].metric()
    main = protocol.shown[0]
    lines = [f"| arm | {' | '.join(protocol.shown)} | records |", "| --- " * (len(protocol.shown) + 2) + "|"]
    kinds = sorted({i.subset for i in items if i.subset is not None})
    for kind in [None, *(kinds if len(kinds) > 1 else ())]:
        at = [k for k, item in enumerate(items) if kind in (None, item.subset)]
        groups = [str(items[k].picture) for k in at]
        arms = {arm: [own[k] for k in at] for arm, own in found.items()}
        said = f", {kind}" if kind else ""
        for arm, own in arms.items():
            values = metric.aggregate(own, groups=groups)
            lines.append(f"| {arm}{said} | {' | '.join(str(values[e]) for e in protocol.shown)} | {len(at)} |")
        for arm, others in protocol.compared:
            for other in others:
                changed = metric.compare(arms[other], arms[arm], groups=groups)[main]
                lines.append(f"| {arm} - {other}{said} | {changed} {'| ' * (len(protocol.shown) - 1)}| {len(at)} |")
    return "\n".join([*lines, "", f"Metric: {metric.name}" + (f" ({metric.note})" if metric.note else "") + "."]) + (
        f"\nReported by others, not measured here: {protocol.theirs}"
    )


def main(given: Any) -> str:
    """What `--published` prints.

    Raises:
        RecipeError: files, records or the model are not what the protocol takes.
    """
    for option, what in (("model", "a folder of transformers or diffusers"), ("data", "a file of records")):
        if getattr(given, option) is None:
            takes = PROTOCOLS[given.published].expected
            raise RecipeError(f"--published {given.published} needs --{option}, {what}: it takes {takes}.")
    images = given.images or given.data.parent
    settings = Settings(
        given.max_new_tokens,
        given.region,
        Where() if given.blocks is None else Where(layers=given.blocks),
        given.noise,
    )
    items = read(given.published, given.data, Folders(images, given.masks or images), settings, given.limit)
    if not given.model.is_dir():
        raise RecipeError(f"there is no folder {given.model}; give a model of transformers or diffusers (--model).")
    kind = PROTOCOLS[given.published].kind
    spec = ModelSpec(path=str(given.model.resolve()), kind=kind, dtype=given.dtype, device=given.device)
    found = measure(given.published, models.load(spec), items, settings, given.out)
    return f"{given.published}, {brief(str(given.model))}, {given.data.name}\n\n{table(given.published, items, found)}"
