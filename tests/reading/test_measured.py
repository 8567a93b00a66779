"""The measurement of the readers runs, and counts what it says."""

from __future__ import annotations

from benchmarks.reading import CASES, iou, mosaic, pointing


def test_pointing_has_an_arm_for_each_comparison() -> None:
    found = pointing("calibration", 2)
    assert all(len(values) == 2 and all(0 <= v <= 1 for v in values) for values in found.values())
    for arm, others in CASES["pointing"][1]:
        assert {arm, *others} <= set(found)


def test_boxes_and_mosaics() -> None:
    assert iou((0, 0, 0.5, 1), (0, 0, 1, 1)) == 0.5
    image, objects = mosaic("calibration", 0)
    assert image.size == (128, 128) and 4 <= len(objects) <= 8
    for _, mask, (left, top) in objects:
        assert mask.any() and int(mask.sum()) == int(mask[top : top + 64, left : left + 64].sum())
