"""What is known of each registered method, read from its class and docstrings; no host library is imported."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .intervention import PASSES, Intervention, needs_of
from .parameters import declared
from .registry import get_host, get_method, hosts, methods

# A citation ends with the first bracket that holds a year: "(ICML 2024, arXiv 2406.15765)".
_CITED = re.compile(r".*?\([^()]*\b(?:19|20)\d\d\b[^()]*\)")


@dataclass(frozen=True)
class MethodEntry:
    """One row of `attnsteer methods`.

    Attributes:
        name: registered name. summary: one line, what is edited. paper: authors, title, venue, or "".
        kinds: kinds of attention it is defined on. doors: the parts of the contract it implements.
        hosts: hosts that provide what it needs. looks_ahead: whether a later prompt token moves an earlier row.
        parameters: hyper-parameters, as "name: values it takes, default"; the values are left out where none are declared.
    """

    name: str
    summary: str
    paper: str
    kinds: tuple[str, ...]
    doors: tuple[str, ...]
    hosts: tuple[str, ...]
    looks_ahead: bool
    parameters: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


def catalogue() -> list[MethodEntry]:
    """All registered methods, third-party ones included, by name."""
    return [describe(name, get_method(name)) for name in methods()]


def describe(name: str, cls: type) -> MethodEntry:
    """The entry of one method class."""
    # Of all hyper-parameters: by one of them an object may leave some alone.
    doors = Intervention.doors(object.__new__(cls))
    needs = needs_of(cls)
    # Streams of a language model are passes of another kind than those of a denoiser.
    wanted = {*needs, *(("around",) if "around" in doors and not PASSES & set(needs) else ())}
    summary, paper = _texts(name, cls)
    return MethodEntry(
        name=name,
        summary=summary,
        paper=paper,
        kinds=tuple(cls.kinds),
        doors=tuple(d for d in ("inputs", "bias", "weights", "output", "around") if d in doors),
        hosts=tuple(h for h in hosts() if wanted <= get_host(h).provides),
        # Of a method in which it depends on a parameter, that is the plain form.
        looks_ahead=cls.looks_ahead is True,
        parameters=tuple(_parameter(cls, f) for f in fields(cls) if f.name != "where" and f.metadata.get("save", True)),
    )


def _texts(name: str, cls: type) -> tuple[str, str]:
    """(summary, paper): from the module's docstring where it begins with the class's name, else from the class's."""
    title, colon, text = (inspect.getdoc(sys.modules.get(cls.__module__)) or "").partition(":")
    if not colon or title not in (name, cls.__name__):
        text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        # A dataclass without a docstring is given its signature for one.
        text = "" if text.startswith(f"{cls.__name__}(") else text
    first, _, rest = text.partition("\n\n")
    cited = _CITED.match(_one_line(rest))
    return _one_line(first), cited[0] if cited else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _parameter(cls: type, field: Any) -> str:
    form = declared(cls, field.name)
    made = field.default if field.default_factory is MISSING else field.default_factory()
    parts = [form.describe()] if form else []
    parts += [f"default {made!r}"] if made is not MISSING else []
    return f"{field.name}: {', '.join(parts)}" if parts else field.name
