"""COCO's objects in captions: the synonym table, words to categories, and what is in an image, from local files.

After Rohrbach et al. 2018, LisaAnne/Hallucination, utils/chair.py (commit 585f2d9). Its table `synonyms.txt` (one line per
category, "person, girl, boy, ...", the first entry names it) is not part of this project: give its path.

The original tokenizes with nltk and makes words singular with pattern or WordNet, and its figures change with their
versions. Here a word is what `WORD` matches, and a plural belongs to the entry whose regular or listed plural it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RecordError, listing

WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "calves": "calf",
    "knives": "knife",
    "loaves": "loaf",
    "wolves": "wolf",
}
# Before these, "baby" and "adult" (animals) or "passenger" (vehicles) name no person.
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
VEHICLES = ("jet", "train")
# Pairs that the original merges; in its own mode no other entries of two words are found.
PAIRS = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, stop sign, "
    "parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, hot dog, cell phone, "
    "mobile phone, teddy bear, hair drier, potted plant, bow tie, laptop computer, home plate"
).split(", ")


class Vocabulary:
    """The synonym table.

    Args:
        path: of the table. official: keep the quirks of the original: entries count as they are written, so those with a
            capital or a leading blank (" motor bike", "iPhone") never match; no entry of three words matches, and of two
            words only the pairs in its code.

    Attributes:
        names: the categories, in order.

    Raises:
        RecordError: the file is missing, is not text, or has an empty line or entry.
    """

    def __init__(self, path: str | Path, official: bool = False):
        text = _text(path)
        self.official = official
        self.names: list[str] = []
        self._entries: dict[str, str] = {}
        for number, line in enumerate(text.rstrip().splitlines(), 1):
            entries = line.strip().split(", ") if official else [e.strip().lower() for e in line.split(",")]
            if not all(entries):
                raise RecordError(f"{path}, line {number}: {line!r} is no list 'name, synonym, ...' of a category.")
            self.names.append(entries[0])
            # As in the original, a later line takes an entry over.
            self._entries.update(dict.fromkeys(entries, entries[0]))
        if not self.names:
            raise RecordError(f"{path} is empty; one line 'name, synonym, ...' per category is needed.")
        self._pairs = {p: p for p in PAIRS}
        self._pairs |= {f"{age} {a}": a for a in ANIMALS for age in ("baby", "adult")}
        self._pairs |= {f"passenger {v}": v for v in VEHICLES}
        self._pairs |= {"bow tie": "tie", "toilet seat": "toilet"}
        self._longest = max(len(e.split()) for e in self._entries)
        self._words = {w for e in (*self._entries, *self._pairs) for w in e.split(" ")}

    def category(self, name: str) -> str:
        """The category that a name or synonym belongs to.

        Raises:
            RecordError: it is not in the table.
        """
        if name not in self._entries:
            raise RecordError(f"{name!r} is no entry of the synonym table; it has {listing(self.names)}.")
        return self._entries[name]

    def mentions(self, text: str) -> list[str]:
        """The categories that a caption mentions, in order, repeats included."""
        words, found, i = [self._singular(w) for w in WORD.findall(text.lower())], [], 0
        while i < len(words):
            length, entry = self._match(words, i)
            found.append(entry)
            i += length
        if "toilet" in found:
            found = [w for w in found if w != "seat"]
        return [self._entries[w] for w in found if w in self._entries]

    def _match(self, words: list[str], i: int) -> tuple[int, str]:
        pair = " ".join(words[i : i + 2])
        if not self.official:
            for length in range(min(self._longest, len(words) - i), 2, -1):
                if " ".join(words[i : i + length]) in self._entries:
                    return length, " ".join(words[i : i + length])
        if pair in self._pairs:
            return 2, self._pairs[pair]
        if not self.official and i + 1 < len(words) and pair in self._entries:
            return 2, pair
        return 1, words[i]

    def _singular(self, word: str) -> str:
        """A word, or what it is the plural of: an entry, or a word of an entry or pair."""
        known = self._words
        if word in known:
            return word
        for guess in (IRREGULAR.get(word), word.removesuffix("s"), word.removesuffix("es")):
            if guess in known:
                return guess
        return word[:-3] + "y" if word.endswith("ies") and word[:-3] + "y" in known else word


def present(
    vocabulary: Vocabulary, instances: Iterable[str | Path] = (), captions: Iterable[str | Path] = ()
) -> dict[int, set[str]]:
    """What is in each image: categories of its instances, and those that its reference captions mention.

    Args:
        instances, captions: COCO's JSON files (`instances_val2014.json`, `captions_val2014.json`, ...). The original takes
            both kinds, of the training and the validation part.

    Raises:
        RecordError: a file cannot be read or is not of this form.
    """
    found: dict[int, set[str]] = {}
    for path in instances:
        table = _json(path)
        try:
            names = {c["id"]: vocabulary.category(c["name"]) for c in table["categories"]}
            for a in table["annotations"]:
                found.setdefault(a["image_id"], set()).add(names[a["category_id"]])
        except (KeyError, TypeError) as error:
            raise RecordError(f"{path} is no COCO instances file: {error!r}.") from error
    for path in captions:
        table = _json(path)
        try:
            for a in table["annotations"]:
                found.setdefault(a["image_id"], set()).update(vocabulary.mentions(a["caption"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"{path} is no COCO captions file: {error!r}.") from error
    return found


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read: {error}.") from error


def _json(path: str | Path) -> Mapping[str, Any]:
    try:
        return json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RecordError(f"{path} is no JSON: {error}.") from error
