"""Parts of a report: pictures and their budget, attention, heads, plots."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attnsteer.errors import RunError
from attnsteer.results.figures import Figure
from attnsteer.results.reports import album, report, sample_browser
from attnsteer.results.reports.content import content
from attnsteer.results.reports.head_grids import heads_of
from attnsteer.results.reports.plots import Axis, head_grid, track
from attnsteer.run.folder import read_run
from tests.results import folders
from tests.results.test_report import copy, data_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    found = {
        "text": folders.text_run(base / "text"),
        "existence": folders.existence_run(base / "existence"),
        "captions": folders.caption_run(base / "captions"),
        "images": folders.image_run(base / "images"),
    }
    for name, kind in (("text", "lm"), ("captions", "vlm"), ("images", "image")):
        folders.add_attention(found[name], kind)
    return found


# ------------------------------------------------------------------------------------------------ pictures


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_large_pictures_are_made_smaller(runs: dict[str, Path], tmp_path: Path) -> None:
    other = copy(runs["images"], tmp_path / "other")
    Image.new("RGB", (1000, 500), (10, 200, 30)).save(other / "images/method/0/l7.png")
    data = data_of(report(other).read_text())
    at = next(s["outs"]["method"]["image"] for s in data["samples"] if s["id"] == "l7")
    assert opened(data["images"][at]).size == (album.SIDE, album.SIDE // 2)
    assert {opened(u).size for i, u in enumerate(data["images"]) if i != at} == {(64, 64)}
    assert data["notes"] == ["Pictures made smaller for this page: 1."]


def test_the_pictures_of_what_changed_come_first(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data_of(report(runs["images"]).read_text())
    assert not whole["notes"]
    changed = sum(s["outs"]["method"]["state"] != "same" for s in whole["samples"])
    assert 0 < changed < 40
    monkeypatch.setattr(album.Album.__init__, "__defaults__", (sum(map(len, whole["images"])) // 2,))
    part = data_of(report(runs["images"]).read_text())
    left_out = 80 - len(part["images"])
    assert 20 < left_out < 60 and any(f"too large: {left_out};" in n for n in part["notes"])
    assert all(
        s["outs"]["baseline"]["image"] is not None for s in part["samples"] if s["outs"]["method"]["state"] == "gained"
    )
    report(runs["images"])


def test_more_samples_than_a_page_bears(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = content(read_run(runs["text"]))["data"]
    monkeypatch.setattr(sample_browser, "MOST", 12)
    part = content(read_run(runs["text"]))["data"]
    kept = [s["id"] for s in part["samples"]]
    assert len(kept) == 12 and part["total"] == 40 and "12 of 40 samples are shown" in part["notes"][0]
    assert {s["id"] for s in whole["samples"] if s["outs"]["method"]["state"] in ("gained", "lost")} <= set(kept)
    assert kept == [s["id"] for s in whole["samples"] if s["id"] in kept]


def test_scenes_of_the_shapes_world_are_drawn_again(runs: dict[str, Path]) -> None:
    from attnsteer.zoo.shapes.questions import picture
    from attnsteer.zoo.shapes.render import render

    data = content(read_run(runs["existence"]))["data"]
    # Two questions of one scene share its picture.
    assert len(data["images"]) < len(data["samples"]) == 40
    uri = data["images"][data["samples"][0]["image"]]
    want = (render([picture("test", 0)])[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert opened(uri).tobytes() == want.tobytes()


def test_pictures_that_are_not_there(runs: dict[str, Path], tmp_path: Path) -> None:
    other = copy(runs["images"], tmp_path / "other")
    (other / "images/method/0/l7.png").write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"l7\.png is no picture"):
        report(other)
    (other / "images/method/0/l7.png").unlink()
    with pytest.raises(RunError, match=r"l7\.png is missing"):
        report(other)
    # The images of the data may lie elsewhere by now.
    pictures = album.Album(other, {"data": {"file": "x.json"}})
    assert pictures.add("/nowhere/at/all.png") is None and pictures.add(3) is None and pictures.add(None) is None


def test_pictures_of_data_files_come_from_their_folder_and_from_nowhere_else(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    from PIL import Image

    own = copy(runs["images"], tmp_path / "run")
    folder = tmp_path / "data"
    for path in (folder / "a.png", tmp_path / "secret.png", own / "images" / "a.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)
    for data in ({"images": str(folder)}, {"file": str(folder / "x.json")}):
        pictures = album.Album(own, {"data": data})
        assert pictures.add("a.png") == 0 and pictures.missing == 0
        for name in ("../secret.png", "x/../../secret.png", str(tmp_path / "secret.png"), "b.png"):
            assert pictures.add(name) is None
        assert pictures.missing == 4
    (own / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "images/link.png"):
        with pytest.raises(RunError, match="is not in the folder"):
            pictures.add(name, own=True)


def test_a_full_disk_is_an_error_and_leaves_no_half_file(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    from attnsteer import HeadSet
    from attnsteer.results import attention_maps
    from attnsteer.run import recipe_calibration, store

    own = copy(runs["text"], tmp_path / "run")
    before = {p: p.read_bytes() for p in own.rglob("*") if p.is_file()}

    def full(handle: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "write_all", full)
    writers = [
        lambda: report(own),
        lambda: attention_maps.save(own, {"schema": 1}),
        lambda: recipe_calibration._write(HeadSet({1: [0]}), own / "calibration" / "h.safetensors"),
        lambda: recipe_calibration._write((1, 2), own / "calibration" / "d.json"),
    ]
    for write in writers:
        with pytest.raises(RunError, match="the disk is full"):
            write()
    assert {p: p.read_bytes() for p in own.rglob("*") if p.is_file()} == before


def test_a_picture_of_the_data_that_cannot_be_read_is_noted(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    pictures = album.Album(runs["images"], {"data": {"images": str(tmp_path)}})
    assert pictures.add("a.png") is None and pictures.missing == 1


# ------------------------------------------------------------------------------------------------ attention, heads, plots


def test_attention_before_and_after(runs: dict[str, Path]) -> None:
    found = content(read_run(runs["text"]))["attention"]
    assert [a["arm"] for a in found["samples"][0]["arms"]] == ["baseline", "method"]
    shares_ = [share for a in found["samples"][0]["arms"] for _, _, share in a["words"]]
    # One scale for both arms.
    assert max(shares_) == 1.0
    report(runs["images"])
    page = (runs["images"] / "report.html").read_text()
    assert page.count('class="map"') == 2 * 2 * 3 and "attention for circle" in page
    assert content(read_run(runs["captions"]))["attention"]["samples"][0]["arms"][0]["image"].startswith(
        "data:image/png"
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"labels": ["a"], "weights": [0.1, 0.2]}, "1 labels and 2 weights"),
        ({"labels": ["a"], "weights": ["x"]}, "no numbers"),
        ({"labels": ["a"], "maps": [[[0.1], [0.2, 0.3]]]}, "rectangle"),
    ],
)
def test_damaged_attention(runs: dict[str, Path], tmp_path: Path, part: Any, message: str) -> None:
    other = copy(runs["text"], tmp_path / "other")
    (other / "attention.json").write_text(json.dumps({"samples": [{"id": "r0", "arms": {"baseline": part}}]}))
    with pytest.raises(RunError, match=message):
        report(other)


def test_heat_is_transparent_nowhere_and_bright_at_the_top() -> None:
    uri = album.heat([[0.0, 0.5], [1.0, 2.0]], top=1.0)
    image = opened(uri)
    assert image.mode == "RGBA" and image.size == (2, 2)
    assert image.getpixel((0, 0)) == album.HEAT[0] and image.getpixel((1, 0)) == album.HEAT[2]
    assert image.getpixel((0, 1)) == image.getpixel((1, 1)) == album.HEAT[-1]


def test_heads_of_an_arm() -> None:
    plain = {"interventions": [{"method": "A", "heads": {"1": [0, 3]}, "where": {}}, {"method": "B", "heads": None}]}
    assert heads_of(plain) == [[(1, 0), (1, 3)]]
    where = {"interventions": [{"method": "A", "heads": None, "where": {"heads": {"0": [2]}}}]}
    assert heads_of(where) == [[(0, 2)]]
    assert heads_of({"interventions": []}) == [] == heads_of({})
    assert str(head_grid([(0, 1)], {(0, 1): 0.5}, (2, 3))).count("<rect") == 6


def test_places_on_an_axis() -> None:
    axis = Axis([0.2, None, 0.6], margin=5)
    assert axis.at(0.2) == pytest.approx(5) and axis.at(0.6) == pytest.approx(95) and axis.at(0.4) == pytest.approx(50)
    assert axis.ticks() == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert Axis([0.3, 0.5], zero=True).low == 0.0
    # All values alike, or none, still make an axis.
    for same in (Axis([0.0, 0.0]), Axis([])):
        assert same.ticks() and same.low < same.high
    row = str(track(Figure(0.4, 0.2, 0.6), axis, "method"))
    assert 'cx="50.00%"' in row and 'x1="5.00%"' in row and 'x2="95.00%"' in row
