"""Patterns of module paths: what `re` says, in bounded time, for every pattern that is taken."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnsteer import Intervention, Where
from attnsteer.errors import SelectionError, SerializationError
from attnsteer.patterns import LENGTH, Pattern, pattern

PATHS = [
    "model.layers.1.self_attn", "model.layers.10.self_attn", "unet.mid_block.attentions.0.transformer_blocks.0.attn1", "", "a",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2", "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2",
]  # fmt: skip
USED = [
    r".*down_blocks\.1.*attn2", r".*up_blocks\.0.*attn2", ".*attn1", r"(.*\.)?mid_block\..*attn1", r"model\.layers\.1\.self_attn",
    r"layers\.1", r".*layers\.1.*", r"unet\.mid_block\..*", "mid_block.*attn1", r".*blocks\.1\.attn1", ".*", r".*decoder.*",
    re.escape("model.layers.1.self_attn"), r"(.*\.)?decoder\..*",
]  # fmt: skip
CATASTROPHIC = [
    "(a+)+$", "(a|a)+$", "(.*a){20}", r"(\w+\.)*\w+x", ".*.*.*.*x", "(a*)*b", "(a|aa)+$", "(a+){10}b", "([a-z]+)*!", "(.*)*x",
    "(a?){100}a{100}", "^(([a-z])+.)+[A-Z]([a-z])+$", "(x+x+)+y", "((a*)*)*b", "(.+.+)+b", r"(?:\w|\.|a)*#", ".*" * 60 + "x",
    "(a|b|ab)*?c", "(.{1,30}){1,30}x",
]  # fmt: skip


@pytest.mark.parametrize("text", USED + CATASTROPHIC[:1])
def test_it_says_what_re_says(text: str) -> None:
    assert [pattern(text).matches(p) for p in PATHS] == [bool(re.fullmatch(text, p)) for p in PATHS]


PARTS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\w", r"\W", r"\d", r"\s", "[ab]", "[^a]", r"[\d_]", "[a-c]", "^", "$", "x{0}", "(?:)"]
)
REPEATS = st.sampled_from(["", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{1,}", "{,2}"])


@given(
    st.recursive(
        st.tuples(PARTS, REPEATS).map("".join),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map("".join),
            st.tuples(inner, inner, REPEATS).map(lambda p: f"({p[0]}|{p[1]}){p[2]}"),
        ),
        max_leaves=6,
    ),
    st.text(alphabet="abc.1_ é", max_size=7),
)
def test_it_says_what_re_says_for_any_pattern(text: str, path: str) -> None:
    try:
        expected = bool(re.fullmatch(text, path))
    except re.error:
        with pytest.raises(SelectionError):
            Pattern(text)
    else:
        assert Pattern(text).matches(path) == expected


@pytest.mark.parametrize("text", CATASTROPHIC)
@pytest.mark.parametrize("path", ["a" * 300, "a" * 299 + "!", "ab." * 100, ("model.layers." * 30)[:300], "x" * 300])
def test_no_pattern_takes_long(text: str, path: str) -> None:
    try:
        found = Pattern(text)
    except SelectionError as error:
        assert "too large" in str(error)
        return
    start = time.perf_counter()
    found.matches(path)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("attn(", "not a regular expression"),
        ("a" * (LENGTH + 1), "at most"),
        ("((a{1000}){1000}){1000}", "too large"),
        ("((){65000}){65000}", "too large"),
        ("a{99999999999999999999}", "not a regular expression"),
        (r"(a)\1", "back-reference"),
        ("(?=a)b", "look-around"),
        ("(?<!a)b", "look-around"),
        (r"\battn", "word boundary"),
        ("(?i)attn", "flags"),
        ("(?i:attn)", "flag"),
        ("a*+b", "possessive"),
        ("(?>a)b", "atomic"),
        (b"attn", "no text"),
    ],
)
def test_what_is_not_taken_is_refused_at_once(text: str, words: str) -> None:
    start = time.perf_counter()
    with pytest.raises(SelectionError, match="modules") as caught:
        Where(modules=[text])
    assert words in str(caught.value) and time.perf_counter() - start < 1.0


def test_deep_nesting_is_matched_or_refused() -> None:
    for depth in (20, 499):
        try:
            assert Pattern("(" * depth + "a" + ")" * depth).matches("a")
        except SelectionError as error:
            assert depth > 20 and "nested too deeply" in str(error)


def test_a_pattern_of_a_file_is_held_to_the_same(tmp_path: Path) -> None:
    (tmp_path / "steer.json").write_text(
        '{"schema": 1, "method": "ZeroTuning", "parameters": {"where": {"modules": ["(?=a)a"]}}, "versions": {}}'
    )
    with pytest.raises(SerializationError, match="look-around"):
        Intervention.from_pretrained(tmp_path)
