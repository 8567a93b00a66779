"""CHAIR: objects that a caption mentions and the image does not have (Rohrbach et al. 2018, arXiv 1809.02156, section 2).

    CHAIR_s = captions with at least one hallucinated mention / captions
    CHAIR_i = hallucinated mentions / mentions        over all captions, repeats counted

Recall, precision and F1 are those of the forks for vision-language models (OPERA, PAI, SPIN): sets of objects, summed
over captions. Length is in words. Figures fall when a model stops naming objects: read recall and length beside them.

What an object is depends on the vocabulary. Without options it is the grammar of the shapes world, where an object is a
colour and a shape; with `synonyms` it is COCO's 80 categories (`attnsteer.evals.coco`, which says where it differs from
the original; `official=True` keeps that one's quirks).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import RecordError
from .base import Mean, Metric, Ratio, f1


def metric(
    synonyms: str | Path | None = None,
    instances: Iterable[str | Path] = (),
    captions: Iterable[str | Path] = (),
    official: bool = False,
    drop_incomplete: bool = False,
) -> Metric:
    """Columns: `hallucinating` (0 or 1), `mentions`, `hallucinated`, `named` (classes mentioned that are there), `classes`
    (classes mentioned), `there` (classes in the image), `words`; `false` and `missed` (classes) for F1.

    The record has `generated`, and `objects`: [colour, shape] pairs, or names of COCO categories; or, with `instances` or
    `captions`, `image_id` in place of `objects`; and `finished`, if it is known whether the caption ended by itself: `cut`
    is the share of those that the token limit ended, whose last words are whatever stood there.

    Args:
        synonyms: path of COCO's synonym table in the official format. instances, captions: paths of COCO annotation
            files, one or several. official: see `attnsteer.evals.coco.Vocabulary`. drop_incomplete: leave out what
            follows the last full stop, "!" or "?", as some evaluations do with captions that hit the token limit.

    Raises:
        RecordError: a file cannot be read, or annotations are given without synonyms.
    """
    instances, captions = ([p] if isinstance(p, str | Path) else list(p) for p in (instances, captions))
    if synonyms is None and (instances or captions or official):
        raise RecordError("chair: COCO annotations need the synonym table too: give synonyms=PATH.")
    key = "image_id" if instances or captions else "objects"
    reader = _shapes if synonyms is None else _coco(synonyms, instances, captions, official)

    def read(record: Mapping[str, Any]) -> dict[str, float]:
        text = record["generated"]
        if not isinstance(text, str):
            raise RecordError(f"chair: the caption is {text!r}; a text is needed.")
        if drop_incomplete:
            text = "".join(re.findall(r"[^.!?]*[.!?]", text))
        mentions, hallucinated, named, classes, there = reader(text, record[key])
        known = record.get("finished") is not None
        ended = {"known_end": 1, "cut": int(not record["finished"])} if known else {}
        return {
            **ended,
            "hallucinating": int(hallucinated > 0),
            "mentions": mentions,
            "hallucinated": hallucinated,
            "named": named,
            "classes": classes,
            "there": there,
            "false": classes - named,
            "missed": there - named,
            "words": len(re.findall(r"\w+(?:['’-]\w+)*", text)),
        }

    kind = "shapes grammar" if synonyms is None else f"COCO synonyms{', official quirks' if official else ''}"
    return Metric(
        "chair",
        ("generated", key),
        read,
        {
            "chair_s": Mean("hallucinating"),
            "chair_i": Ratio(("hallucinated",), ("mentions",)),
            "recall": Ratio(("named",), ("there",)),
            "precision": Ratio(("named",), ("classes",)),
            "f1": f1("named", "false", "missed"),
            "mentions": Mean("mentions"),
            "length": Mean("words"),
            "cut": Ratio(("cut",), ("known_end",)),
        },
        when={"cut": "known_end"},
        note=f"objects: {kind}; incomplete last sentence {'dropped' if drop_incomplete else 'kept'}",
        better={"chair_s": -1, "chair_i": -1, "recall": 1, "precision": 1, "f1": 1, "cut": -1},
    )


def _shapes(text: str, objects: Any) -> tuple[int, int, int, int, int]:
    from ...zoo.shapes.language import parse
    from ...zoo.shapes.layouts import chair
    from ...zoo.shapes.world import COLOUR_NAMES, SHAPES, Object

    pairs = [tuple(o) if isinstance(o, list | tuple) and len(o) == 2 else (None, None) for o in objects]
    if not all(c in COLOUR_NAMES and s in SHAPES for c, s in pairs):
        raise RecordError(
            f"chair: the objects {objects!r} are no [colour, shape] pairs of the shapes world; for names of COCO categories "
            "give synonyms=PATH."
        )
    # Only colour and shape are compared, so that the rest may be anything.
    scene = tuple(Object(shape, colour, "small", 0.0, 0.0, 0.0) for colour, shape in pairs)
    mentions, hallucinated, named = chair(text, scene)
    return mentions, hallucinated, named, len({(p.colour, p.shape) for p in parse(text)}), len(set(pairs))


def _coco(synonyms: str | Path, instances: list[str | Path], captions: list[str | Path], official: bool) -> Any:
    from ..coco import Vocabulary, present

    vocabulary = Vocabulary(synonyms, official)
    images = present(vocabulary, instances, captions)

    def read(text: str, truth: Any) -> tuple[int, int, int, int, int]:
        if instances or captions:
            if truth not in images:
                raise RecordError(f"chair: no annotation of the image {truth!r}; there are {len(images)} other images.")
            there = images[truth]
        else:
            there = {vocabulary.category(name) for name in truth}
        said = vocabulary.mentions(text)
        wrong = sum(s not in there for s in said)
        return len(said), wrong, len(there & set(said)), len(set(said)), len(there)

    return read
