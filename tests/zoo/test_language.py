"""Captions, questions, layouts and reading tasks: their truth, and the splits of texts."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from attnsteer.zoo.shapes import reading as R
from attnsteer.zoo.shapes.language import WORDS, Phrase, caption, describe, join, parse, phrases
from attnsteer.zoo.shapes.layouts import CATEGORIES, Layout, chair, exact, in_boxes, layout, satisfied
from attnsteer.zoo.shapes.questions import (
    KINDS,
    NEGATIVES,
    Question,
    absent,
    draw,
    existence,
    holds,
    lesson,
    picture,
    pope,
)
from attnsteer.zoo.shapes.world import PARTNER, USUAL, Object, rng
from attnsteer.zoo.tokenizers import clip_tokenizer, encode, word_tokenizer


def objects(*looks: str) -> tuple[Object, ...]:
    """Objects "small red star" from left to right."""
    return tuple(Object(w[2], w[1], w[0], 0.1 + 0.2 * i, 0.5, 0.09) for i, w in enumerate(k.split() for k in looks))


def test_captions() -> None:
    some = objects("small red star", "large blue circle", "large red star")
    assert caption(some) == "a red star , a blue circle and a red star"
    assert join(phrases(some)) == "two red stars and a blue circle"
    assert join(phrases(some, sizes=True)) == "a small red star , a large blue circle and a large red star"
    assert join(phrases(some[:1])) == "a red star"


def test_parse_is_the_inverse() -> None:
    for index in range(200):
        scene = picture("test", index)
        g = np.random.default_rng(index)
        text = describe(scene.objects, g)
        named = sorted((p.colour, p.shape) for p in parse(text) for _ in range(p.count))
        assert named == sorted((o.colour, o.shape) for o in scene.objects), text
    assert parse("the star is there and a red") == []
    assert parse("a big thing , three small cyan crosses") == [Phrase("cyan", "cross", "small", 3)]
    assert Phrase("red", "circle", "small").words == "small red circle"


def test_every_word_is_one_token() -> None:
    tokenizer, clip = word_tokenizer(), clip_tokenizer()
    for word in WORDS:
        assert tokenizer(word).input_ids == encode(word) and len(encode(word)) == 2
    # CLIP's normaliser knows no capitals, so the letters of reading tasks are not for it.
    for word in (w for w in WORDS if w.islower() or not w.isalpha()):
        assert len(clip(word).input_ids) == 3, word
    assert clip.decode(clip("a red circle").input_ids, skip_special_tokens=True).strip() == "a red circle"


@pytest.mark.parametrize("kind", NEGATIVES)
def test_existence_questions_are_true_and_balanced(kind: str) -> None:
    for index in range(200):
        scene, asked = pope("test", index, kind)
        there = {(o.colour, o.shape) for o in scene.objects}
        assert len({q.text for q in asked}) == len(asked) == 2 * min(3, len(there))
        assert sum(q.answer == "yes" for q in asked) == len(asked) // 2
        for q in asked:
            colour, shape = re.fullmatch(r"is there a (\w+) (\w+) \?", q.text).groups()
            assert q.answer == ("yes" if (colour, shape) in there else "no")


def test_negatives_are_what_they_are_called() -> None:
    scene_objects = objects("small yellow star", "large red square")
    scene = picture("test", 0).__class__(scene_objects)
    g = np.random.default_rng(0)
    hard = {absent(scene, "adversarial", g) for _ in range(50)}
    assert hard == {(USUAL[PARTNER[s]], PARTNER[s]) for s in ("star", "square")}
    popular = {absent(scene, "popular", g) for _ in range(200)}
    assert popular == {(USUAL[s], s) for s in ("circle", "triangle", "diamond", "cross")}
    assert len({absent(scene, "random", g) for _ in range(800)}) == 34
    with pytest.raises(ValueError, match="adversarial"):
        absent(scene, "hard", g)


def test_other_questions_are_true() -> None:
    kinds = set()
    for index in range(300):
        scene, g = picture("test", index), rng("test", index, 9)
        for kind in KINDS:
            q = draw(scene, kind, g)
            if q is None:
                continue
            kinds.add(kind)
            assert q.answer == _truth(scene, q), (scene, q)
    assert kinds == set(KINDS)


def _truth(scene: object, q: Question) -> str:
    """The answer, found again from the text."""
    text = q.text
    if m := re.fullmatch(r"how many (\w+) are there \?", text):
        n = sum({"cross": "crosses"}.get(o.shape, o.shape + "s") == m[1] for o in scene.objects)
        return ["zero", "one", "two", "three", "four", "five"][n]
    if m := re.fullmatch(r"what colour is the (\w+) \?", text):
        (only,) = [o for o in scene.objects if o.shape == m[1]]
        return only.colour
    if m := re.fullmatch(r"is there a (\w+) (\w+) \?", text):
        return "yes" if any((o.colour, o.shape) == (m[1], m[2]) for o in scene.objects) else "no"
    m = re.fullmatch(r"is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+) \?", text)
    (a,) = [o for o in scene.objects if (o.colour, o.shape) == (m[1], m[2])]
    (b,) = [o for o in scene.objects if (o.colour, o.shape) == (m[4], m[5])]
    first, second = {"left of": (a.x, b.x), "right of": (b.x, a.x), "above": (a.y, b.y), "below": (b.y, a.y)}[m[3]]
    return "yes" if first < second else "no"


def test_lessons_mark_their_answers() -> None:
    scene = picture("train", 3)
    for seed in range(20):
        text, marks = lesson(scene, np.random.default_rng(seed), 4)
        words = text.split()
        spoken = {"yes", "no", "</s>", ",", "and", "a"}
        assert all(
            words[m - 1] in ("answer", "caption") or words[m] in spoken or words[m - 1] != "answer" for m in marks
        )
        assert sum(words[m - 1] == "answer" for m in marks) == 4


def test_relations_are_clear() -> None:
    a, b = objects("small red star", "small blue star")
    assert holds(a, "left of", b) and holds(b, "right of", a)
    assert not holds(a, "right of", b) and not holds(a, "above", b)


@pytest.mark.parametrize("category", CATEGORIES)
def test_layouts(category: str) -> None:
    for index in range(40):
        wanted = layout("test", index, category)
        assert wanted == layout("test", index, category) != layout("calibration", index, category)
        if not wanted.boxes:
            assert category == "count"
            continue
        # A picture drawn to the boxes is what the layout asks for.
        drawn = tuple(
            Object(p.shape, p.colour, p.size or "large", (x0 + x1) / 2, (y0 + y1) / 2, 0.1)
            for p, (x0, y0, x1, y1) in zip(wanted.phrases, wanted.boxes, strict=True)
        )
        assert all(in_boxes(wanted, drawn)) and satisfied(wanted, drawn)
        swapped = tuple(
            Object(o.shape, p.colour, o.size, o.x, o.y, o.radius)
            for o, p in zip(drawn, reversed(wanted.phrases), strict=True)
        )
        if category != "colour":
            assert not satisfied(wanted, swapped)
        assert not satisfied(wanted, drawn[:1])


def test_count_layouts() -> None:
    wanted = Layout("two red stars", (Phrase("red", "star", None, 2),), (), "count")
    assert satisfied(wanted, objects("small red star", "large red star"))
    assert not satisfied(wanted, objects("small red star"))
    assert not satisfied(wanted, objects("small red star", "large red star", "small red star"))
    plain = Layout("a red star", (Phrase("red", "star"),), (), "objects")
    assert exact(plain, objects("small red star")) and exact(wanted, objects("small red star", "large red star"))
    for more in (("small red star", "large red star"), ("small red star", "small blue star"), ()):
        assert not exact(plain, objects(*more))


def test_chair() -> None:
    there = objects("small red star", "large blue circle")
    assert chair("a red star , a green star and a red star", there) == (3, 1, 1)
    assert chair("", there) == (0, 0, 0)


@pytest.mark.parametrize("bad", [("cat", 2), ("objects", 5), ("objects", 0)])
def test_bad_layouts(bad: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match=r"were asked for|categor"):
        layout("test", 0, *bad)


def test_reading_answers_are_true() -> None:
    for index in range(300):
        r = R.reading("test", index, "lookup" if index % 2 else "one-shot")
        passage, question = r.prompt.split(" . ")[-2:]
        known = parse(passage)
        options = dict(zip(*[iter(question.split(" options ")[1].removesuffix(" answer").split())] * 2, strict=True))
        right = options[r.choices[r.answer]]
        assert len(set(options.values())) == 4
        if m := re.search(r"what colour is the (small |large )?(\w+) \?", question):
            named = [p for p in known if p.shape == m[2] and (m[1] is None or p.size == m[1].strip())]
            assert [p.colour for p in named] == [right]
        else:
            m = re.search(r"which shape is (small |large )?(\w+) \?", question)
            named = [p for p in known if p.colour == m[2] and (m[1] is None or p.size == m[1].strip())]
            assert [p.shape for p in named] == [right]


def test_few_shot_rule_is_in_the_examples() -> None:
    for index in range(200):
        r = R.reading("test", index, "few-shot")
        *shots, query = r.prompt.split(" . ")
        examples = [(s.split()[1:4], s.split()[5]) for s in shots]
        look = query.split()[1:4]
        right = r.choices[r.answer]
        # Some attribute of the query says its label in all examples that share it.
        assert any(
            all((words[k] == look[k]) <= (label == right) for words, label in examples)
            and all((label == right) <= (words[k] == look[k]) for words, label in examples)
            for k in range(3)
        )


def test_splits_of_texts_are_disjoint() -> None:
    for split in ("train", "calibration", "test"):
        for index in range(50):
            passage = R.reading(split, index, facts=2).prompt.split(" question ")[0]
            assert R.split_of(passage) == split
    g = rng("train", 0)
    for _ in range(100):
        text, marks = R.lesson(g, 3)
        assert marks and max(marks) < len(text.split())
        if " question " in text:
            assert R.split_of(text.split(" question ")[0]) == "train"


@pytest.mark.parametrize(
    ("call", "message"),
    [((("test", 0, "spelling")), "lookup"), (("dev", 0), "split"), (("test", 0, "lookup", 13), "2 to 12")],
)
def test_bad_reading(call: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        R.reading(*call)


def test_existence_of_one_class() -> None:
    scene = picture("test", 0)
    o = scene.objects[0]
    assert existence(scene, o.colour, o.shape).answer == "yes"


@pytest.mark.long
def test_the_tokenizers_are_the_same_in_every_process() -> None:
    """A training that goes on in another process must read its captions in the same way."""
    code = (
        "from attnsteer.zoo.tokenizers import clip_tokenizer, word_tokenizer as w\n"
        "print([sorted(t.get_vocab().items()) for t in (clip_tokenizer(), w())])"
    )
    seen = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    }
    assert len(seen) == 1 and "circle</w>" in seen.pop()
