"""Searches of recipes: what they find, that it is found once, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnsteer import ACT, HeadSet, zoo
from attnsteer.errors import RecipeError, RunError
from attnsteer.recipe import yaml
from attnsteer.recipe.checks import check
from attnsteer.recipe.loading import load_recipe
from attnsteer.recipe.schema import DataSpec, Recipe
from attnsteer.recipe.search_specs import searches_of
from attnsteer.recipe.validate import validate
from attnsteer.run import recipe_calibration, searches
from attnsteer.run.build import plan
from attnsteer.run.job import prepare
from attnsteer.run.recipe_calibration import calibrate
from attnsteer.run.searches import Subject
from attnsteer.run.tasks.prompts import continuations
from attnsteer.search import SinkDims, calibrate_act
from attnsteer.zoo.shapes.reading import reading
from tests.run.common import CALIBRATION, changed

SEARCHED = {"calibration": CALIBRATION, "interventions.0.heads": "calibrated"}


def searched(**changes: Any) -> Recipe:
    return validate(changed(SEARCHED | {k.replace("__", "."): v for k, v in changes.items()}))


def samples(spec: DataSpec) -> list[dict[str, Any]]:
    """The readings of a section."""
    items = [reading(spec.split, spec.start + i, spec.options["task"]) for i in range(spec.limit)]
    return [
        {"id": str(i), "prompt": r.prompt, "choices": list(r.choices), "answer": r.answer} for i, r in enumerate(items)
    ]


@pytest.fixture(scope="module")
def subject() -> Subject:
    model, tokenizer = zoo.load("shapes-lm")
    return Subject(model, tokenizer)


def test_heads_are_those_of_the_search_and_are_searched_once(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = searched(
        interventions__0__where={"layers": [4, 5]}, calibration__options={"keep": "all"}, calibration__top=3
    )
    assert check(recipe) == []
    found = calibrate(recipe, subject, samples, tmp_path / "cache", progress=False)
    split = [
        dict(zip(("prompt", "candidates"), continuations(subject.tokenizer, s["prompt"], s["choices"]), strict=True))
        | {"answer": s["answer"]}
        for s in samples(recipe.calibration.data)
    ]
    from attnsteer import Where

    direct = calibrate_act(subject.target, split, ACT(beta=0.4, where=Where(layers=[4, 5])), keep="all", progress=False)
    (heads,) = found.values()
    assert heads == direct.top(3) and heads.shape == (6, 8)
    made = plan(recipe, found=found).arms[2].make([])
    assert made[0].heads == heads
    # The result alone is left, whole, and is taken from there.
    (kept,) = (tmp_path / "cache").iterdir()
    assert HeadSet.load(kept) == heads
    with monkeypatch.context() as patch:
        patch.setitem(searches.RUNNERS, "calibrate_act", _fails)
        again = calibrate(recipe, subject, samples, tmp_path / "cache", progress=False)
        assert again == found
        for other in (
            searched(**_parts(recipe), interventions__0__params={"beta": 0.5}),
            searched(**_parts(recipe), calibration__data__limit=13),
        ):
            with pytest.raises(AssertionError, match="searched again"):
                calibrate(other, subject, samples, tmp_path / "cache", progress=False)
        # What does not bear on the search does not start it.
        same = searched(**_parts(recipe), data__limit=5, batch_size=3, controls={"random_heads": 2})
        assert calibrate(same, subject, samples, tmp_path / "cache", progress=False) == found
        kept.write_bytes(kept.read_bytes()[:50])
        with pytest.raises(AssertionError, match="searched again"):
            calibrate(recipe, subject, samples, tmp_path / "cache", progress=False)
        with torch.no_grad():
            first = next(subject.target.parameters())
            first[0, 0] += 1
            with pytest.raises(AssertionError, match="searched again"):
                calibrate(recipe, subject, samples, tmp_path / "cache", progress=False)
            first[0, 0] -= 1


def _parts(recipe: Recipe) -> dict[str, Any]:
    return {
        "interventions__0__where": recipe.interventions[0].where,
        "calibration__options": recipe.calibration.options,
        "calibration__top": recipe.calibration.top,
    }


def _fails(task: Any) -> Any:
    raise AssertionError("searched again")


def test_each_point_that_changes_the_search_has_its_own() -> None:
    swept = searched(sweep={"interventions.0.params.beta": [0.2, 0.4], "decoding.x": [1]})
    assert len(searches_of(swept)) == 2
    dims = validate(changed({"calibration": CALIBRATION | {"search": "find_sink_dims", "into": "sink_dims"}}))
    assert len(searches_of(dims.model_copy(update={"sweep": {"interventions.0.params.beta": [0.2, 0.4]}}))) == 1
    assert searches_of(validate(changed({}))) == []


def test_samples_in_both_splits_are_refused_whatever_the_splits_are_called(subject: Subject) -> None:
    recipe = searched()
    with pytest.raises(RecipeError, match=r"calibration\.data: 12 of its 12 samples are in the test split too"):
        calibrate(recipe, subject, lambda spec: samples(DataSpec(zoo="reading", options=spec.options, limit=12)), None)


def test_an_overlap_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(6)]
    for name, part in (("test", rows[:4]), ("other", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    files = {name: {"file": f"{name}.jsonl", "format": "choices"} for name in ("test", "other")}
    text = yaml.dump(changed(SEARCHED | {"data": files["test"], "calibration": CALIBRATION | {"data": files["other"]}}))
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"calibration\.data: 1 of its 3 samples are in the test split too"):
        prepare(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run")


def test_what_a_search_says_is_a_recipe_error(subject: Subject) -> None:
    for changes, words in (
        ({"interventions__0__params": {"beta": 1.0}}, r"calibration \(calibrate_act\): ACT improves accuracy in none"),
        ({"calibration__options": {"metric": "f1"}}, r"calibration \(calibrate_act\): metric='f1'"),
    ):
        with pytest.raises(RecipeError, match=words):
            calibrate(searched(**changes), subject, samples, None, progress=False)
    with pytest.raises(RecipeError, match="sample 'x' has no choices, answer"):
        calibrate(searched(), subject, lambda s: [{"id": "x", "prompt": s.split}], None, progress=False)


def test_a_cache_that_cannot_be_written(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        calibrate(searched(), subject, samples, tmp_path / "file" / "cache", progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration__search": "calibrate_atc"}, "Did you mean 'calibrate_act'"),
        ({"calibration__search": "vhd"}, "vhd is for models of kind vlm; model.kind is lm"),
        ({"calibration__options": {"metrics": 1}}, r"calibration\.options\.metrics: calibrate_act has .* Did you mean 'metric'"),
        ({"calibration__into": "sink_dims"}, "calibrate_act finds heads; into is 'sink_dims'"),
        ({"calibration__search": "find_sink_dims"}, "find_sink_dims finds no heads; into is 'heads'"),
        (
            {"calibration__search": "find_sink_dims", "calibration__into": "sink_dim", "interventions__0__heads": None},
            "no intervention has a parameter 'sink_dim'",
        ),
        (
            {"interventions": [{"method": "PASTA", "params": {"spans": {"sample": "x"}}, "heads": "calibrated"}]},
            "cannot be searched for a method whose parameters come from the samples",
        ),
    ],
)  # fmt: skip
def test_what_the_check_finds(changes: dict[str, Any], words: str) -> None:
    import re

    problems = check(searched(**changes))
    assert any(re.search(words, p) for p in problems), problems


def test_dimensions_go_into_the_parameter_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = validate(
        changed(
            {
                "model": {"zoo": "shapes-lvlm", "kind": "vlm"},
                "data": {"zoo": "existence", "limit": 4},
                "calibration": {
                    "search": "find_sink_dims",
                    "into": "sink_dims",
                    "data": {"zoo": "existence", "split": "calibration", "limit": 4},
                    "options": {"batch": 3},
                },
                "interventions": [{"method": "VAR", "params": {"tau": 3.0}}],
            }
        )
    )
    assert check(recipe) == []
    seen = []

    def find(model: Any, batches: Any, **options: Any) -> SinkDims:
        seen.extend(batches)
        return SinkDims((92, 5), {}, {}, 3.0, 4, (2,), "" if model is not None else "x")

    monkeypatch.setattr("attnsteer.search.sink_dims.find_sink_dims", find)
    monkeypatch.setattr("attnsteer.search.find_sink_dims", find, raising=False)
    target = torch.nn.Linear(2, 2)
    rows = lambda spec: [{"id": str(i), "prompt": f"{spec.split} {i}"} for i in range(spec.limit)]  # noqa: E731
    asked = Subject(target, None, lambda part: {"n": len(part)})
    found = calibrate(recipe, asked, rows, tmp_path, progress=False)
    assert seen == [{"n": 3}, {"n": 1}] and list(found.values()) == [(92, 5)]
    assert calibrate(recipe, asked, rows, tmp_path, progress=False) == found and len(seen) == 2
    assert plan(recipe, found=found).arms[2].make([])[0].sink_dims == (92, 5)
    with pytest.raises(RecipeError, match="has a calibration, which has not run"):
        plan(recipe)


def test_heads_of_guidance_are_hunted_with_the_detector_as_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = validate(
        changed(
            {
                "model": {"zoo": "shapes-sd", "kind": "image"},
                "data": {"zoo": "prompts", "limit": 2},
                "task": "image",
                "interventions": [{"method": "SoftPAG", "params": {"scale": 2.0}, "heads": "calibrated", "where": {"layers": 6}}],
                "calibration": {
                    "search": "headhunter",
                    "data": {"zoo": "prompts", "split": "calibration", "limit": 2},
                    "options": {"rounds": 1, "steps": 1, "score": "there", "batch": 2},
                    "top": 2,
                },
                "decoding": {"guidance_scale": 1.0, "num_inference_steps": 9},
                "metrics": ["layout"],
                "primary": "layout.valid",
            }
        )
    )  # fmt: skip
    assert check(recipe) == []

    def apart(spec: DataSpec) -> list[dict[str, Any]]:
        return [{"id": f"{i}", "prompt": f"a {c} star", "of": spec.split} for i, c in enumerate(("red", "blue"))]

    (heads,) = calibrate(recipe, Subject(zoo.load("shapes-sd")), apart, None, progress=False).values()
    assert len(heads) == 2 and heads.layers == (6,) and heads.provenance["score"] == "there"
    bad = recipe.model_copy(
        update={"calibration": recipe.calibration.model_copy(update={"options": {"score": "pick"}})}
    )
    with pytest.raises(RecipeError, match="score: 'pick'; there are valid, there, right"):
        calibrate(bad, Subject(None), apart, None, progress=False)


def test_judges_of_pictures() -> None:
    from attnsteer.zoo.shapes.render import render
    from attnsteer.zoo.shapes.world import Ground, Object, Scene

    red = Object("star", "red", "large", 0.5, 0.5, 0.14)
    pictures = list(render([Scene((red,), Ground())]))
    for prompt, score in (("a red star", 1.0), ("a red star and a blue circle", 0.5), ("a blue circle", 0.0)):
        assert searches.there(pictures, [prompt]) == [score] and searches.valid(pictures, [prompt]) == [1.0]
        assert searches.right(pictures, [prompt]) == [(score == 1.0) / 2 + score / 2]


def test_what_a_choice_adds_to_a_prompt() -> None:
    """As lm-evaluation-harness splits: the blank between the two belongs to the choice."""

    class Characters:
        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            # "ab" is one token, so that it can join over the seam.
            ids = [ord(c) for c in text.replace("ab", "\x01")]
            return SimpleNamespace(input_ids=[0, *ids] if add_special_tokens else ids)

    tokenizer = Characters()
    assert continuations(tokenizer, "x:", ["y", "zz"]) == ([0, 120, 58], [[32, 121], [32, 122, 122]])
    assert continuations(tokenizer, "x:\n", ["y"]) == ([0, 120, 58], [[10, 121]])
    assert recipe_calibration.weights(torch.nn.Linear(1, 1)) != recipe_calibration.weights(torch.nn.Linear(1, 2))
