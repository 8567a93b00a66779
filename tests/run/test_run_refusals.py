"""What a run refuses: folders, models, metrics and data that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnsteer.errors import NeverFired, RecipeError, RunError
from attnsteer.run import run, store
from attnsteer.run.job import prepare
from tests.run.running import CAPTIONS, EXISTENCE, LAYOUTS, READING, load, recipe


def test_the_folder_of_another_recipe_is_left_alone(tmp_path: Path, whole: Path) -> None:
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    other = recipe(tmp_path, interventions=[{"method": "ACT", "params": {"beta": 0.5}, "heads": "zoo:act"}])
    with pytest.raises(RunError, match=r"other recipe, and stays as it is"):
        run(other, whole, progress=False)
    with pytest.raises(RunError, match=r"other recipe and samples"):
        run(recipe(tmp_path), whole, limit=3, progress=False)
    with pytest.raises(RunError, match=r"--tiny"):
        run(recipe(tmp_path), whole, tiny=True, progress=False)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before


@pytest.mark.parametrize(
    "name", ["samples.jsonl", "metrics.json", "records-2.jsonl", "recipe.yaml", "report.html", "images", "calibration"]
)
def test_a_folder_with_files_of_someone_else_is_left_alone(tmp_path: Path, name: str) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(RunError, match=f"has {name} but no identity.json"):
        run(recipe(tmp_path), out, progress=False)
    assert {p.name for p in out.iterdir()} == {".lock", ".alone", name} and (out / name).read_text() == "mine"


def test_other_files_in_the_folder_stay_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    for name in ("records-old.jsonl", "timings-2020-1.jsonl", "notes.txt"):
        (out / name).write_text("torn")
    run(recipe(tmp_path, data={**READING["data"], "limit": 1}), out, progress=False)
    assert {p.read_text() for p in (*out.glob("*-*.jsonl"), out / "notes.txt")} == {"torn"}


def test_a_run_killed_before_its_recipe_is_written_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out, real = recipe(tmp_path, data={**READING["data"], "limit": 1}), tmp_path / "run", store.write_atomic

    def write(path: Path, data: bytes) -> None:
        real(path, data)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_atomic", write)
        with pytest.raises(KeyboardInterrupt):
            run(base, out, progress=False)
    run(base, out, progress=False)
    assert load(out / "status.json")["state"] == "complete"


def test_texts_about_a_recipe_may_change(tmp_path: Path, whole: Path) -> None:
    run(recipe(tmp_path, notes="another note", summary="another"), whole, progress=False)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    lock = store.Lock(out)
    lock.take(alone=False)
    try:
        with pytest.raises(RunError, match="being written by another run"):
            run(recipe(tmp_path), out, progress=False)
    finally:
        lock.release()
    assert {p.name for p in out.iterdir()} == {".lock", ".alone"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"path": "nowhere", "kind": "lm", "architecture": "llama"}, "no folder"),
        ({"path": "empty", "kind": "lm", "architecture": "llama"}, "neither config.json nor model_index.json"),
        ({"path": "{lm}", "kind": "vlm", "architecture": "llava"}, r"is a llama model.*Its kind is lm"),
        ({"path": "{lm}", "kind": "image", "architecture": "sd"}, "is a transformers model"),
        ({"path": "{sd}", "kind": "lm", "architecture": "llama"}, "is a diffusion pipeline"),
        ({"path": "unsafe", "kind": "lm", "architecture": "llama"}, "no weights in safetensors"),
        ({"zoo": "shapes-lm", "kind": "lm", "device": "cuda:0"}, "no CUDA device"),
    ],
)
def test_a_model_that_is_not_there_or_of_another_kind(tmp_path: Path, model: Any, message: str) -> None:
    import torch

    from attnsteer import zoo

    if "cuda" in message.lower() and torch.cuda.is_available():
        model = {**model, "device": "cuda:9"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "unsafe").mkdir()
    (tmp_path / "unsafe" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "unsafe" / "pytorch_model.bin").write_bytes(b"")
    if "path" in model:
        path = model["path"].format(lm=zoo.folder("shapes-lm"), sd=zoo.folder("shapes-sd"))
        model = {**model, "path": path}
    parts = {"lm": {}, "vlm": EXISTENCE, "image": LAYOUTS}[model["kind"]]
    changes = {**parts, "model": model}
    if model["kind"] == "lm":
        changes |= {"interventions": [{"method": "ACT", "params": {"beta": 0.4}, "heads": {"1": [0]}}]}
    if model["kind"] == "image":
        changes |= {"metrics": [{"name": "clip_score", "model": "x"}], "primary": "clip_score.cosine"}
    with pytest.raises((RecipeError, RunError), match=message):
        run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)


def test_a_model_from_a_folder_answers_as_the_embedded_one(tmp_path: Path, whole: Path) -> None:
    from attnsteer import HeadSet, zoo

    shipped = HeadSet.load(zoo.folder("shapes-lm") / "act" / "heads.safetensors")
    heads = {str(layer): list(places) for layer, places in shipped.to_dict().items()}
    changes = {
        "model": {"path": str(zoo.folder("shapes-lm")), "kind": "lm", "architecture": "llama", "device": "cpu"},
        "interventions": [{"method": "ACT", "params": {"beta": 0.4}, "heads": heads}],
    }
    out = run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    assert load(whole / "arms.json")["arms"][2]["interventions"][0]["heads"] == heads
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_every_file_that_a_model_is_made_of_tells_it_apart(tmp_path: Path) -> None:
    from attnsteer.run.models import WEIGHTS, hashes

    names = ["a.safetensors", "config.json", "merges.txt", "spiece.model", "chat_template.jinja"]
    for name in names:
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "README.md").write_bytes(b"1")
    assert sorted(hashes(tmp_path)) == sorted(names) and len(names) == len(WEIGHTS)


def test_a_metric_that_the_records_cannot_feed_is_found_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"letter needs .*no generated"):
        prepare(recipe(tmp_path, metrics=["letter"], primary="letter.accuracy"), tmp_path / "run")


def test_a_module_that_a_recipe_needs_is_asked_for_first(tmp_path: Path) -> None:
    from attnsteer.errors import MissingExtra

    with pytest.raises(MissingExtra, match="needs no_such_module"):
        prepare(recipe(tmp_path, requires=["no_such_module.part"]), tmp_path / "run")
    prepare(recipe(tmp_path, requires=["no_such_module.part"]), tmp_path / "run", tiny=True)


def test_every_sample_of_a_vision_model_has_an_image_and_none_of_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "question": "is there a red star ?", "answer": "yes"}\n')
    data = {"file": "rows.jsonl", "format": "questions"}
    changes = {**EXISTENCE, "data": data, "metrics": ["vqa"], "primary": "vqa.accuracy"}
    with pytest.raises(RecipeError, match="1 of 1 samples have no image, a the first"):
        prepare(recipe(tmp_path, **changes), tmp_path / "run")
    seen = {"data": {"zoo": "existence", "limit": 2}, "task": "choice"}
    with pytest.raises(RecipeError, match="does not see"):
        prepare(recipe(tmp_path, **seen), tmp_path / "run")


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ({}, {"decoding": {"max_new_tokens": 2}}, "decoding: max_new_tokens has no meaning for the task choice"),
        ({}, {"baseline": {"max_new_tokens": 2}}, "baseline: max_new_tokens has no meaning for the task choice"),
        (EXISTENCE, {"decoding": {"max_new_token": 3}}, "decoding.max_new_token: .* Did you mean 'max_new_tokens'"),
        (EXISTENCE, {"baseline": {"num_beam": 3}}, "baseline.num_beam: .* Did you mean 'num_beams'"),
        (EXISTENCE, {"sweep": {"decoding.top_kk": [1, 2]}}, "decoding.top_kk: .* Did you mean 'top_k'"),
        (EXISTENCE, {"decoding": {"num_return_sequences": 2}}, "num_return_sequences is set by the run itself"),
        (CAPTIONS, {"decoding": {"return_dict_in_generate": True}}, "return_dict_in_generate is set by the run itself"),
        (LAYOUTS, {"decoding": {"output_type": "np"}}, "output_type is set by the run itself"),
    ],
)
def test_arguments_of_the_call_are_checked_before_the_model_is_loaded(
    tmp_path: Path, base: Any, changes: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare(recipe(tmp_path, **{**base, **changes}), tmp_path / "run")


@pytest.mark.parametrize("place", ["decoding", "baseline"])
def test_arguments_of_a_pipeline_are_checked_before_anything_is_written(tmp_path: Path, place: str) -> None:
    changes = {**LAYOUTS, place: {"num_inference_step": 2}}
    with pytest.raises(RecipeError, match=f"{place}.num_inference_step: .* Did you mean 'num_inference_steps'"):
        run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", ".alone"}


def test_scores_that_are_no_numbers_are_said_with_their_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnsteer.run.tasks import choice

    monkeypatch.setattr(choice, "_at_once", lambda loaded, ask, every: [[float("nan")] * len(own) for own in every])
    with pytest.raises(RunError, match=r"log-likelihoods of reading-lookup-test-0, .* float32"):
        run(recipe(tmp_path), tmp_path / "run", progress=False)


def test_a_method_that_never_acts_ends_the_run(tmp_path: Path) -> None:
    changes = {
        **LAYOUTS,
        "interventions": [
            {"method": "PAG", "params": {"scale": 2.0}, "where": {"layers": [5], "kinds": "self", "steps": [400, 401]}}
        ],
    }
    with pytest.raises((NeverFired, RecipeError, RunError)):
        run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    assert load(tmp_path / "run" / "status.json")["state"] == "failed"
