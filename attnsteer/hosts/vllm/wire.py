"""Methods as JSON: what a request may say of its steering, and what travels with it to the workers. Data only: no path, no code.

A request says one of

    "calm"                                              a steering that the server was started with
    {"name": "calm", "gamma": 0.3}                      the same, with values of its own
    {"method": "ZeroTuning", "gamma": 0.3, "heads": {"1": [0, 3]}}
    "none"                                              no steering

or any of these as JSON text, for clients whose fields hold no objects. An object may say `"prompt": n` too: the first n tokens are
the prompt, and those behind them count as generated (what scores a continuation sends it behind its prompt). Head numbers are
strings in JSON, as `save_pretrained` has them; the gates of a `HeadGate` are a list of [layer, head, gate].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ...choices import NOTHING, Choice
from ...errors import SelectionError, UnknownName, brief, listing
from ...intervention import Intervention, plain_value
from ...parameters import declared
from ...registry import built_in_methods, get_method, methods, registered_name
from ...where import Where

# The field of a request, and of the engine's configuration.
KEY = "attnsteer"
NAME, METHOD, PROMPT = "name", "method", "prompt"
# What the front end makes of a request: no request can say it, since it is not read from one.
RESOLVED = "resolved"
# A request's JSON is at most so long; spans and heads are numbers.
LONGEST = 1 << 20


def parsed(value: Any) -> Any:
    """What a request says, with JSON text read: None, a name, or a mapping.

    Raises:
        SelectionError: it is of another form.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "[", '"'):
        if len(value) > LONGEST:
            raise SelectionError(f"{KEY}: the text has {len(value)} characters; at most {LONGEST} are read.")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SelectionError(f"{KEY}={brief(value)} is neither a name nor JSON ({error}).") from None
    if value is None or value == NOTHING or isinstance(value, str):
        return None if value == NOTHING else value
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise SelectionError(
            f'{KEY}={brief(value)}: give a name, {{"{NAME}": ..., parameter: value}}, {{"{METHOD}": ..., parameter: value}}, or '
            f'"{NOTHING}".'
        )
    if (NAME in value) == (METHOD in value):
        raise SelectionError(f'{KEY}={brief(dict(value))}: give "{NAME}" or "{METHOD}", one of the two.')
    return dict(value)


def ended(given: Any, length: int) -> tuple[Any, int]:
    """What `parsed` gave without its `prompt`, and how many of the `length` tokens are the prompt.

    Raises:
        SelectionError: not so many tokens are there.
    """
    if not isinstance(given, Mapping) or PROMPT not in given:
        return given, length
    values = dict(given)
    end = values.pop(PROMPT)
    if not isinstance(end, int) or isinstance(end, bool) or not 1 <= end <= length:
        raise SelectionError(
            f"{PROMPT}={brief(end)}: give the number of tokens that are the prompt, 1 to {length} here."
        )
    return values, end


def prompt_of(params: Any, length: int) -> int:
    """How many of the first `length` tokens of a resolved request are its prompt."""
    return int(((getattr(params, "extra_args", None) or {}).get(KEY) or {}).get(PROMPT, length))


def made(given: Mapping[str, Any]) -> Intervention:
    """The method of `{"method": ..., parameter: value}`.

    Raises:
        SelectionError: there is no such method or parameter, or a value does not fit.
    """
    values = dict(given)
    name = values.pop(METHOD)
    if not isinstance(name, str):
        raise SelectionError(f"{METHOD}={brief(name)}: give the name of a method; there are {listing(methods(), 60)}.")
    by_case = {known.lower(): known for known in built_in_methods()}
    try:
        cls = get_method(by_case.get(name.lower(), name))
    except UnknownName as error:
        raise SelectionError(str(error)) from None
    return new(cls, cls, values)


def new(cls: type[Intervention], make: Any, values: Mapping[str, Any]) -> Any:
    """`make(**values)`, with the values of JSON in the forms that the fields of `cls` have.

    Raises:
        SelectionError: there is no such parameter, or a value does not fit.
    """
    known = [f.name for f in fields(cls) if f.init and f.metadata.get("save", True)]
    wrong = [name for name in values if name not in known]
    if wrong:
        raise SelectionError(f"{cls.__name__} has no parameter {wrong[0]!r}; it has {listing(known, 30)}.")
    try:
        return make(**{name: value_of(cls, name, value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        if isinstance(error, SelectionError):
            raise
        raise SelectionError(f"{cls.__name__}: {error}") from error


def value_of(cls: type[Intervention], name: str, value: Any) -> Any:
    """One value of JSON in the form that a field takes."""
    if name == "where":
        if not isinstance(value, Mapping):
            raise SelectionError(f'where={brief(value)}: give an object of selections, e.g. {{"layers": [0]}}.')
        return Where(**{k: _plain(v) for k, v in value.items()})
    if name == "gates":
        return _gates(value)
    form = declared(cls, name)
    value = _plain(value)
    return value if form is None else form.of_request(value)


def _gates(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"$pairs"}:
        value = [[*pair, gate] for pair, gate in value["$pairs"]]
    rows = isinstance(value, Sequence) and not isinstance(value, str) and value
    if not rows or not all(isinstance(r, Sequence) and len(r) == 3 for r in value):
        raise SelectionError(f"gates={brief(value)}: give a list of [layer, head, gate].")
    return {(layer, head): gate for layer, head, gate in value}


def _plain(value: Any) -> Any:
    """Values as `save_pretrained` writes them, read; keys that are numbers become numbers."""
    if isinstance(value, Mapping):
        if set(value) == {"$float"}:
            return float(value["$float"])
        if set(value) == {"$pairs"}:
            return {_hashable(_plain(k)): _plain(v) for k, v in value["$pairs"]}
        return {
            int(k) if isinstance(k, str) and k.isdecimal() and len(k) < 10 else k: _plain(v) for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise SelectionError(f"{value} is no number of JSON.")
    return value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def one(method: Intervention) -> Intervention | None:
    """The method for one request, where values may stand in a list of one; None where it leaves the request alone.

    Raises:
        SelectionError: there are values for several samples.
    """

    def which(name: str, count: int) -> int:
        if count != 1:
            raise SelectionError(
                f"{type(method).__name__}({name}=...) has values for {count} samples; this is one request."
            )
        return 0

    return method.of_sample(which)


def record(method: Intervention) -> dict[str, Any]:
    """A method as JSON has it; `restored` is the way back."""
    values = {name: plain_value(getattr(method, name)) for name in saved(type(method))}
    return {METHOD: registered_name(type(method)), "parameters": values}


def saved(cls: type[Intervention]) -> list[str]:
    """The fields of a method that are written down."""
    return [f.name for f in fields(cls) if f.metadata.get("save", True)]


def restored(given: Mapping[str, Any]) -> Intervention:
    """The method of a `record`."""
    cls = get_method(given[METHOD])
    values = {}
    for name, value in given["parameters"].items():
        if name == "where":
            values[name] = Where(**{k: _plain(v) for k, v in value.items()})
        elif name == "gates":
            values[name] = _gates(value)
        else:
            values[name] = _plain(value)
    return cls(**values)


def request_args(steering: str | Intervention | Mapping[str, Any] | None, /, **values: Any) -> dict[str, Any]:
    """The `extra_args` of vLLM's `SamplingParams` for one request.

    Args:
        steering: a name that the engine was started with, a method, an object as above, or None.
        values: for this request alone, of a steering that is named.

    Example:
        >>> from attnsteer import ZeroTuning
        >>> request_args(ZeroTuning(gamma=0.5))["attnsteer"]["gamma"]
        0.5
        >>> request_args("calm", gamma=0.3)
        {'attnsteer': {'name': 'calm', 'gamma': 0.3}}
    """
    if isinstance(steering, Intervention):
        own = record(steering)
        return {KEY: {METHOD: own[METHOD], **own["parameters"], **values}}
    if isinstance(steering, str):
        return {KEY: {NAME: steering, **values}}
    return {KEY: None if steering is None else {**steering, **values}}


def resolved(choice: Choice) -> dict[str, Any]:
    """What travels with a request: its methods in full, so that no other process looks anything up."""
    return {RESOLVED: 1, "methods": [record(part.bound.method) for part in choice.parts]}


def canonical(value: Any) -> str:
    """The same text for the same definition."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
