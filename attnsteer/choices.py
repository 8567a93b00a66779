"""What a steering does to one request of a batch that many share: which of its methods act, and with which values.

A steering has one set of methods for all, or several under names. A request takes one of them, with values of its own, or none.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Final

from ._version import __version__
from .bound import Bound, Heads
from .errors import SelectionError, SerializationError, brief, did_you_mean, listing
from .intervention import Intervention, plain_value
from .parameters import declared
from .tokens import Tokens

# The name under which a request takes no steering.
NOTHING = "none"
# The entry of a request's mapping that names a steering; the others are values.
NAME = "steering"


class _Default:
    """A request that says nothing of steering."""

    def __repr__(self) -> str:
        return "the default"


DEFAULT: Final = _Default()


@dataclass(frozen=True, eq=False)
class Part:
    """One method of a request, and where it acts: site path -> heads (None: all)."""

    bound: Bound
    sites: Mapping[str, Heads | None]


@dataclass(frozen=True, eq=False)
class Choice:
    """The methods of one request, with its own values, in order of application. Empty: the request is not steered."""

    parts: tuple[Part, ...] = ()

    def __deepcopy__(self, memo: Any) -> Choice:
        # Nothing in it changes, and sequences that fork share it.
        return self

    @cached_property
    def row_local(self) -> bool:
        """Whether what a row gets depends on nothing but itself and the keys before it (see `Intervention.row_local`)."""
        return all(p.bound.method.row_local and p.bound.where.rows != "last" for p in self.parts)

    @cached_property
    def identity(self) -> bytes:
        """The same for choices that do the same, in every process; empty for none. Prefixes are shared within it."""
        return self._digest(lambda method, name, value: value) if self.parts else b""

    @cached_property
    def form(self) -> bytes:
        """The same for choices whose methods can be joined into one for a batch (`joined`)."""

        def shared(method: Intervention, name: str, value: Any) -> Any:
            form = declared(type(method), name)
            return value if form is None else form.shared(value)

        return self._digest(shared) if self.parts else b""

    def _digest(self, kept: Callable[[Intervention, str, Any], Any]) -> bytes:
        try:
            record = []
            for part in self.parts:
                method = part.bound.method
                kind, values = type(method), {}
                for f in fields(method):
                    value = getattr(method, f.name)
                    if not f.metadata.get("save", True) and value is not None:
                        raise SerializationError(f.name)
                    values[f.name] = plain_value(kept(method, f.name, value))
                sites = {path: heads if heads is None else list(heads) for path, heads in part.sites.items()}
                record.append([part.bound.index, kind.__module__, kind.__qualname__, values, sites])
            text = json.dumps([__version__, record], sort_keys=True)
        except SerializationError:
            # What it does cannot be written down: it is like no other.
            text = uuid.uuid4().hex
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def settled(self, tokens: Tokens) -> Choice:
        """With what its methods look up in the request's tokens (spans given as text) found.

        Raises:
            SelectionError: a method speaks of tokens that the prompt lacks.
        """
        parts = []
        for part in self.parts:
            method = part.bound.method
            method.check_tokens(tokens)
            tokenizer, found = getattr(method, "tokenizer", None), {}
            for f in fields(method):
                form, value = declared(type(method), f.name), getattr(method, f.name)
                new = value if form is None else form.settled(value, tokens, tokenizer)
                if new is not value:
                    found[f.name] = new
            if found and tokenizer is not None:
                found["tokenizer"] = None
            parts.append(Part(_with(part.bound, method.new(**found)), part.sites) if found else part)
        return Choice(tuple(parts))

    def entries(self, path: str, methods: Mapping[int, Intervention]) -> list[tuple[Bound, Heads | None]]:
        """What acts at a site, each with `methods` (by number) in place of its own."""
        return [(_with(p.bound, methods[p.bound.index]), p.sites[path]) for p in self.parts if path in p.sites]


def joined(choices: Iterable[Choice]) -> dict[int, Intervention]:
    """The methods of several requests as one each, by number, with one value per request; the choices are of one form."""
    choices = list(choices)
    if len(choices) == 1:
        return {p.bound.index: p.bound.method for p in choices[0].parts}
    return {
        parts[0].bound.index: _joined([p.bound.method for p in parts])
        for parts in zip(*(c.parts for c in choices), strict=True)
    }


def _joined(methods: list[Intervention]) -> Intervention:
    first, changes = methods[0], {}
    for f in fields(first):
        form, values = declared(type(first), f.name), [getattr(m, f.name) for m in methods]
        if form is not None and values[0] is not None:
            changes[f.name] = form.joined(values)
    return first.new(**changes)


class Choices:
    """How requests choose among the methods of a steering.

    Args:
        parts: every attached method, by number, with its sites. names: name -> numbers; empty where all act on every request.
        bind: (number, method) -> its part, for a variant that selects other heads; raises where it cannot act there.
        check: raises where methods cannot act together.
    """

    def __init__(
        self,
        parts: list[Part],
        names: Mapping[str, tuple[int, ...]],
        bind: Callable[[int, Intervention], Part],
        check: Callable[[Choice], None],
    ):
        self.parts, self.names, self._bind, self._check = parts, names, bind, check

    def choose(self, wanted: Any = DEFAULT, place: tuple[int, int] | None = None) -> Choice:
        """The choice of one request.

        Args:
            wanted: `DEFAULT` (all methods, or none where they have names); None or "none" for no steering; a name; a mapping of
                parameters to values, with the name under "steering" where there are names; or a `Choice`.
            place: (which, of how many) inputs it is, where values were given for each.

        Raises:
            SelectionError: a name or parameter does not exist, or a value does not fit.
        """
        if isinstance(wanted, Choice):
            return wanted
        if wanted is None or wanted == NOTHING:
            return Choice()
        if wanted is DEFAULT:
            return Choice() if self.names else self._made(self.parts, {}, place)
        if isinstance(wanted, str):
            wanted = {NAME: wanted}
        if not isinstance(wanted, Mapping) or not all(isinstance(key, str) for key in wanted):
            raise SelectionError(
                f"steer={brief(wanted)}: give a name, a mapping of parameters to values such as {{'beta': 0.4}}, or None."
            )
        values = dict(wanted)
        parts = self._named(values.pop(NAME, None))
        return self._made(parts, self._own(parts, values), place)

    def _named(self, name: Any) -> list[Part]:
        if not self.names:
            if name is None:
                return self.parts
            raise SelectionError(
                f"the steering {brief(name)} does not exist: there are no names here. Give them with steer(model, named={{...}})."
            )
        if name == NOTHING:
            return []
        if not isinstance(name, str) or name not in self.names:
            asked = "no steering is named" if name is None else f"the steering {brief(name)} does not exist"
            hint = did_you_mean(name, self.names) if isinstance(name, str) else ""
            raise SelectionError(f"{asked}; there are {listing(sorted(self.names), 40)} and {NOTHING}.{hint}")
        return [self.parts[i] for i in self.names[name]]

    def _own(self, parts: list[Part], values: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """Parameters by number of the method whose they are."""
        found: dict[int, dict[str, Any]] = {}
        for key, value in values.items():
            named = [p for p in parts if p.bound.name == key]
            pairs = value.items() if named and isinstance(value, Mapping) else [(key, value)]
            for name, given in pairs:
                owners = [p for p in named or parts if name in _names(p.bound.method)]
                if len(owners) != 1:
                    raise SelectionError(_not_one(name, named or parts, owners))
                found.setdefault(owners[0].bound.index, {})[name] = given
        return found

    def _made(self, parts: list[Part], own: Mapping[int, dict[str, Any]], place: tuple[int, int] | None) -> Choice:
        made, moved = [], False
        for part in parts:
            bound, values = part.bound, own.get(part.bound.index, {})
            method: Intervention | None = bound.method
            if values:
                forms = {name: declared(type(method), name) for name in values}
                method = method.new(**{n: v if forms[n] is None else forms[n].of_request(v) for n, v in values.items()})

            def which(name: str, count: int, values: Mapping[str, Any] = values, bound: Bound = bound) -> int:
                if name in values and count == 1:
                    return 0
                if name not in values and place is not None and place[1] == count:
                    return place[0]
                inputs = "one request" if place is None or name in values else f"{place[1]} inputs"
                raise SelectionError(
                    f"{bound.name}({name}=...) has {count} values, and this is {inputs}. Give one value, or one for each input of "
                    "generate_batch."
                )

            method = method.of_sample(which)
            if method is None:
                continue
            if method is bound.method:
                made.append(part)
            elif method.selection() == bound.method.selection():
                made.append(Part(_with(bound, method), part.sites))
            else:
                made.append(self._bind(bound.index, method))
                moved = True
        choice = Choice(tuple(made))
        if moved:
            self._check(choice)
        return choice


def _with(bound: Bound, method: Intervention) -> Bound:
    return bound if method is bound.method else replace(bound, method=method)


def _names(method: Intervention) -> list[str]:
    return [f.name for f in fields(method) if f.init]


def _not_one(name: str, parts: list[Part], owners: list[Part]) -> str:
    if owners:
        both = [p.bound.name for p in owners]
        return (
            f"{name} is a parameter of {listing(both)}; say whose, e.g. {{{both[0]!r}: {{{name!r}: ...}}}}. Methods of one class "
            "need names of their own: steer(model, named={...})."
        )
    known = list(dict.fromkeys(n for p in parts for n in _names(p.bound.method)))
    have = f"there are {listing(known, 30)}" if known else "this steering has none"
    return f"no parameter {name!r}; {have}.{did_you_mean(name, known)}"
