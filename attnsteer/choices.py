"""What a steering does to one request of a batch that many share: which of its methods act, and with which values.

A steering has one set of methods for all, or several under names. A request takes one of them, with values of its own, or none.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Final

from ._version import __version__
from .bound import Bound, Heads
from .errors import SelectionError, SerializationError, brief, did_you_mean, listing
from .intervention import Intervention, plain_value
from .parameters import Parameter, declared
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

    @cached_property
    def form(self) -> bytes:
        """The same for parts whose methods can be joined into one for a batch (`joined`)."""
        return _digest(self.record(lambda form, value: value if form is None else form.shared(value)))

    def record(self, kept: Callable[[Parameter | None, Any], Any]) -> Any:
        """What it does, as JSON has it: where, by which method, and with which values, of which `kept` is kept."""
        method, values = self.bound.method, {}
        for f in fields(method):
            value = getattr(method, f.name)
            try:
                if not f.metadata.get("save", True) and value is not None:
                    raise SerializationError(f.name)
                values[f.name] = plain_value(kept(declared(type(method), f.name), value))
            except SerializationError:
                # It cannot be written down, so it is like no other.
                values[f.name] = uuid.uuid4().hex
        sites = {path: heads if heads is None else list(heads) for path, heads in self.sites.items()}
        return [type(method).__module__, type(method).__qualname__, values, sites]


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
        return _digest([p.record(lambda form, value: value) for p in self.parts]) if self.parts else b""

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


def _digest(record: Any) -> bytes:
    text = json.dumps([__version__, record], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Order:
    """The parts of several choices in one order that keeps the order of each: form -> (row -> part)."""

    def __init__(self) -> None:
        self.parts: dict[bytes, dict[int, Part]] = {}
        self._form_of: dict[int, bytes] = {}
        self.size = 0

    def take(self, choice: Choice) -> bool:
        """Add the choice of one more row; False where its order is against that of others, and nothing was added."""
        # What is kept of an intervention in a call is kept under its number, so it has one form there.
        if any(self._form_of.get(p.bound.index, p.form) != p.form for p in choice.parts):
            return False
        order, at = list(self.parts), -1
        for part in choice.parts:
            if part.form not in order:
                order.insert(at + 1, part.form)
            if order.index(part.form) <= at:
                return False
            at = order.index(part.form)
        self.parts = {form: self.parts.get(form, {}) for form in order}
        for part in choice.parts:
            self.parts[part.form][self.size] = part
            self._form_of[part.bound.index] = part.form
        self.size += 1
        return True

    @property
    def uniform(self) -> bool:
        """Whether each part acts on all rows for one intervention."""
        return all(
            len(own) == self.size and len({p.bound.index for p in own.values()}) == 1 for own in self.parts.values()
        )


def joined(own: Mapping[int, Part], size: int) -> Bound:
    """One intervention that is, on some of `size` rows, that of each."""
    first = next(iter(own.values()))
    if size == 1:
        return first.bound
    method, changes = first.bound.method, {}
    for f in fields(method):
        form, value = declared(type(method), f.name), getattr(method, f.name)
        if form is not None and value is not None:
            rest = form.resting(value)
            values = [getattr(own[i].bound.method, f.name) if i in own else rest for i in range(size)]
            changes[f.name] = form.joined(values)
    return replace(first.bound, method=method.new(**changes))


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
                if count == 1 and (name in values or self.names or place in (None, (0, 1))):
                    return 0
                if name not in values and place is not None and place[1] == count:
                    return place[0]
                alone = place is None or name in values
                raise SelectionError(
                    f"{bound.name}({name}=...) is given for {count} sample{'' if count == 1 else 's'}, and this is "
                    f"{'one request' if alone else f'a batch of {place[1]} inputs'}. Give one value, or one for each input of "
                    "generate_batch; a request gives its own by steer={...}."
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
