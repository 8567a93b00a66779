"""Attention-IoU, pointing and grounding against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from attnsteer.errors import RecordError
from attnsteer.evals.maps import inside
from attnsteer.evals.metrics import get_metric
from attnsteer.evals.metrics.attention_iou import attention_iou
from attnsteer.evals.significance import ratio_bootstrap, wilson


@pytest.mark.parametrize(
    ("a", "b", "score"),
    [
        ((0.5, 0.5, 0, 0), (0.5, 0.5, 0, 0), 1.0),
        ((1, 0, 0, 0), (0, 1, 0, 0), 0.0),
        ((0.5, 0.5, 0, 0), (1, 0, 0, 0), 0.8),
        ((1, 1, 1, 1), (0, 0, 7, 0), 4 / 7),
    ],
)
def test_attention_iou(a: tuple, b: tuple, score: float) -> None:
    first, second = (torch.tensor(v).view(2, 2) for v in (a, b))
    assert attention_iou(first, second) == pytest.approx(score) == attention_iou(second, 3 * first)
    metric = get_metric("attention_iou")
    found = metric.sample({"map": first.tolist(), "target": second.tolist()})
    assert found["score"] == pytest.approx(score)


def test_attention_iou_of_random_maps_is_in_range() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        a, b = torch.rand(2, 5, 7, generator=g).pow(8)
        assert 0 <= attention_iou(a, b) < 1 and attention_iou(a, a) == pytest.approx(1)


def test_attention_iou_record() -> None:
    # The box takes the left column: p = (.4, .1, .4, .1), q = (.5, 0, .5, 0): .4 / (2 x .45^2 + 2 x .05^2) = .4 / .41.
    record = {"map": [[4, 1], [4, 1]], "target": (0, 0, 0.5, 1)}
    found = get_metric("attention_iou").sample(record)
    assert found["score"] == pytest.approx(0.4 / 0.41)
    # Uniform against it: .25 / (2 x .375^2 + 2 x .125^2) = .25 / .3125.
    assert found["uniform"] == pytest.approx(0.8)
    # Without its least value the map is the box.
    assert get_metric("attention_iou", scale="minmax").sample(record)["score"] == pytest.approx(1)
    for change, words in (
        ({"target": [[1, 0, 0]]}, r"\[2, 2\] and \[1, 3\]"),
        ({"target": [[0, 0], [0, 0]]}, "zero everywhere"),
        ({"map": [[1, -1], [0, 0]]}, "finite numbers >= 0"),
        ({"map": [[1, 2], [3]]}, "no grid"),
        ({"map": [1, 2]}, "a grid"),
        ({"target": (0.5, 0, 0.4, 1)}, "x0 <= x1"),
        ({"target": (0.1, 0, 0.2, 1)}, "nothing of the 2 x 2 map"),
    ):
        with pytest.raises(RecordError, match=words):
            get_metric("attention_iou").sample(record | change)
    with pytest.raises(RecordError, match="no scale"):
        get_metric("attention_iou", scale="maximum")


def test_inside() -> None:
    assert inside((0, 0, 0.5, 0.5), (2, 4)).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert inside((0.5, 0.75, 1, 1), (2, 2)).tolist() == [[0, 0], [0, 1]]
    with pytest.raises(RecordError, match="resize the mask"):
        inside([[1, 0]], (2, 2))


def test_clicks() -> None:
    metric = get_metric("pointing")
    boxes = [[0, 0, 10, 10], [20, 20, 30, 30]]
    hits = [metric.sample({"point": p, "target": boxes})["hit"] for p in ((10, 0), (11, 0), (25, 20), (10, 10.1))]
    assert hits == [1, 0, 1, 0]
    assert metric.sample({"point": (27.5, 27.5), "target": (14, 14, 41, 41)}) == {"hit": 1}
    found = metric.aggregate([{"hit": h} for h in hits])
    assert found == {"accuracy": wilson(2, 4)} and metric.mcnemar([{"hit": 0}], [{"hit": 1}]).gained == 1
    with pytest.raises(RecordError, match="either a point or a map"):
        metric.sample({"target": boxes})


def test_pointing_of_maps() -> None:
    metric = get_metric("pointing")
    # The vector of ControlMLLM's region mass: rho 0.3, energy 0.49.
    found = metric.sample({"map": [[0.1, 0.2], [0.3, 0.4]], "target": [[0, 0], [1, 0]]})
    assert found == {
        "hit": 0,
        "maps": 1,
        "mass": pytest.approx(0.3),
        "energy": pytest.approx(0.49),
        "lift": pytest.approx(1.2),
    }
    assert metric.sample({"map": [[1, 2], [3, 4]], "target": (0.5, 0.5, 1, 1)})["hit"] == 1
    # A tie is a hit only where all of it is inside; so a flat map never points.
    assert metric.sample({"map": [[0, 2], [0, 2]], "target": (0.5, 0, 1, 1)})["hit"] == 1
    flat = metric.sample({"map": [[1, 1], [1, 1]], "target": (0, 0, 0.5, 1)})
    assert flat["hit"] == 0 and flat["lift"] == 1.0
    scaled = metric.sample({"map": [[10, 20], [30, 40]], "target": [[0, 0], [1, 0]]})
    assert scaled["mass"] == pytest.approx(found["mass"])
    with pytest.raises(RecordError, match="points nowhere"):
        metric.sample({"map": [[0, 0]], "target": (0, 0, 1, 1)})


def test_grounding() -> None:
    metric = get_metric("grounding")
    # Intersection 50 of 100, and 10 of 10.
    samples = [
        metric.sample({"predicted": (0, 0, 10, 10), "target": (0, 0, 10, 5)}),
        metric.sample({"predicted": (3, 0, 5, 5), "target": (3, 0, 5, 5)}),
    ]
    assert (samples[0]["intersection"], samples[0]["union"], samples[0]["iou"]) == (50, 100, 0.5)
    found = metric.aggregate(samples, draws=400)
    assert found["miou"].value == 0.75 and found["oiou"] == ratio_bootstrap([50, 10], [100, 10], draws=400)
    assert found["oiou"].value == pytest.approx(0.5455, abs=1e-4)
    # Strictly above.
    assert found["precision_50"] == wilson(1, 2) and found["precision_90"] == wilson(1, 2)
    apart = metric.sample({"predicted": (0, 0, 1, 1), "target": (2, 2, 3, 3)})
    assert apart["iou"] == 0 and apart["union"] == 2
    masks = metric.sample({"predicted": [[1, 1, 0]], "target": [[0, 1, 1]]})
    assert (masks["intersection"], masks["union"], masks["iou"]) == (1, 3, pytest.approx(1 / 3))
    assert metric.sample({"predicted": [[0, 0]], "target": [[0, 0]]})["iou"] == 1.0
    for record, words in (
        ({"predicted": [[1]], "target": (0, 0, 1, 1)}, "the other a mask"),
        ({"predicted": [[1]], "target": [[1, 0]]}, r"\[1, 1\] and \[1, 2\]"),
        ({"predicted": [[0.5]], "target": [[1]]}, "of 0 and 1"),
        ({"predicted": (1, 0, 0, 1), "target": (0, 0, 1, 1)}, "predicted box"),
        ({"predicted": None, "target": (0, 0, 1, 1)}, "cannot read"),
    ):
        with pytest.raises(RecordError, match=words):
            metric.sample(record)
