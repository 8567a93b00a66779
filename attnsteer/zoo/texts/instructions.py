"""Questions with one demand on the form of the answer, which a few lines of code can check (after IFEval, arXiv 2311.07911)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .draw import rng, split_of

TOPICS = (
    "bees", "rivers", "chess", "bread", "volcanoes", "bicycles", "the moon", "tea", "lighthouses", "owls", "glaciers", "pianos",
    "cheese", "deserts", "whales", "maps", "clocks", "bridges", "mushrooms", "windmills", "salt", "coral reefs", "kites", "honey",
    "snow", "libraries", "horses", "olive trees", "canals", "foxes",
)  # fmt: skip
QUESTIONS = (
    "What should a child know about {t}?", "Why do people like {t}?", "Tell me something about {t}.",
    "What are {t} good for?", "What is surprising about {t}?", "Describe {t} to a visitor from far away.",
    "How would you begin a talk about {t}?", "Write a short note about {t}.", "What would you ask an expert on {t}?",
    "Why should we protect {t}?",
)  # fmt: skip
OPENINGS = (
    "",
    "Please be friendly. ",
    "I need this for school. ",
    "We talked about this at dinner. ",
    "Take your time. ",
)
WORDS = (
    "today", "perhaps", "remember", "morning", "water", "friend", "story", "simple", "green", "together", "market", "winter",
    "window", "number", "travel", "silver",
)  # fmt: skip
DEMANDS = {
    "begin": 'Begin your answer with the word "{w}".',
    "bullet": 'Answer in bullet points only: every line begins with "* ".',
    "key": 'Use the word "{w}" in your answer.',
    "json": 'Answer with a JSON object that has the key "{w}", and with nothing else.',
}
KINDS = tuple(DEMANDS)
CHATML = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
# SmolLM2 was taught with these words before the first turn; without them it often says nothing at all.
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
FORMS = {"plain": "{text}\nAnswer:", "chatml": CHATML, "smollm": SYSTEM + CHATML}


@dataclass(frozen=True)
class Instruction:
    """A question, a demand, and what is checked. prompt: ends where the answer is due. demand: its text; kind: of `KINDS`;
    word: the one that the demand names; text: question and demand, as they stand in the prompt."""

    prompt: str
    demand: str
    kind: str
    word: str
    text: str = ""


def instructions(split: str, kind: str = "all", form: str = "chatml", seed: int = 0) -> Iterator[Instruction]:
    """Questions of a split, none twice.

    Args:
        split: "train", "calibration" or "test". kind: of `KINDS`, or "all" of them in turn. form: "chatml", "smollm" (that
            behind SmolLM2's own system message), or "plain".
    """
    seen: set[str] = set()
    kinds = itertools.cycle(KINDS if kind == "all" else (kind,))
    wanted = next(kinds)
    for number in itertools.count():
        g = rng(split, number, 40, seed)
        parts = (OPENINGS, TOPICS, QUESTIONS, WORDS)
        opening, topic, question, word = (values[int(g.integers(len(values)))] for values in parts)
        demand = DEMANDS[wanted].format(w=word.capitalize() if wanted == "begin" else word)
        text = f"{opening}{question.format(t=topic)} {demand}"
        if text in seen or split_of(text) != split:
            continue
        seen.add(text)
        yield Instruction(FORMS[form].format(text=text), demand, wanted, word, text)
        wanted = next(kinds)
