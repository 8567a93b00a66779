"""Reading tasks in text: look a fact up in a passage and choose a letter; infer a labelling rule from examples.

A passage or a list of examples belongs to one split by its hash, so no test text is ever trained on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from .language import LETTERS, WORDS, Phrase, join
from .world import COLOUR_NAMES, SHAPES, SIZES, SPLITS, rng

TASKS = ("lookup", "few-shot")
# Of ten texts one is for calibration and one for the test.
BUCKETS = {"train": range(0, 8), "calibration": range(8, 9), "test": range(9, 10)}
FACTS = (3, 6)
SHOTS = 8


@dataclass(frozen=True)
class Reading:
    """A text task with answers to choose from.

    Attributes:
        prompt: ends where the answer is due.
        choices: the possible answers, one token each.
        answer: index of the right one.
        task: "lookup" or "few-shot".
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    task: str


def split_of(text: str) -> str:
    """The split that a passage or a list of examples belongs to."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") % 10
    return next(split for split, own in BUCKETS.items() if bucket in own)


def reading(split: str, index: int, task: str = "lookup", facts: int | None = None) -> Reading:
    """Sample `index` of a split: one passage and one question.

    Args:
        split: "train", "calibration" or "test".
        index: >= 0.
        task: "lookup" (four choices, by letter) or "few-shot" (two labels).
        facts: sentences of the passage, 2 to 6; None draws 3 to 6.
    """
    if task not in TASKS:
        raise ValueError(f"No reading task {task!r}; there are {', '.join(TASKS)}.")
    g = rng(split, index, stream=10 + TASKS.index(task))
    if task == "few-shot":
        text, choices, answer = _examples(g, split, SHOTS + 1)
        return Reading(text.rsplit(" ", 2)[0], choices, answer, task)
    known, text = _passage(g, split, facts)
    asked, right, _ = _question(g, known, True, known[int(g.integers(len(known)))], g.random())
    return Reading(f"{text} {asked}", LETTERS, LETTERS.index(right), task)


def lesson(g: np.random.Generator, questions: int, copying: float = 0.0) -> tuple[str, list[int]]:
    """A training text with many supervised words: one answer per passage learns slowly.

    One of four: words that repeat (heads that look back form there first), labelled examples, a passage said again in
    another order, a passage with questions, open or with options.

    Args:
        g: source of randomness.
        questions: about each passage.
        copying: share of texts that are repeated words.

    Returns:
        the text and the positions of its answer words.
    """
    if g.random() < copying:
        period = int(g.integers(6, 30))
        words = [WORDS[int(i)] for i in g.integers(0, len(WORDS), period)] * 3
        return " ".join(words), list(range(period + 1, len(words)))
    form = g.random()
    if form < 0.2:
        text, _, _ = _examples(g, "train", SHOTS + 1)
        words = text.split()
        return text, [i + 1 for i, w in enumerate(words) if w == "output"]
    known, text = _passage(g, "train", int(g.integers(2, FACTS[1] + 1)))
    words, marks = text.split(), []
    if form < 0.35:
        for _ in range(2):
            for i in g.permutation(len(known)):
                shape, colour, size = known[int(i)]
                marks += [len(words) + k for k in (3, 5)]
                words += f"the {shape} is {colour} and {size} .".split()
        return " ".join(words), marks
    while questions > 0:
        fact = known[int(g.integers(len(known)))]
        # Now and then the same question is asked both ways: the choice is then a matter of the options alone.
        forms = ((False,), (True,), (False, True))[int(g.choice(3, p=(0.4, 0.3, 0.3)))]
        kind = g.random()
        for options in forms:
            asked, right, _ = _question(g, known, options, fact, kind)
            words += asked.split()
            marks.append(len(words))
            words += [right, "."]
        questions -= len(forms)
    return " ".join(words), marks


def _passage(g: np.random.Generator, split: str, facts: int | None) -> tuple[list[tuple[str, str, str]], str]:
    if split not in SPLITS:
        raise ValueError(f"No split {split!r}; there are {', '.join(SPLITS)}.")
    n = int(g.integers(FACTS[0], FACTS[1] + 1)) if facts is None else facts
    if not 2 <= n <= len(SHAPES):
        raise ValueError(f"A passage has 2 to {len(SHAPES)} facts; {n} were asked for.")
    while True:
        shapes = [SHAPES[int(i)] for i in g.permutation(len(SHAPES))[:n]]
        known = [(s, COLOUR_NAMES[int(g.integers(6))], SIZES[int(g.integers(2))]) for s in shapes]
        text = join([Phrase(c, s, z) for s, c, z in known]) + " ."
        if split_of(text) == split:
            return known, text


def _question(
    g: np.random.Generator, known: list[tuple[str, str, str]], options: bool, fact: tuple[str, str, str], kind: float
) -> tuple[str, str, str]:
    """Question about a fact up to where the answer is due, the answer word, and what is asked for (by `kind` in [0, 1))."""
    shape, colour, size = fact
    colours = [c for _, c, _ in known]
    if not options and kind < 0.2:
        return f"question what size is the {shape} ? answer", size, "size"
    if kind < 0.4 and colours.count(colour) == 1:
        stem, right, pool = f"question which shape is {colour} ?", shape, [s for s, _, _ in known]
        every, asked = SHAPES, "shape"
    else:
        stem, right, pool = f"question what colour is the {shape} ?", colour, list(dict.fromkeys(colours))
        every, asked = COLOUR_NAMES, "colour"
    if not options:
        return f"{stem} answer", right, asked
    # Wrong options come from the passage first: the answer cannot be had by looking for a word that occurs.
    wrong = [w for w in pool if w != right]
    wrong = [wrong[int(i)] for i in g.permutation(len(wrong))]
    others = [w for w in every if w != right and w not in wrong]
    wrong = (wrong + [others[int(i)] for i in g.permutation(len(others))])[:3]
    at = int(g.integers(4))
    choices = [*wrong[:at], right, *wrong[at:]]
    listed = " ".join(f"{letter} {word}" for letter, word in zip(LETTERS, choices, strict=True))
    return f"{stem} options {listed} answer", LETTERS[at], asked


def _examples(g: np.random.Generator, split: str, count: int) -> tuple[str, tuple[str, ...], int]:
    """Examples "input small red star output A ." under a rule on one attribute; the last one is the query."""
    while True:
        attribute = int(g.integers(3))
        values = (SIZES, COLOUR_NAMES, SHAPES)[attribute]
        pair = [values[int(i)] for i in g.permutation(len(values))[:2]]
        labels = [LETTERS[int(i)] for i in g.permutation(4)[:2]]
        texts, answer = [], 0
        for _ in range(count):
            words = [SIZES[int(g.integers(2))], COLOUR_NAMES[int(g.integers(6))], SHAPES[int(g.integers(6))]]
            answer = int(g.integers(2))
            words[attribute] = pair[answer]
            texts.append(f"input {' '.join(words)} output {labels[answer]} .")
        text = " ".join(texts)
        if split_of(text) == split:
            return text, tuple(labels), answer
