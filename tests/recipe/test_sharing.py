"""Which arms can share a batch, and the methods that they share."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from attnsteer import ACT, PASTA, HeadSet, Intervention, Where, ZeroTuning, register_method
from attnsteer.errors import RecipeError
from attnsteer.heads import head_set
from attnsteer.parameters import number
from attnsteer.recipe.sharing import groups, make
from attnsteer.run.build import plan
from attnsteer.site import Site
from tests.run.common import recipe

SIZES = [Site(name=f"l{i}", layer=i, kind="self", heads=8, kv_heads=8, modality="text") for i in range(6)]
SAMPLES = [{"id": "a", "spans": [[0, 2]], "force": 2.0}, {"id": "b", "spans": [[1, 3]], "force": None}]
ANSWER = {"task": "answer", "metrics": ["letter"], "primary": "letter.accuracy"}
# The arms of the first point with the baseline, those of the second without.
FIRST_POINT = [["baseline", "zero@1", "method@1"], ["zero@2", "method@2"]]
TOKENIZER = SimpleNamespace(tokenizer=None)


def shared(**changes: Any) -> list[list[str]]:
    """The groups of a recipe's arms, by id."""
    return [[arm.id for arm in g] for g in groups(plan(recipe(**changes), SIZES).arms, SAMPLES[0], TOKENIZER)]


def together(**changes: Any) -> list[Intervention]:
    """What all arms of a recipe share."""
    (group,) = groups(plan(recipe(**changes), SIZES).arms, SAMPLES[0], TOKENIZER)
    return make(group, SAMPLES, TOKENIZER)


def test_baseline_zero_method_and_random_heads_share() -> None:
    arms = plan(recipe(controls={"random_heads": 2}), SIZES).arms
    assert shared(controls={"random_heads": 2}) == [["baseline", "zero", "method", "random-1", "random-2"]]
    chosen, first, second = (arms[i].interventions[0].heads for i in (2, 3, 4))
    beta = [None, None, 1.0, 1.0, *[0.4] * 6]
    heads = [None, None, chosen, chosen, chosen, chosen, first, first, second, second]
    assert together(controls={"random_heads": 2}) == [ACT(heads, beta)]


def test_equal_heads_and_equal_strengths_stay_one_for_all() -> None:
    assert together() == [ACT(HeadSet({5: [0, 7], 3: [1]}), [None, None, 1.0, 1.0, 0.4, 0.4])]
    pair = {"method": "ZeroTuning", "params": {"gamma": 3.0}}
    both = together(interventions=[pair, {"method": "ACT", "params": {"beta": 0.2}, "where": {"layers": 1}}])
    assert both[0] == ZeroTuning(gamma=[None, None, 1.0, 1.0, 3.0, 3.0])
    assert both[1] == ACT(beta=[None, None, 1.0, 1.0, 0.2, 0.2], where=Where(layers=1))


def test_a_sweep_of_strengths_shares_and_defaults_are_filled_in() -> None:
    made = together(sweep={"interventions.0.params.threshold": [0.05, 0.3]}, controls={"zero": False})
    heads = HeadSet({5: [0, 7], 3: [1]})
    # The baseline's threshold is not used.
    assert made == [ACT(heads, [None, None, *[0.4] * 4], threshold=[0.05] * 4 + [0.3] * 2)]
    tuned = {"method": "ZeroTuning"}
    arms = together(interventions=[tuned], sweep={"interventions.0.params.gamma": [2.0, 3.0]}, controls={"zero": False})
    assert arms == [ZeroTuning(gamma=[None, None, 2.0, 2.0, 3.0, 3.0])]


def test_values_of_samples_are_those_of_each_arm() -> None:
    spec = {"method": "PASTA", "params": {"spans": {"sample": "spans"}, "alpha": {"sample": "force"}}}
    (made,) = together(interventions=[spec])
    assert made == PASTA([[(0, 2)], [(1, 3)]] * 3, None, [None, None, 1.0, 1.0, 2.0, None])


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        # Other selections, and parameters with one value for all.
        ({"sweep": {"interventions.0.where": [{"phases": "prefill"}, None]}}, FIRST_POINT),
        ({"sweep": {"interventions.0.params.decode": ["frozen", "running"]}}, FIRST_POINT),
        # One of two thresholds.
        ({"sweep": {"interventions.0.params": [{"alpha": 3.0}, {"threshold": 0.1}]}}, FIRST_POINT),
        # All heads beside some.
        ({"sweep": {"interventions.0.heads": [None, {"0": [1]}]}}, FIRST_POINT),
        # Heads in `where`.
        (
            {
                "interventions": [{"method": "SpotLight", "params": {"spans": ["x"]}, "heads": {"1": [0]}}],
                "controls": {"random_heads": 1},
            },
            [["baseline", "zero", "method"], ["random-1"]],
        ),
        # No strength of its own that could leave a sample alone.
        (
            {
                "interventions": [{"method": "HeadGate", "params": {"gates": {"$pairs": [[[0, 0], 0.5]]}}}],
                "controls": {"zero": False},
            },
            [["baseline"], ["method"]],
        ),
        # Another branch of the model.
        ({"interventions": [{"method": "PAG", "where": {"layers": 0}}]}, [["baseline"], ["zero"], ["method"]]),
        ({**ANSWER, "decoding": {"do_sample": True}}, [["baseline"], ["zero"], ["method"]]),
        ({**ANSWER, "decoding": {"num_beams": 2}}, [["baseline"], ["zero"], ["method"]]),
        ({**ANSWER, "baseline": {"max_new_tokens": 3}}, [["baseline"], ["zero", "method"]]),
    ],
)  # fmt: skip
def test_arms_that_do_not_share(changes: dict[str, Any], wanted: list[list[str]]) -> None:
    assert shared(**{k.replace(".", "__"): v for k, v in changes.items()}) == wanted


def test_statistics_over_the_heads_of_all_arms_are_no_ones() -> None:
    @register_method(name="PoolsItsHeads")
    @dataclass(frozen=True)
    class Pools(Intervention):
        heads: HeadSet | None = head_set()
        strength: float = number(1.0, per_sample=True)

        whole_heads = True

    spec = {"method": "PoolsItsHeads", "params": {}, "heads": {"0": [1]}, "zero": {"strength": 0.0}}
    assert shared(interventions=[spec], controls={"random_heads": 1}) == [["baseline", "zero", "method"], ["random-1"]]


def test_arms_that_do_not_fit_are_refused() -> None:
    arms = plan(recipe(sweep={"interventions.0.params.decode": ["frozen", "running"]}), SIZES).arms
    with pytest.raises(RecipeError, match=r"interventions\.0\.params\.decode: ACT takes one value for all samples"):
        make(arms, SAMPLES)
