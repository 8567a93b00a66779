"""Runs: what lies in the folder, what the model is asked, and the controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnsteer.run import run
from tests.run.running import (
    CAPTIONS,
    EXISTENCE,
    FORCES,
    LAYOUTS,
    MARKED,
    figures,
    load,
    recipe,
    records,
    tiny,
    written,
)

# ------------------------------------------------------------------------------------------------ the folder


def test_a_run_leaves_the_agreed_files_and_no_others(whole: Path) -> None:
    names = {p.name for p in whole.iterdir()}
    assert names == {
        ".lock",
        ".alone",
        "MANIFEST.json",
        "recipe.yaml",
        "identity.json",
        "environment.json",
        "status.json",
        "arms.json",
        "samples.jsonl",
        "records.jsonl",
        "timings.jsonl",
        "audit.json",
        "metrics.json",
    }
    status = load(whole / "status.json")
    assert (status["state"], status["done"], status["total"]) == ("complete", 48, 48)


def test_records_are_in_the_order_seed_batch_arm_sample(whole: Path) -> None:
    found = [(r["arm"], r["id"]) for r in records(whole)]
    ids = [f"reading-lookup-test-{i}" for i in range(12)]
    arms = ["baseline", "zero", "method", "random-1"]
    assert found == [(a, i) for b in range(3) for a in arms for i in ids[4 * b : 4 * b + 4]]


def test_scores_are_the_log_likelihoods_of_the_letters(whole: Path) -> None:
    import torch

    from attnsteer import zoo
    from attnsteer.zoo.shapes.reading import reading

    model, tokenizer = zoo.load("shapes-lm")
    for index in (0, 7):
        item = reading("test", index)
        with torch.no_grad():
            logits = model(**tokenizer(item.prompt, return_tensors="pt")).logits[0, -1].log_softmax(-1)
        wanted = logits[tokenizer.convert_tokens_to_ids(list(item.choices))]
        record = next(r for r in records(whole) if r["arm"] == "baseline" and r["id"] == f"reading-lookup-test-{index}")
        torch.testing.assert_close(torch.tensor(record["scores"]), wanted, atol=2e-4, rtol=0)
        assert record["answer"] == item.answer


def test_metrics_say_what_the_records_say(whole: Path) -> None:
    found = load(whole / "metrics.json")
    right = [r["scores"].index(max(r["scores"])) == r["answer"] for r in records(whole) if r["arm"] == "method"]
    assert found["arms"]["method"]["choice"]["accuracy"]["value"] == sum(right) / 12
    assert found["zero_equals_baseline"] is True and not found["partial"]
    pairs = {(d["arm"], d["against"]) for d in found["differences"]}
    assert pairs == {("method", "baseline"), ("zero", "baseline"), ("random-1", "baseline"), ("method", "random-1")}
    assert {c["unit"] for c in found["cost"].values()} == {"samples"}
    assert found["cost"]["baseline"]["relative"] == 1.0


def test_the_first_batch_of_an_arm_does_not_count_in_the_cost(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "timings.jsonl").read_text().splitlines()]
    warm = [t for t in lines if t["arm"] == "method"][1:]
    cost = load(whole / "metrics.json")["cost"]["method"]["seconds_per_sample"]
    assert cost == pytest.approx(sum(t["seconds"] for t in warm) / 8)


def test_the_audit_counts_over_all_batches(whole: Path) -> None:
    arms = load(whole / "audit.json")["arms"]
    steered, idle = (list(arms[arm][0]["sites"].values()) for arm in ("method", "zero"))
    assert steered and all(site["calls"] == site["edits"] == 3 for site in steered) and arms["baseline"] == []
    assert len(idle) == len(steered) and all(site["calls"] == 3 and site["edits"] == 0 for site in idle)


def test_a_run_again_changes_nothing(whole: Path) -> None:
    before = (whole / "records.jsonl").stat().st_mtime_ns, figures(whole)
    base = recipe(whole.parent)
    run(base, whole, progress=False)
    assert figures(whole) == before[1] and len(records(whole)) == 48


# ------------------------------------------------------------------------------------------------ tasks


MMDIT = {
    **LAYOUTS,
    "model": {"zoo": "shapes-mmdit", "kind": "image", "device": "cpu"},
    "interventions": [{"method": "SoftPAG", "params": {"scale": 2.0, "strength": 0.5}, "where": {"layers": [5]}}],
    "decoding": {"num_inference_steps": 2, "max_sequence_length": 8},
}


@pytest.mark.parametrize(
    "changes", [EXISTENCE, CAPTIONS, LAYOUTS, MMDIT], ids=["existence", "captions", "layouts", "mmdit"]
)
def test_at_zero_strength_every_embedded_model_answers_as_the_baseline(tmp_path: Path, changes: Any) -> None:
    out = run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    found = load(out / "metrics.json")
    assert found["zero_equals_baseline"] is True
    by_arm: dict[str, list[Any]] = {}
    for r in records(out):
        by_arm.setdefault(r["arm"], []).append({k: v for k, v in r.items() if k not in ("arm", "image")})
    assert by_arm["zero"] == by_arm["baseline"]
    if changes["task"] != "answer":
        assert by_arm["method"] != by_arm["baseline"]


def test_a_picture_does_not_depend_on_its_batch_and_is_on_the_disk(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    only = {**LAYOUTS, "controls": {"zero": False}}
    first = run(recipe(tmp_path, **only), tmp_path / "a", progress=False)
    second = run(recipe(tmp_path, **{**only, "batch_size": 1}), tmp_path / "b", progress=False)
    for one, two in zip(
        records(first), sorted(records(second), key=lambda r: (r["id"][-1] == "2", r["arm"])), strict=True
    ):
        pictures = [np.asarray(Image.open(f / r["image"])).astype(int) for f, r in ((first, one), (second, two))]
        assert one["image"] == two["image"] and pictures[0].shape == (64, 64, 3)
        # Convolutions over batches of other sizes round differently.
        assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_distances_of_features_are_those_of_the_pictures(tmp_path: Path) -> None:
    import torch

    from attnsteer.evals.features import embedded, extract, save_reference
    from attnsteer.evals.metrics import get_metric
    from attnsteer.zoo.shapes.questions import picture
    from attnsteer.zoo.shapes.render import render

    reference = extract(render([picture("calibration", i) for i in range(12)]), embedded())
    save_reference(tmp_path / "shapes.safetensors", reference, "shapes-lvlm")
    metrics = [{"name": "fid", "features": "shapes-lvlm", "reference": "shapes.safetensors"}]
    asked = {**LAYOUTS, "metrics": metrics, "primary": "fid.frechet_distance"}
    out = run(recipe(tmp_path, **asked), tmp_path / "run", progress=False)
    rows = [r for r in records(out) if r["arm"] == "method"]
    assert all(len(r["features"]) == 128 for r in rows)
    fid = get_metric("fid", reference=reference)
    whole = fid.aggregate([fid.sample(r) for r in rows])["frechet_distance"]
    value = getattr(whole, "value", whole)
    assert load(out / "metrics.json")["arms"]["method"]["fid"]["frechet_distance"]["value"] == pytest.approx(
        value, rel=1e-6
    )
    # Pictures of the same kind are nearer than pictures of another.
    near, far = (
        extract(images, embedded())
        for images in (render([picture("test", i) for i in range(12)]), torch.rand(12, 3, 64, 64))
    )
    distance = [
        fid.aggregate([fid.sample({"features": f.tolist()}) for f in rows])["frechet_distance"] for rows in (near, far)
    ]
    near, far = (getattr(d, "value", d) for d in distance)
    assert near < far / 2


@pytest.mark.parametrize("features", [None, "shapes-lvml"])
def test_a_distance_says_of_what(tmp_path: Path, features: str | None) -> None:
    import torch

    from attnsteer.errors import RecipeError
    from attnsteer.evals.features import save_reference

    save_reference(tmp_path / "shapes.safetensors", torch.randn(4, 128), "shapes-lvlm")
    metric = {"name": "fid", "reference": "shapes.safetensors", **({} if features is None else {"features": features})}
    with pytest.raises(RecipeError, match="features"):
        run(recipe(tmp_path, **{**LAYOUTS, "metrics": [metric], "primary": "fid.frechet_distance"}), tmp_path / "run")


def test_seeds_give_other_pictures_and_are_summarised(tmp_path: Path) -> None:
    out = run(
        recipe(tmp_path, **{**LAYOUTS, "seeds": [0, 5], "controls": {"zero": False}}), tmp_path / "run", progress=False
    )
    found = load(out / "metrics.json")
    pixels = {(r["seed"], r["id"]): r["pixels"] for r in records(out) if r["arm"] == "baseline"}
    assert len(set(pixels.values())) == 6
    assert len(found["seeds"]["baseline"]["layout.valid"]["values"]) == 2
    assert found["samples"] == 3


def test_a_prompt_beside_a_longer_one_is_scored_as_alone(tmp_path: Path) -> None:
    rows = [
        {
            "id": i,
            "prompt": " ".join(["a red circle is above a blue star ."] * n),
            "choices": ["red", "blue"],
            "answer": 0,
        }
        for i, n in enumerate((1, 4))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    changes = {
        # Learned positions.
        "model": {"path": ".", "kind": "lm", "architecture": "gpt2", "device": "cpu"},
        "interventions": [{"method": "ACT", "params": {"beta": 0.4}, "heads": {"1": [0]}}],
        "controls": {"zero": False},
        "data": {"file": "rows.jsonl", "format": "choices"},
    }
    from attnsteer.run import models
    from attnsteer.run.data import load as load_data
    from attnsteer.run.tasks import Request, choice

    asked = recipe(tmp_path, **changes)
    data = load_data(asked.data, "choice", folder=tmp_path)
    loaded = models.load(asked.model, tiny=data)
    together, _ = choice.answer(loaded, Request(data.samples, data, {}, 0))
    for sample, record in zip(data.samples, together, strict=True):
        (alone,), _ = choice.answer(loaded, Request([sample], data, {}, 0))
        assert record["scores"] == pytest.approx(alone["scores"], abs=1e-5)
        assert alone["scores"][0] != alone["scores"][1]


def test_prompts_of_a_search_have_the_positions_that_they_have_alone(tmp_path: Path) -> None:
    import torch

    from attnsteer.run.searches import Subject, Task, _batches
    from attnsteer.run.tiny import tiny_model

    model = {"path": ".", "kind": "lm", "architecture": "gpt2", "device": "cpu"}
    spec = recipe(tmp_path, model=model, interventions=[{"method": "ACT", "heads": {"1": [0]}}])
    samples = [{"id": i, "prompt": "a red circle " * n} for i, n in enumerate((1, 3))]
    from attnsteer.run.data.sample import Data

    loaded = tiny_model(spec.model, Data(samples, lambda s: None), torch.float32, "cpu")
    (batch,) = _batches(Task(spec, Subject(loaded.target, loaded.tokenizer), samples), 2)
    count = int(batch["attention_mask"][0].sum())
    assert batch["position_ids"][0, -count:].tolist() == list(range(count))


def test_choices_of_several_tokens_are_scored_exactly(tmp_path: Path) -> None:
    import torch

    from attnsteer import zoo

    rows = [
        {"id": "a", "question": "a red circle .", "choices": ["the circle is red", "no"], "answer": 0},
        {"id": "b", "question": "two blue stars .", "choices": ["yes", "the star is blue ."], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"file": "rows.jsonl", "format": "choices"}
    changes = {"data": data, "prompt": "{question}", "controls": {"zero": True}}
    out = run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    model, tokenizer = zoo.load("shapes-lm")
    for row in rows:
        record = next(r for r in records(out) if r["id"] == row["id"] and r["arm"] == "baseline")
        for choice, score in zip(row["choices"], record["scores"], strict=True):
            ids = tokenizer(f"{row['question']} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                p = model(input_ids=ids).logits[0].log_softmax(-1)
            count = len(choice.split())
            at = range(ids.shape[1] - count, ids.shape[1])
            assert score == pytest.approx(float(sum(p[i - 1, ids[0, i]] for i in at)), abs=1e-4)


def test_a_strength_of_a_sample_is_that_strength_for_all(tmp_path: Path) -> None:
    """Each sample's record under values of samples, and in a run that has its value for all of them."""
    changes = tiny(tmp_path)
    each = run(recipe(tmp_path, **changes, controls={}), tmp_path / "each", progress=False)
    found = {r["id"]: r["scores"] for r in records(each) if r["arm"] == "method"}
    for row in (0, 2):
        fixed = {**MARKED, "params": {**MARKED["params"], "alpha": FORCES[row]}}
        own = run(recipe(tmp_path, **{**changes, "interventions": [fixed]}), tmp_path / str(row), progress=False)
        same = {
            r["id"]: r["scores"] == pytest.approx(found[r["id"]], abs=1e-5)
            for r in records(own)
            if r["arm"] == "method"
        }
        assert same == {f"r{i}": i == row for i in range(4)}


def test_choices_of_several_tokens_about_a_picture_are_scored_exactly(tmp_path: Path) -> None:
    import torch
    from PIL import Image

    from attnsteer import zoo
    from attnsteer.run.tiny import FIXTURES

    row = {
        "id": "a",
        "prompt": "question is there a red star ? answer",
        "choices": ["yes", "no . question"],
        "answer": 0,
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "image": "0000.png"}))
    changes = {
        **EXISTENCE,
        "data": {"file": "rows.jsonl", "format": "choices", "images": str(FIXTURES / "images")},
        "task": "choice",
        "decoding": {},
        "metrics": ["choice"],
        "primary": "choice.accuracy",
    }
    out = run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    (record,) = (r for r in records(out) if r["arm"] == "baseline")
    model, processor = zoo.load("shapes-lvlm")
    picture = Image.open(FIXTURES / "images" / "0000.png").convert("RGB")
    for choice, score in zip(row["choices"], record["scores"], strict=True):
        batch = processor(images=picture, text=f"<image> {row['prompt']} {choice}", return_tensors="pt")
        with torch.no_grad():
            p = model(**batch).logits[0].log_softmax(-1)
        ids = batch.input_ids[0]
        at = range(len(ids) - len(choice.split()), len(ids))
        assert score == pytest.approx(float(sum(p[i - 1, ids[i]] for i in at)), abs=1e-4)


def test_a_claim_has_ours_beside_it_and_what_is_undefined_is_said(tmp_path: Path) -> None:
    claim = {"metric": "chair.chair_i", "baseline": 14.3, "value": 9.7, "source": "a table"}
    # One token is an article: no caption mentions anything.
    changes = {**CAPTIONS, "decoding": {"max_new_tokens": 1}, "claims": [claim]}
    out = run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    found = load(out / "metrics.json")
    (ours,) = found["claims"]
    assert ours["value"] == 9.7 and ours["ours"]["difference"]["value"] == 0.0
    assert any("chair_i is 0 / 0" in w for w in found["warnings"])


def test_a_sweep_shares_what_its_points_have_in_common(tmp_path: Path) -> None:
    changes = {"sweep": {"interventions.0.params.beta": [0.2, 0.6]}, "controls": {"zero": True}}
    out = run(recipe(tmp_path, **changes), tmp_path / "run", progress=False)
    found = load(out / "metrics.json")
    assert set(found["arms"]) == {"baseline", "zero", "method@1", "method@2"}
    tested = [d for d in found["differences"] if (d["arm"], d["against"]) == ("method", "baseline")]
    assert [d["point"] for d in tested] == [0, 1]
    assert all(d["p_holm"] >= d["mcnemar"]["p"] for d in tested)


def test_the_command_prints_the_result_and_sets_fields(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from attnsteer import cli

    path, out = str(written(tmp_path)), str(tmp_path / "run")
    options = ["--set", "interventions.0.params.beta=0.1", "--set", "data.options.task=few-shot", "--limit", "6"]
    done = CliRunner().invoke(cli.app, ["run", path, "--out", out, "--batch-size", "3", *options])
    assert done.exit_code == 0, done.output
    assert "choice.accuracy" in done.output and f"run folder: {out}" in done.output
    assert (
        "control: zero strength: equals the baseline, record for record" in done.output and "verdict: " in done.output
    )
    assert load(Path(out) / "arms.json")["arms"][2]["interventions"][0]["params"] == {"beta": 0.1}
    assert {r["id"] for r in records(Path(out))} == {f"reading-few-shot-test-{i}" for i in range(6)}
    checked = CliRunner().invoke(cli.app, ["run", path, "--check", "--out", str(tmp_path / "none")])
    assert checked.exit_code == 0 and "12 samples" in checked.output and not (tmp_path / "none").exists()
    wrong = CliRunner().invoke(cli.app, ["run", path, "--set", "data.limits=3"])
    assert wrong.exit_code == 2


def test_a_shared_beginning_gives_the_scores_of_whole_prompts(tmp_path: Path) -> None:
    """Few-shot prompts of several lengths, choices of one token and of more."""
    shots = "the big red circle is left of the cyan star . the small blue square is right of it . "
    rows = [
        {"id": f"r{i}", "prompt": shots + "the " * i + "star is", "choices": ["red", "cyan and big"], "answer": i % 2}
        for i in range(5)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    changes: dict[str, Any] = {
        "data": {"file": "rows.jsonl", "format": "choices"},
        "interventions": [{"method": "ZeroTuning", "params": {"gamma": 4.0}}],
        "controls": {"zero": True},
        "batch_size": 3,
    }
    found = {}
    for prefix in ("off", "shared"):
        data = recipe(tmp_path, prefix=prefix, **changes)
        run(data, out=tmp_path / prefix)
        found[prefix] = records(tmp_path / prefix)
    assert [(r["arm"], r["id"]) for r in found["off"]] == [(r["arm"], r["id"]) for r in found["shared"]]
    for one, other in zip(found["off"], found["shared"], strict=True):
        assert other["scores"] == pytest.approx(one["scores"], abs=2e-5)
    by = {(r["arm"], r["id"]): r["scores"] for r in found["shared"]}
    assert all(by["zero", r["id"]] == by["baseline", r["id"]] for r in rows)
    assert any(
        abs(a - b) > 1e-3 for r in rows for a, b in zip(by["method", r["id"]], by["baseline", r["id"]], strict=True)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "answer", "decoding": {"max_new_tokens": 2}},
        {"task": "choice", "decoding": {}, "metrics": ["choice"], "primary": "choice.accuracy"},
        {
            "interventions": [
                {"method": "PAINT", "params": {"local": {"sample": "local"}, "summary": {"sample": "summary"}}}
            ]
        },
    ],
    ids=["answer", "choice", "by sample"],
)
def test_questions_about_one_image_share_its_cache(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnsteer.evals import beginnings

    told: list[Any] = []
    make = beginnings.image_beginnings
    monkeypatch.setattr(beginnings, "image_beginnings", lambda *a: told.append(make(*a)) or told[-1])
    vhr = {"method": "VHR", "params": {"alpha": 2.0, "rows": "last"}}
    data = {"zoo": "existence", "limit": 9, "options": {"kind": "adversarial", "patches": "paint"}}
    fixed = {"data": data, "interventions": [vhr], "controls": {}, "batch_size": 9}
    found = {}
    for prefix in ("off", "shared"):
        done = recipe(tmp_path / prefix, **{**EXISTENCE, **fixed, **changes, "prefix": prefix})
        run(done, out=tmp_path / prefix / "run")
        found[prefix] = records(tmp_path / prefix / "run")
    # Six questions about the first image, three about the next, in each of three arms.
    assert [len(t.ids) for t in told] == [2, 2, 2]
    for one, other in zip(found["off"], found["shared"], strict=True):
        scores = one.pop("scores", []), other.pop("scores", [])
        assert one == other and scores[1] == pytest.approx(scores[0], abs=1e-5)
