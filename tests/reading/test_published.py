"""The published protocols over files: each on a tiny random model and three records; records of another form are refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from attnsteer.errors import RecipeError
from attnsteer.recipe.schema import ModelSpec
from attnsteer.run.data.sample import Data
from attnsteer.run.tiny import tiny_model
from benchmarks import published
from benchmarks.published import COMMAND, KEY, PROTOCOLS, Folders, measure, prompt, quoted, seen, table
from benchmarks.reading import main

SIZE = (48, 36)
BOX = [6, 9, 24, 18]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "tag": [
        {"img_filename": "a.png", "instruction": "command", "bbox": BOX, "data_type": "text"},
        {"img_filename": "b.png", "instruction": "close it", "bbox": [0, 0, 48, 36], "data_type": "icon"},
    ],
    "controlmllm": [
        {
            "id": 0,
            "image_path": "a.png",
            "text": "Is the <location> a cat or a dog?",
            "name": "cat_(animal)",
            "synonyms": ["pet"],
            "bbox": BOX,
            "seg_mask": "mask.png",
        },
        {
            "question_id": 1,
            "image": "b.png",
            "text": "What is it <location>?",
            "label": "EXIT",
            "box": BOX,
            "mask": "mask.png",
        },
    ],
    "carve": [
        {"image": "a.png", "question": "what is it?", "answers": ["a dog", "dog", "cat"]},
        {"image_id": "c", "question": "what brand?", "answers": [{"answer": "x"}, {"answer": "y"}]},
    ],
    "refam": [
        {"image": "a.png", "expression": "a red circle", "mask": "mask.png"},
        {"image": "b.png", "sentences": [{"sent": "the cat"}, "a dog"], "segmentation": [[6, 9, 30, 9, 30, 27, 6, 27]]},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("published")
    noise = torch.randint(0, 256, (SIZE[1], SIZE[0], 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name in ("a.png", "b.png", "c.jpg"):
        Image.fromarray(noise.numpy()).save(made / name)
    mask = Image.new("L", SIZE)
    mask.paste(255, (BOX[0], BOX[1], BOX[0] + BOX[2], BOX[1] + BOX[3]))
    mask.save(made / "mask.png")
    Image.new("L", (8, 8), 255).save(made / "small.png")
    (made / "model").mkdir()
    for name, records in RECORDS.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return made


@pytest.fixture(scope="module")
def loaded() -> Any:
    data = Data([{"prompt": published.COMMAND + published.SUFFIX + published.GENERAL}], lambda s: None)
    architectures = {"vlm": "llava", "image": "sd3"}
    specs = {k: ModelSpec(path="tiny", kind=k, architecture=a, device="cpu") for k, a in architectures.items()}
    return {k: tiny_model(spec, data, torch.float32, "cpu") for k, spec in specs.items()}


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_a_protocol_from_its_file_to_its_table(
    name: str,
    folder: Path,
    loaded: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(published.models, "load", lambda spec: loaded[spec.kind])
    out, data = tmp_path / "deep" / "out.jsonl", str(folder / f"{name}.jsonl")
    words = ["--published", name, "--data", data, "--max-new-tokens", "2", "--out", str(out)]
    main([*words, "--model", str(folder / "model")])
    printed = capsys.readouterr().out
    count = 3 if name == "refam" else 2
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == count and f"| {count} |" in printed and "not measured here" in printed
    column = {"tag": "hit", "refam": "iou", "carve": "score", "controlmllm": "right"}[name]
    for arm, others in PROTOCOLS[name].compared:
        for each in (arm, *others):
            assert f"| {each} |" in printed and all(0 <= line["arms"][each][column] <= 1 for line in lines)
        assert all(f"| {arm} - {other} |" in printed for other in others)
    if name == "tag":
        # The centre is in both boxes; a line for each kind of element.
        assert [line["arms"]["centre"]["hit"] for line in lines] == [1, 1] and "| TAG, icon |" in printed
        assert lines[1]["arms"]["TAG"]["hit"] == 1 and lines[0]["arms"]["TAG"]["source"] == "prompt"
    if name == "refam":
        assert lines[0]["arms"]["whole image"]["iou"] == pytest.approx(24 * 18 / (48 * 36))


def test_the_commands_tokens_are_found_where_it_is_quoted(loaded: Any) -> None:
    tokenizer = loaded["vlm"].tokenizer
    for command in ("command", "image", 'press "ok"'):
        text = prompt(loaded["vlm"], COMMAND.format(command, key=KEY))
        ids = torch.tensor(tokenizer(text)["input_ids"])
        start, stop = quoted(ids, tokenizer)
        assert tokenizer.decode(ids[start:stop]).strip(' ",') == command.strip('"')
    with pytest.raises(RecipeError, match="not in its tokens"):
        quoted(ids[:10], tokenizer)


def test_figures_are_those_of_the_records(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table from known answers: two records of one picture and one of another."""
    items = published.read("tag", folder / "tag.jsonl", Folders(folder, folder))
    assert items[0].values["target"] == [6 / 48, 9 / 36, 30 / 48, 27 / 36] and [i.subset for i in items] == [
        "text",
        "icon",
    ]
    points = {"TAG": [0.2, 0.3], "centre": [0.9, 0.9], "random heads": [0.2, 0.3]}
    arms = lambda loaded, item, *_: {a: {"point": p, "target": item.values["target"]} for a, p in points.items()}  # noqa: E731
    monkeypatch.setitem(PROTOCOLS, "tag", dataclasses.replace(PROTOCOLS["tag"], arms=arms))
    found = measure("tag", None, items)
    assert {a: [r["hit"] for r in own] for a, own in found.items()} == {
        "TAG": [1, 1],
        "centre": [0, 1],
        "random heads": [1, 1],
    }
    assert "| TAG - centre | 0.500 " in table("tag", items, found)


@pytest.mark.parametrize(
    ("name", "change", "wanted"),
    [
        ("tag", {"bbox": [0.1, 0.2, 0.3, 0.4]}, r"line 1.*bbox.*\[x, y, width, height\] in pixels"),
        ("tag", {"bbox": [20, 20, 40, 36]}, "not corners"),
        ("tag", {"bbox": None}, r"pixels.*ScreenSpot's records"),
        ("tag", {"instruction": ""}, "'instruction'.*ScreenSpot's"),
        ("tag", {"img_filename": "no.png"}, "'img_filename' has 'no.png'.*--images"),
        ("tag", {"img_filename": "../a.png"}, "--images"),
        ("controlmllm", {"name": None}, "'name'.*records of ROC.*RTC"),
        ("controlmllm", {"synonyms": [1]}, "'synonyms'.*texts"),
        ("carve", {"answers": "dog"}, "'answers'.*list.*TextVQA"),
        ("carve", {"answers": ["dog"]}, "several people"),
        ("refam", {"mask": "small.png"}, "8 x 8.*48 x 36"),
        ("refam", {"mask": None, "segmentation": {"counts": "x"}}, "no run lengths"),
        ("refam", {"mask": None, "segmentation": [[90, 90, 99, 90, 99, 99]]}, "a pixel of the picture"),
        ("refam", {"mask": "absent.png"}, "--masks"),
    ],
)
def test_records_of_another_form_are_refused(
    name: str, change: dict[str, Any], wanted: str, folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "records.jsonl"
    data.write_text(json.dumps({**RECORDS[name][0], **change}))
    with pytest.raises(RecipeError, match=f"(?s){wanted}"):
        published.read(name, data, Folders(folder, folder))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "--published and one"),
        (["pointing", "--published", "tag"], "--published and one"),
        (["nothing"], "there is no case nothing"),
        (["--published", "tag"], r"needs --model"),
        (
            ["--published", "tag", "--model", "{folder}/model", "--data", "{folder}/none.jsonl"],
            "none.jsonl: cannot be read",
        ),
        (["--published", "tag", "--model", "{folder}/no", "--data", "{folder}/tag.jsonl"], "there is no folder .*no;"),
        (["--published", "tag", "--model", "{folder}/model", "--data", "{folder}/tag.jsonl"], "neither config.json"),
        (
            ["--published", "tag", "--model", "{folder}/no", "--data", "{folder}/tag.jsonl", "--images", "x"],
            "no folder x",
        ),
    ],
)
def test_what_is_missing_is_said(
    words: list[str], wanted: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([w.format(folder=folder) for w in words])
    assert stop.value.code == 2
    assert re.search(wanted, " ".join(capsys.readouterr().err.split()))


class Pictures:
    """An image processor's settings."""

    do_pad, do_center_crop = None, True
    size, crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}


class Processor:
    """Of such settings."""

    image_processor: Any = Pictures()


def test_maps_are_over_what_the_model_is_shown() -> None:
    processor = Processor()
    assert seen(processor, (100, 60)) == (20, 0, 80, 60)
    processor.image_processor.size = {"height": 336, "width": 336}
    assert seen(processor, (100, 60)) == (0, 0, 100, 60)
    processor.image_processor.size = {"shortest_edge": 400}
    with pytest.raises(RecipeError, match="not known"):
        seen(processor, (100, 60))
    processor.image_processor.do_pad = True
    with pytest.raises(RecipeError, match="pads pictures"):
        seen(processor, (100, 60))
