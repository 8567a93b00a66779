"""Reading tasks in text: look a fact up in a passage and choose a letter; infer a labelling rule from examples.

A passage or a list of examples belongs to one split by its hash, so no test text is ever trained on.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from .language import LETTERS, WORDS, Phrase, join
from .world import COLOUR_NAMES, SHAPES, SIZES, SPLITS, rng

TASKS = ("lookup", "one-shot", "few-shot")
# Of ten texts one is for calibration and one for the test.
BUCKETS = {"train": range(0, 8), "calibration": range(8, 9), "test": range(9, 10)}
# Facts of a test passage; two facts may share a shape, if they differ in size.
FACTS = (4, 9)
MOST = len(SHAPES) * len(SIZES)
SHOTS = 8


@dataclass(frozen=True)
class Reading:
    """A text task with answers to choose from.

    Attributes:
        prompt: ends where the answer is due.
        choices: the possible answers, one token each.
        answer: index of the right one.
        task: of `TASKS`.
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
        task: "lookup": a passage and a question with four choices, by letter; "one-shot": the same after another
            passage with its question and right answer (no lesson has two passages, so this is new to the model);
            "few-shot": labelled examples, two labels.
        facts: objects of the passage, 2 to 12; None draws 4 to 9.
    """
    if task not in TASKS:
        raise ValueError(f"No reading task {task!r}; there are {', '.join(TASKS)}.")
    g = rng(split, index, stream=10 + TASKS.index(task))
    if task == "few-shot":
        text, choices, answer = _examples(g, split, SHOTS + 1)
        return Reading(text.rsplit(" ", 2)[0], choices, answer, task)
    parts: list[str] = []
    for _ in range(2 if task == "one-shot" else 1):
        known, text = _passage(g, split, int(g.integers(FACTS[0], FACTS[1] + 1)) if facts is None else facts)
        asked, right = _question(g, known, True, known[int(g.integers(len(known)))], g.random())
        parts += [text, asked, right, "."]
    return Reading(" ".join(parts[:-2]), LETTERS, LETTERS.index(right), task)


def lesson(g: np.random.Generator, questions: int, copying: float = 0.0, hard: float = 0.7) -> tuple[str, list[int]]:
    """A training text with many supervised words: one answer per passage learns slowly.

    One of four: words that repeat (heads that look back form there first), labelled examples, a passage said again in
    another order, a passage with questions, open or with options.

    Args:
        g: source of randomness.
        questions: about each passage.
        copying: share of texts that are repeated words.
        hard: share of passages in which two objects may share a shape.

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
    if g.random() < hard:
        known, text = _passage(g, "train", int(g.integers(2, FACTS[1] + 1)))
    else:
        known, text = _passage(g, "train", int(g.integers(2, len(SHAPES) + 1)), twice=False)
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
            asked, right = _question(g, known, options, fact, kind)
            words += asked.split()
            marks.append(len(words))
            words += [right, "."]
        questions -= len(forms)
    return " ".join(words), marks


def _passage(
    g: np.random.Generator, split: str, facts: int, twice: bool = True
) -> tuple[list[tuple[str, str, str]], str]:
    """Objects (shape, colour, size), no two of one shape and size (of one shape, unless `twice`), and the text."""
    if split not in SPLITS:
        raise ValueError(f"No split {split!r}; there are {', '.join(SPLITS)}.")
    if not 2 <= facts <= MOST:
        raise ValueError(f"A passage has 2 to {MOST} facts; {facts} were asked for.")
    pairs = list(itertools.product(SHAPES, SIZES))
    while True:
        if twice:
            chosen = [pairs[int(i)] for i in g.permutation(len(pairs))[:facts]]
        else:
            chosen = [(SHAPES[int(i)], SIZES[int(g.integers(2))]) for i in g.permutation(len(SHAPES))[:facts]]
        known = [(s, COLOUR_NAMES[int(g.integers(6))], z) for s, z in chosen]
        text = join([Phrase(c, s, z) for s, c, z in known]) + " ."
        if split_of(text) == split:
            return known, text


def _question(
    g: np.random.Generator, known: list[tuple[str, str, str]], options: bool, fact: tuple[str, str, str], kind: float
) -> tuple[str, str]:
    """Question about a fact up to where the answer is due, and the answer word; `kind` in [0, 1) decides what is asked.

    An attribute that does not tell the object apart by itself is asked for together with its size.
    """
    shape, colour, size = fact
    if not options and kind < 0.2 and sum(f[:2] == fact[:2] for f in known) == 1:
        return f"question what size is the {colour} {shape} ? answer", size
    alike = [f for f in known if f[1] == colour]
    if kind < 0.4 and (len(alike) == 1 or sum(f[2] == size for f in alike) == 1):
        named = colour if len(alike) == 1 else f"{size} {colour}"
        stem, right, pool, every = f"question which shape is {named} ?", shape, [f[0] for f in known], SHAPES
    else:
        named = shape if sum(f[0] == shape for f in known) == 1 else f"{size} {shape}"
        stem, right, pool, every = f"question what colour is the {named} ?", colour, [f[1] for f in known], COLOUR_NAMES
    if not options:
        return f"{stem} answer", right
    # Wrong options come from the passage first: the answer cannot be had by looking for a word that occurs.
    wrong = [w for w in dict.fromkeys(pool) if w != right]
    wrong = [wrong[int(i)] for i in g.permutation(len(wrong))]
    others = [w for w in every if w != right and w not in wrong]
    wrong = (wrong + [others[int(i)] for i in g.permutation(len(others))])[:3]
    at = int(g.integers(4))
    choices = [*wrong[:at], right, *wrong[at:]]
    listed = " ".join(f"{letter} {word}" for letter, word in zip(LETTERS, choices, strict=True))
    return f"{stem} options {listed} answer", LETTERS[at]


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
