"""The YAML reader gives plain data or a RecipeError that names the line; nothing else comes out, whatever is put in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnsteer.errors import RecipeError
from attnsteer.recipe import yaml

PROFILE = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
}
# What is put into texts: the signs of YAML, and what readers stumble over.
PIECES = [
    ":", ": ", "- ", "\n", "  ", "[", "]", "{", "}", ",", "&a ", "*a", "!!str ", "!", "<<: ", "? ", "|\n", ">-\n", "'", '"', "#",
    "%", "---\n", "...\n", "\t", "\\", '"\\x00"', '"\\ud800"', '"\\UFFFFFFFF"', "9" * 40, "1e999", ".nan", "-.inf", "null", "yes",
    "0x1f", "1_0", "01", "\x00", "\x85", "\u2028", "\ufeff", "\ud800", "😀", "~", "@", "`", "a: 1\n", "a", "{a: {a: {a: ", "[[[[[[",
]  # fmt: skip
RECIPE = (Path(__file__).parents[2] / "recipes" / "act" / "shapes-reading.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1", {"a": 1}),
        ("a: -0.5\nb: 1e-3\nc: .5\nd: 5.\ne: 2E3", {"a": -0.5, "b": 1e-3, "c": 0.5, "d": 5.0, "e": 2000.0}),
        ("[yes, no, on, 0x10, 0o7, 1_000, 2024-01-01, 1:30, 010, 1e]", "yes no on 0x10 0o7 1_000 2024-01-01 1:30 010 1e".split()),
        ("[true, False, null, ~, '', ]", [True, False, None, None, ""]),
        ("a:\nb: {}", {"a": None, "b": {}}),
        ("'1': \"true\"\n2: x", {"1": "true", "2": "x"}),
        ("a: |\n  two\n  lines\n", {"a": "two\nlines\n"}),
        ("a: >-\n  two\n  lines\n", {"a": "two lines"}),
        ("# only\n- 1 # here", [1]),
        ("\ufeffa: 1", {"a": 1}),
        (f"{2**63 - 1}", 2**63 - 1),
    ],
)  # fmt: skip
def test_values(text: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    found = yaml.read(path).value
    assert found == value and repr(found) == repr(value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: *x", 2, "the alias *x"),
        ("a: &x 1", 1, "the anchor &x"),
        ("a: 1\n&x b: 1", 2, "the anchor &x"),
        ("a:\n  !!python/object/apply:os.system ['true']", 2, "the tag"),
        ("a: !!int 1", 1, "the tag"),
        ("a: ! x", 1, "the tag"),
        ("a: {}\n<<: {b: 1}", 2, "merge keys"),
        ("a: 1\nb:\n  c: 1\n  c: 2", 4, "'c' is given twice; first in line 3"),
        ("1: a\n'1': b", 2, "'1' is given twice"),
        ("a: 1\n---\nb: 1", 2, "a second document"),
        ("? [a, b]\n: 1", 1, "a key is a list"),
        ("? {a: b}\n: 1", 1, "a key is a list or a mapping"),
        ("true: 1", 1, "the key 'true' is not a text"),
        ("~: 1", 1, "the key '~' is not a text"),
        ("1.5: 1", 1, "the key '1.5' is not a text"),
        ("\n" + "[" * 30, 2, "nested more than 20 deep"),
        ("\n".join(" " * i + "a:" for i in range(30)), 21, "nested more than 20 deep"),
        ("- a\n" * 30_000, 20_000, "more than 20,000 values"),
        ("a: 1\nb: 1e999", 2, "too large for a float"),
        ("a: -1e999", 1, "too large for a float"),
        (f"a: {2**63}", 1, "does not fit 64 bits"),
        ("a: " + "9" * 100_000, 1, "does not fit 64 bits"),
        ("a: .nan", 1, "not a number that a recipe can have"),
        ("a: -.Inf", 1, "not a number that a recipe can have"),
        ("a: [1, 2", 1, "is not YAML"),
        ("a: 1\n- b", 2, "is not YAML"),
        ("a: b: c", 1, "is not YAML"),
        ("a:\n\t- b", 2, "is not YAML"),
        ("a: @b", 1, "is not YAML"),
        ('a: "\\UFFFFFFFF"', 1, "is not YAML"),
        ('a: "\\ud800"', 1, "'\\ud800' is not allowed"),
        ('a: "\\0"', 1, "'\\x00' is not allowed"),
        ("a: 1\nb: \x01", 2, "U+0001 is not allowed"),
        ("", 1, "there is nothing in it"),
        ("# nothing", 1, "there is nothing in it"),
        ("%YAML 9.9\n--- a", 1, "is not YAML"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        yaml.parse(text, "x.yaml")
    message = str(caught.value)
    assert message.startswith(f"x.yaml, line {line}: ") and words in message and len(message) < 300


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_bytes(b"a: '" + b"x" * yaml.BYTES + b"'")
    with pytest.raises(RecipeError, match=r"big\.yaml, line 1: more than 1,000,000 bytes"):
        yaml.read(big)
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9")
    with pytest.raises(RecipeError, match=r"latin\.yaml, line 2: is not UTF-8"):
        yaml.read(tmp_path / "latin.yaml")
    for path, words in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "directory"), ("a\0b", "null byte")):
        with pytest.raises(RecipeError, match=words):
            yaml.read(path)


def test_lines_of_values_and_of_what_contains_them() -> None:
    found = yaml.parse("a: 1\nb:\n  - c\n  - d: 1\n    e: [1,\n 2]\n")
    assert [found.line(p) for p in (("a",), ("b",), ("b", 1, "e"), ("b", 1, "e", 1), ("b", 1, "zzz"), ("q",))] == [
        1, 2, 5, 6, 4, 1,
    ]  # fmt: skip


words = st.characters(exclude_categories=["Cc", "Cs"])
likenesses = [
    "yes",
    "1e-3",
    "0x1f",
    "1_0",
    ".nan",
    ".5",
    "null",
    "~",
    "<<",
    "a: b",
    "- a",
    "#",
    " x ",
    "two\nlines",
    "=",
    "5.",
]
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(words, max_size=12)
    | st.sampled_from(likenesses),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(words, max_size=6) | st.sampled_from(["1", "true", "<<", "1.5"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, **PROFILE)
@given(plain)
def test_what_is_written_is_read_back(value: Any) -> None:
    found = yaml.parse(yaml.dump(value)).value
    assert repr(found) == repr(value) and yaml.dump(found) == yaml.dump(value)


def only_recipe_errors(text: str) -> None:
    """Reads a text: plain data or a RecipeError with a line."""
    try:
        found = yaml.parse(text, "x").value
    except RecipeError as error:
        assert str(error).startswith("x, line ")
    else:
        assert_plain(found, 0)


def assert_plain(value: Any, depth: int) -> None:
    assert depth <= yaml.DEPTH and type(value) in (dict, list, str, int, float, bool, type(None))
    if isinstance(value, dict):
        assert all(type(k) is str for k in value)
    assert not isinstance(value, float) or math.isfinite(value)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        assert_plain(item, depth + 1)


@settings(max_examples=400, **PROFILE)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14).map("".join))
def test_texts_from_pieces(text: str) -> None:
    only_recipe_errors(text)


@settings(max_examples=600, **PROFILE)
@given(
    st.lists(
        st.tuples(st.integers(0, len(RECIPE)), st.integers(0, 12), st.sampled_from(PIECES)), min_size=1, max_size=4
    )
)
def test_recipes_with_pieces_in_them(changes: list[tuple[int, int, str]]) -> None:
    text = RECIPE
    for start, removed, piece in changes:
        text = text[:start] + piece + text[start + removed :]
    only_recipe_errors(text)
