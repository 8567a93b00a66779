"""The words of the shapes world: one vocabulary, noun phrases, captions, and their way back to objects.

A caption is a list of phrases, "a red circle , a small blue square and two green stars". Its objects can be read back
exactly (`parse`), so what a model says is judged without a learned judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .world import COLOUR_NAMES, SHAPES, SIZES, Object

PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "diamond": "diamonds",
    "cross": "crosses",
    "star": "stars",
}
SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
LETTERS = ("A", "B", "C", "D")
RELATIONS = ("left of", "right of", "above", "below")
FUNCTION = (
    "a the and is are there of in on not . , ? : ; question answer options caption input output label "
    "what which how many colour shape size object objects yes no left right above below image text"
).split()

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = tuple(
    dict.fromkeys([*FUNCTION, *NUMBERS, *LETTERS, *COLOUR_NAMES, *SIZES, *SHAPES, *PLURALS.values()])
)  # one token each


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: `count` objects of this colour and shape; `size` is None where it is not said."""

    colour: str
    shape: str
    size: str | None = None
    count: int = 1

    def __str__(self) -> str:
        noun = self.shape if self.count == 1 else PLURALS[self.shape]
        words = ["a" if self.count == 1 else NUMBERS[self.count], self.size, self.colour, noun]
        return " ".join(w for w in words if w)

    @property
    def words(self) -> str:
        """Without the article or number: "small red circle"."""
        return " ".join(str(self).split()[1:])


def join(phrases: Sequence[Phrase]) -> str:
    """ "a red circle", "a red circle and a blue square", "a red circle , a green star and a blue square"."""
    texts = [str(p) for p in phrases]
    return texts[0] if len(texts) == 1 else " , ".join(texts[:-1]) + " and " + texts[-1]


def phrases(objects: Iterable[Object], sizes: Sequence[bool] | bool = False, merge: bool = True) -> list[Phrase]:
    """The phrases that name these objects, in their order.

    Args:
        objects: what to name.
        sizes: whether to say the size, for all or one by one.
        merge: name several objects of one colour, shape (and size, where it is said) together, as a number.
    """
    objects = tuple(objects)
    said = [sizes] * len(objects) if isinstance(sizes, bool) else list(sizes)
    named = [(o.colour, o.shape, o.size if s else None) for o, s in zip(objects, said, strict=True)]
    if not merge:
        return [Phrase(*n) for n in named]
    return [Phrase(*n, count=c) for n, c in Counter(named).items()]


def describe(objects: Sequence[Object], g: np.random.Generator) -> str:
    """A caption as text-to-image models are trained on: phrases in random order, a size said now and then."""
    order = [objects[int(i)] for i in g.permutation(len(objects))]
    return join(phrases(order, sizes=[bool(g.random() < 0.25) for _ in order]))


def caption(objects: Sequence[Object]) -> str:
    """The caption that the vision-language model writes: from left to right, without sizes, one phrase each."""
    return join(phrases(sorted(objects, key=lambda o: o.x), merge=False))


def parse(text: str) -> list[Phrase]:
    """The phrases of a text, in order; words that make no phrase are passed over.

    A phrase is [article or number] [size] colour shape.
    """
    found, count, size, colour = [], 1, None, None
    for word in text.split():
        if word in ("a", "the"):
            count, size, colour = 1, None, None
        elif word in NUMBERS:
            count, size, colour = NUMBERS.index(word), None, None
        elif word in SIZES:
            size = word
        elif word in COLOUR_NAMES:
            colour = word
        elif word in SHAPES or word in SINGULAR:
            if colour is not None:
                found.append(Phrase(colour, SINGULAR.get(word, word), size, count))
            count, size, colour = 1, None, None
        else:
            count, size, colour = 1, None, None
    return found
