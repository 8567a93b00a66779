"""The commands about finished runs: compare them, and report one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import ALLOW_IMPORTS, IMPORT


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders; the first is compared with.")],
    other_samples: Annotated[
        bool, typer.Option("--other-samples", help="Runs of unlike samples too, on those that all have.")
    ] = False,
    other_model: Annotated[bool, typer.Option("--other-model", help="Runs of unlike models too.")] = False,
    partial: Annotated[bool, typer.Option("--partial", help="Unfinished runs too, on what there is.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of Markdown.")] = False,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write it as one HTML page.")] = None,
) -> None:
    """Compare runs over the same samples: paired differences with intervals, tests adjusted for all of them, cost.

    Prints Markdown: each arm with the verdict of its run and its difference from its own baseline, then the runs against
    the first. What differs in the recipes is listed at the end.
    """
    from .results import comparison

    found = comparison.compare(runs, other_samples=other_samples, other_model=other_model, partial=partial)
    if page is not None:
        from .results.reports.comparison_page import comparison_page
        from .run.store import write_atomic

        write_atomic(page, comparison_page(found).encode("utf-8", "backslashreplace"))
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
        return
    print(found.markdown(), end="")


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    attention: Annotated[
        int, typer.Option(min=0, help="Also load the model again, and show the attention of this many samples.")
    ] = 0,
    files: IMPORT = None,
    allow_imports: ALLOW_IMPORTS = False,
) -> None:
    """Write report.html and report.md into a run folder, and print where.

    The page is one file: open it in a browser, send it to someone, or print it. It loads nothing.
    """
    from .results import report as write_report

    if attention:
        from .recipe.loading import load_recipe
        from .results.drawings import record_attention
        from .run.command import import_files
        from .run.store import RECIPE

        import_files(files or (), load_recipe(run / RECIPE) if allow_imports else None, allow_imports)
        record_attention(run, attention)
    print(write_report(run))
