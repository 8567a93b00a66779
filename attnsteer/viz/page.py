"""One self-contained HTML page: its own style and script, data that no text of can become either, and no foreign address."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

HERE = Path(__file__).parent / "pages"
# Pixels of a picture's longer side in a page.
SIDE = 512


def script_json(value: Any) -> str:
    """JSON that may stand inside a <script> element: no character of it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def script_hash(script: str) -> str:
    """What a page's policy lets run: this script and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def asset(*names: str) -> str:
    """Files of the pages' folder, one behind the other."""
    return "\n".join((HERE / name).read_text(encoding="utf-8").strip() for name in names)


def page(
    name: str,
    data: Any,
    *,
    title: str,
    first: Mapping[str, bytes] | None = None,
    later: Mapping[str, bytes] | None = None,
    connect: str = "'none'",
) -> str:
    """The HTML of `pages/NAME.html.j2` with its style and script.

    Args:
        data: JSON for the script, in the element "data". first: bytes that the script reads at once, by the element's id.
        later: bytes that come behind the script, so that it paints before they are read. connect: what it may talk to.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from .._version import __version__

    script = asset("draw.js", f"{name}.js")
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template(f"{name}.html.j2").render(
        title=title,
        version=__version__,
        css=Markup(asset("base.css", f"{name}.css")),
        script=Markup(script),
        # The page's policy lets this script run and no other, so that no text of a capture can become one.
        script_hash=script_hash(script),
        connect=Markup(connect),
        data_json=Markup(script_json(data)),
        first=_encoded(first),
        later=_encoded(later),
    )
    # What a model wrote may have halves of characters.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _encoded(blobs: Mapping[str, bytes] | None) -> Sequence[tuple[str, str]]:
    return [(name, base64.b64encode(found).decode("ascii")) for name, found in (blobs or {}).items()]


def picture_uri(image: Image.Image) -> str:
    """A picture as a data URI, not larger than a page needs."""
    from PIL import Image

    if max(image.size) > SIDE:
        image = image.copy()
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    forms = {}
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 88})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        forms[kind] = buffer.getvalue()
    # A drawing stays as it is; a photograph is several times smaller.
    kind = "PNG" if len(forms["PNG"]) < 2 * len(forms["JPEG"]) or max(image.size) <= 128 else "JPEG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(forms[kind]).decode('ascii')}"
