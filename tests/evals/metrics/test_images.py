"""Layouts, attribute binding and the HRS skills: on drawn scenes, and on vectors of the fork's own functions."""

from __future__ import annotations

import dataclasses

import pytest

from attnsteer.errors import RecordError
from attnsteer.evals.metrics import get_metric
from attnsteer.evals.metrics.hrs import hue_name, mean_hue, merge, related
from attnsteer.evals.significance import ratio_bootstrap, wilson
from attnsteer.zoo.shapes.detect import detect
from attnsteer.zoo.shapes.layouts import CATEGORIES, layout
from attnsteer.zoo.shapes.render import render
from attnsteer.zoo.shapes.world import Object, Scene


def thing(colour: str, shape: str, x: float = 0.5, y: float = 0.5, size: str = "large") -> dict:
    return dataclasses.asdict(Object(shape, colour, size, x, y, 0.14 if size == "large" else 0.09))


TWO = [{"colour": "red", "shape": "circle"}, {"colour": "blue", "shape": "square"}]
BOXES = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_record_of_a_real_layout(category: str) -> None:
    """What the data gives goes in as it is, and a picture drawn to order is right in every way."""
    asked = layout("test", 3, category)
    objects = []
    for k, p in enumerate(asked.phrases):
        if asked.boxes:
            x0, y0, x1, y1 = asked.boxes[k]
            size = p.size or "large"
            objects.append(
                Object(p.shape, p.colour, size, (x0 + x1) / 2, (y0 + y1) / 2, 0.13 if size == "large" else 0.09)
            )
    if not asked.boxes:
        places = iter([(0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8)])
        objects = [
            Object(p.shape, p.colour, "large", *next(places), 0.13) for p in asked.phrases for _ in range(p.count)
        ]
    read = detect(render([Scene(tuple(objects))]))[0]
    record = dataclasses.asdict(asked) | {
        "detected": [dataclasses.asdict(o) for o in read.objects], "valid": read.valid,
    }  # fmt: skip
    found = get_metric("layout").sample(record)
    assert found["right"] == found["exact"] == found["valid"] == 1
    if asked.boxes:
        assert found["boxed"] == found["in_box"] == len(asked.boxes) and found["all_in_box"] == 1
    assert get_metric("binding").sample(record)["all_bound"] == 1
    if category != "objects":
        hrs = get_metric("hrs")
        assert all(v.value == 1.0 for v in hrs.aggregate([hrs.sample(record)], draws=10).values())


def test_layout_over_samples() -> None:
    metric = get_metric("layout")
    asked = {"phrases": TWO, "boxes": BOXES, "valid": True}
    samples = [
        metric.sample(asked | {"detected": [thing("red", "circle", 0.2), thing("blue", "square", 0.7)]}),
        metric.sample(asked | {"detected": [thing("red", "circle", 0.6), thing("blue", "square", 0.7)]}),
        metric.sample(asked | {"detected": [thing("red", "square", 0.2)], "valid": False}),
    ]
    found = metric.aggregate(samples, draws=300)
    assert found["right"] == wilson(2, 3) and found["valid"] == wilson(2, 3) and found["all_in_box"] == wilson(1, 3)
    assert found["in_box"] == ratio_bootstrap([2, 1, 0], [2, 2, 2], draws=300)
    assert found["exact"] == wilson(2, 3)
    bare = [metric.sample({"phrases": ["a red circle"], "detected": [thing("red", "circle")], "valid": True})]
    assert set(metric.aggregate(bare, draws=10)) == {"right", "exact", "valid"}


@pytest.mark.parametrize("detected, valid, right, exact", [
    ([thing("red", "circle", 0.2)], True, 1, 1),
    ([thing("red", "circle", 0.2)], False, 1, 0),
    ([thing("red", "circle", 0.2), thing("red", "circle", 0.7)], True, 1, 0),
    ([thing("red", "circle", 0.2), thing("blue", "star", 0.7)], True, 1, 0),
    ([thing("blue", "circle", 0.2)], True, 0, 0),
])  # fmt: skip
def test_layout_exact(detected: list[dict[str, object]], valid: bool, right: int, exact: int) -> None:
    found = get_metric("layout").sample({"phrases": ["a red circle"], "detected": detected, "valid": valid})
    assert (found["right"], found["exact"], found["valid"]) == (right, exact, int(valid))


def test_binding() -> None:
    metric = get_metric("binding")

    def read(*objects: dict) -> tuple[int, ...]:
        found = metric.sample({"phrases": TWO, "detected": list(objects)})
        return tuple(found[k] for k in ("all_bound", "phrases", "bound", "shape_there", "swapped"))

    assert read(thing("red", "circle"), thing("blue", "square")) == (1, 2, 2, 2, 0)
    assert read(thing("blue", "circle"), thing("red", "square")) == (0, 2, 0, 2, 2)
    assert read(thing("red", "circle"), thing("red", "square")) == (0, 2, 1, 2, 1)
    assert read(thing("red", "circle"), thing("green", "square")) == (0, 2, 1, 2, 0)
    assert read(thing("red", "star")) == (0, 2, 0, 0, 0)
    sized = {"phrases": ["a small red circle"], "detected": [thing("red", "circle")]}
    assert metric.sample(sized)["bound"] == 0
    assert metric.sample(sized | {"detected": [thing("red", "circle", size="small")]})["bound"] == 1
    samples = [metric.sample({"phrases": TWO, "detected": [thing("red", "circle")] * k}) for k in (0, 1)]
    found = metric.aggregate(samples, draws=100)
    assert found["binding"] == wilson(0, 2) and found["phrase_binding"].value == 0.25


def label(name: str | list[str], *box: float, **more: object) -> dict:
    return {"label": name, "box": list(box or (0, 0, 10, 10))} | more


def test_counting_vector_of_the_fork() -> None:
    asked = [[("cup", 2)], [("dog", 3), ("cat", 2)], [("car", 1)], [("bus", 4)]]
    found = [
        [label("cup", k, 0, 10, 10) for k in (1, 2, 3)],
        # One box with two labels is one object.
        [
            label("dog", 0, 0, 5, 5),
            label("Dog", 9, 0, 20, 5),
            label("cat", 9.3, 0, 20.9, 5),
            label("cat", 30, 0, 40, 9),
        ],
        [label("", 0, 0, 1, 1)],
        None,
    ]
    records = [
        {"category": "count", "phrases": [{"label": n, "count": c} for n, c in a], "detected": d}
        for a, d in zip(asked, found, strict=True)
    ]
    fork, own = get_metric("hrs", official=True), get_metric("hrs")
    one = fork.aggregate([fork.sample(r) for r in records], draws=100)
    assert one["count_precision"].value == pytest.approx(0.857142857) and one["count_recall"].value == 0.75
    assert one["count_f1"].value == pytest.approx(2 * 6 / (2 * 6 + 1 + 2)) and set(one) == {
        "count_precision", "count_recall", "count_f1",
    }  # fmt: skip
    # The missing image's four buses are missed.
    assert own.aggregate([own.sample(r) for r in records], draws=100)["count_recall"].value == 0.5
    assert (
        len(merge(found[1])) == 3 and len(merge([label("a", 0.1, 0.1, 0.5, 0.5), label("b", 0.2, 0.1, 0.5, 0.5)])) == 2
    )


def test_spatial_vector_of_the_fork() -> None:
    objects = merge([label("dog", 5, 0, 100, 10), label("cat", 6, 0, 7, 10)])
    left, right = [["dog", "left", "cat"]], [["dog", "right", "cat"]]
    assert related(left, objects, official=True) and related(right, objects, official=True)
    assert not related(left, objects) and related(right, objects)
    # The fork takes the last of two dogs; one of them fits.
    twice = merge([label("dog", 0, 0, 2, 2), label("dog", 50, 0, 52, 2), label("cat", 10, 0, 12, 2)])
    assert related(left, twice) and not related(left, twice, official=True) and related(right, twice, official=True)
    # One choice must do for all relations.
    assert not related([*left, *right], twice)
    row = merge([label(n, 10 * k, 10 * k, 10 * k + 5, 10 * k + 5) for k, n in enumerate("abcd")])
    assert related([["b", "between", "a", "c"]], row) and not related([["a", "between", "b", "c"]], row)
    assert related([["a", "above", "b"], ["c", "below", "a"], ["a", "left of", "d"], ["a", "on", "d"]], row)
    assert not related([["a", "left", "e"]], row)
    with pytest.raises(RecordError, match="no relation 'near'"):
        related([["a", "near", "b"]], row)


def test_size_vector_of_the_fork() -> None:
    boxes = {"x": (0, 0, 10, 10), "y": (0, 0, 5, 5), "z": (0, 0, 50, 50), "w": (0, 0, 7, 7)}
    prompts = [
        ([["x", "bigger", "y"]], boxes),
        ([["x", "smaller", "y"]], boxes),
        ([["x", "larger", "y"], ["x", "smaller", "z"]], boxes),
        ([["x", "larger", "y"], ["x", "larger", "z"], ["w", "bigger", "y"]], boxes | {"z": (0, 0, 6, 6)}),
    ]
    for official in (True, False):
        metric = get_metric("hrs", official=official)
        samples = [
            metric.sample({"category": "size", "relations": r, "detected": [label(n, *v) for n, v in b.items()]})
            for r, b in prompts
        ]
        assert metric.aggregate(samples, draws=10) == {"size": wilson(3, 4)}


def test_hues_of_the_fork() -> None:
    names = [hue_name(h) for h in (0, 14.9, 15, 21.9, 22, 38.9, 39, 77.9, 78, 130.9, 131)]
    assert names == "red red orange orange yellow yellow green green blue blue red".split()
    reds = [2, 2, 178, 178]
    assert hue_name(mean_hue(reds, official=True)) == "blue" and hue_name(mean_hue(reds)) == "red"
    assert mean_hue([10, 20]) == pytest.approx(15) and mean_hue([0, 10, 20], official=True) == 15
    with pytest.raises(RecordError, match="not in 0 to 179"):
        hue_name(180)


def test_colour_counts_objects() -> None:
    metric = get_metric("hrs")
    asked = [{"label": "car", "colour": "red"}, {"label": "dog", "colour": "blue"}, {"label": "cat", "colour": "blue"}]
    seen = [label("car", hue=5), label("dog", colour="red"), label("dog", hue=100)]
    sample = metric.sample({"category": "colour", "phrases": asked, "detected": seen})
    assert sample == {"colour": 3, "colour_right": 2}
    assert metric.sample({"category": "colour", "phrases": asked, "detected": None})["colour_right"] == 0


def test_levels_are_averaged_plainly() -> None:
    metric = get_metric("hrs", levels=True)
    near, far = [label("a", 0, 0, 1, 1), label("b", 2, 0, 3, 1)], []
    rows = [("easy", near), ("easy", near), ("easy", near), ("hard", near), ("hard", far)]
    samples = [
        metric.sample({"category": "spatial", "relations": [["a", "left", "b"]], "detected": d, "level": level})
        for level, d in rows
    ]
    found = metric.aggregate(samples, draws=200)
    assert set(found) == {"spatial"} and found["spatial"].value == 0.75  # the mean of 1 and 1/2; 4/5 over all
    with pytest.raises(RecordError, match="level is 'mean'"):
        metric.sample({"category": "size", "detected": [], "level": "mean"})


def test_shapes_go_through_the_same_rules() -> None:
    metric = get_metric("hrs")
    sides = {"category": "spatial", "phrases": TWO, "side": "left of"}
    near = [thing("red", "circle", 0.2), thing("blue", "square", 0.7)]
    assert metric.sample(sides | {"detected": near}) == {"spatial": 1, "spatial_right": 1}
    assert metric.sample(sides | {"side": "right of", "detected": near}) == {"spatial": 1, "spatial_right": 0}
    many = {"category": "count", "phrases": ["three red circles", "a blue square"]}
    assert metric.sample(many | {"detected": [thing("red", "circle")] * 2 + [thing("blue", "square")] * 2}) == {
        "count": 1, "count_tp": 3, "count_fp": 1, "count_fn": 1,
    }  # fmt: skip
    assert metric.sample({"category": "colour", "phrases": TWO, "detected": near[:1]}) == {
        "colour": 2,
        "colour_right": 1,
    }


def test_refuses() -> None:
    good = {"phrases": TWO, "detected": [], "valid": True, "category": "spatial", "side": "above"}
    for metric, change, words in (
        ("layout", {"phrases": []}, "no phrases"),
        ("layout", {"phrases": ["a dog"]}, "no phrase of the shapes world"),
        ("layout", {"phrases": [{"colour": "red"}]}, "has colour, shape"),
        ("layout", {"phrases": [{"colour": "pink", "shape": "circle"}]}, "nothing of the shapes world"),
        ("layout", {"boxes": BOXES[:1]}, "1 boxes for 2 phrases"),
        ("layout", {"side": None}, "'spatial' needs two"),
        ("layout", {"category": "texture"}, "category is 'texture'"),
        ("layout", {"detected": [{"shape": "circle"}]}, "a detected object"),
        ("layout", {"valid": "no"}, "true or false"),
        ("hrs", {"category": "count", "phrases": []}, "needs phrases"),
        ("hrs", {"category": "objects"}, "category is 'objects'"),
        ("hrs", {"phrases": None}, "needs relations"),
        ("hrs", {"phrases": None, "relations": [["a", "left", "b"]], "detected": [{"label": "a"}]}, "KeyError"),
        ("binding", {"detected": 3}, "cannot read"),
    ):
        with pytest.raises(RecordError, match=words):
            get_metric(metric).sample(good | change)
