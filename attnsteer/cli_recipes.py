"""The commands about recipes: list, show, copy, describe them; and calibrate heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import ALLOW_IMPORTS, IMPORT, JSON

recipes = typer.Typer(no_args_is_help=True, help="List, show and copy the recipes that come with the package.")
NAME = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a file.")]


@recipes.command("ls")
def ls(
    part: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only recipes whose name has this in it.")] = "",
    as_json: JSON = False,
) -> None:
    """List the shipped recipes."""
    from .output import print_json, print_table
    from .recipe.shipped import shipped

    rows = [
        {
            "name": r.name,
            "methods": [s.method for s in r.interventions],
            "model": r.model.name,
            "task": r.task,
            "primary": r.primary,
            "summary": r.summary,
        }
        for r in shipped()
        if part.lower() in r.name.lower()
    ]
    if as_json:
        print_json(rows)
        return
    head = ("name", "methods", "model", "task", "primary", "summary")
    print_table(head, [(*(", ".join(v) if isinstance(v, list) else v for v in row.values()),) for row in rows])


@recipes.command("show")
def show(
    recipe: NAME,
    resolved: Annotated[bool, typer.Option("--resolved", help="With every default filled in.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="As a tiny run has it; implies --resolved.")] = False,
) -> None:
    """Print a recipe."""
    from .recipe.loading import load_recipe
    from .recipe.resolved import resolve
    from .recipe.shipped import locate

    if resolved or tiny:
        print(resolve(load_recipe(recipe), tiny=tiny).canonical(), end="")
        return
    loaded = load_recipe(recipe)
    print(locate(loaded.source).read_text(encoding="utf-8"), end="")


@recipes.command("cp")
def cp(
    recipe: NAME,
    to: Annotated[Path, typer.Argument(metavar="TO", help="A folder, or the path of the new file.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Copy a recipe, with the files beside it that it names, to change it."""
    from .recipe.shipped import copy

    for path in copy(recipe, to, force):
        print(path)


@recipes.command("schema")
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors and other programs."""
    from .output import print_json
    from .recipe.schema import json_schema

    print_json(json_schema())


@recipes.command("table")
def table(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of recipes, such as recipes/act.")],
    runs: Annotated[Path, typer.Option(help="Where the run folders are.")] = Path("runs"),
    write: Annotated[bool, typer.Option("--write", help="Put it into the folder's README.md.")] = False,
) -> None:
    """Print a table of results: the paper's figure, ours, and the difference."""
    from .results.readme_tables import results_table, write_results

    if write:
        print(f"{folder / 'README.md'}: {'written' if write_results(folder, runs) else 'unchanged'}")
        return
    print(results_table(folder, runs), end="")


def calibrate(
    recipe: NAME,
    out: Annotated[Path, typer.Option(help="The file to write, such as heads.safetensors.")],
    cache: Annotated[Path, typer.Option(help="Folder of what was found before.")] = Path("runs/.cache"),
    tiny: Annotated[bool, typer.Option("--tiny", help="With a tiny random model and few samples.")] = False,
    files: IMPORT = None,
    allow_imports: ALLOW_IMPORTS = False,
) -> None:
    """Run the search of a recipe's calibration section, and save the heads that it finds.

    The search goes on where an interrupted one stopped.
    """
    from .recipe.loading import load_recipe
    from .run.command import import_files
    from .run.recipe_calibration import save_found

    import_files(files or (), load_recipe(recipe), allow_imports)
    print(save_found(recipe, out, cache, tiny=tiny))
