"""Random numbers and splits of the text tasks. Nobody trains on them, so half of all texts are for the test."""

from __future__ import annotations

import hashlib

import numpy as np

SPLITS = {"train": 1, "calibration": 2, "test": 3}
BUCKETS = {"train": range(0, 2), "calibration": range(2, 5), "test": range(5, 10)}


def rng(split: str, index: int, stream: int, seed: int = 0) -> np.random.Generator:
    """The random numbers of one sample; samples of different splits, indices, streams or seeds share none."""
    return np.random.default_rng([SPLITS[split], stream, index, seed])


def split_of(text: str) -> str:
    """The split that a text belongs to, by its hash."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") % 10
    return next(split for split, own in BUCKETS.items() if bucket in own)


def shuffled(count: int, split: str, stream: int, seed: int) -> list[int]:
    """0 to count - 1 in the random order of a split and seed."""
    return rng(split, 0, stream, seed).permutation(count).tolist()


def other_words(prompt: str, text: str) -> list[str]:
    """A control for a marked text: a run of as many words of the prompt, at most half of them of it, drawn by the prompt's hash.

    Empty where there is none that the prompt holds once.
    """
    words, size = prompt.split(" "), len(text.split(" "))
    at = len(prompt[: prompt.index(text)].split(" ")) - 1
    runs = [
        " ".join(words[i : i + size])
        for i in range(len(words) - size + 1)
        if max(0, size - abs(i - at)) <= size // 2 and prompt.count(" ".join(words[i : i + size])) == 1
    ]
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
    return [runs[seed % len(runs)]] if runs else []


def pick(g: np.random.Generator, values: tuple[str, ...], count: int = 1) -> list[str]:
    """Different values, in random order."""
    return [values[i] for i in g.permutation(len(values))[:count]]
