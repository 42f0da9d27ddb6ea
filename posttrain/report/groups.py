"""Groups of images of an expander's run: each prompt's, at the first and the last step, with their expansions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.report.before_after import step_name
from posttrain.report.render import image

LARGEST = 256  # pixels of the longer side; larger images are reduced


def groups(folder: Path) -> dict[str, Any] | None:
    """The groups of the first and the last step in a run's `groups`, prompt by prompt; None if there are none."""
    files = sorted(folder.glob("step-*/groups.json")) if folder.is_dir() else []
    if not files:
        return None
    tables: dict[Path, list[dict[str, Any]]] = {}  # by the directory of the step; a run of one step has one
    for file in (files[0], files[-1]):
        tables[file.parent] = json.loads(file.read_text())
    cards = []
    for g, row in enumerate(tables[files[0].parent]):
        sides = []
        for directory, table in tables.items():
            # The last step may have fewer groups.
            if g < len(table):
                expansions = [_expansion(directory, entry) for entry in table[g]["expansions"]]
                sides.append({"step": step_name(directory), "expansions": expansions})
        cards.append({"prompt": row["prompt"], "sides": sides})
    return {"steps": list(map(step_name, tables)), "cards": cards} if cards else None


def _expansion(directory: Path, entry: dict[str, Any]) -> dict[str, Any]:
    file = directory / entry["file"] if entry["file"] is not None else None
    found = image(file, LARGEST) if file is not None and file.is_file() else None
    return {"text": entry["text"], "faults": ", ".join(entry["faults"]), "image": found}
