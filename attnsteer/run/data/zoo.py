"""Samples of the shapes world, and of the text tasks for real language models: drawn by index, so that a split needs no file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from ...errors import RecipeError, did_you_mean
from ...zoo.shapes.language import parse
from ...zoo.shapes.layouts import CATEGORIES, Layout, layout
from ...zoo.shapes.questions import NEGATIVES, PAIRED, paired, picture, pope
from ...zoo.shapes.reading import TASKS, reading
from ...zoo.shapes.world import SPLITS
from ...zoo.texts import facts as text_facts
from ...zoo.texts import passages
from ...zoo.texts.draw import other_range, other_words
from ...zoo.texts.instructions import FORMS, KINDS
from ...zoo.texts.instructions import instructions as text_instructions
from ...zoo.texts.reviews import LABELS
from ...zoo.texts.reviews import reviews as text_reviews
from .sample import Data, Sample

if TYPE_CHECKING:
    from ...recipe.schema import DataSpec


# The values of the option `seed` of the text tasks: their samples in another order, or drawn anew.
SEED = range(2**31)


def load(spec: DataSpec) -> Data:
    """The samples `start` to `start + limit` of a source.

    Raises:
        RecipeError: an unknown split or option.
    """
    if spec.split not in SPLITS:
        raise RecipeError(f"data.split: {spec.zoo} has no split {spec.split!r}; there are {', '.join(SPLITS)}.")
    known, build = SOURCES[str(spec.zoo)]
    for name, value in spec.options.items():
        if name not in known:
            there = ", ".join(known) or "none"
            raise RecipeError(f"data.options.{name}: {spec.zoo} has no such option; there are: {there}.")
        allowed = known[name]
        if allowed is SEED:
            if type(value) is not int or value not in SEED:
                raise RecipeError(f"data.options.{name}: {value!r}; give an integer of 0 to {SEED[-1]}.")
        elif isinstance(value, bool) or value not in allowed:
            hint = did_you_mean(str(value), map(str, allowed))
            raise RecipeError(f"data.options.{name}: {value!r}; there are {', '.join(map(str, allowed))}.{hint}")
    every = build(spec.split, **spec.options)
    stop = None if spec.limit is None else spec.start + spec.limit
    samples = [{**s, "index": spec.start + i} for i, s in enumerate(islice(every, spec.start, stop))]
    return Data(samples, image)


def image(sample: Mapping[str, Any]) -> Any:
    """The rendered scene of a sample: `image` is its index, `split` its split."""
    from PIL import Image

    from ...zoo.shapes.render import render

    pixels = (render([picture(sample["split"], sample["image"])])[0] * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def readings(split: str, task: str = "lookup") -> Iterator[Sample]:
    """Passages with a question and four letters, or labelled examples; task "all" has each kind in turn."""
    kinds = TASKS if task == "all" else (task,)
    number = 0
    while True:
        for kind in kinds:
            item = reading(split, number, kind)
            yield {
                "id": f"reading-{kind}-{split}-{number}",
                "prompt": item.prompt,
                "choices": list(item.choices),
                "answer": item.answer,
                "task": kind,
                **_marks(item.prompt, kind),
            }
        number += 1


def _marks(prompt: str, kind: str) -> dict[str, Any]:
    """What methods on marked text can speak of, as token ranges from the first token, which is <s>.

    spans: the question that is asked (few-shot: the example that is asked about). fact: the phrase that answers it.
    passage: what it is asked about. random: as many words of that as the fact has, from elsewhere in it. `question` is the text of
    the first.
    """
    words = prompt.split()
    if kind == "few-shot":
        at = _last(words, "input")
        span = (at, len(words) - 1)
        return {"question": " ".join(words[slice(*span)]), "spans": [_shift(span)], "passage": [_shift((0, at))]}
    at = _last(words, "question")
    begin = 1 + max((i for i, w in enumerate(words[:at]) if w == "answer"), default=-3) + 2
    asked = (at, at + words[at:].index("?") + 1)
    out = {"question": " ".join(words[at + 1 : asked[1]]), "spans": [_shift(asked)], "passage": [_shift((begin, at))]}
    fact = _fact(words, begin, at, asked[1])
    random = other_range(prompt, at - begin, fact[0] - begin, fact[1] - begin)
    return {**out, "fact": [_shift(fact)], "random": [_shift((begin + a, begin + b)) for a, b in random]}


def _fact(words: list[str], begin: int, at: int, end: int) -> tuple[int, int]:
    """The range of the phrase that the question is about."""
    named = words[at + 4 : end - 1]
    named = [w for w in named if w != "the"]
    start = begin
    for i in range(begin, at):
        if words[i] in (",", "and", "."):
            if set(named) <= set(words[start:i]):
                return start, i
            start = i + 1
    raise AssertionError(f"the question {words[at:end]} is about no phrase of {words[begin:at]}")


def _last(words: list[str], word: str) -> int:
    return len(words) - 1 - words[::-1].index(word)


def _shift(span: tuple[int, int]) -> list[int]:
    return [span[0] + 1, span[1] + 1]


def existence(split: str, kind: str = "random", patches: str | None = None) -> Iterator[Sample]:
    """Questions whether an object is there; `group` is the scene. Half of each scene's questions are to be denied.

    patches "paint": `local` and `summary` are the picture's patches by PAINT's rule.
    """
    number = 0
    while True:
        scene, asked = pope(split, number, kind)
        there, more = _pairs(scene), _patches(scene, patches)
        for k, question in enumerate(asked):
            phrase = parse(question.text)[0]
            yield {
                "id": f"existence-{kind}-{split}-{number}-{k}",
                "group": f"{split}-{number}",
                "prompt": question.prompt,
                "question": question.text,
                "image": number,
                "split": split,
                "label": question.answer,
                "choices": ["yes", "no"],
                "answer": ["yes", "no"].index(question.answer),
                "objects": there,
                "spans": [f"{phrase}"],
                **more,
            }
        number += 1


def pairs(split: str, kind: str = "all", patches: str | None = None) -> Iterator[Sample]:
    """Two questions each, one to be affirmed and one to be denied, as MME has them; `pair` is what they have in common, `category`
    of `PAIRED`, `group` the scene. A scene has one pair of each kind that it allows.

    patches: see `existence`.
    """
    kinds = PAIRED if kind == "all" else (kind,)
    number = 0
    while True:
        scene = picture(split, number)
        more: Mapping[str, Any] | None = None
        for own in kinds:
            two = paired(split, number, own)
            if two is None:
                continue
            more = _patches(scene, patches) if more is None else more
            for question in two:
                yield {
                    "id": f"pairs-{own}-{split}-{number}-{question.answer}",
                    "group": f"{split}-{number}",
                    "pair": f"{own}-{split}-{number}",
                    "category": own,
                    "prompt": question.prompt,
                    "question": question.text,
                    "image": number,
                    "split": split,
                    "label": question.answer,
                    "choices": ["yes", "no"],
                    "answer": ["yes", "no"].index(question.answer),
                    "objects": _pairs(scene),
                    **more,
                }
        number += 1


def captions(split: str, patches: str | None = None) -> Iterator[Sample]:
    """Scenes to describe; patches: see `existence`."""
    number = 0
    while True:
        yield {
            "id": f"caption-{split}-{number}",
            "prompt": "caption",
            "image": number,
            "split": split,
            "objects": _pairs(picture(split, number)),
            **_patches(picture(split, number), patches),
        }
        number += 1


def _patches(scene: Any, rule: str | None) -> dict[str, list[int]]:
    """What PAINT acts on, where it is asked for: the vision tower runs."""
    if rule is None:
        return {}
    from ...zoo.patches import paint_patches

    (local,), (summary,) = paint_patches([scene])
    return {"local": local, "summary": summary}


def _pairs(scene: Any) -> list[list[str]]:
    """The object classes of a scene, from left to right."""
    return [list(p) for p in dict.fromkeys((o.colour, o.shape) for o in sorted(scene.objects, key=lambda o: o.x))]


def layouts(split: str, category: str = "objects", count: int = 2) -> Iterator[Sample]:
    """Prompts with boxes; category "all" has each category in turn."""
    kinds = CATEGORIES if category == "all" else (category,)
    number = 0
    while True:
        for kind in kinds:
            yield {"id": f"layout-{kind}-{count}-{split}-{number}", **_layout(layout(split, number, kind, count))}
        number += 1


def prompts(split: str) -> Iterator[Sample]:
    """Prompts of two, three and four objects in turn."""
    number = 0
    while True:
        yield {"id": f"prompt-{split}-{number}", **_layout(layout(split, number, "objects", 2 + number % 3))}
        number += 1


def _layout(item: Layout) -> Sample:
    """regions: phrase -> box, as methods take it; words: the nouns of the phrases; texts: the phrases without articles;
    groups: each of these as a group of its own."""
    phrases = [{k: v for k, v in asdict(p).items() if v is not None} for p in item.phrases]
    out: Sample = {
        "prompt": item.prompt,
        "phrases": phrases,
        "category": item.category,
        "words": [p.words.split()[-1] for p in item.phrases],
        "texts": [p.words for p in item.phrases],
        "groups": [[p.words] for p in item.phrases],
    }
    if item.boxes:
        out["boxes"] = [list(b) for b in item.boxes]
        out["regions"] = dict(zip(out["texts"], out["boxes"], strict=True))
    if item.side is not None:
        out["side"] = item.side
    return out


def takes_seed(source: str | None) -> bool:
    """Whether the samples of a source are drawn from a seed that a recipe may set."""
    return source in SOURCES and "seed" in SOURCES[source][0]


def _drawn(split: str, seed: int) -> str:
    """The part of a sample's id that says where it was drawn; samples of other seeds have other ids."""
    return f"{split}-seed{seed}" if seed else split


def facts(split: str, kind: str = "now", seed: int = 0) -> Iterator[Sample]:
    """Facts that a passage overrules, and their guards; `category` is the kind, `fact` the clause to be marked, as a text;
    `other` the clause about the earlier fact, `random` as many words from elsewhere: controls."""
    for number, item in enumerate(text_facts.facts(split, kind, seed)):
        yield {
            "id": f"facts-{kind}-{_drawn(split, seed)}-{number}",
            "prompt": item.prompt,
            "choices": list(item.choices),
            "answer": item.answer,
            "category": item.kind,
            "fact": [item.fact] if item.fact is not None else [],
            "other": [item.other] if item.other is not None else [],
            "random": other_words(item.prompt, item.fact) if item.fact is not None else [],
        }


def looked_up(source: str) -> Callable[..., Iterator[Sample]]:
    """Passages with a question; `fact` is the sentence that holds the answer, `other` the first that does not, `random` as many
    words from elsewhere, as texts."""

    def samples(split: str, seed: int = 0) -> Iterator[Sample]:
        draw = passages.readings if source == "passages" else passages.sources
        for number, item in enumerate(draw(split, seed)):
            yield {
                "id": f"{source}-{_drawn(split, seed)}-{number}",
                "prompt": item.prompt,
                "choices": list(item.choices),
                "answer": item.answer,
                "fact": [item.fact],
                "other": [item.others[0]],
                "random": other_words(item.prompt, item.fact),
            }

    return samples


def reviews(split: str, seed: int = 0) -> Iterator[Sample]:
    """Reviews to be called positive or negative, after one of each; `fact` is the review, as a text."""
    for number, item in enumerate(text_reviews(split, seed)):
        yield {
            "id": f"reviews-{_drawn(split, seed)}-{number}",
            "prompt": item.prompt,
            "choices": list(LABELS),
            "answer": item.answer,
            "fact": [item.text],
        }


def instructions(split: str, kind: str = "all", form: str = "chatml", seed: int = 0) -> Iterator[Sample]:
    """Questions with a demand on the form of the answer; `fact` is the demand, as a text, `random` as many words that
    are not it, `name` the word that it names."""
    for number, item in enumerate(text_instructions(split, kind, form, seed)):
        yield {
            "id": f"instructions-{kind}-{_drawn(split, seed)}-{number}",
            "prompt": item.prompt,
            "category": item.kind,
            "name": item.word,
            "fact": [item.demand],
            "random": other_words(item.text, item.demand),
        }


# Source -> its options with their values, and what draws it.
SOURCES: dict[str, tuple[dict[str, Sequence[Any]], Callable[..., Iterator[Sample]]]] = {
    "reading": ({"task": (*TASKS, "all")}, readings),
    "existence": ({"kind": NEGATIVES, "patches": ("paint",)}, existence),
    "pairs": ({"kind": (*PAIRED, "all"), "patches": ("paint",)}, pairs),
    "captions": ({"patches": ("paint",)}, captions),
    "layouts": ({"category": (*CATEGORIES, "all"), "count": (1, 2, 3, 4)}, layouts),
    "prompts": ({}, prompts),
    "facts": ({"kind": (*text_facts.KINDS, "mixture"), "seed": SEED}, facts),
    "passages": ({"seed": SEED}, looked_up("passages")),
    "sources": ({"seed": SEED}, looked_up("sources")),
    "reviews": ({"seed": SEED}, reviews),
    "instructions": ({"kind": (*KINDS, "all"), "form": tuple(FORMS), "seed": SEED}, instructions),
}
