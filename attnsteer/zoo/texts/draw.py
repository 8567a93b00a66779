"""Random numbers and splits of the text tasks. Nobody trains on them, so half of all texts are for the test."""

from __future__ import annotations

import hashlib
from typing import Any

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
    runs = [" ".join(words[a:b]) for a, b in _elsewhere(len(words), at, size)]
    return _drawn([run for run in runs if prompt.count(run) == 1], prompt)


def other_range(prompt: str, count: int, start: int, stop: int) -> list[tuple[int, int]]:
    """The same for a range of `count` places in all."""
    return _drawn(_elsewhere(count, start, stop - start), prompt)


def _elsewhere(count: int, at: int, size: int) -> list[tuple[int, int]]:
    return [(i, i + size) for i in range(count - size + 1) if max(0, size - abs(i - at)) <= size // 2]


def _drawn(runs: list[Any], prompt: str) -> list[Any]:
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
    return [runs[seed % len(runs)]] if runs else []


def pick(g: np.random.Generator, values: tuple[str, ...], count: int = 1) -> list[str]:
    """Different values, in random order."""
    return [values[i] for i in g.permutation(len(values))[:count]]
