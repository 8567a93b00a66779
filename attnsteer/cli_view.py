"""The commands that open a page: `view`, of what was captured or run, and `play`, of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import ALLOW_IMPORTS, IMPORT
from .errors import SelectionError, SerializationError


def _pair(text: str | None, sign: str, name: str, example: str) -> tuple[int, int] | None:
    if text is None:
        return None
    left, found, right = text.partition(sign)
    if not found or not left.isdecimal() or not right.isdecimal():
        raise SelectionError(f"{name} {text}: give two whole numbers, such as {example}.")
    return int(left), int(right)


def view(
    source: Annotated[Path, typer.Argument(metavar="RUN|CAPTURE", help="A run folder, or the folder of a capture.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="PAGE", help="The page; by default attention.html in the folder."),
    ] = None,
    after: Annotated[Path | None, typer.Option(metavar="CAPTURE", help="A second capture, with a method.")] = None,
    sample: Annotated[
        str | None, typer.Option(help="Of a run the id of a sample, of a capture the number of a batch row.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Of a capture: the model whose tokenizer names its tokens.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Of a capture: the picture.")] = None,
    image_tokens: Annotated[
        str | None, typer.Option(metavar="START:STOP", help="Of a capture: the image among the tokens.")
    ] = None,
    grid: Annotated[str | None, typer.Option(metavar="HxW", help="Of a capture: the image's size in tokens.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Of a denoiser's capture: one step.")] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Of a capture: readings that HeadTable.save wrote.")
    ] = None,
    files: IMPORT = None,
    allow_imports: ALLOW_IMPORTS = False,
) -> None:
    """Write a page that shows every head of a capture, or of one sample of a run before and after, and print where.

    The page is one file that loads nothing: open it in a browser, or send it to someone. Of a run the model is loaded again.
    """
    from .captured import INDEX, Captured
    from .results.viewing import page_of, view_run
    from .run.store import RECIPE

    if (source / INDEX).is_file():
        from .viz import view as write

        if sample is not None and not sample.isdecimal():
            raise SelectionError(f"--sample {sample}: of a capture, give the number of a batch row.")
        print(
            write(
                Captured.load(source),
                page_of(source) if out is None else out,
                after=None if after is None else Captured.load(after),
                sample=None if sample is None else int(sample),
                tokenizer=None if tokenizer is None else _tokenizer(tokenizer),
                image=image,
                image_tokens=_pair(image_tokens, ":", "--image-tokens", "1:65"),
                grid=_pair(grid, "x", "--grid", "8x8"),
                step=step,
                profile=None if profile is None else _json(profile),
                title=source.resolve().name,
            )
        )
        return
    if not (source / RECIPE).is_file():
        raise SelectionError(
            f"{source} has neither {INDEX} nor {RECIPE}: give a folder that Captured.save, capture(to=...) or a run wrote."
        )
    given = {"--after": after, "--tokenizer": tokenizer, "--image": image, "--image-tokens": image_tokens, "--grid": grid,
             "--step": step, "--profile": profile}  # fmt: skip
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise SelectionError(f"{', '.join(wrong)}: of a capture; {source} is a run folder, which knows that itself.")
    from .recipe.loading import load_recipe
    from .run.command import import_files

    import_files(files or (), load_recipe(source / RECIPE) if allow_imports else None, allow_imports)
    print(view_run(source, out, sample))


def play(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An embedded model, a folder, or a hub id.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 0,
    device: Annotated[str, typer.Option(help="Where the model runs, e.g. cpu or cuda:0.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
) -> None:
    """Steer a model by hand: a page with sliders, marked tokens and heads, and what the model answers before and after.

    It listens on this machine alone, and its address has a token without which nothing is answered. Ctrl-C ends it.
    """
    from .play import PlayServer, player

    server = PlayServer(player(model, dtype, device), port)
    print(f"open {server.address}\nCtrl-C ends it.", flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        pass


def _tokenizer(model: str) -> Any:
    from . import zoo

    if model in zoo.KNOWN:
        folder: Any = zoo.folder(model)
        # A pipeline's is in a folder of its own.
        folder = folder / "tokenizer" if (folder / "model_index.json").is_file() else folder
    else:
        folder = model
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SelectionError(
            f"--tokenizer {model}: no tokenizer can be had of it ({' '.join(str(error).split())[:200]})."
        ) from error


def _json(path: Path) -> Any:
    import json

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SerializationError(f"--profile {path} cannot be read ({error}).") from error
