"""The registry of methods and hosts: lazy built-ins, entry points, and one decorator each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from .errors import UnknownName, did_you_mean

# "module:Class" strings, so that asking for the list imports nothing.
_METHODS: dict[str, str | type] = {
    "ACT": "attnsteer.methods.act:ACT",
    "HeadGate": "attnsteer.methods.headgate:HeadGate",
    "PAG": "attnsteer.methods.pag:PAG",
    "PASTA": "attnsteer.methods.pasta:PASTA",
    "SEG": "attnsteer.methods.seg:SEG",
    "SoftPAG": "attnsteer.methods.softpag:SoftPAG",
    "SpotLight": "attnsteer.methods.spotlight:SpotLight",
    "ZeroTuning": "attnsteer.methods.zerotuning:ZeroTuning",
}
# Asked in this order; the generic host takes any module, so it comes last.
_HOSTS: dict[str, str | type] = {
    "diffusers": "attnsteer.hosts.diffusers:DiffusersHost",
    "transformers": "attnsteer.hosts.transformers:TransformersHost",
    "generic": "attnsteer.hosts.generic:GenericHost",
}
_GROUPS = {"methods": "attnsteer.methods", "hosts": "attnsteer.hosts"}


def _load(table: dict[str, str | type], name: str) -> type:
    entry = table[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        table[name] = entry = getattr(importlib.import_module(module), attribute)
    return entry


def _with_plugins(table: dict[str, str | type], group: str) -> dict[str, str | type]:
    for point in entry_points(group=_GROUPS[group]):
        table.setdefault(point.name, point.value)
    return table


def methods() -> tuple[str, ...]:
    """The names of all methods, third-party ones included, sorted."""
    return tuple(sorted(_with_plugins(_METHODS, "methods")))


def get_method(name: str) -> type:
    """The intervention class called `name`.

    Raises:
        UnknownName: there is none; the message lists what exists.
    """
    table = _with_plugins(_METHODS, "methods")
    if name not in table:
        raise UnknownName(
            f"there is no method {name!r}; there are {', '.join(sorted(table))}.{did_you_mean(name, table)}"
        )
    return _load(table, name)


def register_method(cls: type | None = None, *, name: str | None = None) -> Any:
    """Class decorator: make an `Intervention` subclass known by `name` (default: the class name).

    Raises:
        TypeError: the class is no `Intervention`. ValueError: the name is taken by another class.
    """
    from .intervention import Intervention

    def add(found: type) -> type:
        key = name or found.__name__
        if not (isinstance(found, type) and issubclass(found, Intervention)):
            raise TypeError(f"register_method: {found!r} is not a subclass of Intervention.")
        old = _METHODS.get(key)
        same = old == f"{found.__module__}:{found.__qualname__}" or (
            isinstance(old, type) and (old.__module__, old.__qualname__) == (found.__module__, found.__qualname__)
        )
        if old is not None and not same:
            raise ValueError(f"register_method: the name {key!r} is taken by {old}; choose another.")
        _METHODS[key] = found
        return found

    return add if cls is None else add(cls)


def registered_name(cls: type) -> str:
    """The name under which a class is registered; unregistered classes cannot be saved."""
    own = f"{cls.__module__}:{cls.__qualname__}"
    for key, entry in _with_plugins(_METHODS, "methods").items():
        if entry is cls or entry == own:
            return key
    raise UnknownName(f"{cls.__name__} is not registered; decorate it with attnsteer.register_method to save it.")


def register_host(cls: type | None = None, *, name: str | None = None) -> Any:
    """Class decorator: add a `Host` subclass; it is asked before the built-in ones."""

    def add(found: type) -> type:
        rest = dict(_HOSTS)
        _HOSTS.clear()
        _HOSTS[name or found.__name__] = found
        _HOSTS.update({k: v for k, v in rest.items() if k != (name or found.__name__)})
        return found

    return add if cls is None else add(cls)


def hosts() -> tuple[str, ...]:
    """The names of all hosts, in the order in which they are asked."""
    return tuple(_with_plugins(_HOSTS, "hosts"))


def get_host(name: str) -> type:
    """The host class called `name`."""
    table = _with_plugins(_HOSTS, "hosts")
    if name not in table:
        raise UnknownName(f"there is no host {name!r}; there are {', '.join(table)}.{did_you_mean(name, table)}")
    return _load(table, name)


HostFactory = Callable[[Any], Any]
