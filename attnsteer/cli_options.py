"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
IMPORT = Annotated[
    list[Path] | None,
    typer.Option(
        "--import", metavar="FILE", help="A file of Python to run first, which registers methods. Repeatable."
    ),
]
ALLOW_IMPORTS = Annotated[
    bool, typer.Option("--allow-imports", help="Run the files that the recipe names under imports. Read them first.")
]
