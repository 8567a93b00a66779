"""Questions about pictures with exact answers: existence with three kinds of negatives, counting, colour, relations.

An object class is a colour and a shape; a class exists in a scene when an object of that colour and shape does.
The negatives are those of POPE (Li et al. 2023, arXiv 2305.10355, section 4): random, popular, adversarial.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from .language import NUMBERS, PLURALS, RELATIONS, Phrase, caption
from .world import BIASED, COLOUR_NAMES, PARTNER, SHAPES, USUAL, Object, Scene, rng, sample_scene

CLASSES = tuple(itertools.product(COLOUR_NAMES, SHAPES))
NEGATIVES = ("random", "popular", "adversarial")
# Kinds of paired questions, after MME's (Fu et al. 2023, arXiv 2306.13394, section 2.2).
PAIRED = ("existence", "colour", "shape", "position")
KINDS = ("existence", "counting", "colour", "relation")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Two centres closer than this along the axis are neither left nor right of each other.
CLEAR = 0.1


@dataclass(frozen=True)
class Question:
    """A question and its answer, one word each in the vocabulary; `kind` of `KINDS`."""

    text: str
    answer: str
    kind: str

    @property
    def prompt(self) -> str:
        """The text that ends where the answer is due, without the image."""
        return f"question {self.text} answer"


def picture(split: str, index: int) -> Scene:
    """Scene `index` of the vision-language data: drawn with the biased prior."""
    return sample_scene(rng(split, index, stream=0), prior=BIASED)


def existence(scene: Scene, colour: str, shape: str) -> Question:
    """Whether an object of this class is there."""
    right = "yes" if scene.find(shape=shape, colour=colour) else "no"
    return Question(f"is there {Phrase(colour, shape)} ?", right, "existence")


def absent(scene: Scene, kind: str, g: np.random.Generator) -> tuple[str, str]:
    """A class that is not in the scene.

    Args:
        scene: the picture.
        kind: "random": any; "popular": among the classes that are the most frequent in all scenes (each shape in
            its usual colour); "adversarial": what the prior puts beside the shapes that are there (their partners
            in the usual colour), then the shapes that are there in their usual colours, then in the colours of others.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in NEGATIVES:
        raise ValueError(f"No negatives of the kind {kind!r}; there are {', '.join(NEGATIVES)}.")
    there = {(o.colour, o.shape) for o in scene.objects}
    shapes = sorted({o.shape for o in scene.objects})
    popular = [(USUAL[s], s) for s in SHAPES]
    tiers: list[list[tuple[str, str]]] = []
    if kind == "popular":
        tiers = [popular]
    if kind == "adversarial":
        tiers = [
            [(USUAL[PARTNER[s]], PARTNER[s]) for s in shapes],
            [(USUAL[s], s) for s in shapes],
            [(c, s) for c in sorted({o.colour for o in scene.objects}) for s in shapes],
        ]
    for tier in [*tiers, list(CLASSES)]:
        free = [c for c in tier if c not in there]
        if free:
            return free[int(g.integers(len(free)))]
    raise AssertionError("a scene has at most five of the 36 classes")


def pope(split: str, index: int, kind: str, pairs: int = 3) -> tuple[Scene, list[Question]]:
    """Scene `index` and its balanced questions: up to `pairs` classes that are there and as many that are not."""
    scene = picture(split, index)
    g = rng(split, index, stream=20 + NEGATIVES.index(kind) if kind in NEGATIVES else 20)
    there = sorted({(o.colour, o.shape) for o in scene.objects})
    there = [there[int(i)] for i in g.permutation(len(there))[:pairs]]
    missing: list[tuple[str, str]] = []
    while len(missing) < len(there):
        found = absent(scene, kind, g)
        # The harder kinds can run out of classes; a repeated question would count twice.
        if found in missing:
            found = absent(scene, "random", g)
        if found not in missing:
            missing.append(found)
    return scene, [existence(scene, *c) for c in itertools.chain(*zip(there, missing, strict=True))]


def counting(scene: Scene, shape: str) -> Question:
    """How many objects of a shape there are."""
    return Question(f"how many {PLURALS[shape]} are there ?", NUMBERS[len(scene.find(shape=shape))], "counting")


def colour(scene: Scene, shape: str) -> Question:
    """The colour of the only object of a shape.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = scene.find(shape=shape)
    if len(found) != 1:
        raise ValueError(f"{len(found)} objects are a {shape}; its colour is asked for where there is one.")
    return Question(f"what colour is the {shape} ?", found[0].colour, "colour")


def holds(a: Object, relation: str, b: Object) -> bool:
    """Whether `a` is left of, right of, above or below `b`: by the centres, clearly."""
    gap = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]
    return gap > CLEAR


def relation(scene: Scene, a: Object, which: str, b: Object) -> Question:
    """Whether one object is on a side of another."""
    right = "yes" if holds(a, which, b) else "no"
    text = f"is the {a.colour} {a.shape} {which} the {b.colour} {b.shape} ?"
    return Question(text, right, "relation")


def draw(scene: Scene, kind: str, g: np.random.Generator, positive: float = 0.5) -> Question | None:
    """A random question of a kind, or None where the scene allows none.

    Args:
        positive: how often an existence question is about something that is there.
    """
    objects = scene.objects
    if kind == "existence":
        if g.random() < positive:
            o = objects[int(g.integers(len(objects)))]
            return existence(scene, o.colour, o.shape)
        return existence(scene, *absent(scene, "random", g))
    if kind == "counting":
        some = objects[int(g.integers(len(objects)))].shape
        return counting(scene, some if g.random() < 0.8 else SHAPES[int(g.integers(len(SHAPES)))])
    if kind == "colour":
        single = [o.shape for o in objects if len(scene.find(shape=o.shape)) == 1]
        return colour(scene, single[int(g.integers(len(single)))]) if single else None
    unique = [o for o in objects if len(scene.find(shape=o.shape, colour=o.colour)) == 1]
    if len(unique) < 2:
        return None
    a, b = (unique[int(i)] for i in g.permutation(len(unique))[:2])
    which = RELATIONS[int(g.integers(len(RELATIONS)))]
    return relation(scene, a, which, b) if holds(a, which, b) or holds(b, which, a) else None


def paired(split: str, index: int, kind: str) -> tuple[Question, Question] | None:
    """Two questions about scene `index`, the first to be affirmed, the second to be denied; None where the scene allows none.

    Args:
        kind: of `PAIRED`. "existence": a class that is there, and a random one; "colour": the same shape in a colour that is not
            there; "shape": another shape in the same colour; "position": the same two objects and the opposite relation.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in PAIRED:
        raise ValueError(f"No pairs of the kind {kind!r}; there are {', '.join(PAIRED)}.")
    scene = picture(split, index)
    g = rng(split, index, stream=50 + PAIRED.index(kind))
    if kind == "position":
        unique = [o for o in scene.objects if len(scene.find(shape=o.shape, colour=o.colour)) == 1]
        every = [(a, r, b) for a, b in itertools.permutations(unique, 2) for r in RELATIONS if holds(a, r, b)]
        if not every:
            return None
        a, which, b = every[int(g.integers(len(every)))]
        return relation(scene, a, which, b), relation(scene, a, OPPOSITE[which], b)
    there = sorted({(o.colour, o.shape) for o in scene.objects})
    colour_, shape = there[int(g.integers(len(there)))]
    if kind == "existence":
        return existence(scene, colour_, shape), existence(scene, *absent(scene, "random", g))
    near = [(c, shape) for c in COLOUR_NAMES] if kind == "colour" else [(colour_, s) for s in SHAPES]
    free = [c for c in near if c not in there]
    return existence(scene, colour_, shape), existence(scene, *free[int(g.integers(len(free)))])


def lesson(scene: Scene, g: np.random.Generator, questions: int, positive: float = 0.5) -> tuple[str, list[int]]:
    """A training text about a picture: several questions with answers, and often its caption.

    Returns:
        the text and the positions of the words that answer (the caption's words and its end among them).
    """
    words: list[str] = []
    marks: list[int] = []
    describe_at = int(g.integers(questions + 1)) if g.random() < 0.6 else -1
    for turn in range(questions + 1):
        if turn == describe_at:
            said = [*caption(scene.objects).split(), "</s>"]
            words.append("caption")
            marks += range(len(words), len(words) + len(said))
            words += said
        if turn == questions:
            break
        kind = KINDS[int(g.choice(4, p=(0.5, 0.18, 0.18, 0.14)))]
        asked = draw(scene, kind, g, positive) or draw(scene, "existence", g, positive)
        words += asked.prompt.split()
        marks.append(len(words))
        words += [asked.answer, "."]
    return " ".join(words), marks
