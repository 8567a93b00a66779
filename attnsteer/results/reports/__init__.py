"""The report of a run: one HTML page that loads nothing from anywhere, and the same in short as Markdown."""

from __future__ import annotations

from pathlib import Path

from ...run import store
from ...run.folder import read_run

HERE = Path(__file__).parent
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
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from ..._version import __version__
    from ...viz.page import script_hash, script_json
    from .headline import p_text

    script = (HERE / "page.js").read_text(encoding="utf-8").strip()
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        **found,
        version=__version__,
        p_text=p_text,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8").strip()),
        script=Markup(script),
        # The page's policy lets this script run and no other, so that no text of a run can become one.
        script_hash=script_hash(script),
        data_json=Markup(script_json(found["data"])),
    )
