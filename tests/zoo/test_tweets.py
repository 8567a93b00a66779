"""Samples of rated tweets: of a small archive of the same form, since the real one is not shipped."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from attnsteer.errors import ZooError
from attnsteer.recipe.schema import DataSpec
from attnsteer.run.data import load
from attnsteer.zoo.texts import tweets

ROWS = [(f"{mood} &amp;  day {i}", sign * 1.5) for i in range(60) for mood, sign in (("good", 1), ("bad", -1))]
ROWS += [(f"nice morning {i}", 2.0) for i in range(60)] + [("so so", 0.2), ("good &amp; day 0", 1.5)]


def packed(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    table = "".join(f"{i}\t{rating}\t{text}\r\n" for i, (text, rating) in enumerate(ROWS))
    whole = packed(f"vaderSentiment-2.5/{tweets.INNER}", packed(tweets.MEMBER, table.encode()))
    monkeypatch.setattr(tweets, "SHA256", hashlib.sha256(whole).hexdigest())
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(whole)
    return path


def test_splits_are_balanced_and_share_no_tweet(archive: Path) -> None:
    every = tweets.rated(archive)
    assert len(every) == len(ROWS) - 1 and every[0] == ("good & day 0", 1.5)
    shown = {}
    for split in ("test", "calibration"):
        samples = list(tweets.tweets(every, split))
        assert sum(s["answer"] for s in samples) * 2 == len(samples) == len({s["fact"][0] for s in samples}) > 20
        for sample in samples:
            texts = re.findall(r"Tweet: (.*)\nSentiment:( \w+)?", sample["question"])
            assert [label.strip() for _, label in texts] == ["positive", "negative", ""]
            assert [dict(every)[t] > 0 for t, _ in texts] == [True, False, sample["answer"] == 0]
            assert sample["fact"] == [texts[2][0]] and len({t for t, _ in texts}) == 3
            shown.setdefault(split, set()).update(t for t, _ in texts)
        assert samples != list(tweets.tweets(every, split, seed=1)) and samples == list(tweets.tweets(every, split))
    assert not shown["test"] & shown["calibration"] and "so so" not in shown["test"] | shown["calibration"]


def test_the_files_are_what_a_recipe_reads(archive: Path, tmp_path: Path) -> None:
    assert tweets.main([str(archive), "--out", str(tmp_path / "data"), "--seed", "3"]) == 0
    path = tmp_path / "data" / "tweets-calibration.jsonl"
    data = load(DataSpec(file=str(path), format="choices", limit=5), "choice", prompt="{question}")
    first = json.loads(path.read_text().splitlines()[0])
    assert data.samples[0]["prompt"] == first["question"] and data.samples[0]["id"].startswith(
        "tweets-calibration-seed3-"
    )


def test_another_file_is_not_read(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ZooError, match="Nothing was read"):
        tweets.rated(archive)
    assert tweets.main([str(tmp_path / "none.tar.gz")]) == 2 and "there is no file" in capsys.readouterr().err
