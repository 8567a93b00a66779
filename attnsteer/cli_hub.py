"""The commands that share: push a run, a method or heads to the hub, and pull a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ENDPOINT = Annotated[str | None, typer.Option(metavar="URL", help="Of another hub than the usual one.")]


def push(
    what: Annotated[
        Path, typer.Argument(metavar="WHAT", help="A run folder, a folder of save_pretrained, or a file of heads.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name; made where there is none.")],
    model: Annotated[str | None, typer.Option(help="The hub id of the model that a method or heads are for.")] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="The run that measured a method or heads: its verdict goes into the card."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    endpoint: ENDPOINT = None,
) -> None:
    """Share a run, a method or heads on the hub, with a card and the hashes of all files.

    Log in first: `hf auth login`.
    """
    from .errors import SerializationError
    from .heads import HeadSet
    from .intervention import RECORD, Intervention
    from .results.hub_runs import evidence, push_run
    from .run.store import RECIPE

    own = private or None
    if (what / RECIPE).is_file():
        print(push_run(what, repo, private=own, endpoint=endpoint))
        return
    if not (what / RECORD).is_file() and not what.is_file():
        raise SerializationError(f"{what} is no run folder, no folder of save_pretrained, and no file of heads.")
    found = HeadSet.load(what) if what.is_file() else Intervention.from_pretrained(what)
    said = "" if run is None else evidence(run, found)
    print(found.push_to_hub(repo, model=model, evidence=said, private=own, endpoint=endpoint))


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name of a run.")],
    to: Annotated[Path, typer.Argument(metavar="TO", help="A folder that is new or empty.")],
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch.")] = None,
    endpoint: ENDPOINT = None,
) -> None:
    """Get a shared run. `attnsteer verify` then says whether it is what it says, and `attnsteer board` shows it."""
    from .results.hub_runs import pull_run

    print(pull_run(repo, to, revision=revision, endpoint=endpoint))
