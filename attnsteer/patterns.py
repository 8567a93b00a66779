"""Regular expressions that cannot hang: the syntax of `re`, matched in time linear in the text.

`re` backtracks, so a short pattern such as "(a+)+x" takes longer than anyone waits, and patterns come from files of others
(recipes, a hub's steer.json). Here a pattern is turned into a non-deterministic automaton of at most `STATES` states that is
walked once over the text (Thompson, "Regular expression search algorithm", CACM 1968), which takes len(text) * STATES
steps at most. What has no such automaton is refused: back-references, look-around, atomic groups; so are word
boundaries and flags. "$" is the end of the text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

# The parser of `re`, so that the syntax is exactly its own; these names are private, and tested.
from re import _constants as op
from re import _parser as parser
from typing import Any

from .errors import SelectionError, brief

LENGTH, STATES = 1000, 2000
# Remembered steps of one pattern; module paths share most of theirs.
STEPS = 4096

Test = Callable[[str], bool]
_START, _END = "start", "end"
_CATEGORIES: dict[Any, Test] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    op.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_ANCHORS = {
    op.AT_BEGINNING: _START,
    op.AT_BEGINNING_STRING: _START,
    op.AT_END: _END,
    op.AT_END_STRING: _END,
}


class Pattern:
    """A regular expression over whole texts.

    Raises:
        SelectionError: it is not a text, not a regular expression, too long, or of a form that is not taken.
    """

    def __init__(self, text: str):
        self.text = text
        if not isinstance(text, str):
            raise self._refused("is not a regular expression: it is no text")
        if len(text) > LENGTH:
            raise self._refused(f"has {len(text)} characters; give at most {LENGTH}")
        try:
            tree = parser.parse(text)
        except RecursionError:
            raise self._refused("is nested too deeply") from None
        except (re.error, OverflowError) as error:
            raise self._refused(f"is not a regular expression: {error}") from None
        if tree.state.flags != re.UNICODE.value:
            raise self._refused("sets flags, which are not taken; spell out what they stand for")
        # A state is (test of the next character or an anchor, states behind it); the test of None takes no character.
        self._states: list[tuple[Test | str | None, list[int]]] = [(None, [])]
        self._spent = 0
        try:
            first = self._sequence(tree, 0)
        except RecursionError:
            raise self._refused("is nested too deeply") from None
        self._first = first
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def matches(self, text: str) -> bool:
        """Whether the whole of `text` matches."""
        now = self._reached([self._first], {_START} if text else {_START, _END})
        for character in text:
            if not now:
                return False
            known = self._steps.get((now, character))
            if known is None:
                behind = [
                    s for at in now if callable(t := self._states[at][0]) and t(character) for s in self._states[at][1]
                ]
                if len(self._steps) >= STEPS:
                    self._steps.clear()
                known = self._steps[now, character] = self._reached(behind, set())
            now = known
        return 0 in self._reached(now, {_END})

    def _reached(self, states: Iterable[int], anchors: set[str]) -> frozenset[int]:
        """`states` and all that are reached from them without a character, through `anchors` too."""
        found, waiting = set(), list(states)
        while waiting:
            at = waiting.pop()
            if at not in found:
                found.add(at)
                test, behind = self._states[at]
                if test is None or (isinstance(test, str) and test in anchors):
                    waiting += behind
        return frozenset(found)

    def _state(self, test: Test | str | None, behind: list[int]) -> int:
        self._states.append((test, behind))
        return len(self._states) - 1

    def _sequence(self, items: Any, behind: int) -> int:
        """The first state of a part of the pattern, whose last one leads to `behind`."""
        for code, value in reversed(list(items)):
            behind = self._item(code, value, behind)
        return behind

    def _item(self, code: Any, value: Any, behind: int) -> int:
        # Parts without states count as well: "(){99999}" is long too.
        self._spent += 1
        if self._spent > STATES:
            raise self._refused("is too large: its repetitions, written out, have too many parts")
        if code is op.MAX_REPEAT or code is op.MIN_REPEAT:
            return self._repeat(*value, behind)
        if code is op.BRANCH:
            return self._state(None, [self._sequence(part, behind) for part in value[1]])
        if code is op.SUBPATTERN and not value[1] and not value[2]:
            return self._sequence(value[3], behind)
        if code is op.AT and value in _ANCHORS:
            return self._state(_ANCHORS[value], [behind])
        test = _test(code, value)
        if test is None:
            raise self._refused(
                "has a part that is not taken: a back-reference, look-around, word boundary, flag, or possessive or atomic group"
            )
        return self._state(test, [behind])

    def _repeat(self, least: int, most: int, body: Any, behind: int) -> int:
        if most is op.MAXREPEAT:
            onward = self._state(None, [behind])
            self._states[onward][1].append(self._copy(body, onward))
            behind = onward
        else:
            onward = behind
            for _ in range(most - least):
                onward = self._state(None, [self._copy(body, onward), behind])
            behind = onward
        for _ in range(least):
            behind = self._copy(body, behind)
        return behind

    def _copy(self, body: Any, behind: int) -> int:
        return self._item(op.SUBPATTERN, (None, 0, 0, body), behind)

    def _refused(self, why: str) -> SelectionError:
        return SelectionError(f"Where(modules={brief(self.text)}) {why}.")


def _test(code: Any, value: Any) -> Test | None:
    """Whether a character fits a part of a pattern that stands for one; None for any other part."""
    if code is op.ANY:
        return lambda c: c != "\n"
    if code is op.LITERAL:
        return chr(value).__eq__
    if code is op.NOT_LITERAL:
        return chr(value).__ne__
    if code is op.RANGE:
        return lambda c: value[0] <= ord(c) <= value[1]
    if code is op.CATEGORY:
        return _CATEGORIES[value]
    if code is op.IN:
        negated = value[0][0] is op.NEGATE
        tests = [_test(*item) for item in value[negated:]]
        return lambda c: any(test(c) for test in tests) != negated
    return None


@functools.lru_cache(maxsize=256)
def _known(text: str) -> Pattern:
    return Pattern(text)


def pattern(text: str) -> Pattern:
    """The pattern of a text; see `Pattern` for what is refused."""
    return _known(text) if isinstance(text, str) else Pattern(text)
