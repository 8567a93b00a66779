"""Recipes: what is accepted, what is refused and in which words, sweeps, and that nothing but a RecipeError comes out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnsteer.errors import RecipeError
from attnsteer.recipe import yaml
from attnsteer.recipe.checks import check
from attnsteer.recipe.loading import load_recipe
from attnsteer.recipe.resolved import resolve
from attnsteer.recipe.schema import json_schema, template_fields
from attnsteer.recipe.sweep import points
from attnsteer.recipe.validate import validate, with_values
from tests.run.common import BASE, CALIBRATION, REMOVED, changed, recipe

HUB = {"hub": "a/b", "kind": "lm", "architecture": "llama"}
ROWS = {"file": "a.jsonl", "format": "choices"}


def refused(data: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        validate(data)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": [0]}, ["seed: unknown field", "Did you mean 'seeds'"]),
        ({"share": "on"}, ["share: ", "'off' or 'auto'"]),
        ({"model.zooo": "a"}, ["model.zooo: unknown field", "Did you mean 'zoo'"]),
        ({"interventions.0.parms": {}}, ["interventions.0.parms: unknown field", "Did you mean 'params'"]),
        ({"calibration": CALIBRATION | {"topp": 1}}, ["calibration.topp: unknown field", "Did you mean 'top'"]),
        ({"controls.random": 1}, ["controls.random: unknown field", "random_heads"]),
        ({"claims": [{"metric": "choice.accuracy", "source": "x"}]}, ["claims.0.value: is missing"]),
        ({"task": REMOVED}, ["task: is missing"]),
        ({"schema": 2}, ["schema: input should be 1, not 2"]),
        ({"name": "Act"}, ["name: string should match pattern", "'Act'"]),
        ({"task": "choices"}, ["task: input should be 'choice', 'answer', 'caption' or 'image', not 'choices'"]),
        ({"batch_size": "50"}, ["batch_size: input should be a valid integer, not '50'"]),
        ({"batch_size": 2.0}, ["batch_size: input should be a valid integer"]),
        ({"batch_size": True}, ["batch_size: input should be a valid integer"]),
        ({"batch_size": 0}, ["batch_size: input should be greater than or equal to 1, not 0"]),
        ({"batch_size": 10**12}, ["batch_size: input should be less than or equal to 10000"]),
        ({"data.limit": 10**18}, ["data.limit: input should be less than or equal to 1000000000"]),
        ({"data.limit": 10**30}, ["data.limit: "]),
        ({"seeds": [2**31]}, ["seeds.0: input should be less than 2147483648"]),
        ({"seeds": []}, ["seeds: list should have at least 1 item"]),
        ({"seeds": [1, 1]}, ["seeds: one is given twice"]),
        ({"seeds": 0}, ["seeds: input should be a valid array"]),
        ({"interventions": []}, ["interventions: list should have at least 1 item"]),
        ({"interventions": {"method": "ACT"}}, ["interventions: input should be a valid array"]),
        ({"interventions.0.params": [1]}, ["interventions.0.params: input should be an object"]),
        ({"interventions.0.heads": {"a": [0]}}, ["interventions.0.heads: 'a' is not the index of a layer"]),
        ({"interventions.0.heads": {"1": []}}, ["interventions.0.heads: layer 1 has the heads []"]),
        ({"interventions.0.heads": {"1": [-1]}}, ["layer 1 has the heads [-1]"]),
        ({"interventions.0.heads": {"1": [True]}}, ["interventions.0.heads.1.0: input should be a valid integer"]),
        ({"interventions.0.heads": 3}, ["interventions.0.heads: "]),
        ({"metrics": []}, ["metrics: list should have at least 1 item"]),
        ({"metrics": [3]}, ["metrics.0: input should be an object, not 3"]),
        ({"metrics": [{"parser": "own"}]}, ["metrics.0.name: is missing"]),
        ({"metrics": ["choice", "choice"]}, ["has a name twice"]),
        ({"primary": "pope.f1"}, ["primary: 'pope.f1' is of none of the metrics choice"]),
        ({"primary": "accuracy"}, ["primary: string should match"]),
        ({"model.kind": "vlm"}, ["model: shapes-lm is a model of kind lm, not vlm"]),
        ({"model.zoo": "shapes-ml"}, ["model: no model 'shapes-ml' in the zoo", "Did you mean 'shapes-lm'"]),
        ({"model.path": "a"}, ["model: give exactly one of zoo, path, hub, vllm; there is zoo and path"]),
        ({"model.zoo": REMOVED}, ["model: give exactly one of zoo, path, hub, vllm; there is none"]),
        ({"model.revision": "main"}, ["model: revision is for a model from the hub"]),
        ({"model.device": "gpu"}, ["model.device: string should match pattern"]),
        ({"model.device": "cpu", "model.device_map": "auto"}, ["model: give device or device_map, not both"]),
        ({"model.dtype": "float64"}, ["model.dtype: input should be 'float32', 'bfloat16' or 'float16'"]),
        ({"model": {"zoo": "shapes-sd", "kind": "image"}}, ["the task choice needs a model of kind lm or vlm"]),
        ({"data.file": "a.jsonl"}, ["data: give exactly one of zoo, file, hub"]),
        ({"data.zoo": "readings"}, ["data: no source 'readings'", "Did you mean 'reading'"]),
        ({"data.zoo": "captions"}, ["data of captions is for the task caption, not choice"]),
        ({"data": {"file": "a.jsonl"}}, ["data: give the format of the rows: choices"]),
        ({"data": ROWS | {"format": "pope"}}, ["data of pope is for the task answer, not choice"]),
        ({"data": ROWS | {"revision": "x"}}, ["data: revision and config are for hub data"]),
        ({"data.format": "choices"}, ["data: format, columns and images are for files"]),
        ({"data.limit": None}, ["data: a zoo source has no end; give a limit"]),
        ({"prompt": "{question}"}, ["prompt is for file and hub data"]),
        ({"prompt": "{question.__class__}", "data": ROWS}, ["prompt: the field {question.__class__} is not a plain name"]),
        ({"prompt": "{0}", "data": ROWS}, ["prompt: the field {0} is not a plain name"]),
        ({"prompt": "{a!r}", "data": ROWS}, ["prompt: the field {a} is not a plain name"]),
        ({"prompt": "{a:>10}", "data": ROWS}, ["prompt: the field {a} is not a plain name"]),
        ({"prompt": "{a", "data": ROWS}, ["prompt: expected '}'"]),
        ({"decoding": {"custom_generate": "a/b", "trust_remote_code": True}}, ["decoding: custom_generate is not for a recipe"]),
        ({"baseline": {"trust_remote_code": True}}, ["baseline: trust_remote_code is not for a recipe"]),
        ({"sweep": {"decoding.custom_generate": ["a/b"]}}, ["custom_generate is not for a recipe"]),
        ({"sweep": {"decoding": [{"custom_generate": "a/b"}]}}, ["custom_generate is not for a recipe"]),
        ({"requires": ["os; import x"]}, ["requires.0: string should match pattern"]),
        ({"interventions.0.heads": "calibrated"}, ["interventions.0.heads is calibrated, but there is no calibration"]),
        ({"calibration": CALIBRATION}, ['no intervention has "heads: calibrated"']),
        (
            {"calibration": CALIBRATION, "calibration.data.split": "test", "interventions.0.heads": "calibrated"},
            ["the calibration split is the test split (test)"],
        ),
        ({"sweep": {"interventions.1.params.beta": [1]}}, ["interventions has 1 items, from 0"]),
        ({"sweep": {"interventions.0.parms.beta": [1]}}, ["interventions.0 has no 'parms'", "Did you mean 'params'"]),
        ({"sweep": {"data.limit": [1]}}, ["'data.limit' cannot be swept", "--set"]),
        ({"sweep": {"interventions.0.params.beta": []}}, ["give at least one value"]),
        ({"sweep": {"interventions.0.params.beta": [1, 1]}}, ["none of them twice"]),
        ({"sweep": {"interventions.0.method": [3]}}, ["interventions.0.method: input should be a valid string"]),
        ({"sweep": {"controls.random_heads": [1000]}}, ["with controls.random_heads=1000"]),
        ({"sweep": {f"decoding.a{i}": list(range(40)) for i in range(2)}}, ["1600 points; at most 1000"]),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    message = refused(changed(changes))
    assert message.startswith("recipe: ") and all(w in message for w in words), message
    assert "\n" not in message


@pytest.mark.parametrize("data", [None, [], "a", 3, [BASE], {}, {"schema": 1}, {1: 2}])
def test_what_is_no_recipe(data: Any) -> None:
    assert refused(data).startswith("recipe: ")


def test_several_problems_come_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.dump(changed({"batch_size": "x", "data.limits": 3, "seeds": [0.5], "tasks": 1, "name": ""})))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    lines = path.read_text().splitlines()
    assert message.startswith(f"{path}: ")
    for field, start in (
        ("batch_size", "batch_size:"),
        ("data.limits", "  limits:"),
        ("seeds.0", "- 0.5"),
        ("tasks", "tasks:"),
    ):
        assert f"{field} (line {1 + next(i for i, s in enumerate(lines) if s.startswith(start))})" in message
    many = refused(changed({f"x{i}": i for i in range(9)}))
    assert many.count("unknown field") == 5 and many.endswith("; and 4 more.")


def test_samples_apart_by_range_are_apart() -> None:
    data = changed(
        {"calibration": CALIBRATION, "calibration.data.split": "test", "interventions.0.heads": "calibrated"}
    )
    assert validate(changed({"calibration.data.start": 10}, data)).calibration.data.start == 10
    assert "is the test split" in refused(changed({"calibration.data.start": 9}, data))
    assert validate(changed({"data.start": 12}, data))


def test_defaults_and_round_trip(tmp_path: Path) -> None:
    first = recipe()
    assert (
        first.seeds == [0] and first.controls.zero and first.controls.random_heads == 0 and first.data.split == "test"
    )
    assert first.interventions[0].heads == {"5": [0, 7], "3": [1]} and first.metrics[0].name == "choice"
    path = tmp_path / "a.yaml"
    path.write_text(first.canonical(), encoding="utf-8")
    second = load_recipe(path)
    assert second.dump() == first.dump() and second.canonical() == first.canonical() and second.folder == tmp_path
    assert second.digest() == first.digest() and len(first.digest()) == 64
    with pytest.raises(Exception, match="frozen"):
        first.batch_size = 3


def test_the_digest_is_of_what_can_change_a_figure() -> None:
    first = recipe().digest()
    assert recipe(notes="other", summary="other").digest() == first
    assert recipe(claims=[{"metric": "choice.accuracy", "value": 1.0, "source": "x"}]).digest() == first
    for changes in ({"batch_size": 8}, {"seeds": [1]}, {"interventions__0__params__beta": 0.5}, {"data__start": 1}):
        assert recipe(**changes).digest() != first


def test_points_are_the_product_and_carry_their_values() -> None:
    swept = recipe(sweep={"interventions.0.params.beta": [0.2, 0.4], "decoding.top": ["a", None]})
    found = points(swept)
    assert [p.values["interventions.0.params.beta"] for p in found] == [0.2, 0.2, 0.4, 0.4]
    assert [p.recipe.decoding["top"] for p in found] == ["a", None, "a", None]
    assert [p.recipe.interventions[0].params["beta"] for p in found] == [0.2, 0.2, 0.4, 0.4]
    assert all(not p.recipe.sweep for p in found) and points(recipe())[0].values == {}
    # A parameter at its default may be swept, and a part of a selection.
    assert len(points(recipe(sweep={"interventions.0.params.alpha": [1, 2]}))) == 2


def test_values_set_by_path() -> None:
    found = with_values(recipe(), {"data.limit": 3, "interventions.0.params.decode": "running"})
    assert found.data.limit == 3 and found.interventions[0].params == {"beta": 0.4, "decode": "running"}
    for values, words in (
        ({"data.limits": 3}, "data.limits: unknown field"),
        ({"dta.limit": 3}, "the recipe has no 'dta'"),
        ({"seeds.4": 3}, "seeds has 1 items"),
        ({"seeds.0.a": 3}, "seeds.0 has no 'a'"),
        ({"": 3}, "unknown field"),
    ):
        with pytest.raises(RecipeError, match=words):
            with_values(recipe(), values)


def test_resolved_paths_are_absolute_and_a_tiny_run_is_small(tmp_path: Path) -> None:
    data = changed(
        {
            "model": HUB,
            "data": ROWS | {"images": "pictures"},
            "interventions.0.heads": "heads.safetensors",
            "tiny": {"interventions.0.heads": {"0": [0]}},
            "seeds": [1, 2],
            "decoding": {"max_new_tokens": 512, "num_inference_steps": 50, "other": 3},
        }
    )
    path = tmp_path / "a.yaml"
    path.write_text(yaml.dump(data))
    full, tiny = resolve(load_recipe(path)), resolve(load_recipe(path), tiny=True)
    assert full.data.file == str(tmp_path / "a.jsonl") and full.data.images == str(tmp_path / "pictures")
    assert full.interventions[0].heads == str(tmp_path / "heads.safetensors") and not full.tiny
    assert full.data.limit is None and full.seeds == [1, 2] and resolve(full).dump() == full.dump()
    assert tiny.data.limit == 4 and tiny.seeds == [1] and tiny.batch_size == 2 and tiny.model.device == "cpu"
    assert tiny.interventions[0].heads == {"0": [0]}
    assert tiny.decoding == {"max_new_tokens": 8, "num_inference_steps": 2, "other": 3}


def test_fields_of_templates() -> None:
    assert template_fields("{a} {b_1}{a} {{c}}") == ("a", "b_1")


def test_the_json_schema_describes_every_field() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False and "schema" in schema["properties"]
    for section in (schema, *schema["$defs"].values()):
        for name, field in section.get("properties", {}).items():
            assert field.get("description"), name
    assert {"type": "string"} in [
        {k: v for k, v in kind.items() if k == "type"} for kind in schema["properties"]["metrics"]["items"]["anyOf"]
    ]


# What a value of a recipe is replaced by.
VALUES = [
    None, True, -1, 0, 1, 2**31, 10**18, 10**400, 0.5, -0.0, 1e308, "", "x", "a.b", "{a.b}", "zoo:act", "zoo:../..", "calibrated",
    "../x", "\x00", "\ud800", [], [[]], [1, 1], {}, {"sample": "x"}, {"sample": 1}, {"$pairs": 3}, {"$float": "nan"}, {"1": [0]},
    {"a": {"b": [{}]}}, ["choice"], [{"name": "choice"}], {"interventions.0.params.beta": [1, 2]},
    ACT := {"method": "ACT"}, [ACT], CALIBRATION,
    HUB, ROWS,
]  # fmt: skip
WHOLE = changed({"calibration": CALIBRATION, "interventions.0.heads": "calibrated", "sweep": {"decoding.a": [1, 2]}})
KEYS = [*BASE] + (
    "calibration sweep controls baseline decoding seeds batch_size claims notes prompt tiny zoo file format limit start split "
    "method params heads where zero beta search top into requires"
).split()


def mutated(data: Any, changes: list[tuple[list[int], int, int, bool]]) -> Any:
    """`data` with values replaced, or keys added, at places that the numbers choose."""
    data = copy.deepcopy(data)
    for way, key, value, add in changes:
        here = data
        for step in way:
            inner = list(here.values()) if isinstance(here, dict) else here
            inner = [v for v in inner if isinstance(v, (dict, list)) and v]
            if not inner:
                break
            here = inner[step % len(inner)]
        new = copy.deepcopy(VALUES[value % len(VALUES)])
        if isinstance(here, list):
            here[key % len(here)] = new
        else:
            names = list(here)
            here[KEYS[key % len(KEYS)] if add or not names else names[key % len(names)]] = new
    return data


MUTATIONS = st.lists(
    st.tuples(st.lists(st.integers(0, 20), max_size=4), st.integers(0, 40), st.integers(0, 60), st.booleans()),
    min_size=1,
    max_size=4,
)
PROFILE = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@settings(max_examples=500, **PROFILE)
@given(MUTATIONS, st.booleans())
def test_changed_recipes_load_or_are_refused(changes: list[Any], searched: bool) -> None:
    data = mutated(WHOLE if searched else BASE, changes)
    try:
        found = validate(data)
    except RecipeError as error:
        assert str(error).startswith("recipe: ")
    else:
        assert validate(found.dump()).dump() == found.dump()


@settings(max_examples=500, **PROFILE)
@given(MUTATIONS, st.booleans())
def test_the_check_of_changed_recipes_gives_sentences(changes: list[Any], searched: bool) -> None:
    places = ("interventions", "calibration", "metrics", "controls")
    base = WHOLE if searched else BASE
    part = mutated({k: base[k] for k in places if k in base}, changes)
    try:
        found = validate({**base, **part})
        resolve(found), resolve(found, tiny=True)
    except RecipeError:
        return
    assert all(isinstance(p, str) and p for p in check(found))
