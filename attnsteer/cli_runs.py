"""The commands about finished runs: compare them, and report one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import ALLOW_IMPORTS, IMPORT, JSON
from .output import print_json, print_table

FAILED = 1


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


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    samples: Annotated[
        int, typer.Option(min=0, help="How many samples are answered again; 0: no model is loaded.")
    ] = 20,
    files: IMPORT = None,
    allow_imports: ALLOW_IMPORTS = False,
    as_json: JSON = False,
) -> None:
    """Check that a run is what it says: files, records, figures, weights, arms, and some answers given again.

    Writes verified.json into the folder, which boards show. Exits with 1 where something is not as it should be, or could
    not be checked.
    """
    from .recipe.loading import load_recipe
    from .results.boards import missing
    from .results.verification import verify as check
    from .run.command import import_files
    from .run.store import RECIPE

    import_files(files or (), load_recipe(run / RECIPE) if allow_imports else None, allow_imports)
    found = check(run, samples=samples)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(
            ("check", "", ""), [(c.name, c.state if c.state != "fail" else "FAIL", c.text) for c in found.checks]
        )
        lacks = [line for line in missing(run) if "attnsteer verify" not in line]
        print("\n" + ("verified" if found.ok else "NOT verified") + f" at {found.when}")
        print("\n".join(f"missing for a board: {line}" for line in lacks), end="\n" if lacks else "")
    if not found.ok:
        raise typer.Exit(FAILED)


def board(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="Run folders, or folders that have some below.")
    ],
    out: Annotated[Path, typer.Option(help="The page; its figures are beside it as JSON.")] = Path("board.html"),
    reports: Annotated[
        bool, typer.Option("--reports", help="Also write the report of each run, which cells link to.")
    ] = False,
) -> None:
    """Write a page over many runs: each method with its paired difference, controls, cost and verdict, by model and task.

    Runs over other samples, weights or figures are in blocks of their own.
    """
    from .errors import RunError
    from .results import report as write_report
    from .results.boards import runs_in, write_board

    if reports:
        for path in runs_in(runs):
            try:
                write_report(path)
            except RunError:
                # The board says why it leaves this one out.
                continue
    found = write_board(runs, out)
    for run, why in found.left_out:
        print(f"left out: {run}: {' '.join(why.split())}")
    print(f"{out}: {len(found.rows)} runs in {len(found.blocks)} blocks, figures in {out.with_suffix('.json')}")
