"""The command line: it parses, calls, and prints; what it prints is computed elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ._version import __version__
from .cli_heads import bake, profile
from .cli_hub import pull, push
from .cli_methods import methods
from .cli_options import ALLOW_IMPORTS, IMPORT, JSON
from .cli_recipes import calibrate, recipes
from .cli_runs import board, compare, report, verify
from .cli_serve import serve
from .cli_view import play, view
from .cli_zoo import zoo as zoo_commands
from .errors import AttnSteerError
from .output import print_json as _print_json
from .output import print_table as _print_table

# Heavy libraries are imported inside the commands, so that `--help` and errors of usage come at once.

USAGE, FAILED, STOPPED = 2, 1, 130
# What a run exits with, by its verdict.
EXITS = {"unchanged": FAILED, "invalid": 3}


class _Group(typer.core.TyperGroup):
    """Prints the library's own errors as one line; every other exception is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AttnSteerError as error:
            print(f"attnsteer: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(USAGE) from None


app = typer.Typer(
    cls=_Group,
    name="attnsteer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exact, training-free attention interventions for transformers and diffusers models.",
    epilog="A command that cannot do what was asked says why in one line and exits with 2.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"attnsteer {__version__}")
        raise typer.Exit()


app.command()(methods)
app.command()(profile)
app.command()(bake)
app.add_typer(recipes, name="recipes")
app.command()(calibrate)
app.command()(compare)
app.command()(report)
app.command()(verify)
app.command()(board)
app.command()(push)
app.command()(pull)
app.command()(view)
app.command()(play)
app.command()(serve)
app.add_typer(zoo_commands, name="zoo")


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def sites(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An embedded model, a folder, or a hub id.")],
    component: Annotated[
        str | None, typer.Option(help="One part of a pipeline, such as text_encoder; without it, the denoisers.")
    ] = None,
    files: IMPORT = None,
    as_json: JSON = False,
) -> None:
    """List the attention sites of a model: what layers and heads a selection can name.

    The model is built from its config alone: no weights are loaded, and no code of the repository is run.
    """
    from .method_files import import_methods
    from .skeleton import sites_of

    for path in files or ():
        import_methods(path)
    found = sites_of(model, component)
    if as_json:
        _print_json([{**site.to_dict(), "path": site.path} for site in found])
        return
    rows = [
        (s.layer, s.kind, s.heads, s.kv_heads, s.modality, s.stack, "linear" if s.linear else "", s.path) for s in found
    ]
    _print_table(("layer", "kind", "heads", "kv heads", "modality", "stack", "", "path"), rows)


@app.command()
def doctor(as_json: JSON = False) -> None:
    """Check this machine: versions, devices, which kernels run, and that their statistics are right.

    Every source of the row log-sum-exp must give masses that add up to one over a partition of the keys. Exits with
    1 when one does not.
    """
    from .doctor import examine

    report = examine()
    if as_json:
        _print_json(report.to_dict())
    else:
        _print_report(report)
    if not report.ok:
        raise typer.Exit(FAILED)


@app.command()
def demo(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL...]", help="Models of the zoo; all that are there without it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("outputs/demo"),
) -> None:
    """Show what methods do to small models: answers, pictures, cost, before and after; and write a page of it.

    Needs no download. Exits with 1 when a check fails or the steering did not do what it should.
    """
    from . import zoo
    from .demo_text import show
    from .doctor import examine

    for name in names or ():
        zoo.folder(name)
    report = examine()
    if not report.ok:
        print(_verdict(report))
        raise typer.Exit(FAILED)
    if not show(_verdict(report), out, names):
        raise typer.Exit(FAILED)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="The run folder; by default runs/ and the recipe's name.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the recipe, its data and parameters.")] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A few samples on a random model of the architecture: tests the recipe.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples, in place of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples per batch.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Draws other samples of a task in plain English, other pictures, other answers."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Any field: interventions.0.params.beta=0.2")
    ] = None,
    join: Annotated[
        bool,
        typer.Option("--join", help="Take part in a run with others, who start and stop as they like: for array jobs."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Answer one batch, write nothing, and say what a run takes: time, memory, disk."
        ),
    ] = False,
    files: IMPORT = None,
    allow_imports: ALLOW_IMPORTS = False,
) -> None:
    """Evaluate a method as a recipe says: against its baseline and controls, on the same samples.

    Ends with its verdict. Exits with 1 when the method did nothing, and with 3 when the control at zero strength moved (not
    with --tiny). The same command goes on with a run that was stopped. `accelerate launch -m attnsteer run ...` shares the
    samples among processes that start together; with `--join` each takes the next batch that nobody has.
    """
    from .run.command import import_files, recipe_from_arguments, run_folder
    from .run.ranks import first

    chosen = recipe_from_arguments(recipe, settings or (), batch_size, seed)
    import_files(files or (), chosen, allow_imports)
    target = run_folder(chosen, tiny) if out is None else out
    if check:
        from .run.job import prepare

        job = prepare(chosen, target, tiny, limit)
        print(f"{chosen.name}: {len(job.data.samples)} samples, nothing found wrong")
        return
    if dry_run:
        from .run.estimate import estimate

        print("\n".join(estimate(chosen, tiny=tiny, limit=limit).lines()))
        return
    from .results.summary import table, verdict_of
    from .run import run as evaluate

    if join:
        from .run.joining import join as evaluate

    try:
        evaluate(chosen, target, tiny=tiny, limit=limit)
    except KeyboardInterrupt:
        print(f"attnsteer: stopped; the same command goes on. What is done is in {target}", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    if first():
        head, rows, remarks = table(target)
        _print_table(head, rows)
        print("\n" + "\n".join([*remarks, f"run folder: {target}"]))
        # A tiny run tests the recipe, not the method.
        code = 0 if tiny else EXITS.get(verdict_of(target).key, 0)
        if code:
            raise typer.Exit(code)


def _verdict(report: Any) -> str:
    """One line for each device."""
    lines = []
    for device, name in report.devices.items():
        own = [c for c in report.checks if c.device == device]
        sources = ", ".join(dict.fromkeys(c.source for c in own))
        passed = sum(c.ok for c in own)
        lines.append(f"{device} ({name}): {passed}/{len(own)} kernel checks pass; log-sum-exp from {sources}")
    return "\n".join(lines)


def _print_report(report: Any) -> None:
    from .doctor import OPTIONAL

    _print_table(("package", "version"), report.versions.items())
    print()
    absent = [(name, found or "-", OPTIONAL[name][1]) for name, found in report.optional.items()]
    _print_table(("optional package", "version", "for"), absent)
    print()
    _print_table(
        ("what", "works here", "with, or what to do"),
        [(f.name, "yes" if f.works else "no", f.detail) for f in report.features],
    )
    print()
    rows = [
        (
            c.device,
            c.dtype,
            c.case,
            c.source,
            c.backend or "-",
            f"{c.error:.1e}",
            "pass" if c.ok else "FAIL",
            c.problem,
        )
        for c in report.checks
    ]
    _print_table(("device", "dtype", "attention", "lse from", "sdpa backend", "error", "", ""), rows)
    print()
    print(_verdict(report))


def main() -> None:
    """Entry point of the `attnsteer` command."""
    app()
