"""`attnsteer view` of captures: what it writes, and what it says where it cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from attnsteer import cli
from tests.viz.captures import captured, causal, take, text


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    text(0).save(tmp_path / "seen")
    text(1).save(tmp_path / "after")
    captured(take(causal(4, n=20))).save(tmp_path / "long")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    return tmp_path


def run(*args: Any) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["view", *map(str, args)])
    return done.exit_code, " ".join(done.output.split())


def content(page: Path) -> dict[str, Any]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))[1])


def test_a_capture_becomes_a_page(seen: Path) -> None:
    assert run(seen / "seen") == (0, str(seen / "seen" / "attention.html"))
    assert content(seen / "seen" / "attention.html")["title"] == "seen"
    assert run(seen / "seen", "--after", seen / "after", "--tokenizer", "shapes-lm", "-o", seen / "p.html")[0] == 0
    found = content(seen / "p.html")
    # Token 5 of the embedded model is "a".
    assert found["arms"] == ["before", "after"] and found["axes"][0]["words"][0].strip() == "a"
    done = run(
        seen / "long", "--image", seen / "red.png", "--image-tokens", "1:13", "--grid", "3x4", "-o", seen / "p.html"
    )
    assert done[0] == 0 and content(seen / "p.html")["axes"][0]["grid"] == [1, 3, 4]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "has neither capture.json nor recipe.yaml"),
        (["seen", "--sample", "x"], "number of a batch row"),
        (["seen", "--sample", "7"], "this capture has 1"),
        (["seen", "--after", "nowhere"], "no readable capture.json"),
        (["seen", "--image-tokens", "1-3"], "such as 1:65"),
        (["seen", "--image-tokens", "1:4"], "3 image places are no square"),
        (["seen", "--grid", "axb"], "such as 8x8"),
        (["seen", "--step", "3"], "step 3 was not captured"),
        (["seen", "--profile", "red.png"], "red.png cannot be read"),
        (["seen", "--image", "red.png"], "give image_tokens"),
        (["seen", "--tokenizer", "nowhere"], "no tokenizer can be had"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(seen: Path, args: list[str], message: str) -> None:
    named = [
        str(seen / a) if a in ("nowhere", "seen", "red.png") and args[max(i - 1, 0)] != "--tokenizer" else a
        for i, a in enumerate(args)
    ]
    code, said = run(*named)
    assert code == 2 and message in said and not (seen / "seen" / "attention.html").exists()


def test_links_out_of_the_folder_are_not_written_through(seen: Path) -> None:
    kept = seen / "kept.txt"
    kept.write_text("mine")
    (seen / "seen" / "attention.html").symlink_to(kept)
    code, said = run(seen / "seen")
    assert code == 2 and "is a link" in said and kept.read_text() == "mine"
    assert run(seen / "seen", "-o", seen / "page.html")[0] == 0


def test_deep_files_are_damaged_ones(seen: Path) -> None:
    (seen / "deep.json").write_text("[" * 100_000)
    code, said = run(seen / "seen", "--profile", seen / "deep.json")
    assert code == 2 and "deep.json cannot be read" in said
    (seen / "seen" / "capture.json").write_text("[" * 100_000)
    code, said = run(seen / "seen")
    assert code == 2 and "no readable capture.json" in said


def test_a_damaged_capture(seen: Path) -> None:
    (seen / "seen" / "000000.safetensors").write_bytes(b"short")
    code, said = run(seen / "seen")
    assert code == 2 and "is not a whole file of a capture" in said
