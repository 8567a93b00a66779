"""metrics.json from records: tests of what is drawn together, the point of claims, cost, and what a stopped run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnsteer.evals.statistics import McNemar
from attnsteer.runner.score import Scores
from tests.runner.running import recipe

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
