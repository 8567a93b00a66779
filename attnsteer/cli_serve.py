"""The command that serves a steered model."""

from __future__ import annotations

from typing import Annotated

import typer

from .cli_options import IMPORT
from .errors import SelectionError


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An embedded model, a folder, or a hub id.")],
    steerings: Annotated[
        list[str] | None,
        typer.Option(
            "--steer",
            metavar="NAME=DIR",
            help="A steering that requests may choose: a name, and a folder (or hub id) of save_pretrained. The same name again "
            "adds a method to it.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of all requests; 0 takes the likeliest token.")] = 0.0,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch.")] = None,
    num_blocks: Annotated[int | None, typer.Option(help="Blocks of the cache.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs, e.g. cpu or cuda:0.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the weights; auto is that of the checkpoint.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa or eager.")] = None,
    files: IMPORT = None,
) -> None:
    """Serve a language model with an OpenAI-compatible API; each request chooses a steering by name, or none.

    A request says `"steering": "NAME"`, or `"steering": {"name": "NAME", "beta": 0.2}` with values of its own. Many requests with
    different steerings share one batch.
    """
    from .intervention import Intervention
    from .method_files import import_methods

    for path in files or ():
        import_methods(path)
    named: dict[str, list[Intervention]] = {}
    for given in steerings or ():
        name, equals, folder = given.partition("=")
        if not (name and equals and folder):
            raise SelectionError(f"--steer {given}: give NAME=DIR, e.g. --steer calm=steerings/calm.")
        named.setdefault(name, []).append(Intervention.from_pretrained(folder))
    if not named:
        raise SelectionError("give at least one steering, e.g. --steer calm=steerings/calm.")
    from .serving import Server

    batching = {"max_batch_tokens": max_batch_tokens, "num_blocks": num_blocks}
    server = Server(
        model,
        named,
        temperature=temperature,
        batching={k: v for k, v in batching.items() if v is not None},
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    server.serve(host, port)
