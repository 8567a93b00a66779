"""Samples: the shapes world, files in the official formats, hub data sets, and what is said of broken ones."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from attnsteer.errors import MissingExtra, RecipeError
from attnsteer.recipe.schema import DataSpec
from attnsteer.run.command import recipe_from_arguments
from attnsteer.run.data import load
from attnsteer.run.tiny import FIXTURES

ZOO = [
    ("reading", {"task": "all"}),
    ("existence", {"kind": "adversarial"}),
    ("pairs", {}),
    ("captions", {}),
    ("layouts", {"category": "all"}),
    ("prompts", {}),
]


# ------------------------------------------------------------------------------------------------ shapes world


@pytest.mark.parametrize(("source", "options"), ZOO)
def test_samples_are_flat_json_and_a_part_is_a_part_of_the_whole(source: str, options: Any) -> None:
    whole = load(DataSpec(zoo=source, limit=30, options=options), "any")
    assert json.loads(json.dumps(whole.samples)) == whole.samples
    assert len({s["id"] for s in whole.samples}) == 30
    part = load(DataSpec(zoo=source, start=7, limit=5, options=options), "any")
    assert part.samples == whole.samples[7:12] and part.digest() != whole.digest()
    other = load(DataSpec(zoo=source, limit=30, split="calibration", options=options), "any")
    assert not {s["id"] for s in other.samples} & {s["id"] for s in whole.samples}


def test_marks_of_a_passage_are_its_question_and_the_fact_that_answers_it() -> None:
    from attnsteer.zoo.shapes.language import parse

    for task in ("lookup", "one-shot"):
        for s in load(DataSpec(zoo="reading", limit=200, options={"task": task}), "choice").samples:
            words = ["<s>", *s["prompt"].split()]
            (question,), (fact,), (passage,) = ([words[slice(*r)] for r in s[k]] for k in ("spans", "fact", "passage"))
            assert question[0] == "question" and question[-1] == "?" and " ".join(question[1:]) == s["question"]
            (phrase,) = parse(" ".join(fact))
            named = set(question) & {phrase.colour, phrase.shape, phrase.size}
            # The phrase is the only one of its passage with what the question names, and has the right choice.
            others = [p for p in parse(" ".join(passage)) if named <= {p.colour, p.shape, p.size}]
            assert len(others) == 1
            options = words[words.index("options", s["spans"][0][1]) :]
            right = options[options.index(s["choices"][s["answer"]]) + 1]
            assert right in (phrase.colour, phrase.shape)


def test_questions_of_a_scene_are_a_group_and_half_are_denied() -> None:
    samples = load(DataSpec(zoo="existence", limit=300, options={"kind": "popular"}), "answer").samples
    assert len({s["group"] for s in samples}) < 150
    for s in samples:
        shown = [" ".join(o) in s["question"] for o in s["objects"]]
        assert (s["label"] == "yes") == any(shown) and s["choices"][s["answer"]] == s["label"]
        assert s["spans"][0] in s["prompt"]


def test_pairs_have_one_question_to_affirm_and_one_to_deny() -> None:
    """Each is checked against the scene's objects, with relations written out here."""
    from attnsteer.zoo.shapes.questions import picture

    samples = load(DataSpec(zoo="pairs", limit=400), "answer").samples
    assert {s["category"] for s in samples} == {"existence", "colour", "shape", "position"}
    apart = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}
    for yes, no in zip(samples[::2], samples[1::2], strict=True):
        assert yes["pair"] == no["pair"] and [yes["label"], no["label"]] == ["yes", "no"] and yes["answer"] == 0
        words = [s["question"].split() for s in (yes, no)]
        scene = picture("test", yes["image"])
        if yes["category"] == "position":
            which = [next(r for r in apart if f" {r} " in s["question"]) for s in (yes, no)]
            assert apart[which[0]][0] == apart[which[1]][0] and apart[which[0]][1] == -apart[which[1]][1]
            a, b = (
                p.replace("is the", "").split()[-2:] for p in yes["question"].removesuffix(" ?").split(f" {which[0]} ")
            )
            one, two = (next(o for o in scene.objects if [o.colour, o.shape] == p) for p in (a, b))
            along, sign = apart[which[0]]
            assert sign * (getattr(two, along) - getattr(one, along)) > 0
            continue
        classes = [tuple(w[-3:-1]) for w in words]
        there = {(o.colour, o.shape) for o in scene.objects}
        assert classes[0] in there and classes[1] not in there
        if yes["category"] != "existence":
            assert classes[0][yes["category"] == "colour"] == classes[1][yes["category"] == "colour"]


def test_the_picture_of_a_sample_is_its_scene() -> None:
    import numpy as np
    import torch

    from attnsteer.zoo.shapes.detect import detect

    data = load(DataSpec(zoo="captions", limit=6), "caption")
    for sample in data.samples:
        pixels = torch.from_numpy(np.asarray(data.image(sample)).copy()).permute(2, 0, 1) / 255
        assert {(o.colour, o.shape) for o in detect(pixels)[0].objects} == {tuple(o) for o in sample["objects"]}


def test_boxes_belong_to_their_phrases() -> None:
    samples = load(DataSpec(zoo="layouts", limit=40, options={"category": "all"}), "image").samples
    assert {s["category"] for s in samples} == {"objects", "spatial", "size", "colour", "count"}
    for s in samples:
        assert [t in s["prompt"] for t in s["texts"]] == [True] * len(s["phrases"])
        assert ("boxes" in s) == (s["category"] != "count")
        if "boxes" in s:
            assert list(s["regions"]) == s["texts"] and list(s["regions"].values()) == s["boxes"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"zoo": "reading", "options": {"task": "one-shoot"}}, "Did you mean 'one-shot'"),
        ({"zoo": "captions", "options": {"kind": "random"}}, "no such option"),
        ({"zoo": "layouts", "options": {"count": True}}, "there are 1, 2, 3, 4"),
        ({"zoo": "prompts", "split": "val"}, "train, calibration, test"),
    ],
)
def test_a_wrong_option_of_the_shapes_world(spec: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(DataSpec(limit=3, **spec), "any")


@pytest.mark.parametrize("source", ["facts", "passages", "sources", "reviews", "instructions"])
def test_another_seed_draws_other_samples_of_the_same_split(source: str) -> None:
    def drawn(**options: Any) -> tuple[list[str], list[str]]:
        samples = load(DataSpec(zoo=source, limit=20, options=options), "any").samples
        return [s["id"] for s in samples], [s["prompt"] for s in samples]

    assert drawn(seed=0) == drawn()
    ids, prompts = drawn(seed=3)
    assert not set(ids) & set(drawn()[0]) and prompts != drawn()[1]
    for wrong in (-1, 1.0, True, "1", 2**31):
        with pytest.raises(RecipeError, match="give an integer of 0 to 2147483647"):
            drawn(seed=wrong)


def test_a_seed_for_one_run() -> None:
    recipe = recipe_from_arguments("spotlight/smollm-facts", seed=5)
    assert (recipe.seeds, recipe.data.options) == ([5], {"kind": "mixture", "seed": 5})
    assert recipe_from_arguments("pag/shapes-prompts", seed=5).seeds == [5]
    assert recipe_from_arguments("pag/shapes-prompts", ["seeds=[1, 2]"], seed=5).seeds == [1, 2]
    with pytest.raises(RecipeError, match=r"neither its samples nor its answers .* data.start=1000"):
        recipe_from_arguments("act/shapes-reading", seed=5)


# ------------------------------------------------------------------------------------------------ files


def saved(folder: Path, name: str, text: str, form: str, prompt: str | None = None, **spec: Any) -> Any:
    """The samples of a file with this text."""
    (folder / name).write_text(text, encoding="utf-8")
    return load(DataSpec(file=name, format=form, **spec), "any", prompt=prompt, folder=folder)


@pytest.mark.parametrize("form", ["choices", "pope", "mme", "captions", "questions", "prompts", "boxes"])
def test_bundled_files_have_their_format(form: str) -> None:
    spec = DataSpec(file=str(FIXTURES / f"{form}.jsonl"), format=form, images=str(FIXTURES / "images"))
    data = load(spec, "any")
    assert len(data.samples) == 8
    if "image" in data.samples[0]:
        assert data.image(data.samples[0]).size == (32, 32)
    for s in data.samples:
        assert all(span in s["prompt"] for span in s.get("spans", ()))


def test_choices_in_the_forms_that_data_sets_have(tmp_path: Path) -> None:
    arc = {"id": "M1", "question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    columns = {"answer": "answerKey"}
    (one,) = saved(tmp_path, "a.jsonl", json.dumps(arc), "choices", columns=columns).samples
    assert (one["id"], one["choices"], one["answer"]) == ("M1", ["x", "y"], 1)
    nested = {"question": "question", "choices": "choices.text", "labels": "choices.label", "answer": "answerKey"}
    template = "{question}\n{choices}\nAnswer:"
    (two,) = saved(tmp_path, "a.jsonl", json.dumps(arc), "choices", template, columns=nested).samples
    # The prompt lists the choices by label, so the labels are what the model chooses from.
    assert two["prompt"] == "Q?\n1. x\n2. y\nAnswer:" and two["choices"] == ["1", "2"] and two["answer"] == 1
    table = 'question,A,B,C,answer\n"One, two?",x,y,z,C\n'
    (three,) = saved(tmp_path, "a.csv", table, "choices").samples
    assert (
        three["prompt"] == "Question: One, two?\nAnswer:"
        and three["choices"] == ["x", "y", "z"]
        and three["answer"] == 2
    )
    options = {"choices": ["negative", "positive"]}
    (four,) = saved(
        tmp_path, "a.jsonl", '{"sentence": "Good.", "label": 1}', "choices", columns={"question": "sentence", "answer": "label"},
        options=options,
    ).samples  # fmt: skip
    assert four["choices"] == options["choices"] and four["answer"] == 1
    (five,) = saved(
        tmp_path, "a.json", '[{"prompt": "It is", "choices": ["x", "y"], "answer": "y"}]', "choices"
    ).samples
    assert five["prompt"] == "It is" and five["answer"] == 1


def test_pope_is_json_lines_under_the_name_json(tmp_path: Path) -> None:
    rows = [{"question_id": i, "image": "a.png", "text": f"Is there a {n} in the image?", "label": "no"} for i, n in
            enumerate(["dog", "cat"], 1)]  # fmt: skip
    (tmp_path / "a.png").write_bytes((FIXTURES / "images" / "0000.png").read_bytes())
    text = "\n".join(map(json.dumps, rows)) + "\n"
    data = saved(tmp_path, "coco_pope.json", text, "pope", prompt="{question} Please answer yes or no.")
    assert [s["id"] for s in data.samples] == ["1", "2"] and {s["group"] for s in data.samples} == {"a.png"}
    assert data.samples[0]["prompt"] == "Is there a dog in the image? Please answer yes or no."
    assert data.samples[0]["label"] == "no"


def test_mme_rows_are_pairs_by_picture_and_category(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((FIXTURES / "images" / "0000.png").read_bytes())
    rows = [
        {"question_id": "a.png", "image": "a.png", "question": "Is it?", "answer": said, "category": kind}
        for kind in ("count", "color")
        for said in ("Yes", "No")
    ]
    samples = saved(tmp_path, "m.jsonl", "\n".join(map(json.dumps, rows)), "mme", prompt="{question} Briefly.").samples
    assert [s["pair"] for s in samples] == ["count/a.png", "count/a.png", "color/a.png", "color/a.png"]
    assert [s["label"] for s in samples] == ["yes", "no"] * 2 and samples[0]["prompt"] == "Is it? Briefly."
    assert len({s["id"] for s in samples}) == 4 and [s["group"] for s in samples] == [s["pair"] for s in samples]
    # LLaVA's own file has other names for two of the columns.
    row = {"image": "a.png", "text": "Is it?", "label": "no", "category": "OCR"}
    assert saved(tmp_path, "m.jsonl", json.dumps(row), "mme").samples[0]["label"] == "no"


def test_samples_with_other_pictures_are_other_samples(tmp_path: Path) -> None:
    pictures = [(FIXTURES / "images" / f"000{i}.png").read_bytes() for i in range(2)]
    digests = set()
    for content in (*pictures, pictures[0]):
        (tmp_path / "a.png").write_bytes(content)
        data = saved(tmp_path, "a.jsonl", '{"image_id": 1, "image": "a.png"}', "captions")
        digests.add(data.digest())
    assert len(digests) == 2


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "{}/secret.png"])
def test_images_outside_their_folder_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes((FIXTURES / "images" / "0000.png").read_bytes())
    (tmp_path / "in" / "a").mkdir(parents=True)
    row = {"image_id": 1, "image": name.format(tmp_path)}
    with pytest.raises(RecipeError, match=r"secret.png' of sample 1 is not in .*data.images"):
        saved(tmp_path / "in", "a.jsonl", json.dumps(row), "captions")


@pytest.mark.parametrize("form", ["pope", "questions"])
def test_questions_are_grouped_as_a_column_says_else_by_picture(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.png").write_bytes((FIXTURES / "images" / "0000.png").read_bytes())
    rows = [
        {"question": "Is there a dog?", "answer": "no", "label": "no", "image": "a.png", "scene": g} for g in (1, 2)
    ]
    for columns, groups in (({}, ["a.png", "a.png"]), ({"group": "scene"}, ["1", "2"])):
        text = "\n".join(map(json.dumps, rows))
        found = saved(tmp_path, "a.jsonl", text, form, columns=columns).samples
        assert [s["group"] for s in found] == groups
    rows = [{**r, "group": r["scene"]} for r in rows]
    found = saved(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)), form).samples
    assert [s["group"] for s in found] == ["1", "2"]


def test_captions_of_a_coco_file(tmp_path: Path) -> None:
    text = json.dumps({"images": [{"id": 42, "file_name": "0001.png"}], "annotations": []}, indent=1)
    data = saved(tmp_path, "instances.json", text, "captions", images=str(FIXTURES / "images"))
    (sample,) = data.samples
    assert (sample["image_id"], sample["image"]) == (42, "0001.png") and "describe the image" in sample["prompt"]


def test_prompts_of_a_text_and_of_hrs_with_its_levels(tmp_path: Path) -> None:
    data = saved(tmp_path, "p.txt", "a cat\n\na dog\n", "prompts", start=1)
    assert [(s["prompt"], s["index"]) for s in data.samples] == [("a dog", 1)]
    table = "meta_prompt,label\n" + "".join(f"prompt {i},x\n" for i in range(6))
    options = {"levels": True, "category": "count"}
    data = saved(tmp_path, "p.csv", table, "prompts", columns={"prompt": "meta_prompt"}, options=options)
    assert [s["level"] for s in data.samples] == ["easy", "easy", "medium", "medium", "hard", "hard"]
    assert {s["category"] for s in data.samples} == {"count"}


def test_boxes_in_pixels_and_several_of_one_phrase(tmp_path: Path) -> None:
    row = {
        "prompt": "two cats and a dog",
        "phrases": ["cats", "cats", "dog"],
        "boxes": [[0, 0, 256, 256], [256, 0, 512, 256], [0, 256, 512, 512]],
    }
    (sample,) = saved(tmp_path, "b.jsonl", json.dumps(row), "boxes", options={"side": 512}).samples
    assert sample["regions"] == {"cats": [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5]], "dog": [0, 0.5, 1, 1]}
    (again,) = saved(
        tmp_path, "b.jsonl", json.dumps({"prompt": row["prompt"], "regions": sample["regions"]}), "boxes"
    ).samples
    assert again["regions"] == sample["regions"]


@pytest.mark.parametrize("name", ["b.jsonl", "b.csv"])
def test_boxes_of_a_file_are_fractions_everywhere(tmp_path: Path, name: str) -> None:
    import csv
    import io

    from attnsteer.results.reports.sample_browser import _prompt_of

    row = {"prompt": "a cat and a dog", "phrases": ["dog", "cat"], "boxes": [[0, 0, 256, 256], [256, 0, 512, 512]]}
    text = io.StringIO()
    if name.endswith(".csv"):
        table = csv.writer(text)
        table.writerow(row)
        table.writerow([row["prompt"], json.dumps(row["phrases"]), json.dumps(row["boxes"])])
    else:
        json.dump(row, text)
    (sample,) = saved(tmp_path, name, text.getvalue(), "boxes", options={"side": 512}).samples
    assert sample["texts"] == ["dog", "cat"] and sample["boxes"] == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 1]]
    assert _prompt_of(sample)["boxes"] == [["dog", 0, 0, 0.5, 0.5], ["cat", 0.5, 0, 1, 1]]
    # Of a phrase with several there is no one box to give; they are drawn all the same.
    row["phrases"], row["prompt"] = ["cats", "cats"], "two cats"
    (sample,) = saved(tmp_path, "c.jsonl", json.dumps(row), "boxes", options={"side": 512}).samples
    assert "boxes" not in sample and len(_prompt_of(sample)["boxes"]) == 2


GOOD = '{"question": "Q?", "choices": ["a", "b"], "answer": 0}\n'


@pytest.mark.parametrize(
    ("name", "text", "form", "message"),
    [
        ("a.jsonl", GOOD + '{"question": "Q?", "choi', "choices", r"a.jsonl, line 2: is not JSON .*choi"),
        ("a.jsonl", GOOD + "[1]\n", "choices", "line 2: is list; an object with columns"),
        ("a.jsonl", GOOD + '\n{"quest": "Q?"}\n', "choices", r"line 3: the column 'question' .*there are quest.*Did you mean"),
        ("a.jsonl", '{"question": "Q?", "choices": ["a", "b"], "answer": 2}', "choices", r"line 1: .* has 2; an index from 0 to 1"),
        ("a.jsonl", '{"question": "Q?", "choices": ["a"], "answer": 0}', "choices", r"'choices' has \['a'\]; a list of 2"),
        ("a.jsonl", '{"question": " ", "choices": ["a", "b"], "answer": 0}', "choices", "'question' has ' '; a text"),
        ("a.json", '[{"question": "Q?",\n "choices" ["a"]}]', "choices", "a.json, line 2, column 12: is not JSON"),
        ("a.json", '{"version": 1,\n "info": {}}', "choices", "no list of rows .*there are version, info"),
        ("a.json", "3", "choices", "is int; a list of objects"),
        ("a.csv", "question,answer\nQ?\n", "choices", "a.csv, line 2: has 1 cells; the head has 2"),
        ("a.csv", 'question,answer\n"Q?,1\n', "choices", r"a.csv, line \d: is not CSV"),
        ("a.csv", "x,x\n1,2\n", "choices", "a column is named twice"),
        ("a.jsonl", "  \n", "choices", "nothing in it"),
        ("a.jsonl", '{"text": "Q?", "label": "maybe", "image": "a"}', "pope", "'label' has 'maybe'; yes or no"),
        ("a.jsonl", '{"text": "Q?", "label": "yes", "image": "gone.png"}', "pope", r"1 of 1 images .*'gone.png'.*data.images"),
        ("a.jsonl", '{"text": "Q?", "answer": "maybe", "image": "a", "category": "x"}', "mme", "'answer' has 'maybe'; yes or no"),
        ("a.jsonl", '{"text": "Q?", "answer": "no", "image": "a"}', "mme", "column 'category' .*is missing"),
        ("a.jsonl", '{"prompt": "a cat", "phrases": ["dog"], "boxes": [[0, 0, 1, 1]]}', "boxes", "'dog'; a part of the prompt"),
        ("a.jsonl", '{"prompt": "a cat", "phrases": ["cat"], "boxes": [[0, 0, 512, 512]]}', "boxes", "options: {side: PIXELS}"),
        ("a.jsonl", '{"prompt": "a cat", "phrases": ["cat"], "boxes": [[0, 0, 1]]}', "boxes", r"\(x0, y0, x1, y1\)"),
        ("a.jsonl", '{"prompt": "a cat", "id": 1}\n{"prompt": "a dog", "id": 1}', "prompts", "the id 1 more than once"),
    ],
)  # fmt: skip
def test_what_is_broken_is_said_with_its_place(tmp_path: Path, name: str, text: str, form: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        saved(tmp_path, name, text, form)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"asks for \{fact\}; there are question"):
        saved(tmp_path, "a.jsonl", GOOD, "choices", prompt="{fact}")
    with pytest.raises(RecipeError, match="no such option; there are: letters"):
        saved(tmp_path, "a.jsonl", GOOD, "choices", options={"letter": True})
    with pytest.raises(RecipeError, match="no samples from number 5"):
        saved(tmp_path, "a.jsonl", GOOD, "choices", start=5)
    with pytest.raises(RecipeError, match="cannot be read"):
        load(DataSpec(file="gone.jsonl", format="choices"), "any", folder=tmp_path)
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(RecipeError, match="not UTF-8"):
        load(DataSpec(file="b.jsonl", format="prompts"), "any", folder=tmp_path)


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    data = saved(tmp_path, "a.jsonl", '{"image_id": 1, "image": "a.png"}', "captions")
    with pytest.raises(RecipeError, match=r"a\.png \(sample 1\) is no image"):
        data.image(data.samples[0])


def test_braces_in_a_question_are_left_alone(tmp_path: Path) -> None:
    row = {"question": "What is {0.__class__}?", "choices": ["a", "b"], "answer": 0}
    (sample,) = saved(tmp_path, "a.jsonl", json.dumps(row), "choices", prompt="{question} {{so}}").samples
    assert sample["prompt"] == "What is {0.__class__}? {so}"


# ------------------------------------------------------------------------------------------------ hub


class Image:
    """The type of a column of pictures, by its name."""


class Table:
    """What the runner uses of a data set of the library `datasets`."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any]):
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def remove_columns(self, names: list[str]) -> Table:
        return Table([{k: v for k, v in r.items() if k not in names} for r in self.rows], {})


def test_hub_data_is_read_at_its_revision_and_pictures_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image as Pictures

    picture = Pictures.new("L", (4, 4))
    rows = [{"image": picture, "query": f"Is there a dog {i}?", "label": "Yes"} for i in range(5)]
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Table:
        asked.append((args, options))
        return Table(rows, {"image": Image(), "query": "text", "label": "text"})

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    spec = DataSpec(
        hub="a/b",
        revision="abc",
        config="c",
        split="val",
        format="pope",
        columns={"question": "query"},
        start=1,
        limit=3,
    )
    data = load(spec, "answer")
    assert asked == [(("a/b", "c"), {"revision": "abc", "split": "val"})]
    assert [s["image"] for s in data.samples] == [1, 2, 3] and data.samples[0]["label"] == "yes"
    assert data.image(data.samples[0]).mode == "RGB"
    with pytest.raises(RecipeError, match=r"a/b \(val\), row 1: the column 'query'"):
        rows[1].pop("query")
        load(spec, "answer")


def test_code_of_a_data_set_is_refused_where_the_library_would_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, trust_remote_code: bool = True, **options: Any) -> Table:
        asked.append(trust_remote_code)
        return Table([{"prompt": "a cat"}], {"prompt": "text"})

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    load(DataSpec(hub="a/b", format="prompts", limit=1), "image")
    assert asked == [False]


def test_hub_data_without_the_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"attnsteer\[eval\]"):
        load(DataSpec(hub="a/b", format="choices"), "choice")
