"""Hyper-parameters: what a method declares of each field, and the one place where values are checked against it.

A declaration stands in place of the dataclass field: `beta: float = number(0.4, low=0, high=1)`. A subclass that gives the
field another default keeps the declaration of its base. Fields without one take any value.
"""

from __future__ import annotations

import abc
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .account import Samples
from .errors import SelectionError, brief, clipped, did_you_mean, listing

if TYPE_CHECKING:
    from .tokens import Tokens

# Weights and statistics are held in float32, where a larger number is infinite and a smaller one may be 0.
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
LARGEST_INTEGER = 2**63 - 1
_KEY = "parameter"
P = ParamSpec("P")
R = TypeVar("R")


class Refused(ValueError):
    """Why a value is not taken, for the end of the message; empty where the declaration says it all."""


def plain(value: Any) -> Any:
    """NumPy scalars, arrays and tensors as Python numbers and (nested) lists; anything else as it is.

    A tensor that needs a gradient stays one: as a number it would be cut off from its graph. So does one that cannot be listed.
    """
    if not (hasattr(value, "tolist") and hasattr(value, "ndim")):
        return value
    if isinstance(value, Tensor) and (value.requires_grad or value.is_meta or value.layout != torch.strided):
        return value
    return value.tolist()


def whole(value: Any) -> int | None:
    """An integer as a Python int, also one of NumPy or a 0-d tensor; None for anything else. True is none."""
    value = plain(value)
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None


class PerSample:
    """A parameter that is no plain number: one value per sample of a batch, or a tensor that needs a gradient.

    Immutable; equal to another one with the same values (of tensors: the same tensor).

    Args:
        given: one value for each sample, in order; None for a sample that the method leaves alone. Or a floating-point
            tensor that needs a gradient, with one value per sample (1-d) or one for all (0-d); it is read at each call, so
            an optimiser may change it in place.
    """

    __slots__ = ("_tensors", "given")

    def __init__(self, given: Sequence[Any] | Tensor):
        object.__setattr__(self, "given", given if isinstance(given, Tensor) else tuple(given))
        # Tensors that were made of the values: a transfer to the device at each call of each layer would cost more than an edit.
        object.__setattr__(self, "_tensors", {})

    @property
    def learned(self) -> bool:
        """Whether it is a tensor that needs a gradient."""
        return isinstance(self.given, Tensor)

    @property
    def values(self) -> tuple[Any, ...]:
        """The values as they are now; one where there is one for all."""
        return tuple(self.given.detach().reshape(-1).tolist()) if self.learned else self.given

    @property
    def count(self) -> int | None:
        """For how many samples it has values; None: one for all."""
        return None if self.learned and self.given.ndim == 0 else len(self.given)

    @property
    def rests(self) -> bool:
        """Whether some samples are left alone."""
        return not self.learned and None in self.given

    @property
    def of_heads(self) -> bool:
        """Whether the values are sets of heads."""
        return not self.learned and any(v is not None and not isinstance(v, (int, float)) for v in self.given)

    def acts(
        self, samples: Samples, batch: int, device: torch.device, site: Any = None, heads: tuple[int, ...] | None = None
    ) -> Tensor:
        """bool [B, 1, 1], or [B, H, 1] for sets of heads: whether a value is given for each row, and holds the head.

        Args:
            site, heads: of the attention call; None: whether a row has a value at all is asked.
        """
        if heads is None or not self.of_heads:
            return self.tensor(samples, batch, torch.bool, device, lambda v: v is not None, "given", axes=2)
        inside = lambda v: [v is not None and head in v.of(site) for head in heads]  # noqa: E731
        return self.tensor(samples, batch, torch.bool, device, inside, (site.path, heads), axes=1)

    def listed(self, samples: Samples, batch: int | None = None) -> list[Any]:
        """The value of each row of a batch (see `Samples.rows`).

        Raises:
            SelectionError: the batch is not of so many samples.
        """
        if self.count is None:
            return list(self.values) * (batch or samples.batch)
        return [self.values[i] for i in samples.rows(self.count, batch)]

    def tensor(
        self,
        samples: Samples,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        each: Callable[[Any], Any] | None = None,
        key: Any = None,
        axes: int = 0,
    ) -> Tensor:
        """The value of each row of a batch, [B, ...]; [1] where there is one for all. Differentiable in a learned one.

        Args:
            each: what stands for each value (a number, or numbers); None: the value itself, and for None the first number
                that there is, so that what is computed for a sample that is left alone is finite. key: tells `each` apart.
            axes: so many axes of size one stand behind; made with the tensor, since each would be an operator in each layer.

        Raises:
            SelectionError: the batch is not of so many samples.
        """
        if self.learned:
            held = self.given.to(device, dtype)
            held = held[None] if held.ndim == 0 else held[list(samples.rows(self.count, batch))]
            return held.reshape(held.shape + (1,) * axes)
        of_row = samples.rows(self.count, batch)
        known, compiling = (of_row, dtype, device, key, axes), torch.compiler.is_compiling()
        if not compiling and known in self._tensors:
            return self._tensors[known]
        fill = next((v for v in self.given if v is not None), 0.0)
        values = [(fill if v is None else v) if each is None else each(v) for v in self.given]
        # It may be used in a call with gradients later.
        with torch.inference_mode(False) if not compiling else torch.no_grad():
            made = torch.tensor([values[i] for i in of_row], dtype=dtype, device=device)
            made = made.reshape(made.shape + (1,) * axes)
        if not compiling:
            self._tensors[known] = made
        return made

    def mapped(self, change: Callable[[Tensor], Tensor]) -> PerSample:
        """Each value through a function of tensors; a sample that is left alone stays so."""
        if self.learned:
            return PerSample(change(self.given))
        new = change(torch.tensor([0.0 if v is None else v for v in self.given], dtype=torch.float64)).tolist()
        return PerSample([None if v is None else n for v, n in zip(self.given, new, strict=True)])

    def __mul__(self, factor: float) -> PerSample:
        return self.mapped(lambda values: values * factor)

    __rmul__ = __mul__

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("PerSample is immutable; make a new one.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PerSample):
            return NotImplemented
        return self.given is other.given or (not self.learned and not other.learned and self.given == other.given)

    def __hash__(self) -> int:
        return hash((PerSample, id(self.given) if self.learned else self.given))

    def __reduce__(self) -> tuple[Any, ...]:
        return PerSample, (self.given,)

    def __repr__(self) -> str:
        return repr(self.given) if self.learned else repr(list(self.given))


def is_all(value: Any, number: float) -> bool:
    """Whether a parameter is `number` for every sample that it does not leave alone; never one that needs a gradient."""
    if isinstance(value, PerSample):
        return not value.learned and all(v is None or v == number for v in value.given)
    return value == number


def _values(value: Any) -> list[Any]:
    """A value, or those of a mapping."""
    return list(value.values()) if isinstance(value, Mapping) else [value]


def sample_values(owner: Any) -> dict[str, PerSample]:
    """The fields of a dataclass that have one value per sample, or need a gradient; those inside of mappings as well."""
    found = {}
    for f in fields(owner):
        value = getattr(owner, f.name)
        if isinstance(value, PerSample):
            found[f.name] = value
        elif isinstance(value, Mapping):
            found |= {f"{f.name}[{k}]": v for k, v in value.items() if isinstance(v, PerSample)}
    return found


@dataclass(frozen=True)
class Parameter(abc.ABC):
    """A declaration. A subclass says which values fit (`convert`) and how that reads (`describe`).

    Attributes:
        optional: None is a value too. per_sample: the parameter is a strength, target, scale or gate, which has a meaning
            for each sample by itself: a list with one value for each is taken too (see `PerSample`). None in it leaves the
            sample alone, or means what it means for all where the parameter is optional.
        learnable: a tensor that needs a gradient is taken, with one value for all or one per sample.
    """

    optional: bool = False
    per_sample: bool = False
    learnable: bool = False

    def describe(self) -> str:
        """The values it takes, e.g. "number from 0 to 1"."""
        return self._form() + (" or None" if self.optional else "") + (", or one per sample" if self.per_sample else "")

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
            raise SelectionError(f"{given}: {clipped(str(error).removeprefix(f'{name}={brief(value)}: '))}") from error
        except Refused as error:
            raise SelectionError(f"{given}: give {self._article()}{self.describe()}{str(error) or '.'}") from None
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, OSError) as error:
            why = clipped(str(error), 120)
            raise SelectionError(f"{given}: give {self._article()}{self.describe()} ({why}).") from error

    @abc.abstractmethod
    def convert(self, value: Any) -> Any:
        """`value` as it is kept; raises `Refused`, or a SelectionError whose message says what to give."""

    # A value of several samples and those of one: what `Intervention.of_sample` and `joined` are made of.

    def count(self, value: Any) -> int | None:
        """For how many samples a value (as it is kept) speaks; None: it is the same for any number."""
        found = (v.count for v in _values(value) if isinstance(v, PerSample))
        return next((n for n in found if n is not None), None)

    def of_sample(self, value: Any, i: int) -> Any:
        """The value of sample `i` by itself; None where that sample is left alone."""
        if isinstance(value, Mapping):
            own = {key: self.of_sample(v, i) for key, v in value.items()}
            return {key: v for key, v in own.items() if v is not None} or None
        if not isinstance(value, PerSample):
            return value
        return value.values[0 if value.count is None else i]

    def of_request(self, given: Any) -> Any:
        """What a request gives for itself, in the form of a value for one sample."""
        return given

    def settled(self, value: Any, tokens: Tokens, tokenizer: Any) -> Any:
        """The value of one sample with what it looks up in that sample's tokens found."""
        return value

    def shared(self, value: Any) -> Any:
        """What values of single samples must have in common so that one value can stand for all of them."""
        if self.per_sample and isinstance(value, (int, float)):
            return "one for each"
        return list(value) if self.per_sample and isinstance(value, Mapping) else value

    def resting(self, value: Any) -> Any:
        """What stands for a sample that is left alone, beside one with this value."""
        return value

    def joined(self, values: Sequence[Any]) -> Any:
        """One value for several samples, of those of each, which agree in what is `shared`."""
        if all(v == values[0] for v in values[1:]):
            return values[0]
        if isinstance(values[0], Mapping):
            return {key: self.joined([v[key] for v in values]) for key in values[0]}
        return PerSample(values)

    @abc.abstractmethod
    def _form(self) -> str:
        """What one value is, e.g. "number from 0 to 1"."""

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

    def convert(self, value: Any) -> int | float | PerSample:
        many = self._many(value) if self.per_sample else None
        return self._one(value) if many is None else many

    def _many(self, value: Any) -> PerSample | None:
        """One value per sample, or a tensor that needs a gradient; None where `value` is neither."""
        given = value.given if isinstance(value, PerSample) else plain(value)
        if isinstance(given, Tensor):
            if not self.learnable or given.is_meta or given.ndim > 1 or not given.is_floating_point():
                return None
            if not given.numel():
                raise Refused
            for number in given.detach().reshape(-1).tolist():
                self._one(number)
            return PerSample(given)
        if not isinstance(given, (list, tuple)):
            return None
        if not given:
            raise Refused
        return PerSample([None if v is None else self._one(v) for v in given])

    def _one(self, value: Any) -> int | float:
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
    learnable: bool = False,
    kw_only: bool = False,
) -> Any:
    """A field that takes a finite number within bounds (see `Number`); a default of None makes it optional too."""
    form = Number(optional or default is None, per_sample, learnable, low, high, above, below, infinite=infinite)
    return declared_field(form, default, kw_only)


def integer(
    default: Any = MISSING,
    *,
    low: int | None = None,
    high: int | None = None,
    optional: bool = False,
    kw_only: bool = False,
) -> Any:
    """A field that takes an integer within bounds, both allowed."""
    return declared_field(Number(optional or default is None, low=low, high=high, whole=True), default, kw_only)


def choice(default: Any, names: Sequence[str], *, kw_only: bool = False) -> Any:
    """A field that takes one of `names`."""
    return declared_field(Choice(default is None, names=tuple(names)), default, kw_only)


def flag(default: Any, *, kw_only: bool = False) -> Any:
    """A field that takes True or False."""
    return declared_field(Flag(), default, kw_only)


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
    return declared_field(
        Parsed(default is None, per_sample, parse=parse, text=text), default, kw_only, default_factory
    )


def declared_field(
    form: Parameter, default: Any = MISSING, kw_only: bool = False, default_factory: Any = MISSING
) -> Any:
    """A field with a declaration of its own kind."""
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

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(cls.__init__)
        taken = list(signature.parameters.values())[1:]
        _check_arguments(cls.__name__, signature.replace(parameters=taken), args, kwargs)
        return super().__new__(cls)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or a pickle sets the fields afterwards, so there are no arguments to look at.
        return object.__new__, (type(self),), self.__getstate__()


def named(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose wrong arguments are a SelectionError, as those of `Named` are."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        _check_arguments(f"{function.__name__}()", signature, args, kwargs)
        return function(*args, **kwargs)

    return checked


def _check_arguments(name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        taken = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
        raise SelectionError(_wrong_arguments(name, taken, args, kwargs) or f"{name}: {error}.") from None


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
