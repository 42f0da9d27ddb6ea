"""The part of a report that shows groups of pictures: each prompt's, before and after, side by side."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

LARGEST = 256  # pixels of the longer side; larger pictures are reduced
SMALL = 128  # pixels up to which a picture is enlarged without smoothing

STYLE = """
.groups { display: grid; align-items: start; gap: 24px 16px; grid-template-columns: 1fr 1fr; }
.groups h3 { grid-column: 1 / -1; margin: 16px 0 -12px; color: var(--text); }
.group { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px; min-width: 0; }
.group figcaption { font-size: 14px; color: var(--soft); margin-bottom: 8px; }
.group .tiles { display: grid; gap: 6px; grid-template-columns: repeat(4, minmax(0, 1fr)); }
.group img, .group .none { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px; }
.group img.small { image-rendering: pixelated; }
.group .none { border: 1px dashed var(--rule); color: var(--soft); font-size: 12px; padding: 6px; }
.group details { margin-top: 8px; font-size: 14px; }
.group ol { margin: 8px 0 0; padding-left: 24px; }
.group li { margin-bottom: 6px; }
@media (max-width: 640px) { .groups { grid-template-columns: 1fr; } }
"""


def groups_section(folder: Path) -> str:
    """HTML of the first and the last step in a run's `groups`, prompt by prompt; empty where there are none."""
    steps = sorted(folder.glob("step-*/groups.json")) if folder.is_dir() else []
    tables = [(path.parent, json.loads(path.read_text())) for path in ([steps[0], steps[-1]] if steps else [])]
    if not tables or not tables[0][1]:
        return ""
    if len(steps) == 1:
        tables = tables[:1]
    parts = []
    for g, row in enumerate(tables[0][1]):
        parts.append(f"<h3>{html.escape(row['prompt'])}</h3>")
        parts += [_group(directory, table[g]) for directory, table in tables if g < len(table)]
    return (
        "<h2>Expansions</h2><p>Each prompt's pictures at the first and the last step, from the same noise, and the"
        f' expansions they were drawn from.</p><div class="groups">{"".join(parts)}</div>'
    )


def _group(directory: Path, row: dict[str, Any]) -> str:
    step = int(directory.name.removeprefix("step-"))
    tiles = "".join(_tile(directory, entry) for entry in row["expansions"])
    texts = "".join(f"<li>{html.escape(e['text']) or '(empty)'}{_faults(e)}</li>" for e in row["expansions"])
    return (
        f'<figure class="group"><figcaption>step {step}</figcaption><div class="tiles">{tiles}</div>'
        f"<details><summary>{len(row['expansions'])} expansions</summary><ol>{texts}</ol></details></figure>"
    )


def _tile(directory: Path, entry: dict[str, Any]) -> str:
    title = html.escape(entry["text"], quote=True)
    if entry["file"] is None or not (directory / entry["file"]).is_file():
        return f'<div class="none" title="{title}">not drawn{_faults(entry)}</div>'
    image = Image.open(directory / entry["file"]).convert("RGB")
    css = ' class="small"' if max(image.size) <= SMALL else ""
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img{css} src="{uri}" alt="{title}" title="{title}">'


def _faults(entry: dict[str, Any]) -> str:
    return f" [{html.escape(', '.join(entry['faults']))}]" if entry["faults"] else ""
