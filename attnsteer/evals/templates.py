"""Spans by template: what each document of a harness marks in its own prompt.

    SpotLight(spans=["{{passage}}"], target=0.3)

is a method whose span is the field `passage` of the document that a prompt was made from. A field is a name, or a path such
as `{{choices.text.0}}`; text around it is taken as it is. A field that is a list of texts marks each of them, an empty one
nothing. A text that the prompt has several times is marked where it stands last: examples come before the question.

The language of templates is no more than that, since a method may come from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..errors import SelectionError, did_you_mean, listing
from ..intervention import Intervention
from ..tokens import Range, char_offsets, is_text

SPANS = "spans"
FIELD = re.compile(r"\{\{\s*([A-Za-z_]\w*(?:\.\w+)*)\s*\}\}")


def templates(method: Intervention) -> tuple[Any, ...]:
    """The spans of a method that has templates among them, or ().

    Raises:
        SelectionError: they are given for each sample, which only the document knows.
    """
    spans = getattr(method, SPANS, ()) if any(f.name == SPANS for f in fields(method)) else ()
    spans = (spans,) if isinstance(spans, str) else spans
    if "{{" not in repr(spans):
        return ()
    if not all(is_text(s) for s in spans):
        raise SelectionError(
            f"{type(method).__name__}: spans with templates are those of every document; give a list of texts."
        )
    return tuple(spans)


def filled(template: str, doc: Any) -> list[str]:
    """The texts that a template stands for in a document.

    Raises:
        SelectionError: the document has no such field, or it is no text.
    """
    whole = FIELD.fullmatch(template.strip())
    if whole is None:
        found = FIELD.sub(lambda m: _text(_field(m[1], doc), m[1]), template)
        if "{{" in found or "}}" in found:
            raise SelectionError(
                f"the span {template!r}: a template is {{{{field}}}} or {{{{field.inner}}}}, and text."
            )
        return [found.strip()] if found.strip() else []
    value = _field(whole[1], doc)
    every = value if isinstance(value, list | tuple) else [value]
    return [text for text in (_text(v, whole[1]).strip() for v in every) if text]


def _field(path: str, doc: Any) -> Any:
    found = doc
    for name in path.split("."):
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list | tuple) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            there = list(found) if isinstance(found, Mapping) else []
            told = f"it has {listing(there)}" if there else f"there is {type(found).__name__} in its place"
            raise SelectionError(
                f"spans: the document has no field {path!r} (at {name!r}; {told}).{did_you_mean(name, there)}"
            )
    return found


def _text(value: Any, path: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise SelectionError(f"spans: the field {path!r} of the document is {type(value).__name__}, and no text.")
    return str(value)


class Marks:
    """What the documents of a harness mark, by the prompts that were made from them.

    Attributes:
        methods: as they were given. templates: of those that have some, by their number.
    """

    def __init__(self, methods: Sequence[Intervention]):
        self.methods = tuple(methods)
        self.templates = {i: found for i, m in enumerate(self.methods) if (found := templates(m))}
        self.texts: dict[str, dict[int, tuple[Any, ...]]] = {}

    def __bool__(self) -> bool:
        return bool(self.templates)

    def note(self, prompts: Iterable[tuple[str, Any]]) -> None:
        """Remember what is marked in each prompt. prompts: (text, the document that it was made from).

        Raises:
            SelectionError: a document lacks a field, or two documents mark other texts in one prompt.
        """
        self.texts = {}
        for prompt, doc in prompts:
            if doc is None:
                raise SelectionError(
                    "spans: the harness gives no document with this request, so no template can be filled."
                )
            found = {i: tuple(_items(spans, doc)) for i, spans in self.templates.items()}
            if self.texts.setdefault(prompt, found) != found:
                raise SelectionError(f"spans: two documents with the prompt {prompt[:80]!r} mark other texts in it.")

    def of(self, prompts: Sequence[str], rows: Sequence[Sequence[int]], tokenizer: Any) -> tuple[Intervention, ...]:
        """The methods with the token ranges of a batch.

        Args:
            prompts: of the rows, as they were noted. rows: their token ids, without padding.

        Raises:
            SelectionError: what a document marks is not in its prompt.
        """
        read = [char_offsets(list(ids), tokenizer) for ids in rows]
        out = list(self.methods)
        for i in self.templates:
            ranges = [
                [r for item in self.texts[prompt][i] for r in _ranges(item, *found)]
                for prompt, found in zip(prompts, read, strict=True)
            ]
            out[i] = self.methods[i].new(**{SPANS: ranges})
        return tuple(out)


def _items(spans: Sequence[Any], doc: Any) -> Iterable[tuple[str, Any]]:
    """(text, which of its occurrences; None: the last)."""
    for span in spans:
        text, which = (span, None) if isinstance(span, str) else span
        for found in filled(text, doc):
            yield found, which


def _ranges(item: tuple[str, Any], offsets: Sequence[Range], prompt: str) -> list[Range]:
    text, which = item
    places = [m.start() for m in re.finditer(re.escape(text), prompt)]
    chosen = places if which == "all" else places[-1:] if which is None else places[which : which + 1]
    out = []
    for at in chosen:
        inside = [i for i, (start, stop) in enumerate(offsets) if start < at + len(text) and stop > at]
        out += [(inside[0], inside[-1] + 1)] if inside else []
    if not out:
        shown = prompt if len(prompt) <= 200 else f"...{prompt[-200:]}"
        raise SelectionError(
            f"spans: {text[:80]!r}, which its document marks, is not in the prompt ({shown!r}): cut off on the left, or written "
            "otherwise by the tokenizer."
        )
    return out
