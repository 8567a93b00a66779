"""CHAIR against the definition by hand: COCO from small files in the official format, and the shapes grammar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnsteer.errors import RecordError
from attnsteer.evals.coco import Vocabulary, present
from attnsteer.evals.metrics import get_metric
from attnsteer.evals.metrics.base import UndefinedMetric
from attnsteer.evals.metrics.fluency import guard
from attnsteer.evals.significance import ratio_bootstrap, wilson

# Own lines in the official format, with its quirks: a leading blank, a capital, three words.
TABLE = """person, girl, boy, man, woman, child, passenger, baby, adult
dog, puppy
cat, kitten
chair, seat, stool
motorcycle, motor cycle,  motor bike
cell phone, mobile phone, iPhone
oven, stove, stove top oven
toilet, urinal
tie, bow
wine glass
train, jet
bus
knife
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "synonyms.txt"
    path.write_text(TABLE, encoding="utf-8")
    return path


def test_the_vector_of_the_protocol(table: Path) -> None:
    metric = get_metric("chair", synonyms=str(table))
    first = metric.sample(
        {"objects": ["dog", "chair"], "generated": "A dog sits on a chair next to a cat and another cat."}
    )
    second = metric.sample({"objects": ["dog", "person"], "generated": "A dog."})
    assert first == {
        "hallucinating": 1, "mentions": 4, "hallucinated": 2, "named": 2, "classes": 3, "there": 2, "false": 1,
        "missed": 0, "words": 13,
    }  # fmt: skip
    found = metric.aggregate([first, second], draws=1000)
    assert {k: v.value for k, v in found.items()} == {
        "chair_s": 0.5, "chair_i": 2 / 5, "recall": 3 / 4, "precision": 3 / 4, "f1": 3 / 4, "mentions": 2.5, "length": 7.5,
    }  # fmt: skip
    assert found["chair_s"] == wilson(1, 2) and found["chair_i"] == ratio_bootstrap([2, 0], [4, 1], draws=1000)
    assert metric.correct is None and "COCO" in metric.note


def test_words_become_categories(table: Path) -> None:
    own, official = Vocabulary(table), Vocabulary(table, official=True)
    both = {
        "Two dogs, three KITTENS and some people": ["dog", "cat", "person"],
        "women with wine glasses and knives on buses": ["person", "wine glass", "knife", "bus"],
        "a baby cat on a passenger train": ["cat", "train"],
        "a baby and an adult": ["person", "person"],
        "the seat of the toilet; a toilet seat": ["toilet", "toilet"],
        "a seat": ["chair"],
        "a bow tie": ["tie"],
        "a motor cycle and a mobile phone": ["motorcycle", "cell phone"],
        "hot dog": [],
        "catalogue, dogged, chairman": [],
        "": [],
    }
    for text, categories in both.items():
        assert own.mentions(text) == categories, text
        assert official.mentions(text) == categories, text
    # What the original's table has and never finds.
    for text, categories, there in (
        ("a motor bike", ["motorcycle"], []),
        ("an iPhone", ["cell phone"], []),
        ("a stove top oven", ["oven"], ["oven", "oven"]),
    ):
        assert own.mentions(text) == categories and official.mentions(text) == there, text
    assert own.category("puppy") == "dog" and own.names[:2] == ["person", "dog"] and len(own.names) == 13


def test_truth_from_annotation_files(table: Path, tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "dog"}, {"id": 7, "name": "chair"}]
    boxes = [{"image_id": 5, "category_id": 1}, {"image_id": 5, "category_id": 1}, {"image_id": 6, "category_id": 7}]
    texts = [{"image_id": 5, "caption": "A puppy and a man."}, {"image_id": 9, "caption": "A cat"}]
    (tmp_path / "instances.json").write_text(json.dumps({"categories": categories, "annotations": boxes}))
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": texts}))
    found = present(Vocabulary(table), [tmp_path / "instances.json"], [tmp_path / "captions.json"])
    assert found == {5: {"dog", "person"}, 6: {"chair"}, 9: {"cat"}}
    options = {"instances": str(tmp_path / "instances.json"), "captions": [str(tmp_path / "captions.json")]}
    metric = get_metric("chair", synonyms=table, **options)
    sample = metric.sample({"image_id": 5, "generated": "A boy on a stool"})
    assert (sample["mentions"], sample["hallucinated"], sample["named"], sample["there"]) == (2, 1, 1, 2)
    with pytest.raises(RecordError, match="no annotation of the image 4; there are 3"):
        metric.sample({"image_id": 4, "generated": ""})
    with pytest.raises(RecordError, match="'image_id' is missing"):
        metric.sample({"objects": ["dog"], "generated": ""})


def test_shapes() -> None:
    metric = get_metric("chair")
    objects = [["red", "circle"], ["blue", "square"], ["blue", "square"]]
    text = "a red circle , a green star and two red circles"
    assert metric.sample({"objects": objects, "generated": text}) == {
        "hallucinating": 1, "mentions": 3, "hallucinated": 1, "named": 1, "classes": 2, "there": 2, "false": 1,
        "missed": 1, "words": 10,
    }  # fmt: skip
    right = metric.sample({"objects": objects, "generated": "a red circle and a blue square"})
    assert right["hallucinating"] == 0 and right["named"] == right["there"] == 2
    assert "shapes" in metric.note


def test_nothing_mentioned() -> None:
    metric = get_metric("chair")
    samples = [metric.sample({"objects": [["red", "circle"]], "generated": "the picture ."})]
    with pytest.warns(UndefinedMetric):
        found = metric.aggregate(samples, draws=10)
    assert found["chair_i"].value == 0.0 and found["recall"].value == 0.0 and found["mentions"].value == 0.0


def test_captions_that_never_end() -> None:
    """They count as they stand, and the share of them and its rise are said."""
    metric = get_metric("chair")
    told = {"objects": [["red", "circle"]], "generated": "a red circle and a red circle and a"}
    assert "cut" not in metric.sample(told) and metric.sample({**told, "finished": True})["cut"] == 0
    ends = metric.aggregate([metric.sample({**told, "finished": True})] * 4, draws=10)
    never = metric.aggregate([metric.sample({**told, "finished": i == 0}) for i in range(4)], draws=10)
    assert (ends["cut"].value, never["cut"], never["mentions"].value) == (0.0, wilson(3, 4), 2.0)
    assert guard(ends, never) == ["texts that never ended, cut off by the token limit, rose from 0.0% to 75.0%"]
    assert not guard(never, ends)


def test_the_incomplete_sentence(table: Path) -> None:
    record = {"objects": ["dog"], "generated": "A dog. Is it big? There is a cat and a"}
    assert get_metric("chair", synonyms=table).sample(record)["hallucinated"] == 1
    metric = get_metric("chair", synonyms=table, drop_incomplete=True)
    assert metric.sample(record)["hallucinated"] == 0 and metric.sample(record)["words"] == 5
    assert "dropped" in metric.note


def test_refuses(table: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="give synonyms=PATH"):
        get_metric("chair", instances=["x.json"])
    with pytest.raises(RecordError, match=r"no \[colour, shape\] pairs"):
        get_metric("chair").sample({"objects": ["dog"], "generated": "a dog"})
    with pytest.raises(RecordError, match="no entry of the synonym table"):
        get_metric("chair", synonyms=table).sample({"objects": ["unicorn"], "generated": ""})
    with pytest.raises(RecordError, match="cannot be read"):
        get_metric("chair", synonyms=tmp_path / "missing.txt")
    empty, hole, bad, other = (tmp_path / n for n in ("empty", "hole", "bad.json", "other.json"))
    empty.write_text("\n")
    hole.write_text("dog, puppy\n\ncat\n")
    bad.write_text("{")
    other.write_text('{"annotations": [{"id": 1}]}')
    for path, words in ((empty, "is empty|no list"), (hole, "line 2")):
        with pytest.raises(RecordError, match=words):
            get_metric("chair", synonyms=path)
    for name, path, words in (
        ("instances", bad, "is no JSON"),
        ("instances", other, "no COCO instances file"),
        ("captions", other, "no COCO captions file"),
    ):
        with pytest.raises(RecordError, match=words):
            get_metric("chair", synonyms=table, **{name: [path]})
