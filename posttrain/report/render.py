"""Pages from templates/*.html: Jinja2 with autoescape, so text from prompts, recipes or metrics stays text.

A page is one file that opens without a network: its style, script and images are inside it, and its
Content-Security-Policy lets it load nothing and run no other script.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from PIL import Image

from posttrain.errors import counted
from posttrain.report.format import aligned, cell, change, number, shown
from posttrain.runs.files import replacing

FOLDER = Path(__file__).parent
LARGEST = 512  # pixels of the longer side; larger images are reduced
ENLARGED = 128  # pixels up to which an image is enlarged without smoothing
PNG_UP_TO = 256  # pixels; larger images are JPEG, which would show its blocks in small ones


def breakable(value: Any) -> Markup:
    """Text that may continue on a new line within a path or a long name."""
    return Markup(str(escape(value)).replace("/", "/<wbr>").replace("_", "_<wbr>"))


def colour(i: int) -> str:
    """The CSS class of the i-th of several lines or parts; after six they repeat, dashed."""
    return f"c{i % 6}" + (" again" if i >= 6 else "")


def image(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """The image as a data URI, and whether it is so small that it is shown as pixels."""
    loaded = Image.open(path).convert("RGB")
    small = max(loaded.size) <= ENLARGED
    loaded.thumbnail((largest, largest))
    kind = "png" if max(loaded.size) <= PNG_UP_TO else "jpeg"
    buffer = io.BytesIO()
    loaded.save(buffer, kind, quality=90)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {"uri": f"data:image/{kind};base64,{encoded}", "small": small}


ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=select_autoescape(["html", "svg"]),  # model cards are Markdown, in which &lt; would stay as it is
    undefined=StrictUndefined,  # a misspelt name is an error, not an empty page
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"aligned": aligned, "breakable": breakable, "cell": cell, "number": number, "shown": shown}
ENVIRONMENT.globals |= {"change": change, "colour": colour, "counted": counted}


def page(template: str, title: str, **data: Any) -> str:
    """A whole document from one of the templates that extend page.html."""
    style, script = (FOLDER / "report.css").read_text(), (FOLDER / "report.js").read_text()
    # The browser compares this hash with the script's text, so no other script runs.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    document = ENVIRONMENT.get_template(template)
    return document.render(title=title, style=Markup(style), script=Markup(script), script_hash=digest, **data)


def write_page(path: Path, template: str, title: str, **data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A recipe's text may contain an unpaired surrogate, which UTF-8 cannot encode.
    text = page(template, title, **data).encode("utf-8", errors="backslashreplace")
    with replacing(path, shared=True) as temporary:  # a run may write it while someone asks for it
        temporary.write_bytes(text)
    return path


def macro(template: str, name: str) -> Callable[..., Markup]:
    """One part of a page by itself."""
    return getattr(ENVIRONMENT.get_template(template).module, name)
