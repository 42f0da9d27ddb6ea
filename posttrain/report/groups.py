"""The part of a report that shows groups of pictures: each prompt's, before and after, side by side."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from posttrain.report.before_after import both, step_name, wiped
from posttrain.report.html import picture

LARGEST = 256  # pixels of the longer side; larger pictures are reduced


def groups_section(folder: Path) -> str:
    """HTML of the first and the last step in a run's `groups`, prompt by prompt; empty where there are none."""
    steps = sorted(folder.glob("step-*/groups.json")) if folder.is_dir() else []
    tables = [(path.parent, json.loads(path.read_text())) for path in ([steps[0], steps[-1]] if steps else [])]
    if not tables or not tables[0][1]:
        return ""
    if len(steps) == 1:
        tables = tables[:1]
    names = [step_name(directory) for directory, _ in tables]
    cards = []
    for g, row in enumerate(tables[0][1]):
        groups = [(directory, table[g]) for directory, table in tables if g < len(table)]
        tiles = [f'<div class="tiles">{"".join(_tile(d, e) for e in group["expansions"])}</div>' for d, group in groups]
        shown = both(tiles[0], tiles[1], names[0], names[1]) if len(tiles) == 2 else tiles[0]
        texts = "".join(_texts(name, group) for name, (_, group) in zip(names, groups))
        title = f"<figcaption>{html.escape(row['prompt'])}</figcaption>"
        cards.append(f'<figure class="card group">{shown}{title}{texts}</figure>')
    grid = f'<div class="groups">{"".join(cards)}</div>'
    return (
        "<h2>Expansions</h2><p>Each prompt's pictures at the first and the last step, from the same noise, and the"
        f" expansions they were drawn from.</p>{wiped(names[0], names[1], grid) if len(names) == 2 else grid}"
    )


def _texts(step: str, row: dict[str, Any]) -> str:
    texts = "".join(f"<li>{html.escape(e['text']) or '(empty)'}{_faults(e)}</li>" for e in row["expansions"])
    summary = f"<summary>{step}: {len(row['expansions'])} expansions</summary>"
    return f'<details class="texts">{summary}<ol>{texts}</ol></details>'


def _tile(directory: Path, entry: dict[str, Any]) -> str:
    title = html.escape(entry["text"], quote=True)
    if entry["file"] is None or not (directory / entry["file"]).is_file():
        return f'<div class="none" title="{title}">not drawn{_faults(entry)}</div>'
    return f'<div title="{title}">{picture(directory / entry["file"], entry["text"], LARGEST)}</div>'


def _faults(entry: dict[str, Any]) -> str:
    return f" [{html.escape(', '.join(entry['faults']))}]" if entry["faults"] else ""
