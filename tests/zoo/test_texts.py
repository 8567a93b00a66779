"""The text tasks: no two samples alike, splits that share nothing, spans that are in the prompt once, right answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest

from attnsteer.recipe.schema import ZOO_TASKS, DataSpec
from attnsteer.run.data import load
from attnsteer.zoo.texts.draw import other_words, split_of
from attnsteer.zoo.texts.facts import CAPITALS, KINDS, MIXTURE, facts
from attnsteer.zoo.texts.instructions import KINDS as DEMANDED
from attnsteer.zoo.texts.instructions import instructions
from attnsteer.zoo.texts.passages import readings, sources
from attnsteer.zoo.texts.reviews import reviews

TEST, CALIBRATION = 1000, 400
DRAWS: dict[str, Callable[[str], Iterator[Any]]] = {
    **{kind: lambda split, kind=kind: facts(split, kind) for kind in (*KINDS, "mixture")},
    "readings": readings,
    "sources": sources,
}


@pytest.mark.parametrize("name", DRAWS)
def test_samples_differ_and_splits_share_none(name: str) -> None:
    test, calibration = (
        [(s.prompt, tuple(s.choices)) for s in islice(DRAWS[name](split), count)]
        for split, count in (("test", TEST), ("calibration", CALIBRATION))
    )
    assert (len(set(test)), len(set(calibration))) == (TEST, CALIBRATION)
    assert not set(test) & set(calibration)
    assert test == [(s.prompt, tuple(s.choices)) for s in islice(DRAWS[name]("test"), TEST)]


@pytest.mark.parametrize("name", DRAWS)
def test_spans_and_answers(name: str) -> None:
    for sample in islice(DRAWS[name]("test"), 200):
        assert len(set(sample.choices)) == len(sample.choices) and not sample.prompt.endswith(" ")
        right = sample.choices[sample.answer]
        if sample.fact is None:
            country = sample.prompt.removeprefix("The capital of ").removesuffix(" is")
            assert (sample.kind, CAPITALS[country]) == ("plain", right)
            continue
        assert sample.prompt.count(sample.fact) == 1
        asked_of_the_other = getattr(sample, "kind", "").endswith("earlier")
        assert sample.fact.rstrip(".").endswith(right) != asked_of_the_other
        others = getattr(sample, "others", None) or (sample.other,)
        assert all(sample.prompt.count(text) == 1 for text in others)


def test_what_is_asked_of_a_fact_stays_in_its_split() -> None:
    for kind in ("now", "earlier", "plain"):
        for sample in islice(facts("calibration", kind), 50):
            new, old = sample.choices
            country = next(c for c, city in CAPITALS.items() if city == old)
            assert split_of(f"{country} {old} {new}") == "calibration"


def test_the_mixture_is_half_the_task() -> None:
    kinds = [s.kind for s in islice(facts("test", "mixture"), 80)]
    assert kinds == list(MIXTURE) * 10 and kinds.count("now") == 40 and set(kinds) == set(KINDS)


@pytest.mark.parametrize("source", ["facts", "passages", "sources"])
def test_recipes_draw_them(source: str) -> None:
    spec = DataSpec(zoo=source, split="test", start=5, limit=10)
    samples = load(spec, ZOO_TASKS[source][0]).samples
    assert [s["index"] for s in samples] == list(range(5, 15)) and len({s["id"] for s in samples}) == 10
    assert all(
        isinstance(text, str) and s["prompt"].count(text) == 1
        for s in samples
        for text in (*s["fact"], *s["other"], *s["random"])
    )


def test_a_random_span_has_as_many_words_and_at_most_half_of_the_marked_ones() -> None:
    found = [(s.prompt, s.fact, other_words(s.prompt, s.fact)) for s in islice(facts("test"), 200)]
    for prompt, fact, (drawn,) in found:
        assert prompt.count(drawn) == 1 and drawn != fact and len(drawn.split()) == len(fact.split())
        assert sum(w in fact.split() for w in set(drawn.split()) - {"the", "capital", "of"}) <= len(fact.split()) // 2
    assert len({prompt.index(drawn) for prompt, _, (drawn,) in found}) > 3
    assert other_words("a b", "a b") == [] and other_words("a b a b", "a b") != ["a b"]


def test_reviews_differ_are_balanced_and_their_splits_share_none() -> None:
    test, calibration = (
        list(islice(reviews(split), count)) for split, count in (("test", TEST), ("calibration", CALIBRATION))
    )
    texts = [{r.text for r in part} for part in (test, calibration)]
    assert tuple(map(len, texts)) == (TEST, CALIBRATION) and not texts[0] & texts[1]
    assert all(split_of(t) == "test" for t in texts[0]) and test == list(islice(reviews("test"), TEST))
    assert 0.45 < sum(r.answer for r in test) / TEST < 0.55
    for review in test[:100]:
        shown = re.findall(r"Review: (.*)\nSentiment:( \w+)?", review.prompt)
        assert [label.strip() for _, label in shown] == ["positive", "negative", ""] and shown[-1][0] == review.text
        assert not texts[1] & {text for text, _ in shown}


@pytest.mark.parametrize("kind", ["all", "bullet"])
def test_instructions_differ_and_their_splits_share_none(kind: str) -> None:
    count = {"all": (TEST, CALIBRATION), "bullet": (100, 40)}[kind]
    test, calibration = (
        list(islice(instructions(split, kind), n)) for split, n in zip(("test", "calibration"), count, strict=True)
    )
    prompts = [{i.prompt for i in part} for part in (test, calibration)]
    assert tuple(map(len, prompts)) == count and not prompts[0] & prompts[1]
    assert [i.kind for i in test[:8]] == (list(DEMANDED) * 2 if kind == "all" else [kind] * 8)
    for item in test[:50]:
        assert item.prompt.count(item.demand) == 1 and item.prompt.endswith("<|im_start|>assistant\n")
        assert item.kind == "bullet" or item.word in item.demand.lower()
