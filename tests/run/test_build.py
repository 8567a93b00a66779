"""Arms: what each one is, which are the same, values of samples, and controls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnsteer import ACT, PASTA, HeadSet, Where, capture, get_method, methods
from attnsteer.errors import RecipeError
from attnsteer.recipe.arms import head_counts, random_heads, random_heads_of_all
from attnsteer.recipe.checks import check
from attnsteer.recipe.parameters import ZERO
from attnsteer.run.build import Plan, plan
from attnsteer.site import Site
from attnsteer.testing import tiny_transformers, tiny_transformers_inputs
from tests.run.common import BASE, changed, recipe

SIZES = [Site(name=f"l{i}", layer=i, kind="self", heads=8, kv_heads=8, modality="text") for i in range(6)]


def arms(**changes: Any) -> Plan:
    return plan(recipe(**changes), SIZES)


def test_baseline_zero_method_and_random_heads() -> None:
    found = arms(controls={"random_heads": 2}, decoding={"a": 1, "b": 2}, baseline={"b": 3})
    assert [(a.id, a.kind) for a in found.arms] == [
        ("baseline", "baseline"), ("zero", "zero"), ("method", "method"), ("random-1", "random"), ("random-2", "random"),
    ]  # fmt: skip
    assert found.arms[0].decoding == {"a": 1, "b": 3} and found.arms[2].decoding == {"a": 1, "b": 2}
    assert found.points == [
        {"point": 0, "values": {}, "arms": {a: a for a in ("baseline", "zero", "method", "random-1", "random-2")}}
    ]
    made = [a.make([{"id": "x"}]) for a in found.arms]
    heads = HeadSet({5: [0, 7], 3: [1]})
    assert made[0] == [] and made[1] == [ACT(heads, beta=1.0)] and made[2] == [ACT(heads, beta=0.4)]
    for (method,) in made[3:]:
        assert method.new(heads=heads) == made[2][0] and method.heads.layers == (3, 5)
        assert [len(method.heads[layer]) for layer in (3, 5)] == [1, 2]
    assert made[3] != made[4]


def test_arms_without_controls() -> None:
    assert [a.id for a in arms(controls={"zero": False}).arms] == ["baseline", "method"]


def test_random_heads_are_the_same_everywhere_and_differ_by_draw() -> None:
    heads = HeadSet({2: [1, 4, 6], 9: [0]}, shape=(12, 16))
    draws = [random_heads(heads, None, n) for n in range(1, 40)]
    assert draws[0].to_dict() == {2: [7, 9, 11], 9: [13]}
    assert draws[0] == random_heads(heads, {2: 16, 9: 16}, 1) and all(d.shape == heads.shape for d in draws)
    assert len({str(d) for d in draws}) > 35
    drawn = {h for d in draws for h in d[2]}
    assert drawn == set(range(16)) and all(len(d[2]) == 3 and len(d[9]) == 1 for d in draws)
    with pytest.raises(RecipeError, match="how many heads layer 2 has is not known"):
        random_heads(HeadSet({2: [1]}), None, 1)
    with pytest.raises(RecipeError, match="3 heads are chosen in layer 2, which has 2"):
        random_heads(heads, {2: 2}, 1)


def test_random_heads_of_everywhere() -> None:
    made = arms(controls={"random_heads": 9, "random_from": "where"}, interventions__0__where={"layers": [1, 3, 5]})
    drawn = [m.make([])[0].heads for m in made.arms[3:]]
    assert all(len(d) == 3 and set(d.layers) <= {1, 3, 5} for d in drawn)
    assert {layer for d in drawn for layer in d.layers} == {1, 3, 5} and len({str(d) for d in drawn}) > 7
    with pytest.raises(RecipeError, match="3 heads are chosen, and there are 2"):
        random_heads_of_all(HeadSet({2: [1, 4, 6]}), {0: 1, 1: 1}, 1)


def test_random_heads_of_both() -> None:
    made = arms(controls={"random_heads": 2, "random_from": "both"}, interventions__0__where={"layers": [1, 3, 5]})
    assert [a.id for a in made.arms[3:]] == ["random-1", "random-2", "random-anywhere-1", "random-anywhere-2"]
    drawn = [m.make([])[0].heads for m in made.arms[3:]]
    assert all(d.layers == (3, 5) for d in drawn[:2]) and all(set(d.layers) <= {1, 3, 5} for d in drawn[2:])
    assert {a.kind for a in made.arms[3:]} == {"random"}


def test_other_spans() -> None:
    marked = {"method": "PASTA", "params": {"spans": {"sample": "fact"}, "alpha": 0.1}}
    made = arms(interventions=[marked], controls={"spans": ["random", "other"]})
    assert [(a.id, a.kind) for a in made.arms[3:]] == [("span-random", "span"), ("span-other", "span")]
    sample = {"id": "x", "fact": ["a"], "random": ["b"], "other": []}
    assert [a.make([sample])[0].spans for a in made.arms[2:]] == [(("a",),), (("b",),), ((),)]
    assert all(a.interventions[0].params["alpha"] == 0.1 for a in made.arms[2:])
    with pytest.raises(RecipeError, match=r"controls\.spans\.0: 'fact' cannot .* that is what interventions\.0 marks"):
        arms(interventions=[marked], controls={"spans": ["fact"]})
    assert check(recipe(controls={"spans": ["other"]})) == [
        "controls.spans.0: 'other' cannot stand in the place of spans: no intervention has spans: {sample: KEY}."
    ]


def test_heads_are_counted_in_the_stack_that_is_steered() -> None:
    vision = Site(name="v", layer=0, kind="self", heads=4, kv_heads=4, modality="vision")
    assert head_counts([vision, *SIZES[:2]], "vlm") == {0: 8, 1: 8} and head_counts(None, "lm") is None


def test_a_sweep_shares_equal_arms() -> None:
    found = arms(
        sweep={"interventions.0.params.beta": [0.2, 0.4], "interventions.0.params.decode": ["frozen", "running"]}
    )
    ids = [a.id for a in found.arms]
    assert ids[:3] == ["baseline", "zero@1", "method@1"] and sorted(ids[3:]) == [
        "method@2",
        "method@3",
        "method@4",
        "zero@2",
    ]
    # The zero arm depends on `decode`, not on beta.
    assert [p["arms"]["zero"] for p in found.points] == ["zero@1", "zero@2", "zero@1", "zero@2"]
    assert [p["arms"]["method"] for p in found.points] == ["method@1", "method@2", "method@3", "method@4"]
    assert {p["arms"]["baseline"] for p in found.points} == {"baseline"}
    by_id = {a.id: a for a in found.arms}
    for point in found.points:
        method = by_id[point["arms"]["method"]].interventions[0]
        assert method.params["beta"] == point["values"]["interventions.0.params.beta"]


def test_what_arms_json_says_has_no_objects() -> None:
    import json

    found = arms(interventions__0__where={"layers": "2-5", "phases": "prefill"})
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["arms"][2]["interventions"] == [
        {
            "method": "ACT",
            "params": {"beta": 0.4},
            "heads": {"3": [1], "5": [0, 7]},
            "where": {"layers": [2, 3, 4, 5], "phases": ["prefill"]},
        }
    ]


def test_values_of_samples_are_taken_batch_by_batch() -> None:
    spec = {"method": "PASTA", "params": {"spans": {"sample": "marks"}, "alpha": 0.5}}
    method = next(a for a in arms(interventions=[spec]).arms if a.id == "method")
    assert method.interventions[0].per_sample() == ("marks",)
    tokenizer = object()
    samples = [{"id": "a", "marks": [[0, 2]]}, {"id": "b", "marks": ["red", [4, 5]]}]
    (made,) = method.make(samples, SimpleNamespace(tokenizer=tokenizer))
    assert made == PASTA((((0, 2),), ("red", (4, 5))), alpha=0.5) and made.tokenizer is tokenizer
    (other,) = method.make(samples[:1], SimpleNamespace(tokenizer=None, processor=SimpleNamespace(tokenizer=tokenizer)))
    assert other.spans == (((0, 2),),) and other.tokenizer is tokenizer
    with pytest.raises(
        RecipeError, match=r"interventions\.0\.params\.spans: sample 'c' has no 'marks'; it has id, mark\. Did"
    ):
        method.make([{"id": "c", "mark": 1}])
    with pytest.raises(RecipeError, match=r"interventions\.0 \(PASTA\): PASTA\(spans="):
        method.make([{"id": "d", "marks": 3}])


def test_a_number_of_each_sample_is_a_strength_of_its_own() -> None:
    spec = {"method": "ACT", "params": {"beta": {"sample": "force"}, "threshold": {"sample": "limit"}}}
    source = recipe(interventions=[spec])
    assert check(source) == []
    _, zero, method = plan(source, SIZES).arms
    samples = [{"id": "a", "force": 0.2, "limit": 0.1}, {"id": "b", "force": None, "limit": 0.3}]
    assert method.make(samples) == [ACT(beta=[0.2, None], threshold=[0.1, 0.3])]
    assert zero.make(samples) == [ACT(beta=1.0, threshold=[0.1, 0.3])]
    for wrong, words in (
        (2.0, r"ACT\(beta=\[2.0\]\): give a number from 0 to 1, or one per sample"),
        ("much", "not str"),
    ):
        with pytest.raises(RecipeError, match=rf"interventions\.0 \(ACT\): .*{words}"):
            method.make([{**samples[0], "force": wrong}])
    with pytest.raises(RecipeError, match=r"interventions\.0\.params\.beta: sample 'c' has no 'force'"):
        method.make([{"id": "c"}])


def test_keys_that_are_no_texts_and_infinities() -> None:
    gate = {
        "method": "HeadGate",
        "params": {"gates": {"$pairs": [[[1, 3], 0.5]]}},
        "zero": {"gates": {"$pairs": [[[1, 3], 1.0]]}},
    }
    baseline, zero, method = arms(interventions=[gate]).arms
    assert method.make([])[0].gates == {(1, 3): 0.5} and zero.make([])[0].gates == {(1, 3): 1.0}
    blur = {"method": "SEG", "params": {"sigma": {"$float": "inf"}}, "where": {"layers": 0}}
    assert arms(interventions=[blur]).arms[2].make([])[0].sigma == float("inf")


def test_heads_of_files_inline_and_of_the_zoo(tmp_path: Path) -> None:
    HeadSet({1: [2]}, shape=(6, 8)).save(tmp_path / "found.safetensors")
    source = recipe(interventions__0__heads="found.safetensors")
    source._source = tmp_path / "a.yaml"
    assert plan(source).arms[2].make([])[0].heads == HeadSet({1: [2]})
    assert plan(recipe(interventions__0__heads="zoo:act")).arms[2].make([])[0].heads.shape == (6, 8)


def test_heads_of_a_method_without_that_field_go_into_its_where() -> None:
    spec = {"method": "SpotLight", "params": {"spans": ["x"]}, "heads": {"1": [0, 2]}, "where": {"phases": "prefill"}}
    made = arms(interventions=[spec]).arms[2].make([])[0]
    assert made.where == Where(heads=HeadSet({1: [0, 2]}), phases="prefill")


# Gates name their heads, bases are off at the model's own, and a frozen map is off where the run is the clean one.
NEVER_OFF = {"AttentionBuckets", "FreezeMaps", "HeadGate"}


def test_every_method_of_the_library_has_a_zero_strength_that_builds(tmp_path: Path) -> None:
    own = {n for n in methods() if get_method(n).__module__.startswith("attnsteer.methods.")} - NEVER_OFF
    assert own == {n for n in ZERO if n in methods()}
    model = tiny_transformers("llama")
    with torch.no_grad(), capture(model, what="output", to=tmp_path / "seen"):
        model(**tiny_transformers_inputs("llama", model, batch=1, length=4))
    needed = {key: {"sample": key} for key in ("words", "boxes", "spans", "groups")}
    needed |= {"negative": "dark", "local": [[0]], "summary": [[1]], "value": 2.0}
    sources = {"InjectMap": "previous", "PatchHeads": str(tmp_path / "seen")}
    for name in sorted(own):
        known = needed | {"source": sources.get(name)}
        params = {k: v for k, v in known.items() if k in {f.name for f in _fields(name)}}
        data = changed({"interventions": [{"method": name, "params": params, "where": {"layers": 0}}]})
        from attnsteer.recipe.validate import validate

        assert check(validate(data)) == [], name


def _fields(name: str) -> Any:
    import dataclasses

    return dataclasses.fields(get_method(name))


HUB = {"hub": "a/b", "kind": "lm", "architecture": "llama"}
TUNING = {"method": "ZeroTuning"}
GATE = {"method": "HeadGate", "params": {"gates": {"$pairs": [[[0, 0], 0.5]]}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"interventions.0.method": "Act"}, ["interventions.0.method: there is no method 'Act'", "Did you mean 'ACT'"]),
        ({"interventions.0.params": {"betta": 1}}, ["params.betta: ACT has no such parameter", "Did you mean 'beta'"]),
        ({"interventions.0.params": {"heads": {}}}, ["It has a place of its own, interventions.0.heads"]),
        ({"interventions.0.params": {"beta": "0.4"}}, ["interventions.0.params.beta: '0.4' is str; float is needed"]),
        ({"interventions.0.params": {"beta": True}}, ["True is bool; float is needed"]),
        ({"interventions.0.params": {"min_rows": 1.5}}, ["1.5 is float; int is needed"]),
        ({"interventions.0.params": {"beta": None}}, ["None is NoneType; float is needed"]),
        ({"interventions.0.params": {"beta": 1e300}}, ["interventions.0 (ACT): ACT(beta=1e+300"]),
        ({"interventions.0.params": {"beta": {"$float": "inf"}}}, ["interventions.0 (ACT): ACT(beta=inf"]),
        ({"interventions.0.params": {"beta": {"$float": "nan"}}}, ['$float is "inf" or "-inf"']),
        ({"interventions.0.params": {"beta": {"$pairs": [1]}}}, ["$pairs is a list of [key, value]"]),
        ({"interventions.0.params": {"beta": {"$pairs": [[{}, 1]]}}}, ["a key of $pairs is a text"]),
        ({"interventions.0.params": {"beta": [{"sample": "x"}]}}, ["stands for a whole parameter"]),
        ({"interventions.0.params": {"beta": {"sample": 3}}}, ["give the name of a key"]),
        ({"interventions.0.params": {"min_rows": {"sample": "x"}}}, ["ACT takes one min_rows for all samples (integer"]),
        ({"interventions.0.params": {"decode": {"sample": "x"}}}, ["ACT takes one decode for all samples (one of"]),
        ({"interventions.0.zero": {"gamma": 1.0}}, ["interventions.0.zero.gamma: ACT has no such parameter"]),
        ({"interventions.0.zero": {"beta": 7.0}}, ["interventions.0 (ACT): ACT(beta=7.0"]),
        ({"interventions.0.where": {"layer": 1}}, ["interventions.0.where.layer: Where has", "Did you mean 'layers'"]),
        ({"interventions.0.where": {"layers": "a"}}, ["interventions.0.where: Where(layers='a')"]),
        ({"interventions.0.where": {"modules": ["("]}}, ["is not a regular expression"]),
        ({"interventions.0.where": {"heads": {"a": [1]}}}, ["interventions.0.where: "]),
        ({"interventions.0.heads": "gone.safetensors"}, ["interventions.0.heads: HeadSet.load: there is no file gone"]),
        ({"interventions.0.heads": "zoo:atc"}, ["interventions.0.heads: shapes-lm has no heads 'atc'", "Did you mean 'act'"]),
        ({"interventions.0.heads": "zoo:../.."}, ["shapes-lm has no heads '../..'"]),
        ({"interventions.0.heads": "zoo:act", "model": HUB}, ["this recipe has another one"]),
        ({"interventions.0.heads": None, "controls.random_heads": 1}, ["no intervention names heads"]),
        ({"interventions": [GATE]}, ["which parameters turn HeadGate off"]),
        ({"interventions": [{"method": "PASTA"}]}, ["interventions.0.params: PASTA needs spans"]),
        ({"metrics": ["choise"], "primary": "choise.x"}, ["metrics.0: there is no metric 'choise'", "Did you mean 'choice'"]),
        ({"metrics": [{"name": "choice", "parser": "own"}]}, ["metrics.0: the metric choice has no option 'parser'"]),
        ({"metrics": ["choice", {"name": "pope", "parser": "mine"}]}, ["metrics.1: pope: no parser 'mine'"]),
        ({"metrics": ["choice", {"name": "fid", "reference": "gone.safetensors"}]}, ["metrics.1 (fid): there is no file"]),
        ({"primary": "choice.acuracy"}, ["primary: choice has no estimate 'acuracy'", "Did you mean 'accuracy'"]),
        ({"claims": [{"metric": "pope.f1", "value": 1.0, "source": "x"}]}, ["claims.0.metric: 'pope.f1' is of none"]),
        ({"model": {"hub": "a/b", "kind": "lm"}}, ["model.architecture: is needed for --tiny"]),
        ({"model": {"hub": "a/b", "kind": "lm", "architecture": "lama"}}, ["no tiny model 'lama'", "Did you mean 'llama'"]),
        ({"model": {"path": "gone", "kind": "lm", "architecture": "llama"}}, ["model.path: there is no folder gone"]),
        ({"data": {"file": "gone.jsonl", "format": "choices"}}, ["data.file: there is no file gone.jsonl"]),
        ({"sweep": {"interventions.0.params.beta": [0.5, 9.0]}}, ["ACT(beta=9.0"]),
        ({"prefix": "shared"}, ["prefix: ACT may act on the beginning of a prompt by what follows it"]),
        ({"prefix": "shared", "share": "auto"}, ["prefix: shared is for arms that answer by themselves"]),
        ({"prefix": "shared", "interventions": [{"method": "PASTA", "params": {"spans": [[[0, 2]]]}}]}, ["PASTA marks spans"]),
        ({"prefix": "shared", "interventions": [{"method": "AttentionBuckets", "zero": {"bases": [100]}}]}, ["prefix: AttentionB"]),
        ({"prefix": "shared", "interventions": [{"method": "ZeroTuning", "params": {"gamma": {"sample": "x"}}}]}, ["by sample"]),
        ({"prefix": "shared", "interventions": [{"method": "ZeroTuning", "where": {"rows": "last"}}]}, ["prefix: ZeroT"]),
        ({"prefix": "shared", "interventions": [TUNING], "task": "answer", "decoding": {"num_beams": 2}}, ["num_beams"]),
    ],
)  # fmt: skip
def test_what_the_check_finds(changes: dict[str, Any], words: list[str]) -> None:
    from attnsteer.recipe.validate import validate

    problems = check(validate(changed(changes)))
    assert any(all(w in p for w in words) for p in problems), problems


def test_a_good_recipe_has_no_problems() -> None:
    assert check(recipe()) == [] == check(recipe(controls={"random_heads": 3})) and BASE["name"] == "act/test"
