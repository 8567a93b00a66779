"""The report of a run: one HTML page that loads nothing from anywhere, and the same in short as Markdown."""

from __future__ import annotations

from pathlib import Path

from ...run import store
from ...run.folder import read_run

HTML, MARKDOWN = "report.html", "report.md"


def report(folder: str | Path) -> Path:
    """Write report.html and report.md into a run folder; returns the path of the page.

    Raises:
        RunError: the folder is damaged or cannot be written, or its run has no figures yet.
    """
    from .content import content
    from .markdown import markdown

    run = read_run(folder)
    found = content(run)
    for name, text in ((MARKDOWN, markdown(run, found)), (HTML, page(found))):
        # What a model wrote may have halves of characters; they are written as escapes, which JSON reads back.
        store.write_atomic(run.path / name, text.encode("utf-8", "backslashreplace"))
    return run.path / HTML


def page(found: dict) -> str:
    """The HTML of `content`."""
    from .pages import render

    return render("page", **found)
