"""YAML read from its events into dicts, lists and scalars; what a recipe has no use for is refused, with its line.

Refused: aliases, anchors, tags, merge keys, duplicate keys, several documents, keys that are not texts, deep nesting, large
files, many values, control characters, numbers that overflow, infinities and NaN. Scalars are read as in YAML 1.2: `yes`,
`on`, dates, `0x10` and `1_000` are texts, `1e-3` is a number.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError

BYTES, DEPTH, VALUES = 1_000_000, 20, 20_000
# JSON readers of other languages agree on integers of 64 bits and no more.
LARGEST = 2**63 - 1

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {t: t.lower() == "true" for t in ("true", "True", "TRUE", "false", "False", "FALSE")}
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """What a file says.

    Attributes:
        value: dicts, lists, str, int, float, bool, None. source: the file, for messages.
        lines: the line, from 1, of the value at each path of keys and indices.
    """

    value: Any
    source: str
    lines: dict[Keys, int] = field(repr=False)

    def line(self, path: Keys) -> int:
        """The line of a value, or of the nearest one that contains it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read(path: str | Path) -> Document:
    """A YAML file.

    Raises:
        RecipeError: no such file, or see `parse`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(BYTES + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    try:
        # A byte order mark is no part of the text.
        text = raw[:BYTES].decode("utf-8-sig") if len(raw) <= BYTES else " " * (BYTES + 1)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}, line {line}: is not UTF-8 text.") from error
    return parse(text, str(path))


def parse(text: str, source: str = "recipe") -> Document:
    """A YAML text.

    Args:
        text: of one document, at most `BYTES` characters. source: its name in messages.

    Raises:
        RecipeError: it is not YAML, or has something that is refused; the message names the line.
    """
    if len(text) > BYTES:
        raise RecipeError(f"{source}, line 1: more than {BYTES:,} bytes; a recipe is a page of text.")
    lines: dict[Keys, int] = {}
    line = 1

    def events() -> Iterator[yaml.Event]:
        nonlocal line
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1
            yield event

    try:
        value = _document(events(), lines)
    except _Refused as error:
        raise RecipeError(f"{source}, line {error.line or line}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = mark.line + 1 if mark else line
        raise RecipeError(f"{source}, line {where}: is not YAML ({error.problem or error.context}).") from error
    except yaml.reader.ReaderError as error:
        # Its position counts characters where the text was given as str.
        where = text[: error.position].count("\n") + 1
        raise RecipeError(
            f"{source}, line {where}: the character U+{int(error.character):04X} is not allowed."
        ) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # An escape beyond the last character, and the like.
        raise RecipeError(f"{source}, line {line}: is not YAML ({error}).") from error
    return Document(value, source, lines)


class _Refused(Exception):
    def __init__(self, message: str, line: int | None = None):
        super().__init__(message)
        self.line = line


def _document(events: Iterator[yaml.Event], lines: dict[Keys, int]) -> Any:
    value, documents = None, 0
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _Refused("a second document begins; one file is one recipe.")
        elif not isinstance(event, (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentEndEvent)):
            value = _value(event, events, lines, ())
    if not documents:
        raise _Refused("there is nothing in it.")
    return value


def _value(event: yaml.Event, events: Iterator[yaml.Event], lines: dict[Keys, int], path: Keys) -> Any:
    lines[path] = event.start_mark.line + 1
    if len(lines) > VALUES:
        raise _Refused(f"more than {VALUES:,} values; samples belong into a file of data.")
    _plain(event)
    if isinstance(event, yaml.ScalarEvent):
        return event.value if _quoted(event) else scalar(event.value)
    if len(path) >= DEPTH:
        raise _Refused(f"nested more than {DEPTH} deep.")
    if isinstance(event, yaml.SequenceStartEvent):
        found: list[Any] = []
        for item in events:
            if isinstance(item, yaml.SequenceEndEvent):
                break
            found.append(_value(item, events, lines, (*path, len(found))))
        return found
    return _mapping(events, lines, path)


def _mapping(events: Iterator[yaml.Event], lines: dict[Keys, int], path: Keys) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for event in events:
        if isinstance(event, yaml.MappingEndEvent):
            break
        key, line = _key(event), event.start_mark.line + 1
        if key in found:
            raise _Refused(f"{key!r} is given twice; first in line {lines[(*path, key)]}.", line)
        found[key] = None
        found[key] = _value(next(events), events, lines, (*path, key))
        lines[(*path, key)] = line
    return found


def _key(event: yaml.Event) -> str:
    _plain(event)
    if not isinstance(event, yaml.ScalarEvent):
        raise _Refused("a key is a list or a mapping; keys are texts.")
    if _quoted(event):
        return event.value
    if event.value == "<<":
        raise _Refused("merge keys (<<) are not read; write the fields out.")
    # Layers are natural keys; they are kept as JSON keeps them.
    if not isinstance(scalar(event.value), (str, int)) or event.value in _BOOL:
        raise _Refused(f"the key {event.value!r} is not a text; put it in quotes if it is meant as one.")
    return event.value


def _plain(event: yaml.Event) -> None:
    """Refuse what a reader of the file would have to look up elsewhere in it."""
    if isinstance(event, yaml.AliasEvent):
        raise _Refused(f"the alias *{event.anchor} is not read; write the value out.")
    if event.anchor is not None:
        raise _Refused(f"the anchor &{event.anchor} is not read; write the value out where it is needed.")
    if event.tag is not None:
        raise _Refused(
            f"the tag {event.tag!r} is not read; values are texts, numbers, true, false, null, lists, mappings."
        )
    if isinstance(event, yaml.ScalarEvent):
        for char in event.value:
            if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t":
                raise _Refused(f"the character {char!r} is not allowed in a text.")


def _quoted(event: yaml.ScalarEvent) -> bool:
    return event.style is not None


def scalar(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        # Before it is converted, which takes long for long ones.
        if len(text) > 20 or abs(int(text)) > LARGEST:
            raise _Refused(f"the number {text[:24]}{'...' if len(text) > 24 else ''} does not fit 64 bits.")
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise _Refused(f"the number {text[:24]}{'...' if len(text) > 24 else ''} is too large for a float.")
        return number
    if _NOT_FINITE.fullmatch(text):
        raise _Refused(f"{text} is not a number that a recipe can have; leave the field out for its default.")
    return text


class _Dumper(yaml.SafeDumper):
    """Writes what `parse` reads back as the same value."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    try:
        same = scalar(text) == text
    except _Refused:
        same = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if same else '"')


_Dumper.add_representer(str, _represent_text)


def dump(value: Any) -> str:
    """The YAML text of plain data; equal values give equal texts, and `parse` gives the value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=False)
