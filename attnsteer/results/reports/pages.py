"""Pages of one file that load nothing: a template, a style sheet, and at most one script, whose hash the page's policy has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def render(name: str, *, data: Any = None, **values: Any) -> str:
    """The HTML of a page.

    Args:
        name: of the template, `NAME.html.j2`, whose script is `NAME.js` where there is one. data: JSON for the script.
        values: for the template.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from ..._version import __version__
    from ...viz.page import script_hash, script_json
    from ..figures import p_text
    from ..verdict import SIGNS, WORDS

    path = HERE / f"{name}.js"
    script = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(f"{name}.html.j2").render(
        **values,
        data=data,
        version=__version__,
        p_text=p_text,
        words=WORDS,
        signs=SIGNS,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8").strip()),
        script=Markup(script),
        # The page's policy lets this script run and no other, so that no text of a run can become one.
        script_hash=script_hash(script),
        data_json=Markup(script_json(data)),
    )
