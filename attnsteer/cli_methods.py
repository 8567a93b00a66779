"""The command about methods: list them, or say all that is known of one."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

import typer

from .cli_options import IMPORT, JSON
from .output import print_json, print_table

# What an example gives for parameters without a default, by name.
EXAMPLES = {
    "boxes": '{"fox": (0.1, 0.4, 0.5, 0.9)}',
    "gates": "{(0, 3): 0.0}",
    "groups": '[("red", "fox"), ("blue", "ball")]',
    "local": "[[0, 5, 17]]",
    "negative": '"blurry"',
    "source": '"previous"',
    "spans": "[[(6, 10)]]",
    "summary": "[[3]]",
    "value": "1.2",
    "words": '["fox"]',
}
# Methods whose source is another run, and what to capture of it.
OF_A_RUN = {"FreezeMaps": '("q", "k")', "PatchHeads": '"output"'}


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method; all of them without it.")] = None,
    files: IMPORT = None,
    as_json: JSON = False,
) -> None:
    """List the methods: what each edits, its paper, and where it can act; or say all that is known of one.

    Methods of other packages are included. "looks ahead" marks those whose statistics run over the whole prompt.
    """
    from .catalogue import catalogue
    from .method_files import import_methods

    for path in files or ():
        import_methods(path)
    if name is not None:
        _print_one(name, as_json)
        return
    found = catalogue()
    if as_json:
        print_json([entry.to_dict() for entry in found])
        return
    head = ("name", "edits", "attention", "hosts", "looks ahead", "what it does", "paper")
    rows = [(m.name, *map(_listed, (m.doors, m.kinds, m.hosts, m.looks_ahead)), m.summary, m.paper) for m in found]
    print_table(head, rows)


def _listed(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else ", ".join(value)


def _print_one(name: str, as_json: bool) -> None:
    from .catalogue import describe
    from .registry import get_method

    cls = get_method(name)
    entry = describe(name, cls)
    own = parameters(cls)
    if as_json:
        print_json({**entry.to_dict(), "parameters": own, "example": example(name, cls, entry.hosts)})
        return
    print(f"{name}: {entry.summary}\n")
    facts = {"paper": entry.paper or "-", "edits": entry.doors, "attention": entry.kinds, "hosts": entry.hosts}
    for title, value in {**facts, "looks ahead": entry.looks_ahead}.items():
        print(f"{title:<12}  {value if isinstance(value, str) else _listed(value)}")
    print()
    rows = [(p["name"], p["type"], p["values"], "required" if p["required"] else p["default"]) for p in own]
    print_table(("parameter", "type", "values", "default"), rows)
    print(f"\n{example(name, cls, entry.hosts)}")


def parameters(cls: type) -> list[dict[str, Any]]:
    """The hyper-parameters of a method: {"name", "type", "values", "required", "default"}; the default as it is written."""
    out = []
    for field in (f for f in fields(cls) if f.init):
        required = field.default is MISSING and field.default_factory is MISSING
        default = field.default_factory() if field.default is MISSING and not required else field.default
        row = {"name": field.name, "type": _type(field), "values": _values(cls, field), "required": required}
        out.append({**row, "default": None if required else repr(default)})
    return out


def _type(field: Field[Any]) -> str:
    return field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))


def _values(cls: type, field: Field[Any]) -> str:
    """The values that a field declares, its own or those of the nearest base that does; "any" where none are declared."""
    for base in cls.__mro__:
        own = base.__dict__.get("__dataclass_fields__", {}).get(field.name)
        declared = own.metadata.get("parameter") if own is not None else None
        if declared is not None:
            return declared.describe()
    return "any"


def example(name: str, cls: type, hosts: tuple[str, ...]) -> str:
    """Code that steers with a method of these hosts, its required parameters filled in."""
    import attnsteer

    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    given = ", ".join(f"{key}={EXAMPLES.get(key, '...')}" for key in required)
    public = name in attnsteer.__all__
    imports = f"from attnsteer import {name}, steer" if public else "from attnsteer import get_method, steer"
    if name in OF_A_RUN:
        given = "source=seen"
        imports = (
            f"from attnsteer import {name}, capture, steer\n\n"
            f"with capture(model, what={OF_A_RUN[name]}) as seen:\n    model(**inputs)"
        )
    made = f"{name}({given})" if public else f"get_method({name!r})({given})"
    target, call = (
        ("pipe", 'image = pipe("a fox").images[0]') if hosts == ("diffusers",) else ("model", "out = model(**inputs)")
    )
    return f"{imports}\n\nwith steer({target}, {made}) as run:\n    {call}\nprint(run.audit)"
