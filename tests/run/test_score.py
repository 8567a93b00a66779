"""metrics.json from records: tests of what is drawn together, the point of claims, cost, and what a stopped run leaves."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from attnsteer.evals.metrics import get_metric
from attnsteer.evals.significance import McNemar, holm
from attnsteer.results import summary
from attnsteer.run.score import Scores
from tests.run.running import recipe

ROLES = {"baseline": "baseline", "method": "method"}


def plan(*points: dict[str, Any]) -> dict[str, Any]:
    """arms.json of points, each {"values": ..., "arms": {role: id}}; one without values by default."""
    found = [{"point": i, **p} for i, p in enumerate(points or ({"values": {}, "arms": ROLES},))]
    arms = {a: role for p in found for role, a in p["arms"].items()}
    return {"arms": [{"id": a, "kind": k, "decoding": {}} for a, k in arms.items()], "points": found}


def choices(right: dict[str, list[list[int]]], seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Records of the task `choice`: for each arm, for each seed, 1 where the sample's answer is right."""
    return {
        arm: {
            (seed, f"s{i}"): {"choices": ["a", "b"], "answer": 0, "scores": [-1.0, -2.0] if ok else [-2.0, -1.0]}
            for seed, row in zip(seeds, rows, strict=True)
            for i, ok in enumerate(row)
        }
        for arm, rows in right.items()
    }


def samples(count: int) -> list[dict[str, Any]]:
    return [{"id": f"s{i}", "group": f"s{i}"} for i in range(count)]


def test_seeds_with_equal_answers_are_no_further_evidence(tmp_path: Path) -> None:
    before, after = [0] * 3 + [1] * 17, [1] * 20
    for seeds in ((0,), (0, 1, 2, 3)):
        records = choices({"baseline": [before] * len(seeds), "method": [after] * len(seeds)}, seeds)
        own = recipe(tmp_path, seeds=list(seeds), controls={})
        (found,) = Scores(own, plan(), samples(20), records, []).to_dict()["differences"]
        assert found["mcnemar"] == McNemar(3, 0, 0.25)._asdict() and found["p_holm"] == 0.25


@pytest.mark.parametrize(
    ("change", "shared", "equal"),
    [(0.0, False, True), (5e-5, False, False), (5e-5, True, True), (1e-3, True, False)],
)
def test_a_zero_control_of_shared_batches_equals_the_baseline_up_to_rounding(
    tmp_path: Path, change: float, shared: bool, equal: bool
) -> None:
    records = choices({"baseline": [[1, 0]], "zero": [[1, 0]], "method": [[1, 1]]})
    records["zero"][0, "s1"]["scores"][0] += change
    lines = [
        {"arm": a, "seconds": 1.0, "samples": 2, "peak_memory": 0, **({"shared": 3} if shared else {})} for a in records
    ]
    roles = {"values": {}, "arms": {a: a for a in records}}
    found = Scores(recipe(tmp_path), plan(roles), samples(2), records, lines).to_dict()
    assert found["zero_equals_baseline"] is equal


SWEEP = {"interventions.0.params.beta": [0.2, 0.4, 0.6]}
POINTS = [
    {"values": {"interventions.0.params.beta": b}, "arms": {"baseline": "baseline", "method": f"method@{i}"}}
    for i, b in enumerate(SWEEP["interventions.0.params.beta"])
]


def swept(folder: Path, **changes: Any) -> dict[str, Any]:
    """A sweep whose own point (0.4) is the second one: 1, 6 and 3 of 20 answers are gained."""
    rows = {f"method@{i}": [[1] * (10 + n) + [0] * (10 - n)] for i, n in enumerate((1, 6, 3))}
    records = choices({"baseline": [[1] * 10 + [0] * 10], **rows})
    own = recipe(folder, **{"sweep": SWEEP, "controls": {}, **changes})
    return Scores(own, plan(*POINTS), samples(20), records, []).to_dict()


def test_claims_are_about_the_point_of_the_recipe(tmp_path: Path) -> None:
    claim = {"metric": "choice.accuracy", "baseline": 57.1, "value": 60.2, "source": "Table 2"}
    for beta, gained in ((0.4, 6), (0.5, 1)):
        method = {"method": "ACT", "params": {"beta": beta}, "heads": "zoo:act"}
        (found,) = swept(tmp_path, claims=[claim], interventions=[method])["claims"]
        # Without a point of its own, the first one.
        assert found["ours"]["difference"]["value"] == pytest.approx(gained / 20)
        assert found["ours"]["value"]["value"] == pytest.approx((10 + gained) / 20)


def test_points_that_share_their_arms_are_one_test(tmp_path: Path) -> None:
    found = swept(tmp_path)["differences"]
    assert [d["p"] for d in found] == [1.0, 2 / 64, 2 / 8]
    assert [d["p_holm"] for d in found] == [1.0, 3 * 2 / 64, 2 * 2 / 8]
    records = choices({"baseline": [[0] * 6], "method": [[1] * 6]})
    points = [{"values": {"controls.zero": z}, "arms": ROLES} for z in (True, False)]
    found = Scores(recipe(tmp_path, controls={}), plan(*points), samples(6), records, []).to_dict()["differences"]
    assert [d["p_holm"] for d in found] == [2 / 64, 2 / 64]


def test_the_printed_table_has_adjusted_tests_of_the_primary_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of these figures there is no run, so there is no verdict either.
    monkeypatch.setattr(summary, "remarks", lambda *_: [])
    (tmp_path / "metrics.json").write_text(json.dumps(swept(tmp_path)))
    head, rows, _ = summary.table(tmp_path)
    column = head.index("p (Holm)")
    assert [r[column] for r in rows if r[1] == "method"] == ["1", "0.0938", "0.5"]
    # McNemar's test of `choice` says nothing of other figures.
    (tmp_path / "metrics.json").write_text(json.dumps(swept(tmp_path, primary="choice.loss")))
    assert not {"0.0938", "0.5", "0.0312", "0.25"} & {r[column] for r in summary.table(tmp_path)[1]}


def test_figures_without_right_and_wrong_are_adjusted_too(tmp_path: Path) -> None:
    found = swept(tmp_path, primary="choice.loss")["differences"]
    assert [d["p_holm"] for d in found] == holm([d["p"] for d in found])
    metric, rows = get_metric("choice"), choices({"b": [[1] * 10 + [0] * 10], "m": [[1] * 16 + [0] * 4]})
    before, after = ([metric.sample(r) for r in rows[a].values()] for a in "bm")
    assert found[1]["p"] == metric.p_value("loss", before, after)


def test_times_are_relative_to_the_baseline_of_the_point(tmp_path: Path) -> None:
    points = [
        {"values": {}, "arms": {"baseline": f"baseline@{i}", "method": f"method@{i}", "zero": "zero"}} for i in (1, 2)
    ]
    seconds = {"baseline@1": 1.0, "method@1": 2.0, "zero": 1.5, "baseline@2": 10.0, "method@2": 15.0}
    lines = [
        {"arm": a, "seed": 0, "batch": 0, "samples": 1, "seconds": s, "tokens": 1, "peak_memory": 0}
        for a, s in seconds.items()
    ]
    cost = Scores(recipe(tmp_path), plan(*points), samples(1), {}, lines).cost()
    found = {a: c["relative"] for a, c in cost.items()}
    assert found == {"baseline@1": 1.0, "method@1": 2.0, "zero": 1.5, "baseline@2": 1.0, "method@2": 1.5}


def test_a_seed_that_is_not_whole_may_lack_an_estimate(tmp_path: Path) -> None:
    """Of the second seed, which was stopped, there are pictures of counts only; only the first one says something of colours."""
    phrase = {"label": "dog", "count": 1, "colour": "red"}
    seen = [{"label": "dog", "box": [0, 0, 9, 9], "colour": "red"}]

    def record(category: str) -> dict[str, Any]:
        return {"category": category, "phrases": [phrase], "detected": seen}

    rows = {(seed, c): record(c) for seed, c in ((0, "count"), (0, "colour"), (1, "count"))}
    own = recipe(tmp_path, seeds=[0, 1], controls={}, metrics=["hrs"], primary="hrs.count_f1")
    asked = [{"id": c, "group": c} for c in ("count", "colour")]
    for keys in (list(rows), [(0, "count"), (1, "colour")]):
        records = {arm: {k: record(k[1]) for k in keys} for arm in ROLES}
        found = Scores(own, plan(), asked, records, []).to_dict()
        assert found["partial"] and found["seeds"]["method"]["hrs.colour"]["values"] == [1.0]
        json.dumps(found, allow_nan=False)


def test_a_seed_whose_figure_is_not_finite_is_null(tmp_path: Path) -> None:
    own = recipe(tmp_path, seeds=[0, 1, 2], controls={})
    found = Scores(own, plan(), samples(4), choices({a: [[1, 0, 1, 1]] * 3 for a in ROLES}, (0, 1, 2)), [])
    values = iter([0.5, math.inf, 0.7])
    metric = dataclasses.replace(found.measures["choice"])
    object.__setattr__(metric, "aggregate", lambda *a, **k: {"accuracy": next(values)})
    found.measures["choice"] = metric
    row = found._seeds("method")["choice.accuracy"]
    assert row["values"] == [0.5, None, 0.7] and row["mean"] == pytest.approx(0.6)
    assert found.warnings == ["accuracy: a seed's value is not finite, and is null"]


def test_a_seed_with_too_few_samples_for_a_set_is_left_out(tmp_path: Path) -> None:
    from attnsteer.evals.metrics import get_metric

    own = recipe(tmp_path, seeds=[0, 1], controls={})
    found = Scores(own, plan(), samples(4), choices({a: [[1, 0, 1, 1], [1]] for a in ROLES}, (0, 1)), [])
    found.measures = {"fid": get_metric("fid", reference=torch.eye(4, 3, dtype=torch.float64))}
    found.numbers = {a: {"fid": [{"features": [float(i), 1.0, 0.0]} for i in range(5)]} for a in ROLES}
    assert len(found._seeds("method")["fid.frechet_distance"]["values"]) == 1
    assert found.warnings == ["seed 1: fid: 1 samples; a set has at least two."]
