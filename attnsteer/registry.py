"""The registry of methods and hosts: lazy built-ins, entry points, and one decorator each."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from importlib.metadata import entry_points as read_entry_points
from pathlib import Path
from typing import Any

from .errors import RegistrationError, UnknownName, brief, did_you_mean

# "module:Class" strings, so that asking for the list imports nothing. A built-in method stands in its file under
# `@register_method`, and is found by reading the files.
_METHODS: dict[str, str | type] = {}
# Asked in this order; the sdpa host takes any module, so it comes last.
_HOSTS: dict[str, str | type] = {
    "diffusers": "attnsteer.hosts.diffusers.host:DiffusersHost",
    "transformers": "attnsteer.hosts.transformers.host:TransformersHost",
    "generic": "attnsteer.hosts.sdpa.host:GenericHost",
}
_DECORATED = re.compile(r"^@register_method\n(?:@.*\n)*class (\w+)", re.MULTILINE)
# What the classes of a group derive from, once its module is loaded: a class that derives from it has loaded it.
_BASES: dict[str, type] = {}
_GROUPS = {"methods": "attnsteer.methods", "hosts": "attnsteer.hosts"}


# Third-party entries, by table and name, kept apart so that they can be named in messages.
_PLUGINS: dict[str, dict[str, str]] = {"methods": {}, "hosts": {}}


def _load(table: dict[str, str | type], name: str, group: str) -> type:
    entry = table[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if name not in _PLUGINS[group]:
                raise
            raise RegistrationError(
                f"the entry point {name} = {entry!r} in {_GROUPS[group]} does not load ({error}); mend or remove the "
                "package that brings it."
            ) from error
        table[name] = entry = _checked(found, group)
    return entry


def base_of(group: str) -> Any:
    """Class decorator: what the classes of "methods" or "hosts" derive from."""

    def note(cls: type) -> type:
        _BASES[group] = cls
        return cls

    return note


def _checked(found: Any, group: str) -> type:
    """`found`, if it is a class of the kind that the group holds."""
    base = _BASES.get(group)
    if base is None or not (isinstance(found, type) and issubclass(found, base)):
        name = {"methods": "Intervention", "hosts": "Host"}[group]
        raise RegistrationError(f"{found!r} is not a subclass of {name}, so it cannot be one of the {group}.")
    return found


@functools.cache
def built_in_methods() -> dict[str, str]:
    """Name -> "module:Class" of the methods that come with the library, from the text of their files."""
    found = {}
    for path in sorted((Path(__file__).parent / "methods").glob("*.py")):
        for name in _DECORATED.findall(path.read_text(encoding="utf-8")):
            found[name] = f"{__package__}.methods.{path.stem}:{name}"
    return dict(sorted(found.items()))


def entry_points(group: str) -> tuple[EntryPoint, ...]:
    """The installed entry points of a group: read once, since that opens a file of each installed package."""
    return _read_once(group, tuple(sys.path))


@functools.cache
def _read_once(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(read_entry_points(group=group))


def _with_plugins(table: dict[str, str | type], group: str) -> dict[str, str | type]:
    if group == "methods":
        for name, entry in built_in_methods().items():
            table.setdefault(name, entry)
    known = _PLUGINS[group]
    for point in entry_points(group=_GROUPS[group]):
        old = table.get(point.name)
        if old is None:
            known[point.name] = point.value
            _put(table, group, point.name, point.value)
        elif known.get(point.name) != point.value and not _is(point, old):
            raise RegistrationError(
                f"the entry point {point.name} = {point.value!r} in {_GROUPS[group]} takes a name that {_spell(old)} "
                "has; rename it, or remove the package that brings it."
            )
    return table


def _is(point: EntryPoint, old: str | type) -> bool:
    """Whether an entry point names a class that is registered already, perhaps from another module than its own."""
    if isinstance(old, str) or _same(old, point.value):
        return _same(old, point.value)
    try:
        return point.load() is old
    except (ImportError, AttributeError):
        return False


def _spell(entry: str | type) -> str:
    """The "module:Class" form of an entry."""
    return entry if isinstance(entry, str) else f"{entry.__module__}:{entry.__qualname__}"


def _same(old: str | type, new: str | type) -> bool:
    return _spell(old) == _spell(new)


def methods() -> tuple[str, ...]:
    """The names of all methods, third-party ones included, sorted."""
    return tuple(sorted(_with_plugins(_METHODS, "methods")))


def get_method(name: str) -> type:
    """The intervention class called `name`.

    Raises:
        UnknownName: there is none; the message lists what exists.
    """
    table = _with_plugins(_METHODS, "methods")
    if not isinstance(name, str) or name not in table:
        raise UnknownName(
            f"there is no method {brief(name)}; there are {', '.join(sorted(table))}.{did_you_mean(name, table)}"
        )
    return _load(table, name, "methods")


def register_method(cls: type | None = None, *, name: str | None = None) -> Any:
    """Class decorator: make an `Intervention` subclass known by `name` (default: the class name).

    Raises:
        RegistrationError: the class is no `Intervention`, or the name is taken by another class.
    """
    return _adder(_METHODS, "methods", cls, name)


def registered_name(cls: type) -> str:
    """The name under which a class is registered; unregistered classes cannot be saved."""
    own = f"{cls.__module__}:{cls.__qualname__}"
    for key, entry in _with_plugins(_METHODS, "methods").items():
        if entry is cls or entry == own:
            return key
    raise UnknownName(f"{cls.__name__} is not registered; decorate it with attnsteer.register_method to save it.")


def register_host(cls: type | None = None, *, name: str | None = None) -> Any:
    """Class decorator: add a `Host` subclass; it is asked before the built-in ones.

    Raises:
        RegistrationError: the class is no `Host`, or the name is taken by another class.
    """
    return _adder(_HOSTS, "hosts", cls, name)


def _adder(table: dict[str, str | type], group: str, cls: type | None, name: str | None) -> Any:
    def add(found: type) -> type:
        key = name or _checked(found, group).__name__
        old = _with_plugins(table, group).get(key)
        if old is not None and not _same(old, found):
            raise RegistrationError(f"the name {key!r} is taken by {_spell(old)} among the {group}; choose another.")
        _put(table, group, key, _checked(found, group))
        return found

    return add if cls is None else add(cls)


def _put(table: dict[str, str | type], group: str, key: str, entry: str | type) -> None:
    """Add or exchange an entry; hosts go in front, because the first that takes a target gets it."""
    rest = {k: v for k, v in table.items() if k != key}
    table.clear()
    table.update({key: entry, **rest} if group == "hosts" else {**rest, key: entry})


def hosts() -> tuple[str, ...]:
    """The names of all hosts, in the order in which they are asked."""
    return tuple(_with_plugins(_HOSTS, "hosts"))


@contextlib.contextmanager
def all_or_nothing() -> Iterator[None]:
    """A block whose registrations are taken back where it raises, so that it can be mended and entered again."""
    before = [(table, dict(table)) for table in (_METHODS, _HOSTS)]
    try:
        yield
    except BaseException:
        for table, entries in before:
            table.clear()
            table.update(entries)
        raise


def get_host(name: str) -> type:
    """The host class called `name`."""
    table = _with_plugins(_HOSTS, "hosts")
    if not isinstance(name, str) or name not in table:
        raise UnknownName(f"there is no host {brief(name)}; there are {', '.join(table)}.{did_you_mean(name, table)}")
    return _load(table, name, "hosts")
