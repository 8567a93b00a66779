"""Hyper-parameters: what a method declares of each field, and the one place where values are checked against it.

A declaration stands in place of the dataclass field: `beta: float = number(0.4, low=0, high=1)`. A subclass that gives the
field another default keeps the declaration of its base. Fields without one take any value.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch

from .errors import SelectionError, brief, did_you_mean, listing

# Weights and statistics are held in float32, where a larger number is infinite and a smaller one may be 0.
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
LARGEST_INTEGER = 2**63 - 1
_KEY = "parameter"


class Refused(ValueError):
    """Why a value is not taken, for the end of the message; empty where the declaration says it all."""


def plain(value: Any) -> Any:
    """NumPy scalars, arrays and tensors as Python numbers and (nested) lists; anything else as it is.

    A tensor that needs a gradient stays one: as a number it would be cut off from its graph.
    """
    if not (hasattr(value, "tolist") and hasattr(value, "ndim")):
        return value
    kept = getattr(value, "requires_grad", False) or getattr(value, "is_meta", False)
    return value if kept else value.tolist()


def whole(value: Any) -> int | None:
    """An integer as a Python int, also one of NumPy or a 0-d tensor; None for anything else. True is none."""
    value = plain(value)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Parameter:
    """A declaration. A subclass says which values fit (`convert`) and how that reads (`describe`).

    Attributes:
        optional: None is a value too. per_sample: the parameter is a strength, target, scale or gate, which has a meaning
            for each sample by itself. Reserved: only one value for all is taken.
    """

    optional: bool = False
    per_sample: bool = False

    def describe(self) -> str:
        """The values it takes, e.g. "number from 0 to 1"."""
        return self._form() + (" or None" if self.optional else "")

    def check(self, method: str, name: str, value: Any) -> Any:
        """`value` as it is kept.

        Raises:
            SelectionError: it does not fit; the message names the method, the parameter, the value, and what it takes.
        """
        if value is None and self.optional:
            return None
        given = f"{method}({name}={brief(value)})"
        try:
            return self.convert(value)
        except SelectionError as error:
            raise SelectionError(f"{given}: {str(error).removeprefix(f'{name}={brief(value)}: ')}") from error
        except Refused as error:
            raise SelectionError(f"{given}: give {self._article()}{self.describe()}{str(error) or '.'}") from None
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
            raise SelectionError(f"{given}: give {self._article()}{self.describe()} ({error}).") from error

    def convert(self, value: Any) -> Any:
        """`value` as it is kept; raises `Refused`, or a SelectionError whose message says what to give."""
        raise NotImplementedError

    def _form(self) -> str:
        raise NotImplementedError

    def _article(self) -> str:
        return ""


@dataclass(frozen=True)
class Number(Parameter):
    """A number within bounds, kept as an int or a float.

    Attributes:
        low, high: bounds that are themselves allowed. above, below: bounds that are not.
        whole: only integers. infinite: infinity is allowed where no bound is against it.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False
    infinite: bool = False

    def convert(self, value: Any) -> int | float:
        value = plain(value)
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            if getattr(value, "requires_grad", False):
                raise Refused(", not a tensor that needs a gradient: it would get none.")
            raise Refused(f", not {type(value).__name__}.")
        value = int(value) if isinstance(value, int) else float(value)
        if not self._inside(value):
            raise Refused
        if self.whole:
            if abs(value) > LARGEST_INTEGER:
                raise Refused("; integers have 64 bits.")
        elif math.inf == abs(value):
            if not self.infinite:
                raise Refused
        elif abs(value) > LARGEST or 0 < abs(value) < SMALLEST:
            raise Refused(f"; float32 holds {SMALLEST:.1e} to {LARGEST:.1e}.")
        return value

    def _inside(self, value: float) -> bool:
        return (
            # NaN is within no bounds, and not equal to itself.
            value == value
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _form(self) -> str:
        kind = "integer" if self.whole else "number"
        bounds = {"above": self.above, "from": self.low, "below": self.below, "to": self.high}
        given = {word: f"{value:g}" for word, value in bounds.items() if value is not None}
        if set(given) == {"from", "to"}:
            return f"{kind} from {given['from']} to {given['to']}"
        words = {"from": "of at least", "to": "at most"}
        text = ", ".join(f"{words.get(word, word)} {value}" for word, value in given.items())
        bounded = {"above", "from"} & set(given) and {"below", "to"} & set(given)
        finite = "" if self.whole or self.infinite or bounded else "finite "
        return f"{finite}{kind}{text and ' '}{text}{', or infinity' if self.infinite else ''}"

    def _article(self) -> str:
        return "an " if self.whole else "a "


@dataclass(frozen=True)
class Choice(Parameter):
    """One of some names."""

    names: tuple[str, ...] = ()

    def convert(self, value: Any) -> str:
        value = plain(value)
        if not isinstance(value, str):
            raise Refused(f", not {type(value).__name__}.")
        if value not in self.names:
            raise Refused(f".{did_you_mean(value, self.names)}")
        return str(value)

    def _form(self) -> str:
        return f"one of {', '.join(map(repr, self.names))}"


@dataclass(frozen=True)
class Flag(Parameter):
    """True or False."""

    def convert(self, value: Any) -> bool:
        value = plain(value)
        if not isinstance(value, bool):
            raise Refused(f", not {type(value).__name__}.")
        return value

    def _form(self) -> str:
        return "True or False"


@dataclass(frozen=True)
class Parsed(Parameter):
    """A value with a form of its own.

    Attributes:
        parse: the value as it is kept; raises a SelectionError that says what to give. text: the form in words.
    """

    parse: Callable[[Any], Any] = lambda value: value
    text: str = ""

    def convert(self, value: Any) -> Any:
        return self.parse(value)

    def _form(self) -> str:
        return self.text


def number(
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    optional: bool = False,
    per_sample: bool = False,
    kw_only: bool = False,
) -> Any:
    """A field that takes a finite number within bounds (see `Number`); a default of None makes it optional too."""
    form = Number(optional or default is None, per_sample, low, high, above, below, infinite=infinite)
    return _field(form, default, kw_only)


def integer(
    default: Any = MISSING,
    *,
    low: int | None = None,
    high: int | None = None,
    optional: bool = False,
    kw_only: bool = False,
) -> Any:
    """A field that takes an integer within bounds, both allowed."""
    return _field(Number(optional or default is None, False, low, high, whole=True), default, kw_only)


def choice(default: Any, names: Sequence[str], *, kw_only: bool = False) -> Any:
    """A field that takes one of `names`."""
    return _field(Choice(default is None, names=tuple(names)), default, kw_only)


def flag(default: Any, *, kw_only: bool = False) -> Any:
    """A field that takes True or False."""
    return _field(Flag(), default, kw_only)


def parsed(
    parse: Callable[[Any], Any],
    text: str,
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    per_sample: bool = False,
    kw_only: bool = False,
) -> Any:
    """A field whose values have a form of their own (see `Parsed`)."""
    return _field(Parsed(default is None, per_sample, parse, text), default, kw_only, default_factory)


def _field(form: Parameter, default: Any, kw_only: bool, default_factory: Any = MISSING) -> Any:
    return field(default=default, default_factory=default_factory, kw_only=kw_only, metadata={_KEY: form})


def declared(cls: type, name: str) -> Parameter | None:
    """The declaration of a field: its own, or that of the nearest base which has one."""
    for base in cls.__mro__:
        own = base.__dict__.get("__dataclass_fields__", {}).get(name)
        if own is not None and _KEY in own.metadata:
            return own.metadata[_KEY]
    return None


def check_fields(owner: Any) -> None:
    """Check the fields of a (frozen) dataclass against their declarations, and keep the values as those convert them.

    Raises:
        SelectionError: a value does not fit.
    """
    cls = type(owner)
    for f in fields(cls):
        form = declared(cls, f.name)
        if form is not None:
            object.__setattr__(owner, f.name, form.check(cls.__name__, f.name, getattr(owner, f.name)))


class Named:
    """Base of dataclasses whose wrong arguments are a SelectionError: an unknown or missing name, too many values.

    It looks before `__init__` does, which each dataclass has of its own.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(cls.__init__)
        try:
            signature.bind(None, *args, **kwargs)
        except TypeError as error:
            taken = list(signature.parameters.values())[1:]
            raise SelectionError(
                _wrong_arguments(cls.__name__, taken, args, kwargs) or f"{cls.__name__}: {error}."
            ) from None
        return super().__new__(cls)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or a pickle sets the fields afterwards, so there are no arguments to look at.
        return object.__new__, (type(self),), self.__getstate__()


def _wrong_arguments(
    cls: str, taken: list[inspect.Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """What is wrong with the arguments of a call, in a sentence."""
    names = [p.name for p in taken]
    have = f"it has {listing(names, 30)}" if names else "it has none"
    for name in kwargs:
        if name not in names:
            return f"{cls} has no parameter {name!r}; {have}.{did_you_mean(name, names)}"
    by_position = [p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(by_position):
        return (
            f"{cls} takes {len(by_position)} values by position ({listing(by_position, 30) or 'none'}), not {len(args)}. "
            "Give the others by name."
        )
    twice = [name for name in by_position[: len(args)] if name in kwargs]
    if twice:
        return f"{cls} got {listing(twice)} twice: by position and by name."
    missing = [p.name for p in taken if p.default is p.empty and p.name not in {*by_position[: len(args)], *kwargs}]
    return f"{cls} needs {listing(missing)}; {have}." if missing else None
