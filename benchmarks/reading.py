"""What readers find on the embedded models, against what needs no attention and against random heads.

    python -m benchmarks.reading pointing second segmentation control --limit 200 --out readings

Cases: pointing (TAG on shapes-lvlm), control (ControlMLLM, questions about a marked object), second (CARVE,
questions on cluttered scenes), segmentation (RefAM on shapes-mmdit). Values are means over samples of the test split with 95 %
bootstrap intervals, differences are paired.

The papers' protocols, over a model and records in files (`benchmarks/published.py` says what they hold):

    python -m benchmarks.reading --published tag --model FOLDER --data FILE [--images FOLDER] [--limit N] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnsteer import CARVE, TAG, ControlMLLM, HeadSet, RefAM, Where, zoo
from attnsteer.errors import AttnSteerError
from attnsteer.evals.metrics.grounding import metric as grounding
from attnsteer.evals.significance import Interval, paired_bootstrap
from attnsteer.reading._pictures import box_of
from attnsteer.reading._vision import decoded, prepared
from attnsteer.run.data.zoo import image as scene_image
from attnsteer.zoo.shapes.questions import picture
from attnsteer.zoo.shapes.render import SIDE, coverage, render
from attnsteer.zoo.shapes.world import SHAPES
from attnsteer.zoo.train.diffusion import scene as plain_scene
from benchmarks import published

Values = dict[str, list[float]]
# Of the language model of shapes-lvlm, and of a block of shapes-mmdit.
LAYERS, HEADS, BLOCK_HEADS = 6, 8, 6
# By the calibration split: layers where the answer's row localises, a step size that moves attention.
MIDDLE = (1, 2, 3)
CONTROL = ControlMLLM(steps=8, lr=0.1, optimiser="adam", rows="last", stop=None)
SECOND = CARVE(layers=MIDDLE, steps="first")


def unique(scene: Any) -> list[Any]:
    """The objects that their colour and shape tell apart."""
    return [o for o in scene.objects if len(scene.find(shape=o.shape, colour=o.colour)) == 1]


def mask_of(scene: Any, o: Any) -> Tensor:
    """bool [64, 64]: the pixels of an object."""
    return coverage([scene])[0][scene.objects.index(o)] > 0.5


def random_heads(draw: random.Random, count: int = 10) -> HeadSet:
    """So many (layer, head) pairs."""
    chosen = draw.sample([(n, h) for n in range(LAYERS) for h in range(HEADS)], count)
    return HeadSet({n: sorted(h for m, h in chosen if m == n) for n in {m for m, _ in chosen}})


def pointing(split: str, limit: int) -> Values:
    """A click on a named object (share inside its box, and on the object itself), and its box (intersection over union)."""
    model, processor = zoo.load("shapes-lvlm")
    found: Values = {}
    draw, index = random.Random(0), -1
    while len(found.get("TAG, box", ())) < limit:
        index += 1
        scene = picture(split, index)
        if len(scene.objects) < 2 or not unique(scene):
            continue
        o = unique(scene)[index % len(unique(scene))]
        image = scene_image({"split": split, "image": index})
        text = f"<image> question is there a {o.colour} {o.shape} ? answer"
        mask = mask_of(scene, o)
        x0, y0, x1, y1 = box_of(mask)
        points = {"centre": (0.5, 0.5)}
        boxes: dict[str, Any] = {"whole image": (0.0, 0.0, 1.0, 1.0), "centre quarter": (0.25, 0.25, 0.75, 0.75)}
        for name, heads in (("TAG", 10), ("all heads", LAYERS * HEADS), ("random heads", random_heads(draw))):
            made = TAG(heads=heads).ground(model, processor, image, text, f"{o.colour} {o.shape}")
            points[name], boxes[name] = made.point, made.box
        for name, (x, y) in points.items():
            column, row = min(int(x * SIDE), SIDE - 1), min(int(y * SIDE), SIDE - 1)
            found.setdefault(f"{name}, box", []).append(float(x0 <= column < x1 and y0 <= row < y1))
            found.setdefault(f"{name}, object", []).append(float(mask[row, column]))
        for name, box in boxes.items():
            found.setdefault(f"{name}, IoU", []).append(iou(box, [c / SIDE for c in (x0, y0, x1, y1)]))
    return found


def control(split: str, limit: int) -> Values:
    """A question with two right answers, one of them marked: the colour of a shape that two objects have. Share of answers that are
    the marked object's colour."""
    model, processor = zoo.load("shapes-lvlm")
    found: Values = {}
    draw, index = random.Random(0), -1
    while len(found.get("ControlMLLM", ())) < limit:
        index += 1
        scene = picture(split, index)
        pairs = [
            pair
            for pair in ([o for o in scene.objects if o.shape == shape] for shape in SHAPES)
            if len(pair) == 2 and pair[0].colour != pair[1].colour
        ]
        if not pairs:
            continue
        marked, other = draw.sample(pairs[0], 2)
        image = scene_image({"split": split, "image": index})
        text = f"<image> question what colour is the {marked.shape} ? answer"
        r = 1.4 * marked.radius
        x, y = draw.uniform(r, 1 - r), draw.uniform(r, 1 - r)
        arms = {
            "no region": (ControlMLLM(steps=0), around(marked)),
            "ControlMLLM": (CONTROL, around(marked)),
            "the other object's box": (CONTROL, around(other)),
            "a random box": (CONTROL, (x - r, y - r, x + r, y + r)),
        }
        for name, (method, region) in arms.items():
            said, moved = method.ask(model, processor, image, text, {"box": region}, max_new_tokens=1)
            found.setdefault(name, []).append(float(said == marked.colour))
            if name == "ControlMLLM":
                found.setdefault("attention in the box, first pass", []).append(moved.shares[0])
                found.setdefault("attention in the box, last pass", []).append(moved.shares[-1])
    return found


def around(o: Any) -> tuple[float, float, float, float]:
    """A box round an object, in fractions of the image."""
    r = 1.4 * o.radius
    x0, y0, x1, y1 = (min(max(v, 0.0), 1.0) for v in (o.x - r, o.y - r, o.x + r, o.y + r))
    return x0, y0, x1, y1


def mosaic(split: str, index: int) -> tuple[Any, list[tuple[Any, Tensor, tuple[int, int]]]]:
    """(a picture of 128 x 128 pixels made of four scenes of up to two objects, (object, its pixels, its quarter) of each object).

    The model sees 64 x 64 pixels, in which the objects are half as large as those that it was trained on.
    """
    from PIL import Image

    canvas, objects = torch.zeros(2 * SIDE, 2 * SIDE, 3), []
    for k in range(4):
        scene = picture(split, 4 * index + k)
        scene = dataclasses.replace(scene, objects=scene.objects[:2])
        top, left = SIDE * (k // 2), SIDE * (k % 2)
        canvas[top : top + SIDE, left : left + SIDE] = render([scene])[0].permute(1, 2, 0)
        for o in scene.objects:
            mask = torch.zeros(2 * SIDE, 2 * SIDE, dtype=torch.bool)
            mask[top : top + SIDE, left : left + SIDE] = mask_of(scene, o)
            objects.append((o, mask, (left, top)))
    return Image.fromarray((canvas * 255).round().byte().numpy()), objects


def asked(split: str, limit: int) -> Iterator[tuple[Any, str, str, Tensor, tuple[int, int]]]:
    """Mosaics with a question: (picture, prompt, answer, pixels of the object that is asked about, its quarter)."""
    index, count = -1, 0
    while count < limit:
        index += 1
        image, objects = mosaic(split, index)
        single = [own for own in objects if sum(o.shape == own[0].shape for o, _, _ in objects) == 1]
        if not single:
            continue
        count += 1
        o, mask, quarter = single[index % len(single)]
        yield image, f"<image> question what colour is the {o.shape} ? answer", o.colour, mask, quarter


def second(split: str, limit: int, tried: int = 40) -> Values:
    """Questions on cluttered pictures whose objects are too small for the model: share of right answers before and after a second
    look. How much is kept is chosen on the calibration split."""
    model, processor = zoo.load("shapes-lvlm")
    general: dict[int, Tensor] = {}

    def look(method: CARVE, number: int, image: Any, text: str) -> Any:
        if number not in general:
            own = prepared(model, processor, image, "<image> caption")
            general[number], _ = method.attention(model, own, max_new_tokens=1)
        return method.ask(model, processor, image, text, general[number], max_new_tokens=1)

    variants = [replaced(SECOND, keep=keep, regions=regions) for keep in (0.1, 0.25, 0.5) for regions in (1, 2)]
    samples = list(asked("calibration", tried))
    right = [sum(look(v, -i - 1, s[0], s[1]).answer == s[2] for i, s in enumerate(samples)) / tried for v in variants]
    best = variants[max(range(len(variants)), key=right.__getitem__)]
    print(f"calibration ({tried}): {right}; chosen: keep {best.keep}, regions {best.regions}", flush=True)
    found: Values = {}
    draw, full = random.Random(0), 2 * SIDE
    for number, (image, text, answer, target, (left, top)) in enumerate(asked(split, limit)):
        made = look(best, number, image, text)
        found.setdefault("whole image", []).append(float(made.before == answer))
        found.setdefault("CARVE", []).append(float(made.answer == answer))
        x0, y0, x1, y1 = made.box
        x, y = draw.randint(0, full - (x1 - x0)), draw.randint(0, full - (y1 - y0))
        windows = {
            "a random window": (x, y, x + x1 - x0, y + y1 - y0),
            "the object's quarter": (left, top, left + SIDE, top + SIDE),
        }
        for name, (a, b, c, d) in windows.items():
            mask = torch.zeros(full, full, dtype=torch.bool)
            mask[b:d, a:c] = True
            inputs = prepared(model, processor, best.refine(image, mask)[0], text)
            with torch.no_grad():
                said = model.generate(**inputs, max_new_tokens=1, do_sample=False)
            said = decoded(processor, said[0, inputs["input_ids"].shape[1] :])
            found.setdefault(name, []).append(float(said == answer))
        kept = float((made.mask & target).sum() / target.sum())
        found.setdefault("object kept by CARVE", []).append(float(kept > 0.5))
        found.setdefault("share of the picture that is cut out", []).append((x1 - x0) * (y1 - y0) / full**2)
    return found


def named(split: str, limit: int) -> Iterator[tuple[Any, Tensor, str]]:
    """Pictures of two objects or more, the pixels of one of them, and its name."""
    from PIL import Image

    index, count = -1, 0
    while count < limit:
        index += 1
        scene = plain_scene(index, split)
        if len(scene.objects) < 2 or not unique(scene):
            continue
        count += 1
        o = unique(scene)[index % len(unique(scene))]
        pixels = (render([scene])[0] * 255).round().byte().permute(1, 2, 0).numpy()
        yield Image.fromarray(pixels), mask_of(scene, o), f"a {o.colour} {o.shape}"


def overlap(mask: Tensor, target: Tensor) -> float:
    """Intersection over union."""
    return float((mask & target).sum() / (mask | target).sum())


def segmentation(split: str, limit: int, tried: int = 16) -> Values:
    """The pixels of a named object in a given picture: intersection over union. Block, noise and words by the calibration split."""
    pipe = zoo.load("shapes-mmdit")
    call = {"max_sequence_length": 32}
    variants = [
        RefAM(where=Where(layers=[block]), noise=noise, include=include)
        for block in (3, 5)
        for noise in (0.15, 0.4)
        for include in ("words", "last")
    ]
    samples = list(named("calibration", tried))
    scores = [sum(overlap(v.refer(pipe, i, n, **call).mask, t) for i, t, n in samples) / tried for v in variants]
    best = variants[max(range(len(variants)), key=scores.__getitem__)]
    print(f"calibration ({tried}): {[round(v, 3) for v in scores]}")
    print(f"chosen: {best.where}, noise {best.noise}, {best.include}", flush=True)
    found: Values = {}
    draw = random.Random(0)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for image, target, name in named(split, limit):
        # As large as the object, in the middle.
        masks = {
            "whole image": torch.ones(SIDE, SIDE, dtype=torch.bool),
            "centre disc": (y - 31.5) ** 2 + (x - 31.5) ** 2 <= float(target.sum()) / torch.pi,
        }
        chosen = HeadSet({draw.randrange(6): [draw.randrange(BLOCK_HEADS)]})
        arms = {
            "RefAM": best,
            "without magnets": replaced(best, magnets=()),
            "sinks kept": replaced(best, sinks="keep"),
            "random heads": replaced(best, where=Where(heads=chosen)),
        }
        masks |= {arm: method.refer(pipe, image, name, **call).mask for arm, method in arms.items()}
        for arm, mask in masks.items():
            found.setdefault(arm, []).append(overlap(mask, target))
    return found


def replaced(method: Any, **changes: Any) -> Any:
    """A variant."""
    return dataclasses.replace(method, **changes)


def iou(a: Any, b: Any) -> float:
    """Of two boxes."""
    return grounding().read({"predicted": list(a), "target": list(b)})["iou"]


def interval(values: list[float]) -> Interval:
    """The mean, with its bootstrap interval."""
    return paired_bootstrap([0.0] * len(values), values)


# Case -> (how, ((an arm, what it is compared with), ...)).
CASES: dict[str, tuple[Callable[[str, int], Values], Any]] = {
    "pointing": (
        pointing,
        (
            ("TAG, box", ("centre, box", "random heads, box", "all heads, box")),
            ("TAG, IoU", ("whole image, IoU", "centre quarter, IoU", "random heads, IoU")),
        ),
    ),
    "control": (control, (("ControlMLLM", ("no region", "the other object's box", "a random box")),)),
    "second": (second, (("CARVE", ("whole image", "a random window", "the object's quarter")),)),
    "segmentation": (segmentation, (("RefAM", ("whole image", "centre disc", "random heads", "without magnets")),)),
}


def main(words: Sequence[str] | None = None) -> None:
    """Some cases, one after the other; or a published protocol."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(sorted(CASES))}")
    parser.add_argument("--limit", type=int, help="samples of a case (200), or items of a file (all)")
    parser.add_argument("--split", default="test", choices=["test", "calibration"])
    parser.add_argument(
        "--out", type=Path, help="a folder for the values of each sample; with --published a file (JSON Lines)"
    )
    files = parser.add_argument_group("published protocols, over local files")
    files.add_argument("--published", choices=sorted(published.PROTOCOLS))
    files.add_argument("--model", type=Path, help="a folder of transformers or diffusers, with weights in safetensors")
    files.add_argument("--data", type=Path, help="the records: JSON Lines, or JSON with a list")
    files.add_argument("--images", type=Path, help="the folder of the pictures; default: that of the records")
    files.add_argument("--masks", type=Path, help="the folder of the masks; default: that of the pictures")
    files.add_argument("--region", default="box", choices=["box", "mask"], help="of controlmllm")
    files.add_argument("--blocks", type=int, nargs="+", help="of refam; default: all")
    files.add_argument("--noise", type=float, default=0.5, help="of refam")
    files.add_argument("--max-new-tokens", type=int, help="default: the protocol's")
    files.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    files.add_argument("--device", default="auto")
    given = parser.parse_args(words)
    if given.limit is not None and given.limit < 1:
        parser.error(f"--limit {given.limit}: give at least 1.")
    if bool(given.cases) == (given.published is not None):
        parser.error(f"give cases, some of {', '.join(sorted(CASES))}; or --published and one of its protocols.")
    unknown = sorted(set(given.cases) - set(CASES))
    if unknown:
        parser.error(f"there is no case {', '.join(unknown)}; there are {', '.join(sorted(CASES))}.")
    if given.published is not None:
        try:
            print(published.main(given), flush=True)
        except AttnSteerError as error:
            parser.error(str(error))
        return
    for case in given.cases:
        how, comparisons = CASES[case]
        found = how(given.split, given.limit or 200)
        print(f"\n{case}\n\n| arm | value [95 %] | samples |\n| --- | --- | --- |")
        for name, values in found.items():
            print(f"| {name} | {interval(values)} | {len(values)} |")
        for arm, others in comparisons:
            for other in others:
                print(
                    f"| {arm} - {other} | {paired_bootstrap(found[other], found[arm])} | {len(found[arm])} |",
                    flush=True,
                )
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / f"{case}.json").write_text(json.dumps({"split": given.split, "values": found}) + "\n")


if __name__ == "__main__":
    main()
