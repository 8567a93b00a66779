"""Tuned settings: a preset is what its recipe runs, with what a prompt brings filled in."""

from __future__ import annotations

import pytest

from attnsteer import HeadSet, Where, get_method, zoo
from attnsteer.errors import SelectionError, UnknownName
from attnsteer.recipe import load_recipe
from attnsteer.recipe.arms import methods_of
from attnsteer.recipe.parameters import PLACEHOLDERS


@pytest.mark.parametrize(("model", "method", "recipe"), zoo.presets())
def test_a_preset_is_what_its_recipe_runs(model: str, method: str, recipe: str) -> None:
    source = load_recipe(recipe)
    (own,) = methods_of(source)
    assert (source.model.zoo, own.name) == (model, method) and "calibration" in source.notes
    brought = {v["sample"]: k for k, v in own.params.items() if isinstance(v, dict) and set(v) == {"sample"}}
    sample = {"id": "x", **{key: PLACEHOLDERS[name] for key, name in brought.items()}}
    given = {name: [sample[key]] for key, name in brought.items()}
    assert zoo.preset(model, method, **given) == own.make([sample])
    assert zoo.preset(model, get_method(method), **given) == own.make([sample])


def test_whatever_is_given_counts() -> None:
    found = zoo.preset("shapes-lm", "PASTA", spans=[[(1, 3)]], alpha=0.5, heads={1: [0]}, where=Where(layers=[1]))
    assert (found.alpha, found.heads, found.where) == (0.5, HeadSet({1: [0]}), Where(layers=[1]))
    boxes = {"red circle": (0.0, 0.0, 0.5, 1.0)}
    tuned = zoo.preset("shapes-sd", "AttentionRefocusing", boxes=boxes)
    assert tuned.step_size == 0.0025 and tuned.where != get_method("AttentionRefocusing")(boxes).where


def test_what_cannot_be_given() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'shapes-lm'"):
        zoo.preset("shape-lm", "ACT")
    with pytest.raises(UnknownName, match=r"no settings of NAG were tuned for shapes-lm; there are: ACT, .*"):
        zoo.preset("shapes-lm", "NAG")
    with pytest.raises(
        SelectionError, match=r"preset\('shapes-lm', 'PASTA'\) speaks of the prompt; give spans=\.\.\. too"
    ):
        zoo.preset("shapes-lm", "PASTA")
    with pytest.raises(SelectionError, match=r"there is no parameter 'alhpa'\. Did you mean 'alpha'"):
        zoo.preset("shapes-lm", "PASTA", spans=["a"], alhpa=0.5)
