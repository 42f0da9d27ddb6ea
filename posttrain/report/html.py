"""The parts that all reports are made of: the whole page, tables, figures and text that prompts cannot break out of."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from posttrain.report.charts import number

FILES = Path(__file__).parent
LARGEST = 512  # pixels of the longer side; larger pictures are reduced for a report
FIRST = ("reward", "loss", "ratio", "kl", "clip", "grad_norm", "diversity")  # order of curves
MOST_OPEN = 16  # charts of a section; one with more is folded
SMALL = 128  # pixels up to which a picture is enlarged without smoothing


def page(title: str, body: list[str]) -> str:
    """A whole document of these parts, which may load nothing and run only our script; empty parts are left out."""
    style, script = ((FILES / name).read_text() for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{text(title)}</title><style>{style}</style></head><body><main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main><script>{script}</script></body></html>\n"
    )


def section(title: str, charts: Sequence[str], most: int = MOST_OPEN) -> str:
    """Charts under a heading; folded if there are more than `most`."""
    grid, heading = f'<div class="charts">{"".join(charts)}</div>', f"<h3>{text(title)}</h3>"
    if len(charts) <= most:
        return heading + grid
    return f"<details><summary>{heading} ({len(charts)} charts)</summary>{grid}</details>"


def by_section(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Metrics by what stands before their last slash, those of training first."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition("/")[0], []).append(name)
    ordered = sorted(found.items(), key=lambda item: item[0] != "")
    return [(title or "training", sorted(held, key=_rank)) for title, held in ordered]


def _rank(name: str) -> int:
    return next((i for i, start in enumerate(FIRST) if name.startswith(start)), len(FIRST))


def text(value: object) -> str:
    return html.escape(str(value))


def breakable(value: object) -> str:
    """Text that may go on in a new line within a path or a long name."""
    return text(value).replace("/", "/<wbr>").replace("_", "_<wbr>")


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], numeric: Sequence[bool]) -> str:
    """`numeric` says which columns stand to the right. A wide table scrolls in itself."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        css = [' class="n"' if right else "" for right in numeric]
        return "<tr>" + "".join(f"<{tag}{c}>{breakable(shown(cell))}</{tag}>" for c, cell in zip(css, cells)) + "</tr>"

    return f'<div class="scroll"><table>{line("th", head)}{"".join(line("td", row) for row in rows)}</table></div>'


def figure(value: Any, sign: str = "") -> str:
    """A figure of a before/after table: four decimals, so that columns line up, unless it is large."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return shown(value)
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.0f}"


def shown(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, list):
        return ", ".join(shown(item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def shares(parts: Mapping[str, float], unit: str) -> str:
    """How a whole splits into parts: a bar, and under it what each comes to."""
    whole = sum(parts.values())
    if whole <= 0:
        return ""
    bars, entries, x = [], [], 0.0
    for i, (name, value) in enumerate(parts.items()):
        css, width = colour(i), 1000 * value / whole
        bars.append(f'<rect class="fill {css}" x="{x:.1f}" y="0" width="{width:.1f}" height="20"/>')
        entries.append(f'<li class="{css}">{text(name)} <span>{number(value)} {unit}, {value / whole:.0%}</span></li>')
        x += width
    about = text(", ".join(f"{name} {value / whole:.0%}" for name, value in parts.items()))
    return (
        f'<svg class="shares" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" aria-label="{about}">'
        f'<title>{about}</title>{"".join(bars)}</svg><ul class="legend">{"".join(entries)}</ul>'
    )


def colour(i: int) -> str:
    """The class of the i-th of several lines or parts; after six they come again, dashed."""
    return f"c{i % 6}" + (" again" if i >= 6 else "")


def legend(names: Sequence[str]) -> str:
    return (
        '<ul class="legend">'
        + "".join(f'<li class="{colour(i)}">{text(n)}</li>' for i, n in enumerate(names))
        + "</ul>"
    )


def picture(path: Path, alt: str, largest: int = LARGEST) -> str:
    """An <img> that holds the picture."""
    uri, small = data_uri(path, largest)
    css = ' class="small"' if small else ""
    return f'<img{css} src="{uri}" alt="{text(alt)}">'


def data_uri(path: Path, largest: int = LARGEST) -> tuple[str, bool]:
    """The image as a data URI, and whether it is so small that it should be enlarged without smoothing."""
    image = Image.open(path).convert("RGB")
    small = max(image.size) <= SMALL
    image.thumbnail((largest, largest))
    kind = "png" if max(image.size) <= 256 else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small
