"""Looking up one sentence of a passage: who put what where, and who said so."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .draw import pick, rng, shuffled, split_of

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Kevin", "Laura", "Mark", "Nora",
    "Oliver", "Paula",
    "Robert", "Sarah", "Thomas",
)  # fmt: skip
THINGS = (
    "key", "book", "letter", "phone", "wallet", "camera", "umbrella", "hammer", "map", "ring", "watch", "guitar",
    "bottle", "candle",
    "blanket", "basket",
)  # fmt: skip
PLACES = (
    "kitchen", "garage", "garden", "cellar", "office", "bathroom", "attic", "bedroom", "library", "hallway", "car",
    "tent", "barn",
    "closet", "workshop", "balcony",
)  # fmt: skip
FILLERS = (
    "The weather was mild that day.", "A dog barked somewhere in the street.", "It was almost time for lunch.",
    "The radio played an old song.", "Nobody noticed the rain.", "The neighbours were away on holiday.", "The clock struck four.",
    "A train passed in the distance.",
)  # fmt: skip
PAPERS = ("Herald", "Gazette", "Tribune", "Courier", "Chronicle", "Observer", "Standard", "Mercury")
EVENTS = (
    ("the festival takes place on", ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")),
    ("the new bridge is made of", ("wood", "steel", "stone", "glass", "brick")),
    ("the winner of the race is from", ("Canada", "Brazil", "Kenya", "Japan", "Norway", "Italy")),
    ("the new school is painted", ("red", "blue", "green", "yellow", "white", "grey")),
    ("the stolen painting shows a", ("horse", "ship", "castle", "tree", "woman", "lion")),
)


@dataclass(frozen=True)
class Passage:
    """A passage, a question, and answers to choose from.

    Attributes:
        prompt: ends where the answer is due. choices, answer: the possible answers and the index of the right one. fact: the
            sentence that holds the answer. others: the sentences that hold the others.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    fact: str
    others: tuple[str, ...]


def readings(split: str, seed: int = 0) -> Iterator[Passage]:
    """Four things that four people put in four places, two sentences that say nothing of them, and a question about one."""
    for number in itertools.count():
        g = rng(split, number, 20, seed)
        names, things, places = pick(g, NAMES, 4), pick(g, THINGS, 4), pick(g, PLACES, 4)
        facts = [f"{n} put the {t} in the {p}." for n, t, p in zip(names, things, places, strict=True)]
        lines = [*facts, *pick(g, FILLERS, 2)]
        text = " ".join(lines[i] for i in g.permutation(len(lines)))
        at = int(g.integers(4))
        if split_of(text) != split:
            continue
        prompt = f"{text}\nQuestion: Where is the {things[at]}?\nAnswer: The {things[at]} is in the"
        yield Passage(prompt, tuple(places), at, facts[at], tuple(f for i, f in enumerate(facts) if i != at))


def sources(split: str, seed: int = 0) -> Iterator[Passage]:
    """Two newspapers that disagree, and a question what one of them says; no two alike, in the order of the seed."""
    papers = list(itertools.permutations(PAPERS, 2))
    claims = [(stem, said) for stem, values in EVENTS for said in itertools.permutations(values, 2)]
    every = []
    for (one, other), (stem, said) in itertools.product(papers, claims):
        lines = [f"The {p} writes that {stem} {v}." for p, v in zip((one, other), said, strict=True)]
        if split_of(" ".join(lines)) == split:
            every += [(lines, (one, other), stem, said, at) for at in (0, 1)]
    for i in shuffled(len(every), split, 21, seed):
        lines, both, stem, said, at = every[i]
        asked = f"Question: What does the {both[at]} write?\nAnswer: The {both[at]} writes that {stem}"
        yield Passage(f"{' '.join(lines)}\n{asked}", said, at, lines[at], (lines[1 - at],))
