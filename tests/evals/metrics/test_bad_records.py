"""Whatever a record holds, a metric gives finite numbers or a RecordError."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from attnsteer.errors import RecordError
from attnsteer.evals.metrics import METRICS, get_metric

KEYS = (
    "answer answers boxes bytes category choices detected features finished generated label level log_likelihood map name objects "
    "part_similarities phrases point predicted relations scores side similarity synonyms target tokens valid words"
).split()
PLAIN = (
    None, True, False, 0, 1, -1, 2, 0.5, -3.5, 1e308, 10**400, math.inf, math.nan, "", "yes", "no", "A", "a red circle",
    "spatial", "count", "size", "colour", "left of", "easy", "é\x00\ud800",
)  # fmt: skip
GOOD = (
    ["red", "circle"], [["red", "circle"]], [0, 0, 1, 1], [[0.1, 0.2], [0.3, 0.4]], [[1, 0], [0, 1]], [-1.0, -2.0], ["A", "B"],
    [{"label": "dog", "box": [0, 0, 5, 5], "count": 2, "colour": "red"}], [["dog", "left", "cat"]],
    [{"colour": "red", "shape": "circle"}],
    [{"shape": "circle", "colour": "red", "size": "small", "x": 0.1, "y": 0.2, "radius": 0.1}],
)  # fmt: skip


def value(g: random.Random, depth: int = 0):
    kind = g.random()
    if kind < 0.35:
        return g.choice(GOOD)
    if depth == 3 or kind < 0.7:
        return g.choice(PLAIN)
    items = [value(g, depth + 1) for _ in range(g.randrange(4))]
    return items if kind < 0.9 else {g.choice([*KEYS, "box", "shape", "colour", "x"]): v for v in items}


@pytest.mark.parametrize("name", sorted(METRICS))
def test_random_records(name: str) -> None:
    options = {"reference": torch.eye(4)[:, :2]} | ({"k": 1} if name == "precision_recall" else {})
    metric = get_metric(name, **(options if name in ("fid", "precision_recall") else {}))
    g = random.Random(name)
    refused = 0
    for _ in range(1000):
        record = {k: value(g) for k in KEYS if k in metric.needs or g.random() < 0.5}
        try:
            found = metric.sample(record)
        except RecordError as error:
            assert str(error)
            refused += 1
            continue
        assert found and all(isinstance(k, str) for k in found)
        json.dumps(found, allow_nan=False)
    assert refused > 0
